//! One pull of one image: what its index says, and its zTOCs, fetched in one burst.
//!
//! The first Prepare of an image starts the session: the index is discovered, then all artifacts are fetched at once, and
//! each is stored, decoded and handed over as soon as it is there. A layer waits for its own zTOC only, and a bad one costs
//! its layer only. Later Prepares of the image use no network.
//!
//! A session ends when nothing was asked of it for [`IDLE`], or with the image's last snapshot; what is still being fetched
//! for it ends with it. A failure is not remembered, but for the moment that the other layers of the same pull need to hear
//! of it: [`NO_INDEX`] when the image surely has none, [`FAILED`] for the rest.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use parking_lot::Mutex;
use soci_index::prefetch::Prefetch;
use soci_index::{ArtifactKind, DiscoverError, DiscoverRequest, Discovered, SociIndex, discover, resolve};
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{Digest, FetchClass, FetchContext, FetchError, FetchErrorKind, Manifest};
use soci_registry::Repository;
use soci_snapshotter::error::chain;
use soci_snapshotter::jobs::Jobs;
use soci_snapshotter::plan::ResolveErrorKind;
use soci_snapshotter::{LayerRequest, ResolveError};
use soci_store::ContentStore;
use soci_ztoc::{DecodeLimits, Ztoc};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::field::Empty;

use super::claims::{Claims, Hold};
use super::content::has_all;
use super::ztocs::Ztocs;
use crate::config::checked::Discovery;
use crate::metrics::{Metrics, Series, Timing, names};
use crate::traces;

/// How long an image is remembered after its last use.
pub const IDLE: Duration = Duration::from_secs(300);
/// How long it is remembered that an image has no index.
pub const NO_INDEX: Duration = Duration::from_secs(30);
/// How long a failure to find out is remembered.
pub const FAILED: Duration = Duration::from_secs(3);
/// How long fetching the artifacts of an image may take in all.
const BURST: Duration = Duration::from_secs(300);
/// How long the registry is waited for when all of the image is on this machine.
const HERE_PATIENCE: Duration = Duration::from_secs(2);

/// Namespace, manifest and explicit index.
pub type Key = (String, Digest, Option<Digest>);

/// A layer's zTOC, or why it cannot be had; `None` while it is on its way.
type Arrival = Option<Result<Arc<Ready>, FetchError>>;

/// An image whose index is known.
#[derive(Debug)]
pub struct Image {
    /// Its manifest.
    pub manifest: Manifest,
    /// Its index.
    pub index: Arc<SociIndex>,
    /// Where it is pulled from.
    pub repository: Repository,
    /// What is on this machine already.
    pub content: Arc<dyn ContentStore>,
    layers: HashMap<Digest, watch::Receiver<Arrival>>,
    /// Its zTOCs are not deleted while it is here.
    hold: Arc<Hold>,
    /// What was counted about its index and layers so far.
    _series: Vec<Arc<Series>>,
    /// Ends the fetching of its artifacts.
    _fetching: DropGuard,
}

/// A layer whose zTOC is here, stored and decoded.
#[derive(Debug)]
pub struct Ready {
    /// The zTOC.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Whether no file of the layer has extended attributes.
    pub disable_xattrs: bool,
    /// Spans to fetch first, once they are known; it closes when none will come. None where the index has none.
    pub prefetch: Option<watch::Receiver<Option<Prefetch>>>,
    /// Decoded, until somebody takes it.
    pub decoded: Mutex<Option<Ztoc>>,
}

/// How images are resolved.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How an index is found.
    pub discovery: Discovery,
    /// How long that may take.
    pub timeout: Duration,
    /// Whether prefetch artifacts are honoured.
    pub prefetch: bool,
}

/// The images being pulled.
#[derive(Debug)]
pub struct Sessions {
    settings: Settings,
    ztocs: Arc<Ztocs>,
    claims: Arc<Claims>,
    metrics: Metrics,
    known: Mutex<HashMap<Key, Known>>,
    resolving: Jobs<Key, Outcome>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

type Outcome = Result<Arc<Image>, ResolveError>;

#[derive(Debug)]
struct Known {
    outcome: Outcome,
    until: Instant,
}

impl Image {
    /// Returns the layer's zTOC once it is here; `None` when the index has none for it.
    ///
    /// # Errors
    /// Why it cannot be had or used.
    pub async fn ready(&self, layer: &Digest, deadline: Instant) -> Option<Result<Arc<Ready>, FetchError>> {
        let mut artifact = self.layers.get(layer)?.clone();
        let arrived = tokio::time::timeout_at(deadline.into(), artifact.wait_for(Option::is_some)).await;
        Some(match arrived {
            Ok(Ok(arrived)) => arrived.clone().unwrap_or_else(|| Err(gone(layer))),
            Ok(Err(_)) => Err(gone(layer)),
            Err(_) => Err(FetchError::new(
                FetchErrorKind::Unavailable,
                format!("timeout waiting for layer {layer} to resolve"),
            )),
        })
    }

