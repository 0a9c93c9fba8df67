//! The counters that this crate bumps. The daemon fills them; the default counts nothing.

use std::fmt;
use std::time::Duration;

use soci_oci::Digest;

use crate::Operation;

/// Counters. Labels are bounded: operations and status classes. A digest is for those who know which ones they count.
pub trait Meters: Send + Sync + fmt::Debug {
    /// A host (or the storage it redirected to) answered the head of a request, so long after it was sent. A blob that is
    /// read goes by its digest.
    fn answered(&self, _operation: Operation, _blob: Option<&Digest>, _status: u16, _took: Duration) {}
    /// A request got no answer.
    fn failed(&self, _operation: Operation) {}
    /// A request is tried again, or a body resumed.
    fn retried(&self, _operation: Operation) {}
    /// A blob was redirected to a location that will be remembered.
    fn located(&self) {}
    /// A remembered location was refused before its time.
    fn location_lost(&self) {}
    /// Bytes of a blob arrived.
    fn received(&self, _bytes: usize) {}
}

/// Counts nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMeters;

impl Meters for NoMeters {}
