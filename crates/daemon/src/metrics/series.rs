//! How long slow operations took, by the layer or index they were for.
//!
//! A series is shown while somebody holds it: the image that is being pulled, and each mount of the layer. Then it goes, so
//! that the number of series is bounded by what is mounted and pulled.

use std::collections::HashMap;
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
}

const TIMINGS: [(Timing, &str); 7] = [
    (Timing::Mount, "mount"),
    (Timing::FuseMount, "fuse_mount"),
    (Timing::MetadataInit, "init_metadata_store"),
    (Timing::IndexFetch, "soci_index_fetch"),
    (Timing::ZtocFetch, "ztoc_fetch"),
    (Timing::ZtocUnmarshal, "ztoc_unmarshal"),
    (Timing::BackgroundFetch, "background_fetch"),
];

/// The durations of one layer or index.
#[derive(Debug)]
pub struct Series {
    digest: Digest,
    histograms: [Millis; TIMINGS.len()],
    all: Weak<All>,
}

/// All series that somebody holds.
#[derive(Debug, Default)]
pub(super) struct All(Mutex<HashMap<Digest, Weak<Series>>>);

impl All {
    /// Returns the series of `digest`.
    pub(super) fn of(self: &Arc<Self>, digest: &Digest) -> Arc<Series> {
        let mut all = self.0.lock();
        if let Some(series) = all.get(digest).and_then(Weak::upgrade) {
            return series;
        }
        let series =
            Arc::new(Series { digest: *digest, histograms: Default::default(), all: Arc::downgrade(self) });
        all.insert(*digest, Arc::downgrade(&series));
        series
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

    fn collect(&self, scrape: &mut Scrape) {
        let digest = self.digest.to_string();
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