    /// Whether the index has a zTOC for `layer`.
    pub fn has(&self, layer: &Digest) -> bool {
        self.layers.contains_key(layer)
    }
}

fn gone(layer: &Digest) -> FetchError {
    FetchError::new(FetchErrorKind::Unavailable, format!("fetching the zTOC of layer {layer} was given up"))
}

impl Sessions {
    /// Returns no sessions yet.
    pub fn new(
        settings: Settings,
        ztocs: Arc<Ztocs>,
        claims: Arc<Claims>,
        metrics: Metrics,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let resolving = Jobs::new(tracker.clone());
        Self { settings, ztocs, claims, metrics, known: Mutex::default(), resolving, tracker, stop }
    }

    /// Returns the image that `layer` belongs to, resolving it when it is not known.
    ///
    /// # Errors
    /// Why it has no index, or none that can be had.
    pub async fn image(
        self: &Arc<Self>,
        layer: &LayerRequest,
        reach: impl FnOnce() -> (Repository, Arc<dyn ContentStore>),
    ) -> Outcome {
        let key = (layer.namespace.clone(), layer.manifest, layer.explicit_index);
        let recalled = self.recall(&key);
        self.metrics.add(
            &names::OPERATIONS,
            &["", if recalled.is_some() { "resolve_cache_hit" } else { "resolve_cache_miss" }],
            1,
        );
        if let Some(outcome) = recalled {
            return outcome;
        }
        let request = DiscoverRequest {
            image: layer.image.clone(),
            manifest: layer.manifest,
            explicit: layer.explicit_index,
            v1: self.settings.discovery.v1,
            v2: self.settings.discovery.v2,
        };
        let (repository, content) = reach();
        let (this, job_key) = (Arc::clone(self), key.clone());
        let resolve = move || async move {
            // It may have become known between the look and this task.
            if let Some(outcome) = this.recall(&job_key) {
                return outcome;
            }
            let span = tracing::debug_span!(
                target: traces::TARGET,
                "image.resolve",
                image = %request.image,
                outcome = Empty,
                otel.status_code = Empty
            );
            let told = |error: &ResolveError| {
                let surely = matches!(error.kind, ResolveErrorKind::None | ResolveErrorKind::Disabled);
                (error.kind, !surely && error.kind != ResolveErrorKind::OnMachine)
            };
            let outcome = traces::within(span, this.resolve(&request, repository, content), told).await;
            this.remember(job_key, &outcome);
            outcome
        };
        let lost = |_| ResolveError {
            kind: ResolveErrorKind::Local,
            message: "resolving the image ended without a result".to_owned(),
        };
        self.resolving.run(key, resolve).await.map_err(lost)?
    }

    /// Ends the sessions of images with `ztoc`, the last snapshot with which is gone, unless a Prepare is using them. A pull
    /// that is under way nevertheless resolves its image once more.
    pub fn abandon(&self, ztoc: &Digest) {
        self.end(|known| {
            known
                .outcome
                .as_ref()
                .is_ok_and(|image| Arc::strong_count(image) == 1 && image.hold.ztocs().contains(ztoc))
        });
    }

    /// Forgets what was not used for a while.
    pub fn expire(&self) {
        let now = Instant::now();
        self.end(|known| known.until <= now);
    }

