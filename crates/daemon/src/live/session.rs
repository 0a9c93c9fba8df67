//! One pull of one image: what its index says, and its zTOCs, fetched in one burst.
//!
//! The first Prepare of an image starts the session: the index is discovered, then all [`artifacts`](super::artifacts) are
//! fetched at once. Later Prepares of the image use no network.
//!
//! A session ends when nothing was asked of it for [`IDLE`], or with the image's last snapshot; what is still being fetched
//! for it ends with it. A failure is answered once to each layer of the image, however long its pull takes: containerd asks
//! for the next when it has unpacked one. A layer that asks again is of another pull, for which a failure is no longer
//! remembered than a moment: [`NO_INDEX`] when the image surely has none, [`FAILED`] for the rest.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use soci_index::{DiscoverError, DiscoverRequest, Discovered, SociIndex, Source, discover};
use soci_layer::LayerPool;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{Digest, FetchClass, FetchContext, FetchErrorKind, Manifest, with_causes};
use soci_registry::Repository;
use soci_snapshotter::jobs::Jobs;
use soci_snapshotter::plan::ResolveErrorKind;
use soci_snapshotter::provider::ArtifactRef;
use soci_snapshotter::{LayerRequest, ResolveError};
use soci_store::ContentStore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::field::Empty;

use super::artifacts::{Artifacts, Origin, Wanted};
use super::claims::Claims;
use super::content::has_all;
use super::ztocs::Ztocs;
use crate::config::checked::Discovery;
use crate::metrics::{Metrics, Series, Timing};
use crate::traces;

/// How long an image is remembered after its last use.
pub const IDLE: Duration = Duration::from_secs(300);
/// How long it is remembered that an image has no index.
pub const NO_INDEX: Duration = Duration::from_secs(30);
/// How long a failure to find out is remembered.
pub const FAILED: Duration = Duration::from_secs(3);
/// How long the registry is waited for when all of the image is on this machine.
const HERE_PATIENCE: Duration = Duration::from_secs(2);

/// Namespace, manifest and explicit index.
pub type Key = (String, Digest, Option<Digest>);

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
    /// Its zTOCs, which are not deleted while it is here.
    pub artifacts: Artifacts,
    /// What was counted about its index so far.
    _series: Arc<Series>,
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
    pool: Arc<LayerPool>,
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
    /// When nobody has asked for it for long.
    until: Instant,
    /// From when on a failure is found out anew for who heard of it.
    stale: Instant,
    /// The layers that it was told to.
    told: HashSet<Digest>,
}

impl Known {
    fn new(outcome: Outcome, now: Instant) -> Self {
        let hold = match &outcome {
            Ok(_) => IDLE,
            Err(ResolveError {
                kind: ResolveErrorKind::None | ResolveErrorKind::Disabled | ResolveErrorKind::OnMachine,
                ..
            }) => NO_INDEX,
            Err(_) => FAILED,
        };
        Self { outcome, until: now + IDLE, stale: now + hold, told: HashSet::new() }
    }

    /// Returns what `layer` is to be told; `None` when that has to be found out anew.
    fn tell(&mut self, layer: Digest, now: Instant) -> Option<Outcome> {
        let again = !self.told.insert(layer);
        if self.until <= now || (self.outcome.is_err() && again && self.stale <= now) {
            return None;
        }
        self.until = now + IDLE;
        Some(self.outcome.clone())
    }
}

impl Sessions {
    /// Returns no sessions yet.
    pub fn new(
        settings: Settings,
        ztocs: Arc<Ztocs>,
        claims: Arc<Claims>,
        pool: Arc<LayerPool>,
        metrics: Metrics,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let resolving = Jobs::new(tracker.clone());
        Self { settings, ztocs, claims, pool, metrics, known: Mutex::default(), resolving, tracker, stop }
    }

