//! What the daemon counts, and the endpoint that shows it.
//!
//! Layers count for themselves and are looked at when somebody scrapes; when a layer is gone its series are. Label sets are
//! bounded: digests of what is mounted, and words from fixed lists.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use soci_fs::FsMeter;
use soci_layer::{LayerMeter, MeterFactory};
use soci_oci::Digest;
use soci_snapshotter::Verdict;

pub(crate) mod auth;
pub mod document;
mod files;
mod layers;
mod living;
pub mod names;
mod series;
pub mod serve;
pub mod text;

use files::{FileSystem, OfImage, OfLayer};
use layers::Layer;
use living::Living;
use series::Millis;
pub use series::{Series, Timing};
use text::{Family, Scrape};

/// Numbers of the whole daemon, by family and label values. Label values come from fixed lists.
type Global = BTreeMap<(&'static str, Vec<&'static str>), (&'static Family, u64)>;

/// Everything that is counted. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    global: Mutex<Global>,
    received: AtomicU64,
    file_systems: Living<OfLayer>,
    images: Living<OfImage>,
    layers: Living<Layer>,
    /// The layer of each zTOC, for readers, who only know the latter.
    of_ztoc: Mutex<BTreeMap<Digest, Digest>>,
    series: Arc<series::All>,
    /// How long registries took to answer requests for blobs that nobody has series of: with content, and with another
    /// place.
    answers: Millis,
    redirects: Millis,
    auth: auth::Numbers,
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

    /// Returns the durations of the layer or index `digest`, which are shown while they are held.
    pub fn series(&self, digest: &Digest) -> Arc<Series> {
        self.0.series.of(digest)
    }

    /// Forgets which layer `ztoc` was of, once nothing of it is left.
    pub fn forget(&self, ztoc: &Digest) {
        self.0.of_ztoc.lock().remove(ztoc);
    }

    /// Returns the meter of the file system of `layer`, in the image with this manifest, and says that the layer's reader
    /// goes by `ztoc`. Called before the layer is opened.
    pub fn file_system(
        &self,
        ztoc: &Digest,
        layer: &Digest,
        index: &Digest,
        image: &Digest,
    ) -> Arc<dyn FsMeter> {
        self.0.of_ztoc.lock().insert(*ztoc, *layer);
        let series = [self.series(layer), self.series(index)];
        Arc::new(FileSystem::new(&self.0, layer, image, series))
    }

    /// Adds everything that is counted to `scrape`.
    pub fn collect(&self, scrape: &mut Scrape) {
        for operation in [
            "fuse_mount_failure_count",
            "local_mount_failure_count",
            "background_fetch_work_queue_evicted",
            "preresolve_queue_drop",
        ] {
            scrape.add(&names::OPERATIONS, &["", operation], 0);
        }
        for ((_, labels), (family, value)) in &*self.0.global.lock() {
            scrape.add(family, labels, *value);
        }
        scrape.add(&names::RECEIVED, &[], self.0.received.load(Ordering::Relaxed));
        scrape.add_histogram(&names::MILLISECONDS, &["", "remote_registry_get"], self.0.answers.read());
        scrape.add_histogram(&names::MILLISECONDS, &["", "blob_redirect"], self.0.redirects.read());
        self.0.series.collect(scrape);
        for layer in self.0.file_systems.all() {
            layer.collect(scrape);
        }
        for image in self.0.images.all() {
            image.collect(scrape);
        }
        for layer in self.0.layers.all() {
            layer.collect(scrape);
        }
        self.0.auth.collect(scrape);
        process(scrape);
    }
}

fn millis(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

fn micros(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX)
}

impl MeterFactory for Metrics {
    fn layer(&self, ztoc: &Digest) -> Arc<dyn LayerMeter> {
        let layer = self.0.of_ztoc.lock().get(ztoc).copied();
        let layer = layer.map(|layer| (layer, self.series(&layer)));
        let meter = Arc::new(Layer::new(Arc::downgrade(&self.0), *ztoc, layer));
        self.0.layers.add(&meter);
        meter
    }
}