    /// Returns how many images are known, or known to have no index.
    pub fn len(&self) -> usize {
        self.known.lock().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn end(&self, ends: impl Fn(&Known) -> bool) {
        let mut known = self.known.lock();
        let keys: Vec<Key> =
            known.iter().filter(|(_, known)| ends(known)).map(|(key, _)| key.clone()).collect();
        let ended: Vec<Known> = keys.iter().filter_map(|key| known.remove(key)).collect();
        drop(known);
        drop(ended);
    }

    fn recall(&self, key: &Key) -> Option<Outcome> {
        let mut known = self.known.lock();
        let found = known.get_mut(key)?;
        let now = Instant::now();
        if found.until <= now {
            known.remove(key);
            return None;
        }
        if found.outcome.is_ok() {
            found.until = now + IDLE;
        }
        Some(found.outcome.clone())
    }

    fn remember(&self, key: Key, outcome: &Outcome) {
        let hold = match outcome {
            Ok(_) => IDLE,
            Err(ResolveError {
                kind: ResolveErrorKind::None | ResolveErrorKind::Disabled | ResolveErrorKind::OnMachine,
                ..
            }) => NO_INDEX,
            Err(_) => FAILED,
        };
        self.known.lock().insert(key, Known { outcome: outcome.clone(), until: Instant::now() + hold });
    }

    /// Finds the image's index. An image that is all on this machine does not wait for a registry that does not answer,
    /// and is never the worse for what the registry says.
    async fn discover(
        &self,
        request: &DiscoverRequest,
        repository: &Repository,
        content: &dyn ContentStore,
    ) -> Result<Discovered, ResolveError> {
        let context = FetchContext::new(Instant::now() + self.settings.timeout, FetchClass::OnDemand);
        let mut discovering = std::pin::pin!(discover(request, repository, Some(content), &context));
        let mut looking = std::pin::pin!(is_here(&request.manifest, content));
        let (found, here) = tokio::select! {
            biased;
            found = &mut discovering => (Some(found), None),
            here = &mut looking => (None, Some(here)),
        };
        let found = match (found, here) {
            (Some(found), _) => Some(found),
            (None, Some(true)) => tokio::time::timeout(HERE_PATIENCE, discovering).await.ok(),
            (None, _) => Some(discovering.await),
        };
        let message = match found {
            Some(Ok(found)) => return Ok(found),
            Some(Err(error)) => {
                let here = match here {
                    Some(here) => here,
                    None => looking.await,
                };
                if !here {
                    return Err(resolve_error(&error));
                }
                chain(&error)
            }
            None => format!("no answer from the registry within {} s", HERE_PATIENCE.as_secs()),
        };
        Err(ResolveError {
            kind: ResolveErrorKind::OnMachine,
            message: format!("all of the image is on this machine, which needs no index: {message}"),
        })
    }

    async fn resolve(
        self: &Arc<Self>,
        request: &DiscoverRequest,
        repository: Repository,
        content: Arc<dyn ContentStore>,
    ) -> Outcome {
        let begun = Instant::now();
        let found = self.discover(request, &repository, &*content).await?;
        tracing::info!(
            image = %request.image,
            digest = %found.index.digest,
            source = ?found.source,
            "fetching SOCI artifacts using index descriptor"
        );
        let index = Arc::new(found.index);
        let of_index = self.metrics.series(&index.digest);
        of_index.observe(Timing::IndexFetch, begun.elapsed());
        let mut series = vec![of_index];
        let mut senders = HashMap::new();
        let mut layers = HashMap::new();
        for layer in &found.image_manifest.layers {
            if index.ztoc(&layer.digest).is_some() {
                let (sender, receiver) = watch::channel(None);
                let of_layer = self.metrics.series(&layer.digest);
                series.push(Arc::clone(&of_layer));
                senders.insert(layer.digest, (sender, of_layer));
                layers.insert(layer.digest, receiver);
            }
        }
        if layers.is_empty() {
            // Its tools make none without a zTOC, so it is another image's. containerd pulls layers side by side.
            return Err(ResolveError {
                kind: ResolveErrorKind::Malformed,
                message: format!("SOCI index {} has a zTOC for none of the image's layers", index.digest),
            });
        }
        // Before anything is stored: from here on nobody deletes one of them.
        let hold = Arc::new(
            self.claims.hold(layers.keys().filter_map(|layer| Some(index.ztoc(layer)?.digest)).collect()),
        );
        let wanted = |layer: &&Digest| self.settings.prefetch && index.prefetch(layer).is_some();
        let (prefetches, coming) = layers
            .keys()
            .filter(wanted)
            .map(|layer| {
                let (sender, receiver) = watch::channel(None);
                ((*layer, sender), (*layer, receiver))
            })
            .unzip();
        let burst = Burst {
            image: request.image.to_string(),
            index: Arc::clone(&index),
            repository: repository.clone(),
            content: Arc::clone(&content),
            ztocs: Arc::clone(&self.ztocs),
            prefetches,
            coming,
            senders,
            hold: Arc::clone(&hold),
        };
        let stop = self.stop.child_token();
        let ends = stop.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                () = burst.run() => {}
                () = ends.cancelled() => {}
            }
        });
        let manifest = found.image_manifest;
        let _fetching = stop.drop_guard();
        Ok(Arc::new(Image { manifest, index, repository, content, layers, hold, _series: series, _fetching }))
    }
}

/// Whether the image needs no registry to be unpacked: all of it is on this machine.
async fn is_here(manifest: &Digest, content: &dyn ContentStore) -> bool {
    match content.read(manifest, MAX_MANIFEST_SIZE).await {
        Ok(Some(bytes)) => match Manifest::decode(&bytes) {
            Ok(manifest) => has_all(content, &manifest).await,
            Err(_) => false,
        },
        _ => false,
    }
}