    /// Whether the image that `layer` belongs to was resolved.
    pub fn knows(&self, layer: &LayerRequest) -> bool {
        let known = self.known.lock();
        known.get(&key(layer)).is_some_and(|known| known.outcome.is_ok() && known.until > Instant::now())
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
        let key = key(layer);
        if let Some(outcome) = self.recall(&key, layer.layer) {
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
        let (this, job_key, digest) = (Arc::clone(self), key.clone(), layer.layer);
        let resolve = move || async move {
            // It may have become known between the look and this task.
            if let Some(outcome) = this.recall(&job_key, digest) {
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
            this.remember(job_key, digest, &outcome);
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
                .is_ok_and(|image| Arc::strong_count(image) == 1 && image.artifacts.ztocs().contains(ztoc))
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

    fn recall(&self, key: &Key, layer: Digest) -> Option<Outcome> {
        let mut known = self.known.lock();
        let told = known.get_mut(key)?.tell(layer, Instant::now());
        if told.is_none() {
            known.remove(key);
        }
        told
    }

    fn remember(&self, key: Key, layer: Digest, outcome: &Outcome) {
        let mut known = Known::new(outcome.clone(), Instant::now());
        known.told.insert(layer);
        self.known.lock().insert(key, known);
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
        if let Some(found) = &found {
            tell(request, found);
        }
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
                with_causes(&error)
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
        tracing::debug!(
            image = %request.image,
            digest = %found.index.digest,
            source = ?found.source,
            "fetching SOCI artifacts using index descriptor"
        );
        let index = Arc::new(found.index);
        let of_index = self.metrics.series(&index.digest);
        of_index.observe(Timing::IndexFetch, begun.elapsed());
        let mut wanted = Vec::new();
        let mut ztocs = Vec::new();
        for layer in &found.image_manifest.layers {
            if let Some(ztoc) = index.ztoc(&layer.digest) {
                ztocs.push(ztoc.digest);
                wanted.push(Wanted {
                    layer: layer.digest,
                    series: self.metrics.series(&layer.digest),
                    prefetch: index
                        .prefetch(&layer.digest)
                        .filter(|_| self.settings.prefetch)
                        .map(|prefetch| ArtifactRef { digest: prefetch.digest, size: prefetch.size }),
                });
            }
        }
        if wanted.is_empty() {
            // Its tools make none without a zTOC, so it is another image's. containerd pulls layers side by side.
            return Err(ResolveError {
                kind: ResolveErrorKind::Malformed,
                message: format!("SOCI index {} has a zTOC for none of the image's layers", index.digest),
            });
        }
        // Before anything is stored: from here on nobody deletes one of them.
        let hold = self.claims.hold(ztocs);
        let origin = Origin {
            image: request.image.to_string(),
            index: Arc::clone(&index),
            repository: repository.clone(),
            content: Arc::clone(&content),
        };
        let (tracker, stop) = (self.tracker.clone(), self.stop.child_token());
        let (ztocs, pool) = (Arc::clone(&self.ztocs), Arc::clone(&self.pool));
        let artifacts = Artifacts::fetch(origin, wanted, hold, ztocs, pool, tracker, stop);
        let manifest = found.image_manifest;
        Ok(Arc::new(Image { manifest, index, repository, content, artifacts, _series: of_index }))
    }
}

fn key(layer: &LayerRequest) -> Key {
    (layer.namespace.clone(), layer.manifest, layer.explicit_index)
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

/// Says how an index was looked for, in the lines that tools made for the reference know.
fn tell(request: &DiscoverRequest, found: &Result<Discovered, DiscoverError>) {
    let image = &request.image;
    if let Some(digest) = request.explicit {
        tracing::debug!(%image, %digest, "using provided soci index digest");
        return;
    }
    let source = found.as_ref().ok().map(|found| found.source);
    let none = matches!(found, Err(DiscoverError::NoIndex { .. }));
    if request.v2 {
        tracing::debug!(%image, "checking for soci v2 index annotation");
        match source {
            Some(Source::Annotation) => tracing::debug!(%image, "using soci v2 index annotation"),
            None if !none => {}
            _ => tracing::debug!(%image, "soci v2 index annotation not found"),
        }
    } else {
        tracing::debug!(%image, "soci v2 is disabled");
    }
    match source {
        Some(Source::Annotation | Source::Explicit) => {}
        Some(Source::Referrer) => tracing::debug!(%image, "using soci v1 index via referrers API"),
        None if !request.v1 => tracing::debug!(%image, "soci v1 is disabled"),
        None if none => tracing::debug!(%image, "soci v1 referrers not found"),
        None => {}
    }
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
    ResolveError { kind, message: with_causes(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(kind: ResolveErrorKind) -> Outcome {
        Err(ResolveError { kind, message: "scripted".into() })
    }

    #[test]
    fn a_failure_is_told_to_each_layer_of_a_pull_however_slow_and_found_out_anew_for_the_next_pull() {
        let begun = Instant::now();
        let mut known = Known::new(failed(ResolveErrorKind::Unavailable), begun);
        let layer = |number: u8| Digest::of(&[number]);
        // containerd unpacks for a minute before it asks for the next layer.
        for number in 0..100 {
            let now = begun + Duration::from_secs(60) * u32::from(number);
            assert!(known.tell(layer(number), now).is_some(), "layer {number}");
        }
        let now = begun + Duration::from_secs(60) * 100;
        assert!(known.tell(layer(0), now).is_none(), "another pull");
        assert!(known.tell(layer(100), now + IDLE).is_none(), "long ago");
    }

    #[test]
    fn layers_asked_for_by_several_at_once_hear_the_same_failure() {
        let begun = Instant::now();
        for (kind, hold) in [(ResolveErrorKind::Denied, FAILED), (ResolveErrorKind::None, NO_INDEX)] {
            let mut known = Known::new(failed(kind), begun);
            let layer = Digest::of(b"layer");
            assert!(known.tell(layer, begun).is_some());
            assert!(known.tell(layer, begun + hold / 2).is_some());
            assert!(known.tell(layer, begun + hold).is_none());
        }
    }
}
