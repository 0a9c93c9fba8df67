//! What the daemon counts, and the endpoint that shows it.
//!
//! Layers count for themselves and are looked at when somebody scrapes; when a layer is gone its series are. Label sets are
//! bounded: digests of what is mounted, and words from fixed lists.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use soci_fs::{FsMeter, Operation};
use soci_layer::{Event, LayerMeter, MeterFactory};
use soci_oci::{Digest, FetchClass};
use soci_snapshotter::Verdict;

pub mod names;
pub mod serve;
pub mod text;

use text::{Family, Histogram, Scrape};

/// Numbers of the whole daemon, by family and label values. Label values come from fixed lists.
type Global = BTreeMap<(&'static str, Vec<&'static str>), (&'static Family, u64)>;

/// Everything that is counted. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    global: Mutex<Global>,
    received: AtomicU64,
    files: Mutex<Vec<Weak<FileSystem>>>,
    layers: Mutex<Vec<Weak<Layer>>>,
    /// The layer of each zTOC, for readers, who only know the latter.
    of_ztoc: Mutex<HashMap<Digest, Digest>>,
    mount: Mutex<HashMap<Digest, Arc<Histogram<16>>>>,
}

/// What the file system of one mount counts.
#[derive(Debug)]
struct FileSystem {
    layer: String,
    image: String,
    counts: [AtomicU64; OPERATIONS.len()],
    failures: [AtomicU64; OPERATIONS.len()],
    served: AtomicU64,
    read: Histogram<26>,
    readdir: Histogram<26>,
}

/// Operations, with the names under which they are counted and their failures are.
const OPERATIONS: [(Operation, &str, &str); 9] = [
    (Operation::Lookup, "node.Lookup", "fuse_node_lookup_failure_count"),
    (Operation::Getattr, "node.Getattr", "fuse_node_getattr_failure_count"),
    (Operation::Readlink, "node.Readlink", "fuse_unknown_operation_failure_count"),
    (Operation::Open, "node.Open", "fuse_node_open_failure_count"),
    (Operation::Read, "file.Read", "fuse_file_read_failure_count"),
    (Operation::Readdir, "node.Readdir", "fuse_node_readdir_failure_count"),
    (Operation::Getxattr, "node.Getxattr", "fuse_unknown_operation_failure_count"),
    (Operation::Listxattr, "node.Listxattr", "fuse_node_listxattr_failure_count"),
    (Operation::Statfs, "node.Statfs", "fuse_unknown_operation_failure_count"),
];

/// What the reader of one zTOC counts.
#[derive(Debug)]
struct Layer {
    metrics: Weak<Inner>,
    ztoc: Digest,
    layer: String,
    reads: AtomicU64,
    on_demand: AtomicU64,
    background: AtomicU64,
    background_failed: AtomicU64,
    mismatches: AtomicU64,
}

impl Metrics {
    /// Adds `value` to a number of the whole daemon.
    pub fn add(&self, family: &'static Family, labels: &[&'static str], value: u64) {
        let mut global = self.0.global.lock();
        global.entry((family.name, labels.to_vec())).or_insert((family, 0)).1 += value;
    }

    /// Counts a verdict.
    pub fn verdict(&self, verdict: &Verdict) {
        let reason = verdict.reasons.first().map_or("none", |reason| reason.code());
        self.add(&names::VERDICTS, &[verdict.word(), reason], 1);
    }

    /// Says which layer a zTOC is of. Called before the layer is opened.
    pub fn introduce(&self, ztoc: &Digest, layer: &Digest) {
        self.0.of_ztoc.lock().insert(*ztoc, *layer);
    }

    /// Counts a mount of `layer` that took `elapsed`.
    pub fn mounted(&self, layer: &Digest, elapsed: Duration) {
        let histogram = Arc::clone(self.0.mount.lock().entry(*layer).or_default());
        histogram.observe(millis(elapsed));
    }

    /// Forgets what is kept about `layer`.
    pub fn forget(&self, layer: &Digest) {
        self.0.mount.lock().remove(layer);
    }

    /// Returns the meter of the file system of `layer` in the image with this manifest.
    pub fn file_system(&self, layer: &Digest, image: Option<&Digest>) -> Arc<dyn FsMeter> {
        let meter = Arc::new(FileSystem {
            layer: layer.to_string(),
            image: image.map(Digest::to_string).unwrap_or_default(),
            counts: Default::default(),
            failures: Default::default(),
            served: AtomicU64::new(0),
            read: Histogram::default(),
            readdir: Histogram::default(),
        });
        keep(&self.0.files, &meter);
        meter
    }

    /// Adds everything that is counted to `scrape`.
    pub fn collect(&self, scrape: &mut Scrape) {
        for operation in
            ["fuse_mount_failure_count", "local_mount_failure_count", "background_fetch_work_queue_evicted"]
        {
            scrape.add(&names::OPERATIONS, &["", operation], 0);
        }
        for ((_, labels), (family, value)) in &*self.0.global.lock() {
            scrape.add(family, labels, *value);
        }
        scrape.add(&names::RECEIVED, &[], self.0.received.load(Ordering::Relaxed));
        for (layer, histogram) in &*self.0.mount.lock() {
            scrape.add_histogram(&names::MILLISECONDS, &[&layer.to_string(), "mount"], histogram.read());
        }
        for files in living(&self.0.files) {
            files.collect(scrape);
        }
        for layer in living(&self.0.layers) {
            layer.collect(scrape);
        }
        process(scrape);
    }
}

