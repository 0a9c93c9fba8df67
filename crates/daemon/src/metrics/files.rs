//! What file systems count: by layer and by image.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use soci_fs::{FsMeter, Operation};
use soci_oci::Digest;

use super::text::{Histogram, Scrape};
use super::{Inner, Series, micros, names};

/// Powers of two of microseconds, from one to 33 s, and one bucket for the rest.
type Micros = Histogram<27>;

/// Operations, with the names under which they are counted and their failures are.
const OPERATIONS: [(Operation, &str, &str); 11] = [
    (Operation::Lookup, "node.Lookup", "fuse_node_lookup_failure_count"),
    (Operation::Getattr, "node.Getattr", "fuse_node_getattr_failure_count"),
    (Operation::GetattrOfFile, "file.Getattr", "fuse_file_getattr_failure_count"),
    (Operation::GetattrOfWhiteout, "whiteout.Getattr", "fuse_whiteout_getattr_failure_count"),
    (Operation::Readlink, "node.Readlink", "fuse_unknown_operation_failure_count"),
    (Operation::Open, "node.Open", "fuse_node_open_failure_count"),
    (Operation::Read, "file.Read", "fuse_file_read_failure_count"),
    (Operation::Readdir, "node.Readdir", "fuse_node_readdir_failure_count"),
    (Operation::Getxattr, "node.Getxattr", "fuse_unknown_operation_failure_count"),
    (Operation::Listxattr, "node.Listxattr", "fuse_node_listxattr_failure_count"),
    (Operation::Statfs, "node.Statfs", "fuse_unknown_operation_failure_count"),
];

/// How often each operation was done.
#[derive(Debug, Default)]
struct Counts([AtomicU64; OPERATIONS.len()]);

impl Counts {
    fn add(&self, place: usize) {
        self.0[place].fetch_add(1, Ordering::Relaxed);
    }

    fn of(&self, place: usize) -> u64 {
        self.0[place].load(Ordering::Relaxed)
    }
}

/// What all mounts of one layer count together; it goes with the last of them, so that no number falls with one of several.
#[derive(Debug)]
pub(super) struct OfLayer {
    metrics: Weak<Inner>,
    layer: Digest,
    counts: Counts,
    failures: Counts,
    served: AtomicU64,
    read: Micros,
    readdir: Micros,
}

/// What all layers of one image count together.
#[derive(Debug)]
pub(super) struct OfImage {
    metrics: Weak<Inner>,
    image: Digest,
    counts: Counts,
}

/// The meter of one mount.
#[derive(Debug)]
pub(super) struct FileSystem {
    layer: Arc<OfLayer>,
    image: Arc<OfImage>,
    /// Keeps the series of layer and index for as long as the mount.
    _series: [Arc<Series>; 2],
}

impl FileSystem {
    pub(super) fn new(
        metrics: &Arc<Inner>,
        layer: &Digest,
        image: &Digest,
        series: [Arc<Series>; 2],
    ) -> Self {
        let layer = metrics.file_systems.find_or_add(
            |known| known.layer == *layer,
            || OfLayer {
                metrics: Arc::downgrade(metrics),
                layer: *layer,
                counts: Counts::default(),
                failures: Counts::default(),
                served: AtomicU64::new(0),
                read: Histogram::default(),
                readdir: Histogram::default(),
            },
        );
        let image = metrics.images.find_or_add(
            |known| known.image == *image,
            || OfImage { metrics: Arc::downgrade(metrics), image: *image, counts: Counts::default() },
        );
        Self { layer, image, _series: series }
    }
}

impl OfLayer {
    pub(super) fn collect(&self, scrape: &mut Scrape) {
        let layer = &self.layer.to_string();
        for (place, (operation, _, failure)) in OPERATIONS.iter().enumerate() {
            scrape.add(&names::OPERATIONS, &[layer, failure], self.failures.of(place));
            if *operation == Operation::Read {
                scrape.add(&names::OPERATIONS, &[layer, "synchronous_read_count"], self.counts.of(place));
            }
        }
        scrape.add(&names::SERVED, &[layer, "synchronous_bytes_served"], self.served.load(Ordering::Relaxed));
        scrape.add_histogram(&names::MICROSECONDS, &[layer, "synchronous_read"], self.read.read());
        scrape.add_histogram(&names::MICROSECONDS, &[layer, "node_readdir"], self.readdir.read());
    }
}

impl OfImage {
    pub(super) fn collect(&self, scrape: &mut Scrape) {
        let image = &self.image.to_string();
        for (place, (_, name, _)) in OPERATIONS.iter().enumerate() {
            scrape.add(&names::IMAGE_OPERATIONS, &[image, name], self.counts.of(place));
        }
    }
}

impl FsMeter for FileSystem {
    fn operation(&self, operation: Operation, elapsed: Duration, bytes: u64, failed: bool) {
        let place = OPERATIONS.iter().position(|(known, ..)| *known == operation);
        if let Some(place) = place {
            self.layer.counts.add(place);
            self.image.counts.add(place);
            if failed {
                self.layer.failures.add(place);
            }
        }
        match operation {
            Operation::Read => {
                self.layer.served.fetch_add(bytes, Ordering::Relaxed);
                self.layer.read.observe(micros(elapsed));
            }
            Operation::Readdir => self.layer.readdir.observe(micros(elapsed)),
            _ => {}
        }
    }
}

impl Drop for OfLayer {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.upgrade() {
            metrics.file_systems.prune();
        }
    }
}

impl Drop for OfImage {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.upgrade() {
            metrics.images.prune();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_place() {
        let places: std::collections::HashSet<_> =
            OPERATIONS.iter().map(|(operation, ..)| *operation).collect();
        assert_eq!(places.len(), OPERATIONS.len());
    }
}
