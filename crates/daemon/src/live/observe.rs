//! What is mounted and under way, for metrics and for the debug socket.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::Live;
use super::mounted::Mounted;
use crate::metrics::names;
use crate::metrics::text::Scrape;

/// The state of the layers at a moment.
#[derive(Debug, Serialize)]
pub struct State {
    /// Images being pulled, or known to have no index.
    pub sessions: usize,
    /// Layers that wait to be completed in the background.
    pub background_queue: usize,
    /// Spans that are fetched or inflated, and the bytes that these take.
    pub spans_in_flight: usize,
    /// See `spans_in_flight`.
    pub bytes_in_flight: u64,
    /// Jobs that wait for a thread or run.
    pub jobs: usize,
    /// Readers that wait.
    pub waiting: usize,
    /// Bytes of the span cache, and the most there may be.
    pub cache_bytes: u64,
    /// See `cache_bytes`.
    pub cache_limit: Option<u64>,
    /// Tasks of the layers that have not ended.
    pub tasks: usize,
    /// Mounted layers.
    pub layers: Vec<Layer>,
}

/// One mounted layer at a moment.
#[derive(Debug, Serialize)]
pub struct Layer {
    /// Where it is.
    pub mountpoint: String,
    /// Its digest.
    pub digest: String,
    /// Its zTOC.
    pub ztoc: String,
    /// The image it was mounted for.
    pub image: String,
    /// Whether the kernel still has the mount.
    pub served: bool,
    /// Its size in compressed bytes.
    pub size: u64,
    /// How many of them are cached.
    pub fetched: u64,
    /// How many of them readers touched.
    pub needed: u64,
}

impl Live {
    /// Adds what is mounted to `scrape`.
    pub fn collect(&self, scrape: &mut Scrape) {
        let mounts = self.mounted();
        scrape.add(&names::MOUNTS, &[], mounts.len() as u64);
        // A layer that an image holds twice counts once.
        let mut of_images = BTreeMap::new();
        for mounted in &mounts {
            let Some(reader) = mounted.reader() else { continue };
            let at = mounted.at().display().to_string();
            let labels = [mounted.layer.to_string(), at];
            let labels = labels.each_ref().map(String::as_str);
            let fetched = reader.fetched_bytes();
            scrape.add(&names::SIZE, &labels, reader.size());
            scrape.add(&names::FETCHED_SIZE, &labels, fetched);
            if let Some(image) = mounted.image {
                of_images.insert((image, mounted.ztoc), (reader.needed_bytes(), fetched));
            }
        }
        for ((image, _), (needed, fetched)) in of_images {
            let image = image.to_string();
            scrape.add(&names::IMAGE_NEEDED, &[&image], needed);
            scrape.add(&names::IMAGE_FETCHED, &[&image], fetched);
        }
        let queue = self.pool().queued() as u64;
        scrape.add(&names::IMAGE_OPERATIONS, &["", "background_fetch_work_queue_size"], queue);
        scrape.add(&names::CACHE, &[], self.pool().cache().usage());
        if let Some(limit) = self.pool().cache().limit() {
            scrape.add(&names::CACHE_LIMIT, &[], limit);
        }
        scrape.add(&names::IN_FLIGHT, &[], self.pool().gauges().bytes);
    }

    /// Returns the state at this moment.
    pub fn state(&self) -> State {
        let gauges = self.pool().gauges();
        let layer = |mounted: &Arc<Mounted>| Layer {
            mountpoint: mounted.at().display().to_string(),
            digest: mounted.layer.to_string(),
            ztoc: mounted.ztoc.to_string(),
            image: mounted.reference.clone(),
            served: mounted.serves(),
            size: mounted.reader().map_or(0, |reader| reader.size()),
            fetched: mounted.reader().map_or(0, |reader| reader.fetched_bytes()),
            needed: mounted.reader().map_or(0, |reader| reader.needed_bytes()),
        };
        State {
            sessions: self.sessions.len(),
            background_queue: self.pool().queued(),
            spans_in_flight: gauges.spans,
            bytes_in_flight: gauges.bytes,
            jobs: gauges.jobs,
            waiting: gauges.waiting,
            cache_bytes: self.pool().cache().usage(),
            cache_limit: self.pool().cache().limit(),
            tasks: self.tracker.len(),
            layers: self.mounted().iter().map(layer).collect(),
        }
    }

    fn mounted(&self) -> Vec<Arc<Mounted>> {
        self.mounts.lock().values().cloned().collect()
    }
}
