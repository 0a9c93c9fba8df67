//! What the file system of one mount counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use soci_fs::{FsMeter, Operation};

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

/// The counts of one mount; they go with it.
#[derive(Debug)]
pub(super) struct FileSystem {
    metrics: Weak<Inner>,
    layer: String,
    image: String,
    /// Keeps the series of layer and index for as long as the mount.
    _of_layer: Arc<Series>,
    _of_index: Arc<Series>,
    counts: [AtomicU64; OPERATIONS.len()],
    failures: [AtomicU64; OPERATIONS.len()],
    served: AtomicU64,
    read: Micros,
    readdir: Micros,
}

impl FileSystem {
    pub(super) fn new(
        metrics: Weak<Inner>,
        layer: String,
        image: String,
        of_layer: Arc<Series>,
        of_index: Arc<Series>,
    ) -> Self {
        Self {
            metrics,
            layer,
            image,
            _of_layer: of_layer,
            _of_index: of_index,
            counts: Default::default(),
            failures: Default::default(),
            served: AtomicU64::new(0),
            read: Histogram::default(),
            readdir: Histogram::default(),
        }
    }

    pub(super) fn collect(&self, scrape: &mut Scrape) {
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

impl Drop for FileSystem {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.upgrade() {
            metrics.files.prune();
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
