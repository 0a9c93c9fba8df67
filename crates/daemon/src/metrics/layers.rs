//! What the reader of one zTOC counts, whatever it is mounted for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use soci_layer::{Event, LayerMeter};
use soci_oci::{Digest, FetchClass};

use super::text::Scrape;
use super::{Inner, Series, Timing, names};

/// What bytes may be fetched for, as a label's value.
const CLASSES: [(FetchClass, &str); 4] = [
    (FetchClass::OnDemand, "on-demand"),
    (FetchClass::ReadAhead, "read-ahead"),
    (FetchClass::Prefetch, "prefetch"),
    (FetchClass::Background, "background"),
];

/// The counts of one open layer; they go when it closes.
#[derive(Debug)]
pub(super) struct Layer {
    metrics: Weak<Inner>,
    ztoc: Digest,
    layer: String,
    series: Option<Arc<Series>>,
    reads: AtomicU64,
    on_demand: AtomicU64,
    background: AtomicU64,
    background_failed: AtomicU64,
    mismatches: AtomicU64,
    not_cached: AtomicU64,
    fetched: [AtomicU64; CLASSES.len()],
}

impl Layer {
    pub(super) fn new(metrics: Weak<Inner>, ztoc: Digest, layer: Option<(Digest, Arc<Series>)>) -> Self {
        let (layer, series) = layer.unzip();
        Self {
            metrics,
            ztoc,
            layer: layer.map(|layer| layer.to_string()).unwrap_or_default(),
            series,
            reads: AtomicU64::new(0),
            on_demand: AtomicU64::new(0),
            background: AtomicU64::new(0),
            background_failed: AtomicU64::new(0),
            mismatches: AtomicU64::new(0),
            not_cached: AtomicU64::new(0),
            fetched: Default::default(),
        }
    }

    pub(super) fn collect(&self, scrape: &mut Scrape) {
        for (operation, number) in [
            ("reads_that_waited", &self.reads),
            ("synchronous_read_remote_registry_fetch_count", &self.on_demand),
            ("background_span_fetch_count", &self.background),
            ("background_span_fetch_failure_count", &self.background_failed),
            ("span_digest_mismatch_count", &self.mismatches),
            ("span_not_cached_count", &self.not_cached),
        ] {
            scrape.add(&names::OPERATIONS, &[&self.layer, operation], number.load(Ordering::Relaxed));
        }
        for ((_, class), bytes) in CLASSES.iter().zip(&self.fetched) {
            scrape.add(&names::LAYER_FETCHED, &[&self.layer, class], bytes.load(Ordering::Relaxed));
        }
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
            Event::NotCached => &self.not_cached,
            Event::BytesFetched(class) => {
                let place = CLASSES.iter().position(|(known, _)| *known == class);
                match place.and_then(|place| self.fetched.get(place)) {
                    Some(number) => number,
                    None => return,
                }
            }
            _ => return,
        };
        number.fetch_add(amount, Ordering::Relaxed);
    }

    fn completed(&self, elapsed: Duration) {
        if let Some(series) = &self.series {
            series.observe(Timing::BackgroundFetch, elapsed);
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.upgrade() {
            metrics.of_ztoc.lock().remove(&self.ztoc);
            metrics.layers.prune();
        }
    }
}
