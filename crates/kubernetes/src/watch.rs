//! Keeps the store equal to what the API server has.
//!
//! One task owns the connection and follows each selection over it (all namespaces or one, and one secret type, since the
//! field selector takes one). A 401 or a TLS failure ends the connection, and the next one is built from the files as they
//! are then. A file that changed, or a credential about to end, ends it when the next one is there: until it is, the one
//! that works stays in use. The next one goes on where the last one was, unless it is to another server. Nothing here ends before the process does, and nothing waits for it: without an API server
//! this keychain is empty, and it becomes full whenever the server appears.

use std::collections::HashSet;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::Rng;
use tokio_util::sync::CancellationToken;

use crate::back_off::BackOff;
use crate::connect::Connection;
use crate::kubeconfig::{Location, locate, places};
use crate::secret::SecretType;
use crate::selection::{Follower, Known, Selection};
use crate::settings::Settings;
use crate::synced::{Synced, told};

/// Syncs until `stop` is cancelled.
pub(crate) async fn run(synced: Arc<Synced>, settings: Settings, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = sync_for_ever(&synced, &settings) => {}
    }
}

async fn sync_for_ever(synced: &Synced, settings: &Settings) {
    let mut opener = Opener { settings, back_off: BackOff::new(&settings.timing), noticed: HashSet::new() };
    let selections = selections(settings);
    let mut known: Vec<Known> = selections.iter().map(|_| Known::default()).collect();
    let mut connection = opener.open(|what| synced.unconnected(what)).await;
    loop {
        synced.begin(&selections);
        let next = tokio::select! {
            next = opener.replace(&connection) => Some(next),
            () = refused(&connection, &selections, &mut known, synced, settings) => None,
        };
        let next = match next {
            Some(next) => {
                tracing::info!(server = next.server, "connecting to the API server anew");
                next
            }
            None => {
                opener.back_off.lasted(connection.opened.elapsed());
                tokio::time::sleep(opener.back_off.next()).await;
                opener.open(|what| synced.unconnected(what)).await
            }
        };
        if next.identity != connection.identity {
            // Versions are of one server only.
            known.fill_with(Known::default);
        }
        connection = next;
    }
}

/// Makes connections, and remembers what was told on the way.
struct Opener<'a> {
    settings: &'a Settings,
    back_off: BackOff,
    noticed: HashSet<String>,
}

impl Opener<'_> {
    /// Tries until there is a connection; `tell` gets what is wrong each time.
    async fn open(&mut self, mut tell: impl FnMut(String)) -> Connection {
        let Settings { timing, .. } = self.settings;
        loop {
            let Some(location) = locate(self.settings) else {
                tell(format!(
                    "no kubeconfig at {}; write one there, or set kubeconfig_path: it is used as soon as it is there",
                    places(self.settings)
                ));
                let wait = timing.appear.mul_f64(rand::rng().random_range(1.0..5.0));
                tokio::time::sleep(wait).await;
                continue;
            };
            let name = name(&location);
            match Connection::open(location, self.settings).await {
                Ok(connection) => {
                    for notice in &connection.notices {
                        if self.noticed.insert(notice.clone()) {
                            tracing::warn!("{notice}");
                        }
                    }
                    return connection;
                }
                Err(error) => tell(told(&name, &error, error.advice())),
            }
            tokio::time::sleep(self.back_off.next()).await;
        }
    }

    /// Waits until a connection is outdated and another one is made. What keeps that from being made is told once.
    async fn replace(&mut self, connection: &Connection) -> Connection {
        connection.outdated(self.settings).await;
        self.back_off.lasted(connection.opened.elapsed());
        let mut last = String::new();
        let tell = |what: String| {
            if what != last {
                tracing::warn!(
                    error = %what,
                    "cannot connect to the API server anew; the connection that is there stays in use"
                );
                last = what;
            }
        };
        self.open(tell).await
    }
}

fn name(location: &Location) -> String {
    match location {
        Location::Files(paths) => {
            paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(":")
        }
        Location::InCluster => "service account".to_owned(),
    }
}

fn selections(settings: &Settings) -> Vec<Selection> {
    let namespaces: Vec<Option<Arc<str>>> = match settings.namespaces.as_slice() {
        [] => vec![None],
        some => some.iter().map(|namespace| Some(namespace.as_str().into())).collect(),
    };
    let kinds: &[SecretType] = match settings.legacy_dockercfg {
        true => &[SecretType::DockerConfigJson, SecretType::DockerCfg],
        false => &[SecretType::DockerConfigJson],
    };
    let all = namespaces.iter().flat_map(|namespace| {
        kinds.iter().map(move |kind| Selection { namespace: namespace.clone(), kind: *kind })
    });
    all.collect()
}

/// Follows the selections until the server refuses the connection for one of them.
async fn refused(
    connection: &Connection,
    selections: &[Selection],
    known: &mut [Known],
    synced: &Synced,
    settings: &Settings,
) {
    let follow = |(selection, known)| {
        let follower = Follower {
            client: &connection.client,
            server: &connection.server,
            synced,
            timing: &settings.timing,
            selection: Selection::clone(selection),
        };
        follower.follow(known)
    };
    let mut followed: FuturesUnordered<_> = selections.iter().zip(known).map(follow).collect();
    followed.next().await;
}
