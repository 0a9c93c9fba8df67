//! One pull of one image: what its index says, and its zTOCs, fetched in one burst.
//!
//! The first Prepare of an image starts the session: the index is discovered, then all artifacts are fetched at once, and
//! each is stored, decoded and handed over as soon as it is there. A layer waits for its own zTOC only, and a bad one costs
//! its layer only. Later Prepares of the image use no network.
//!
//! A session ends when nothing was asked of it for [`IDLE`]. A failure is not remembered, but for the moment that the other
//! layers of the same pull need to hear of it: [`NO_INDEX`] when the image surely has none, [`FAILED`] for the rest.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use parking_lot::Mutex;
use soci_index::prefetch::Prefetch;
use soci_index::{ArtifactKind, DiscoverError, DiscoverRequest, SociIndex, discover, resolve};
use soci_oci::{Digest, FetchClass, FetchContext, FetchError, FetchErrorKind, Manifest};
use soci_registry::Repository;
use soci_snapshotter::error::chain;
use soci_snapshotter::jobs::Jobs;
use soci_snapshotter::plan::ResolveErrorKind;
use soci_snapshotter::{LayerRequest, ResolveError};
use soci_store::ContentStore;
use soci_ztoc::{DecodeLimits, Ztoc};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ztocs::Ztocs;
use crate::config::checked::Discovery;

/// How long an image is remembered after its last use.
pub const IDLE: Duration = Duration::from_secs(300);
/// How long it is remembered that an image has no index.
pub const NO_INDEX: Duration = Duration::from_secs(30);
/// How long a failure to find out is remembered.
pub const FAILED: Duration = Duration::from_secs(3);
/// How long fetching the artifacts of an image may take in all.
const BURST: Duration = Duration::from_secs(300);

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
    /// Spans to fetch first.
    pub prefetch: Mutex<Option<Prefetch>>,
    /// Decoded, until somebody takes it.
    pub decoded: Mutex<Option<Ztoc>>,
}

/// The images being pulled.
#[derive(Debug)]
pub struct Sessions {
    discovery: Discovery,
    timeout: Duration,
    prefetch: bool,
    ztocs: Arc<Ztocs>,
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

    /// Returns the zTOCs that are here.
    pub fn ztocs(&self) -> impl Iterator<Item = Digest> {
        self.layers.values().filter_map(|layer| match &*layer.borrow() {
            Some(Ok(ready)) => Some(ready.digest),
            _ => None,
        })
    }
}

fn gone(layer: &Digest) -> FetchError {
    FetchError::new(FetchErrorKind::Unavailable, format!("fetching the zTOC of layer {layer} was given up"))
}

impl Sessions {
    /// Returns no sessions yet.
    pub fn new(
        discovery: Discovery,
        timeout: Duration,
        prefetch: bool,
        ztocs: Arc<Ztocs>,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let resolving = Jobs::new(tracker.clone());
        Self { discovery, timeout, prefetch, ztocs, known: Mutex::default(), resolving, tracker, stop }
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
        if let Some(outcome) = self.recall(&key) {
            return outcome;
        }
        let request = DiscoverRequest {
            image: layer.image.clone(),
            manifest: layer.manifest,
            explicit: layer.explicit_index,
            v1: self.discovery.v1,
            v2: self.discovery.v2,
        };
        let (repository, content) = reach();
        let (this, job_key) = (Arc::clone(self), key.clone());
        let resolve = move || async move {
            // It may have become known between the look and this task.
            if let Some(outcome) = this.recall(&job_key) {
                return outcome;
            }
            let outcome = this.resolve(&request, repository, content).await;
            this.remember(job_key, &outcome);
            outcome
        };
        let lost = |_| ResolveError {
            kind: ResolveErrorKind::Local,
            message: "resolving the image ended without a result".to_owned(),
        };
        self.resolving.run(key, resolve).await.map_err(lost)?
    }

    /// Whether a session holds the zTOC.
    pub fn holds(&self, ztoc: &Digest) -> bool {
        self.known
            .lock()
            .values()
            .any(|known| known.outcome.as_ref().is_ok_and(|image| image.ztocs().any(|held| held == *ztoc)))
    }