/// Fetching all artifacts of an image.
struct Burst {
    image: String,
    index: Arc<SociIndex>,
    repository: Repository,
    content: Arc<dyn ContentStore>,
    ztocs: Arc<Ztocs>,
    /// Where prefetch artifacts go that have not come yet, and where they come out.
    prefetches: HashMap<Digest, watch::Sender<Option<Prefetch>>>,
    coming: HashMap<Digest, watch::Receiver<Option<Prefetch>>>,
    senders: HashMap<Digest, (watch::Sender<Arrival>, Arc<Series>)>,
    hold: Arc<Hold>,
}

impl Burst {
    async fn run(mut self) {
        let context = FetchContext::new(Instant::now() + BURST, FetchClass::OnDemand);
        let artifacts = resolve(Arc::clone(&self.index), Arc::new(self.repository), self.content, context);
        let mut artifacts = std::pin::pin!(artifacts);
        let begun = Instant::now();
        while let Some(artifact) = artifacts.next().await {
            let layer = artifact.layer;
            let Some((sender, series)) = self.senders.get(&layer) else { continue };
            if artifact.kind == ArtifactKind::Prefetch {
                let decoded = artifact.bytes.map(|bytes| Prefetch::decode(&bytes));
                // Taken out, so that whoever waits hears of it whatever comes.
                let sender = self.prefetches.remove(&layer);
                match (decoded, sender) {
                    (Ok(Ok(prefetch)), Some(sender)) => drop(sender.send_replace(Some(prefetch))),
                    (Ok(Ok(_)), None) => {}
                    (Ok(Err(error)), _) => {
                        tracing::warn!(%layer, error = %chain(&error), "prefetch artifact is not used")
                    }
                    (Err(error), _) => {
                        tracing::warn!(%layer, error = %chain(&error), "prefetch artifact is not used")
                    }
                }
                continue;
            }
            series.observe(Timing::ZtocFetch, begun.elapsed());
            let (ztocs, hold, series) = (Arc::clone(&self.ztocs), Arc::clone(&self.hold), Arc::clone(series));
            let stored = tokio::task::spawn_blocking(move || {
                let stored = store(&ztocs, artifact, &series);
                drop(hold);
                stored
            });
            let stored = stored.await;
            let stored = stored.unwrap_or_else(|_| Err(gone(&layer)));
            if let Err(error) = &stored {
                tracing::warn!(image = self.image, %layer, error = %chain(error), "a zTOC cannot be used");
            }
            let stored = stored.map(|ready| {
                let prefetch = self.coming.get(&layer).cloned();
                Arc::new(Ready { prefetch, ..ready })
            });
            sender.send_replace(Some(stored));
        }
    }
}

/// Stores and decodes a zTOC. Blocks.
fn store(ztocs: &Ztocs, artifact: soci_index::Resolved, series: &Series) -> Result<Ready, FetchError> {
    let bytes = artifact.bytes?;
    let digest = artifact.descriptor.digest;
    let begun = Instant::now();
    let ztoc = Ztoc::decode(bytes.clone(), &DecodeLimits::default()).map_err(|error| {
        FetchError::because(FetchErrorKind::Integrity, format!("decode zTOC {digest}"), error)
    })?;
    series.observe(Timing::ZtocUnmarshal, begun.elapsed());
    ztocs
        .put(&digest, &bytes)
        .map_err(|error| FetchError::because(FetchErrorKind::Local, format!("store zTOC {digest}"), error))?;
    Ok(Ready {
        digest,
        size: bytes.len() as u64,
        disable_xattrs: SociIndex::disable_xattrs(&artifact.descriptor),
        prefetch: None,
        decoded: Mutex::new(Some(ztoc)),
    })
}

fn resolve_error(error: &DiscoverError) -> ResolveError {
    let kind = match error {
        DiscoverError::Disabled => ResolveErrorKind::Disabled,
        DiscoverError::NoIndex { .. } => ResolveErrorKind::None,
        DiscoverError::BadManifest { .. }
        | DiscoverError::BadAnnotation { .. }
        | DiscoverError::BadIndex { .. } => ResolveErrorKind::Malformed,
        DiscoverError::FetchManifest { source, .. }
        | DiscoverError::Referrers { source, .. }
        | DiscoverError::FetchIndex { source, .. } => match source.kind() {
            FetchErrorKind::NotFound => ResolveErrorKind::Missing,
            FetchErrorKind::Denied => ResolveErrorKind::Denied,
            FetchErrorKind::Unavailable => ResolveErrorKind::Unavailable,
            FetchErrorKind::Protocol | FetchErrorKind::Integrity => ResolveErrorKind::Malformed,
            FetchErrorKind::Local => ResolveErrorKind::Local,
        },
    };
    ResolveError { kind, message: chain(error) }
}
