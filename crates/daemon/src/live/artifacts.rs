//! The artifacts of one image's index: fetched in one burst, each stored, decoded and handed over as soon as it is there.
//!
//! A layer waits for its own zTOC only, and a bad one costs its layer only. That a zTOC cannot be had is told to those who
//! wait for it and is not remembered: whoever asks after that has it fetched again, alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use parking_lot::Mutex;
use soci_index::{ArtifactKind, Resolved, SociIndex, fetch_artifact, resolve};
use soci_layer::LayerPool;
use soci_oci::{Digest, FetchClass, FetchContext, FetchError, FetchErrorKind, with_causes};
use soci_registry::Repository;
use soci_snapshotter::provider::ArtifactRef;
use soci_store::ContentStore;
use soci_ztoc::{DecodeLimits, Ztoc};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::claims::Hold;
use super::ztocs::Ztocs;
use crate::metrics::{Series, Timing};

/// zTOCs that are decoded and stored at a time: those that are synced together share a commit of the journal.
const STORED_AT_ONCE: usize = 16;
/// How long fetching the artifacts of an image may take in all.
const BURST: Duration = Duration::from_secs(300);

/// A layer's zTOC, or why it cannot be had; `None` while it is on its way.
type Arrival = Option<Result<Arc<Ready>, FetchError>>;

/// Where the artifacts of an image come from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The image, for messages.
    pub image: String,
    /// Its index.
    pub index: Arc<SociIndex>,
    /// Where it is pulled from.
    pub repository: Repository,
    /// What is on this machine already.
    pub content: Arc<dyn ContentStore>,
}

/// A layer whose zTOC is to be fetched.
#[derive(Debug)]
pub struct Wanted {
    /// The layer.
    pub layer: Digest,
    /// Who is told how long it takes.
    pub series: Arc<Series>,
    /// Its prefetch artifact, where it has one that is used.
    pub prefetch: Option<ArtifactRef>,
}

/// The artifacts of an image. Dropping it ends their fetches.
#[derive(Debug)]
pub struct Artifacts {
    shared: Arc<Shared>,
    layers: HashMap<Digest, Mutex<Slot>>,
    tracker: TaskTracker,
    stop: CancellationToken,
    _ends: DropGuard,
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
    /// Its prefetch artifact. None where the index has none.
    pub prefetch: Option<Coming>,
    /// Decoded, until somebody takes it.
    pub decoded: Mutex<Option<Ztoc>>,
}

/// The prefetch artifact of a layer, coming or here.
#[derive(Debug, Clone)]
pub struct Coming {
    /// Which it is.
    pub artifact: ArtifactRef,
    /// Its bytes; it closes when it cannot be had.
    pub bytes: watch::Receiver<Option<Bytes>>,
}

/// The zTOC of a layer, coming or here.
#[derive(Debug)]
struct Slot {
    arrival: watch::Receiver<Arrival>,
    /// Whether somebody was told that it cannot be had.
    told: bool,
}

/// What fetching needs.
#[derive(Debug)]
struct Shared {
    origin: Origin,
    ztocs: Arc<Ztocs>,
    /// The zTOCs are not deleted while this is here.
    hold: Arc<Hold>,
    series: HashMap<Digest, Arc<Series>>,
    /// Where prefetch artifacts come out.
    prefetches: HashMap<Digest, Coming>,
}

impl Artifacts {
    /// Begins to fetch what `origin` has for the layers that are wanted, whose zTOCs `hold` holds: before what `pool` does in
    /// the background, since a pull waits for it. Ends with `stop`.
    pub fn fetch(
        origin: Origin,
        wanted: Vec<Wanted>,
        hold: Hold,
        ztocs: Arc<Ztocs>,
        pool: Arc<LayerPool>,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let (mut coming, mut prefetches) = (HashMap::new(), HashMap::new());
        let (mut senders, mut layers) = (HashMap::new(), HashMap::new());
        let mut series = HashMap::new();
        for Wanted { layer, series: of_layer, prefetch } in wanted {
            let (sender, arrival) = watch::channel(None);
            senders.insert(layer, sender);
            layers.insert(layer, Mutex::new(Slot { arrival, told: false }));
            series.insert(layer, of_layer);
            if let Some(artifact) = prefetch {
                let (sender, bytes) = watch::channel(None);
                coming.insert(layer, sender);
                prefetches.insert(layer, Coming { artifact, bytes });
            }
        }
        let shared = Arc::new(Shared { origin, ztocs, hold: Arc::new(hold), series, prefetches });
        let burst = Burst { shared: Arc::clone(&shared), coming: Mutex::new(coming), senders };
        let run = async move { pool.before_background(burst.run()).await };
        tracker.spawn(stop.clone().run_until_cancelled_owned(run));
        let _ends = stop.clone().drop_guard();
        Self { shared, layers, tracker, stop, _ends }
    }

    /// Returns the layer's zTOC once it is here; `None` when the index has none for it.
    ///
    /// # Errors
    /// Why it cannot be had or used.
    pub async fn ready(&self, layer: &Digest, deadline: Instant) -> Option<Result<Arc<Ready>, FetchError>> {
        let slot = self.layers.get(layer)?;
        let mut arrival = {
            let mut slot = slot.lock();
            if slot.told {
                *slot = Slot { arrival: self.fetch_again(*layer), told: false };
            }
            slot.arrival.clone()
        };
        let arrived = match tokio::time::timeout_at(deadline.into(), arrival.wait_for(Option::is_some)).await
        {
            Ok(arrived) => {
                arrived.ok().and_then(|arrived| arrived.clone()).unwrap_or_else(|| Err(gone(layer)))
            }
            Err(_) => {
                // In the words that tools made for the reference know.
                tracing::debug!(layerDigest = %layer, "timeout waiting for layer to resolve");
                let message = format!("timeout waiting for layer {layer} to resolve");
                return Some(Err(FetchError::new(FetchErrorKind::Unavailable, message)));
            }
        };
        if arrived.is_err() {
            let mut slot = slot.lock();
            slot.told |= slot.arrival.same_channel(&arrival);
        }
        Some(arrived)
    }