impl soci_registry::Meters for Metrics {
    fn answered(
        &self,
        operation: soci_registry::Operation,
        blob: Option<&Digest>,
        status: u16,
        took: Duration,
    ) {
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
        let timed = match (operation, status) {
            (soci_registry::Operation::Blob, 200..=299) => Some((Timing::RegistryGet, &self.0.answers)),
            (soci_registry::Operation::Blob, 300..=399) => Some((Timing::BlobRedirect, &self.0.redirects)),
            _ => None,
        };
        if let Some((timing, others)) = timed {
            match blob.and_then(|blob| self.0.series.known(blob)) {
                Some(series) => series.observe(timing, took),
                None => others.observe(millis(took)),
            }
        }
        self.add(&names::REQUESTS, &[operation_name(operation), class], 1);
    }

    fn failed(&self, operation: soci_registry::Operation) {
        self.add(&names::REQUESTS, &[operation_name(operation), "none"], 1);
    }

    fn received(&self, bytes: usize) {
        self.0.received.fetch_add(bytes as u64, Ordering::Relaxed);
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
    use soci_fs::Operation;
    use soci_layer::Event;
    use soci_oci::FetchClass;

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
        let files = metrics.file_system(&ztoc, &layer, &Digest::of(b"index"), &Digest::of(b"image"));
        let reader = MeterFactory::layer(&metrics, &ztoc);
        files.operation(Operation::Read, Duration::from_micros(3), 4096, false);
        files.operation(Operation::Lookup, Duration::from_micros(1), 0, true);
        reader.count(Event::SpansRequested(FetchClass::OnDemand), 2);
        reader.count(Event::BytesFetched(FetchClass::Background), 7);
        reader.completed(Duration::from_millis(3));
        metrics.series(&layer).observe(Timing::Mount, Duration::from_millis(5));
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
            format!("soci_layer_fetched_bytes_total{{layer=\"{layer}\",class=\"background\"}} 7"),
            format!(
                "soci_fs_operation_duration_milliseconds_bucket{{layer=\"{layer}\",operation_type=\"background_fetch\",le=\"4\"}} 1"
            ),
            format!(
                "soci_fs_operation_duration_milliseconds_sum{{layer=\"{layer}\",operation_type=\"mount\"}} 5"
            ),
        ] {
            assert!(shown.contains(&line), "{line} in\n{shown}");
        }
        drop((files, reader));
        let left = text(&metrics);
        assert!(!left.contains(&layer.to_string()), "{left}");
        let kept = (metrics.0.file_systems.len(), metrics.0.images.len(), metrics.0.layers.len());
        assert_eq!(kept, (0, 0, 0), "memory of it is kept");
    }

    #[test]
    fn a_layer_of_two_mounts_keeps_its_series_until_the_second_is_gone() {
        let metrics = Metrics::default();
        let (layer, ztoc, index) = (Digest::of(b"layer"), Digest::of(b"ztoc"), Digest::of(b"index"));
        let mount = |image: &[u8]| metrics.file_system(&ztoc, &layer, &index, &Digest::of(image));
        let (one, two) = (mount(b"one"), mount(b"two"));
        one.operation(Operation::Read, Duration::from_micros(3), 4096, false);
        two.operation(Operation::Read, Duration::from_micros(3), 100, false);
        metrics.series(&layer).observe(Timing::Mount, Duration::from_secs(100));
        drop(one);
        let shown = text(&metrics);
        assert!(
            shown.contains(&format!("layer=\"{layer}\",operation_type=\"mount\",le=\"32768\"}} 0")),
            "{shown}"
        );
        assert!(
            shown.contains(&format!("layer=\"{layer}\",operation_type=\"mount\",le=\"+Inf\"}} 1")),
            "{shown}"
        );
        assert!(!shown.contains(&Digest::of(b"one").to_string()));
        let served = format!(
            "soci_fs_bytes_served{{layer=\"{layer}\",operation_type=\"synchronous_bytes_served\"}} 4196"
        );
        assert!(shown.contains(&served), "a counter fell: {shown}");
        drop(two);
        assert!(!text(&metrics).contains(&layer.to_string()));
    }
}
