//! Keeps the store equal to what the API server has.
//!
//! One task owns the connection. Each selection (all namespaces or one, and one secret type, since the field selector
//! takes one) is listed in pages and watched with bookmarks by kube's watcher, which resumes after a clean close and
//! lists anew after a 410. A 401, a TLS failure or a changed file ends the connection and the next one is built from the
//! files as they are then. Nothing here ends before the process does, and nothing waits for it: without an API server
//! this keychain is empty, and it becomes full whenever the server appears.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use rand::Rng;
use tokio_util::sync::CancellationToken;

use crate::connect::Connection;
use crate::keychain::Synced;
use crate::kubeconfig::locate;
use crate::object::PullSecret;
use crate::secret::SecretType;
use crate::settings::{Settings, Timing};
use crate::store::SecretId;

/// Secrets of one type, in one namespace or in all.
#[derive(Debug, Clone, Copy)]
struct Selection<'a> {
    namespace: Option<&'a str>,
    kind: SecretType,
}

/// Why a connection is given up.
enum Ended {
    /// Something it was made from changed or expired.
    Outdated,
    /// The server does not accept it: 401, TLS.
    Refused,
}

/// Syncs until `stop` is cancelled.
pub(crate) async fn run(synced: Arc<Synced>, settings: Settings, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = sync_for_ever(&synced, &settings) => {}
    }
}

async fn sync_for_ever(synced: &Synced, settings: &Settings) {
    let timing = &settings.timing;
    let mut back_off = BackOff::new(timing);
    let mut waited_for_file = false;
    loop {
        let Some(location) = locate(settings) else {
            if !waited_for_file {
                waited_for_file = true;
                tracing::info!("no kubeconfig yet; pull secrets are used as soon as one appears");
            }
            synced.initial_attempt_failed();
            let wait = timing.appear.mul_f64(rand::rng().random_range(1.0..5.0));
            tokio::time::sleep(wait).await;
            continue;
        };
        match Connection::open(&location, timing.exec).await {
            Err(error) => {
                synced.failed(&location_name(&location), &error);
                tokio::time::sleep(back_off.next()).await;
            }
            Ok(connection) => {
                let since = Instant::now();
                let ended = tokio::select! {
                    () = connection.outdated(timing.recheck) => Ended::Outdated,
                    ended = watch_all(&connection, synced, settings) => ended,
                };
                match ended {
                    Ended::Outdated => {
                        tracing::info!(server = connection.server, "connecting to the API server anew")
                    }
                    Ended::Refused => {
                        if since.elapsed() > Duration::from_secs(120) {
                            back_off.reset();
                        }
                        tokio::time::sleep(back_off.next()).await;
                    }
                }
            }
        }
    }
}

fn location_name(location: &crate::kubeconfig::Location) -> String {
    match location {
        crate::kubeconfig::Location::Files(paths) => {
            paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(":")
        }
        crate::kubeconfig::Location::InCluster => "service account".to_owned(),
    }
}

async fn watch_all(connection: &Connection, synced: &Synced, settings: &Settings) -> Ended {
    let namespaces: Vec<Option<&str>> = match settings.namespaces.as_slice() {
        [] => vec![None],
        some => some.iter().map(|namespace| Some(namespace.as_str())).collect(),
    };
    let kinds: &[SecretType] = if settings.legacy_dockercfg {
        &[SecretType::DockerConfigJson, SecretType::DockerCfg]
    } else {
        &[SecretType::DockerConfigJson]
    };
    let selections =
        namespaces.iter().flat_map(|namespace| kinds.iter().map(move |kind| (*namespace, *kind)));
    synced.begin(namespaces.len() * kinds.len());
    let mut watches: FuturesUnordered<_> = selections
        .map(|(namespace, kind)| {
            watch(&connection.client, Selection { namespace, kind }, synced, settings, &connection.server)
        })
        .collect();
    watches.next().await.unwrap_or(Ended::Outdated)
}