    /// Whether the index has a zTOC for `layer`.
    pub fn has(&self, layer: &Digest) -> bool {
        self.layers.contains_key(layer)
    }

    /// Returns the zTOCs that are held.
    pub fn ztocs(&self) -> &[Digest] {
        self.shared.hold.ztocs()
    }

    fn fetch_again(&self, layer: Digest) -> watch::Receiver<Arrival> {
        let (sender, receiver) = watch::channel(None);
        let shared = Arc::clone(&self.shared);
        let fetching = async move {
            let begun = Instant::now();
            let Origin { index, repository, content, .. } = &shared.origin;
            let Some(descriptor) = index.ztoc(&layer).cloned() else { return };
            let context = FetchContext::new(Instant::now() + BURST, FetchClass::OnDemand);
            let artifact =
                fetch_artifact(layer, ArtifactKind::Ztoc, descriptor, repository, &**content, &context).await;
            sender.send_replace(Some(shared.take(artifact, begun).await));
        };
        self.tracker.spawn(self.stop.clone().run_until_cancelled_owned(fetching));
        receiver
    }
}

fn gone(layer: &Digest) -> FetchError {
    FetchError::new(FetchErrorKind::Unavailable, format!("fetching the zTOC of layer {layer} was given up"))
}

/// Fetching all artifacts of an image.
struct Burst {
    shared: Arc<Shared>,
    /// Where prefetch artifacts go that have not come yet.
    coming: Mutex<HashMap<Digest, watch::Sender<Option<Bytes>>>>,
    senders: HashMap<Digest, watch::Sender<Arrival>>,
}

impl Burst {
    async fn run(self) {
        let Origin { index, repository, content, .. } = self.shared.origin.clone();
        let context = FetchContext::new(Instant::now() + BURST, FetchClass::OnDemand);
        let begun = Instant::now();
        let artifacts = resolve(index, Arc::new(repository), content, context);
        artifacts.for_each_concurrent(STORED_AT_ONCE, |artifact| self.hand_over(artifact, begun)).await;
    }

    async fn hand_over(&self, artifact: Resolved, begun: Instant) {
        match artifact.kind {
            ArtifactKind::Prefetch => self.prefetch(artifact),
            ArtifactKind::Ztoc => {
                let Some(sender) = self.senders.get(&artifact.layer) else { return };
                sender.send_replace(Some(self.shared.take(artifact, begun).await));
            }
        }
    }

    fn prefetch(&self, artifact: Resolved) {
        // Taken out, so that whoever waits hears of it whatever comes.
        let Some(sender) = self.coming.lock().remove(&artifact.layer) else { return };
        match artifact.bytes {
            Ok(bytes) => drop(sender.send_replace(Some(bytes))),
            Err(error) => {
                tracing::debug!(layer = %artifact.layer, error = %with_causes(&error), "a prefetch artifact does not come");
            }
        }
    }
}

impl Shared {
    /// Takes in a zTOC that was asked for at `begun`, and says why where it cannot be used.
    async fn take(&self, artifact: Resolved, begun: Instant) -> Result<Arc<Ready>, FetchError> {
        let layer = artifact.layer;
        let series = self.series.get(&layer).cloned().ok_or_else(|| gone(&layer))?;
        series.observe(Timing::ZtocFetch, begun.elapsed());
        let taken = self.store_and_decode(artifact, series).await;
        if let Err(error) = &taken {
            tracing::warn!(image = self.origin.image, %layer, error = %with_causes(error), "a zTOC cannot be used");
        }
        taken.map(Arc::new)
    }

    /// Stores and decodes a zTOC, both at once: one waits for the disk, the other for a processor.
    async fn store_and_decode(&self, artifact: Resolved, series: Arc<Series>) -> Result<Ready, FetchError> {
        let Resolved { layer, descriptor, bytes, .. } = artifact;
        let (digest, bytes) = (descriptor.digest, bytes?);
        let size = bytes.len() as u64;
        let (ztocs, hold, content) = (Arc::clone(&self.ztocs), Arc::clone(&self.hold), bytes.clone());
        let storing = tokio::task::spawn_blocking(move || {
            // Nobody deletes it before it is stored, though everybody else be gone by then.
            let _hold = hold;
            ztocs.put(&digest, &content)
        });
        let decoding = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            Ztoc::decode(bytes, &DecodeLimits::default())
                .inspect(|_| series.observe(Timing::ZtocUnmarshal, begun.elapsed()))
        });
        let (stored, decoded) = tokio::join!(storing, decoding);
        let ztoc = decoded.map_err(|_| gone(&layer))?.map_err(|error| {
            FetchError::because(FetchErrorKind::Integrity, format!("decode zTOC {digest}"), error)
        })?;
        stored.map_err(|_| gone(&layer))?.map_err(|error| {
            FetchError::because(FetchErrorKind::Local, format!("store zTOC {digest}"), error)
        })?;
        Ok(Ready {
            digest,
            size,
            disable_xattrs: SociIndex::disable_xattrs(&descriptor),
            prefetch: self.prefetches.get(&layer).cloned(),
            decoded: Mutex::new(Some(ztoc)),
        })
    }
}