fn keep<T>(list: &Mutex<Vec<Weak<T>>>, meter: &Arc<T>) {
    let mut list = list.lock();
    list.retain(|meter| meter.strong_count() > 0);
    list.push(Arc::downgrade(meter));
}

fn living<T>(list: &Mutex<Vec<Weak<T>>>) -> Vec<Arc<T>> {
    list.lock().iter().filter_map(Weak::upgrade).collect()
}

fn millis(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

fn micros(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX)
}

impl FsMeter for FileSystem {
    fn operation(&self, operation: Operation, elapsed: Duration, bytes: u64, failed: bool) {
        let place = OPERATIONS.iter().position(|(known, ..)| *known == operation);
        if let Some(place) = place {
            self.counts[place].fetch_add(1, Ordering::Relaxed);
            if failed {
                self.failures[place].fetch_add(1, Ordering::Relaxed);
            }
        }
        match operation {
            Operation::Read => {
                self.served.fetch_add(bytes, Ordering::Relaxed);
                self.read.observe(micros(elapsed));
            }
            Operation::Readdir => self.readdir.observe(micros(elapsed)),
            _ => {}
        }
    }
}

impl FileSystem {
    fn collect(&self, scrape: &mut Scrape) {
        let layer = self.layer.as_str();
        for (place, (operation, name, failure)) in OPERATIONS.iter().enumerate() {
            let count = self.counts[place].load(Ordering::Relaxed);
            scrape.add(&names::IMAGE_OPERATIONS, &[&self.image, name], count);
            scrape.add(&names::OPERATIONS, &[layer, failure], self.failures[place].load(Ordering::Relaxed));
            if *operation == Operation::Read {
                scrape.add(&names::OPERATIONS, &[layer, "synchronous_read_count"], count);
            }
        }
        scrape.add(&names::SERVED, &[layer, "synchronous_bytes_served"], self.served.load(Ordering::Relaxed));
        scrape.add_histogram(&names::MICROSECONDS, &[layer, "synchronous_read"], self.read.read());
        scrape.add_histogram(&names::MICROSECONDS, &[layer, "node_readdir"], self.readdir.read());
    }
}

impl MeterFactory for Metrics {
    fn layer(&self, ztoc: &Digest) -> Arc<dyn LayerMeter> {
        let layer = self.0.of_ztoc.lock().get(ztoc).map(Digest::to_string).unwrap_or_default();
        let meter = Arc::new(Layer {
            metrics: Arc::downgrade(&self.0),
            ztoc: *ztoc,
            layer,
            reads: AtomicU64::new(0),
            on_demand: AtomicU64::new(0),
            background: AtomicU64::new(0),
            background_failed: AtomicU64::new(0),
            mismatches: AtomicU64::new(0),
        });
        keep(&self.0.layers, &meter);
        meter
    }
}

impl LayerMeter for Layer {
    fn count(&self, event: Event, amount: u64) {
        let number = match event {
            Event::Waited => &self.reads,
            Event::SpansRequested(FetchClass::OnDemand | FetchClass::ReadAhead) => &self.on_demand,
            Event::SpansFetched(FetchClass::Background | FetchClass::Prefetch) => &self.background,
            Event::SpansFailed(FetchClass::Background | FetchClass::Prefetch) => &self.background_failed,
            Event::Mismatches => &self.mismatches,
            _ => return,
        };
        number.fetch_add(amount, Ordering::Relaxed);
    }
}