async fn watch(
    client: &Client,
    selection: Selection<'_>,
    synced: &Synced,
    settings: &Settings,
    server: &str,
) -> Ended {
    let api: Api<PullSecret> = match selection.namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let seconds = rand::rng().random_range(300..600);
    let config = watcher::Config::default()
        .fields(&format!("type={}", selection.kind.name()))
        .page_size(500)
        .timeout(seconds);
    let mut events = Box::pin(watcher(api.clone(), config.clone()));
    let mut back_off = BackOff::new(&settings.timing);
    let mut seen: HashSet<SecretId> = HashSet::new();
    let mut healthy_since = Instant::now();
    loop {
        let Some(event) = events.next().await else { return Ended::Outdated };
        match event {
            Ok(event) => {
                if healthy_since.elapsed() > Duration::from_secs(120) {
                    back_off.reset();
                }
                match event {
                    Event::Init => seen.clear(),
                    Event::InitApply(object) => {
                        if let Some(id) = synced.apply(object, selection.kind) {
                            seen.insert(id);
                        }
                    }
                    Event::InitDone => {
                        synced.listed(selection.namespace, selection.kind, &std::mem::take(&mut seen));
                    }
                    Event::Apply(object) => {
                        synced.apply(object, selection.kind);
                        synced.heard();
                    }
                    Event::Delete(object) => {
                        synced.delete(&object);
                        synced.heard();
                    }
                }
            }
            Err(error) => {
                healthy_since = Instant::now();
                match classify(&error) {
                    Trouble::Refused => {
                        synced.failed(server, &error);
                        return Ended::Refused;
                    }
                    Trouble::Denied => {
                        synced.denied(server, selection.kind, selection.namespace);
                        tokio::time::sleep(back_off.next_up_to(settings.timing.denied)).await;
                    }
                    // kube lists anew when a running watch says 410, but not when opening one does.
                    Trouble::Expired => {
                        tokio::time::sleep(back_off.next()).await;
                        events = Box::pin(watcher(api.clone(), config.clone()));
                    }
                    Trouble::Unavailable => {
                        synced.failed(server, &error);
                        tokio::time::sleep(back_off.next()).await;
                    }
                }
            }
        }
    }
}

enum Trouble {
    Refused,
    Denied,
    Expired,
    Unavailable,
}

fn classify(error: &watcher::Error) -> Trouble {
    use watcher::Error as E;
    let inner = match error {
        E::InitialListFailed(inner) | E::WatchStartFailed(inner) | E::WatchFailed(inner) => inner,
        E::WatchError(status) => return by_code(status.code),
        E::NoResourceVersion => return Trouble::Unavailable,
    };
    match inner {
        kube::Error::Api(status) => by_code(status.code),
        other if is_tls(other) => Trouble::Refused,
        _ => Trouble::Unavailable,
    }
}

fn by_code(code: u16) -> Trouble {
    match code {
        401 => Trouble::Refused,
        403 => Trouble::Denied,
        410 => Trouble::Expired,
        _ => Trouble::Unavailable,
    }
}

fn is_tls(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<rustls::Error>() {
            return true;
        }
        // An I/O error holds the TLS error inside instead of naming it as its source.
        if let Some(inner) = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref)
            && inner.is::<rustls::Error>()
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Waits that double, with full jitter.
struct BackOff {
    first: Duration,
    limit: Duration,
    step: u32,
}

impl BackOff {
    fn new(timing: &Timing) -> Self {
        Self { first: timing.back_off.0, limit: timing.back_off.1, step: 0 }
    }

    fn reset(&mut self) {
        self.step = 0;
    }

    fn next(&mut self) -> Duration {
        self.next_up_to(self.limit)
    }

    fn next_up_to(&mut self, limit: Duration) -> Duration {
        let base = self.first.saturating_mul(1 << self.step.min(20)).min(limit);
        self.step = self.step.saturating_add(1);
        base.mul_f64(rand::rng().random_range(0.5..1.0))
    }
}