    /// Forgets what was not used for a while; returns the zTOCs of images forgotten.
    pub fn expire(&self) -> Vec<Digest> {
        let now = Instant::now();
        let mut gone = Vec::new();
        self.known.lock().retain(|_, known| {
            if known.until > now {
                return true;
            }
            gone.extend(known.outcome.iter().flat_map(|image| image.ztocs()));
            false
        });
        gone
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
            Err(ResolveError { kind: ResolveErrorKind::None | ResolveErrorKind::Disabled, .. }) => NO_INDEX,
            Err(_) => FAILED,
        };
        self.known.lock().insert(key, Known { outcome: outcome.clone(), until: Instant::now() + hold });
    }

    async fn resolve(
        self: &Arc<Self>,
        request: &DiscoverRequest,
        repository: Repository,
        content: Arc<dyn ContentStore>,
    ) -> Outcome {
        let context = FetchContext::new(Instant::now() + self.timeout, FetchClass::OnDemand);
        let found = discover(request, &repository, Some(&*content), &context).await;
        let found = found.map_err(|error| resolve_error(&error))?;
        tracing::info!(
            image = %request.image,
            digest = %found.index.digest,
            source = ?found.source,
            "fetching SOCI artifacts using index descriptor"
        );
        let index = Arc::new(found.index);
        let mut senders = HashMap::new();
        let mut layers = HashMap::new();
        for layer in &found.image_manifest.layers {
            if index.ztoc(&layer.digest).is_some() {
                let (sender, receiver) = watch::channel(None);
                senders.insert(layer.digest, sender);
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
        let burst = Burst {
            image: request.image.to_string(),
            index: Arc::clone(&index),
            repository: repository.clone(),
            content: Arc::clone(&content),
            ztocs: Arc::clone(&self.ztocs),
            prefetch: self.prefetch,
            senders,
        };
        let stop = self.stop.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                () = burst.run() => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(Arc::new(Image { manifest: found.image_manifest, index, repository, content, layers }))
    }
}

/// Fetching all artifacts of an image.
struct Burst {
    image: String,
    index: Arc<SociIndex>,
    repository: Repository,
    content: Arc<dyn ContentStore>,
    ztocs: Arc<Ztocs>,
    prefetch: bool,
    senders: HashMap<Digest, watch::Sender<Arrival>>,
}

impl Burst {
    async fn run(self) {
        let context = FetchContext::new(Instant::now() + BURST, FetchClass::OnDemand);
        let artifacts = resolve(Arc::clone(&self.index), Arc::new(self.repository), self.content, context);
        let mut artifacts = std::pin::pin!(artifacts);
        let mut early: HashMap<Digest, Prefetch> = HashMap::new();
        while let Some(artifact) = artifacts.next().await {
            let layer = artifact.layer;
            let Some(sender) = self.senders.get(&layer) else { continue };
            if artifact.kind == ArtifactKind::Prefetch {
                let decoded = artifact.bytes.map(|bytes| Prefetch::decode(&bytes));
                match decoded {
                    Ok(Ok(prefetch)) if self.prefetch => match &*sender.borrow() {
                        Some(Ok(ready)) => *ready.prefetch.lock() = Some(prefetch),
                        _ => drop(early.insert(layer, prefetch)),
                    },
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => {
                        tracing::warn!(%layer, error = %chain(&error), "prefetch artifact is not used")
                    }
                    Err(error) => {
                        tracing::warn!(%layer, error = %chain(&error), "prefetch artifact is not used")
                    }
                }
                continue;
            }
            let ztocs = Arc::clone(&self.ztocs);
            let stored = tokio::task::spawn_blocking(move || store(&ztocs, artifact)).await;
            let stored = stored.unwrap_or_else(|_| Err(gone(&layer)));
            if let Err(error) = &stored {
                tracing::warn!(image = self.image, %layer, error = %chain(error), "a zTOC cannot be used");
            }
            let stored = stored.map(|ready| {
                *ready.prefetch.lock() = early.remove(&layer);
                Arc::new(ready)
            });
            sender.send_replace(Some(stored));
        }
    }
}

/// Stores and decodes a zTOC. Blocks.
fn store(ztocs: &Ztocs, artifact: soci_index::Resolved) -> Result<Ready, FetchError> {
    let bytes = artifact.bytes?;
    let digest = artifact.descriptor.digest;
    let ztoc = Ztoc::decode(bytes.clone(), &DecodeLimits::default()).map_err(|error| {
        FetchError::because(FetchErrorKind::Integrity, format!("decode zTOC {digest}"), error)
    })?;
    ztocs
        .put(&digest, &bytes)
        .map_err(|error| FetchError::because(FetchErrorKind::Local, format!("store zTOC {digest}"), error))?;
    Ok(Ready {
        digest,
        size: bytes.len() as u64,
        disable_xattrs: SociIndex::disable_xattrs(&artifact.descriptor),
        prefetch: Mutex::new(None),
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
