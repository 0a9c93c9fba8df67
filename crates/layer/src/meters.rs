//! What a layer counts. The daemon turns it into metrics; by default nobody listens.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use soci_oci::{Digest, FetchClass};

/// One thing that happened in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// A read had to wait; the amount is one.
    Waited,
    /// Bytes went out to a reader.
    ServedBytes,
    /// Spans were asked of a source, by what they were wanted for.
    SpansRequested(FetchClass),
    /// A range was opened at a source.
    Requests,
    /// Spans arrived and were verified.
    SpansFetched(FetchClass),
    /// Compressed bytes of spans that were verified.
    BytesFetched(FetchClass),
    /// Spans could not be had.
    SpansFailed(FetchClass),
    /// Spans whose bytes were not what the zTOC promises.
    Mismatches,
    /// Spans that could not be written to the cache and were served from memory.
    NotCached,
}

/// Receives what one layer counts. Dropped when the layer closes: its series go then.
pub trait LayerMeter: Send + Sync + fmt::Debug {
    /// Adds `amount` to the count of `event`. Called often: must be cheap and must not block.
    fn count(&self, event: Event, amount: u64);

    /// The layer was completed in the background, `elapsed` after that was asked for.
    fn completed(&self, elapsed: Duration) {
        let _ = elapsed;
    }
}

/// Makes the meters of layers.
pub trait MeterFactory: Send + Sync + fmt::Debug {
    /// Returns the meter of the layer with this zTOC.
    fn layer(&self, ztoc: &Digest) -> Arc<dyn LayerMeter>;
}

/// Where counts go; to nobody by default.
#[derive(Debug, Clone, Default)]
pub struct Meters(Option<Arc<dyn MeterFactory>>);

impl Meters {
    /// Returns meters made by `factory`.
    pub fn new(factory: Arc<dyn MeterFactory>) -> Self {
        Self(Some(factory))
    }

    /// Returns the meter of the layer with this zTOC.
    pub(crate) fn layer(&self, ztoc: &Digest) -> Arc<dyn LayerMeter> {
        match &self.0 {
            Some(factory) => factory.layer(ztoc),
            None => Arc::new(Nobody),
        }
    }
}

#[derive(Debug)]
struct Nobody;

impl LayerMeter for Nobody {
    fn count(&self, _event: Event, _amount: u64) {}
}
