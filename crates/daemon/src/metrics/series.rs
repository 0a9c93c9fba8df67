//! How long slow operations took, and how often a layer's image was known already, by the layer or index they were for.
//!
//! A series is shown while somebody holds it: the image that is being pulled, and each mount of the layer. Then it goes, so
//! that the number of series is bounded by what is mounted and pulled.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use soci_oci::Digest;

use super::names;
use super::text::{Histogram, Scrape};

/// Powers of two of milliseconds, from one to 32 s, and one bucket for the rest.
pub(super) type Millis = Histogram<17>;

/// A slow operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timing {
    /// A lazy mount, from the question to the answer.
    Mount,
    /// Tree and FUSE session of a lazy mount.
    FuseMount,
    /// Building the tree of files from the zTOC.
    MetadataInit,
    /// Finding and fetching the SOCI index.
    IndexFetch,
    /// Fetching the zTOC.
    ZtocFetch,
    /// Decoding the zTOC.
    ZtocUnmarshal,
    /// Completing the layer in the background.
    BackgroundFetch,
    /// A request for bytes of the layer, until the head of the answer.
    RegistryGet,
    /// A request for bytes of the layer that a registry answered with another place.
    BlobRedirect,
}

const TIMINGS: [(Timing, &str); 9] = [
    (Timing::Mount, "mount"),
    (Timing::FuseMount, "fuse_mount"),
    (Timing::MetadataInit, "init_metadata_store"),
    (Timing::IndexFetch, "soci_index_fetch"),
    (Timing::ZtocFetch, "ztoc_fetch"),
    (Timing::ZtocUnmarshal, "ztoc_unmarshal"),
    (Timing::BackgroundFetch, "background_fetch"),
    (Timing::RegistryGet, "remote_registry_get"),
    (Timing::BlobRedirect, "blob_redirect"),
];

/// The durations of one layer or index.
#[derive(Debug)]
pub struct Series {
    digest: Digest,
    /// How often a pull asked for the layer and its image was resolved already, and how often it was not.
    resolved: [AtomicU64; 2],
    histograms: [Millis; TIMINGS.len()],
    all: Weak<All>,
}

/// All series that somebody holds.
#[derive(Debug, Default)]
pub(super) struct All(Mutex<BTreeMap<Digest, Weak<Series>>>);

impl All {
    /// Returns the series of `digest`.
    pub(super) fn of(self: &Arc<Self>, digest: &Digest) -> Arc<Series> {
        let mut all = self.0.lock();
        if let Some(series) = all.get(digest).and_then(Weak::upgrade) {
            return series;
        }
        let series = Arc::new(Series {
            digest: *digest,
            resolved: Default::default(),
            histograms: Default::default(),
            all: Arc::downgrade(self),
        });
        all.insert(*digest, Arc::downgrade(&series));
        series
    }

    /// Returns the series of `digest` where somebody holds it.
    pub(super) fn known(&self, digest: &Digest) -> Option<Arc<Series>> {
        self.0.lock().get(digest).and_then(Weak::upgrade)
    }

    pub(super) fn collect(&self, scrape: &mut Scrape) {
        // Upgraded first: the last holder may let go meanwhile, and dropping locks.
        let living: Vec<Arc<Series>> = self.0.lock().values().filter_map(Weak::upgrade).collect();
        living.iter().for_each(|series| series.collect(scrape));
    }
}

impl Series {
    /// Counts an operation that took `elapsed`.
    pub fn observe(&self, timing: Timing, elapsed: Duration) {
        let place = TIMINGS.iter().position(|(known, _)| *known == timing);
        if let Some(histogram) = place.and_then(|place| self.histograms.get(place)) {
            histogram.observe(super::millis(elapsed));
        }
    }

    /// Counts a layer that a pull asks for, whose image is `known` or has to be resolved first.
    pub fn resolves(&self, known: bool) {
        let [hits, misses] = &self.resolved;
        if known { hits } else { misses }.fetch_add(1, Ordering::Relaxed);
    }

    fn collect(&self, scrape: &mut Scrape) {
        let digest = self.digest.to_string();
        for (name, number) in ["resolve_cache_hit", "resolve_cache_miss"].iter().zip(&self.resolved) {
            let number = number.load(Ordering::Relaxed);
            if number > 0 {
                scrape.add(&names::OPERATIONS, &[&digest, name], number);
            }
        }
        for ((_, name), histogram) in TIMINGS.iter().zip(&self.histograms) {
            let read = histogram.read();
            if read.0.iter().any(|count| *count > 0) {
                scrape.add_histogram(&names::MILLISECONDS, &[&digest, name], read);
            }
        }
    }
}

impl Drop for Series {
    fn drop(&mut self) {
        let Some(all) = self.all.upgrade() else { return };
        let mut all = all.0.lock();
        // A new one may have taken the place.
        if all.get(&self.digest).is_some_and(|series| series.strong_count() == 0) {
            all.remove(&self.digest);
        }
    }
}