impl Layer {
    fn collect(&self, scrape: &mut Scrape) {
        for (operation, number) in [
            ("reads_that_waited", &self.reads),
            ("synchronous_read_remote_registry_fetch_count", &self.on_demand),
            ("background_span_fetch_count", &self.background),
            ("background_span_fetch_failure_count", &self.background_failed),
            ("span_digest_mismatch_count", &self.mismatches),
        ] {
            scrape.add(&names::OPERATIONS, &[&self.layer, operation], number.load(Ordering::Relaxed));
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.upgrade() {
            metrics.of_ztoc.lock().remove(&self.ztoc);
        }
    }
}

impl soci_registry::Meters for Metrics {
    fn answered(&self, operation: soci_registry::Operation, status: u16, took: Duration) {
        let class = match status {
            200..=299 => "2xx",
            300..=399 => "3xx",
            401 => "401",
            403 => "403",
            404 => "404",
            429 => "429",
            400..=499 => "4xx",
            _ => "5xx",
        };
        let _ = took;
        self.add(&names::REQUESTS, &[operation_name(operation), class], 1);
    }

    fn failed(&self, operation: soci_registry::Operation) {
        self.add(&names::REQUESTS, &[operation_name(operation), "none"], 1);
    }

    fn received(&self, bytes: usize) {
        self.0.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl soci_auth::Meters for Metrics {
    fn resolved(&self, option: &'static str, found: bool) {
        self.add(&names::LOOKUPS, &[option, if found { "found" } else { "none" }], 1);
    }

    fn option_failed(&self, option: &'static str) {
        self.add(&names::LOOKUPS, &[option, "failed"], 1);
    }

    fn rejected(&self, option: &'static str) {
        self.add(&names::LOOKUPS, &[option, "refused"], 1);
    }

    fn token_fetched(&self, success: bool) {
        self.add(&names::GRANTS, &[if success { "granted" } else { "failed" }], 1);
    }
}

fn operation_name(operation: soci_registry::Operation) -> &'static str {
    use soci_registry::Operation as O;
    match operation {
        O::Resolve => "resolve",
        O::Manifest => "manifest",
        O::Referrers => "referrers",
        O::Blob => "blob",
        O::Exists => "exists",
        _ => "upload",
    }
}

fn process(scrape: &mut Scrape) {
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or_default();
    scrape.add(&names::RESIDENT, &[], resident.saturating_mul(page));
    let descriptors = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    scrape.add(&names::DESCRIPTORS, &[], descriptors as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(metrics: &Metrics) -> String {
        let mut scrape = Scrape::default();
        metrics.collect(&mut scrape);
        scrape.text()
    }

    #[test]
    fn series_of_a_layer_have_the_references_names_and_go_with_it() {
        let metrics = Metrics::default();
        let (layer, ztoc) = (Digest::of(b"layer"), Digest::of(b"ztoc"));
        metrics.introduce(&ztoc, &layer);
        let files = metrics.file_system(&layer, Some(&Digest::of(b"image")));
        let reader = MeterFactory::layer(&metrics, &ztoc);
        files.operation(Operation::Read, Duration::from_micros(3), 4096, false);
        files.operation(Operation::Lookup, Duration::from_micros(1), 0, true);
        reader.count(Event::SpansRequested(FetchClass::OnDemand), 2);
        let shown = text(&metrics);
        for line in [
            format!(
                "soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"synchronous_read_count\"}} 1"
            ),
            format!(
                "soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"fuse_node_lookup_failure_count\"}} 1"
            ),
            format!(
                "soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"synchronous_read_remote_registry_fetch_count\"}} 2"
            ),
            format!(
                "soci_fs_bytes_served{{layer=\"{layer}\",operation_type=\"synchronous_bytes_served\"}} 4096"
            ),
            "soci_fs_operation_count{layer=\"\",operation_type=\"local_mount_failure_count\"} 0".to_owned(),
        ] {
            assert!(shown.contains(&line), "{line} in\n{shown}");
        }
        drop((files, reader));
        assert!(!text(&metrics).contains(&layer.to_string()));
    }

    #[test]
    fn every_operation_has_its_place() {
        let places: std::collections::HashSet<_> =
            OPERATIONS.iter().map(|(operation, ..)| *operation).collect();
        assert_eq!(places.len(), OPERATIONS.len());
    }
}
