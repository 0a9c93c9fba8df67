//! One open layer: what all of its readers share.
//!
//! A layer is open while a [`crate::LayerReader`] of it exists; fetches, read-ahead and background work hold it too but
//! end when it closes.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use soci_oci::{Digest, FetchClass, FetchContext, Priority};
use soci_ztoc::{SpanId, SpanTable};
use tokio_util::sync::CancellationToken;

use crate::mend::{Mending, ZtocFile};
use crate::meters::LayerMeter;
use crate::pool::Shared;
use crate::readahead::{Access, ReadAhead};
use crate::recent::LayerId;
use crate::slot::{Admission, FetchPermit, Slots, SpanForm};
use crate::sources::Sources;
use crate::span_cache::SpanKey;
use crate::touched::Touched;
use crate::{ReadError, fetch, window};

/// An open layer. Its locks are leaves: nothing else is locked under one of them.
#[derive(Debug)]
pub(crate) struct LayerCore {
    pub(crate) id: LayerId,
    pub(crate) ztoc: Digest,
    pub(crate) spans: Arc<SpanTable>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) sources: Sources,
    pub(crate) meter: Arc<dyn LayerMeter>,
    /// Cancelled when the last reader is gone.
    pub(crate) closed: CancellationToken,
    /// The zTOC as it is stored at present.
    pub(crate) file: Mutex<Arc<dyn ZtocFile>>,
    pub(crate) mending: Mending,
    ahead: Mutex<ReadAhead>,
    /// Spans that readers touched.
    pub(crate) touched: Mutex<Touched>,
    /// Spans to be fetched first, by order of a prefetch list.
    pub(crate) listed: Mutex<VecDeque<SpanId>>,
    /// Spans that turned out wrong, with the generation of the sources they came from: background work leaves them out.
    pub(crate) spoiled: Mutex<HashMap<SpanId, u64>>,
    /// Set when there was no room for a span that nobody waited for.
    pub(crate) full: AtomicBool,
    /// Set while spans cannot be written to the cache.
    pub(crate) failing: AtomicBool,
    /// Set while its sources give no bytes.
    pub(crate) barren: AtomicBool,
    /// Set when it is to be completed.
    pub(crate) completing: AtomicBool,
}

/// Where a span that is ready can be had.
#[derive(Debug)]
pub(crate) enum Found {
    /// In memory, whole and inflated.
    Memory(Bytes),
    /// In the cache, in the form that was asked for.
    Cached,
}

impl LayerCore {
    /// Returns the open layer `id` without any source.
    pub(crate) fn new(
        id: LayerId,
        ztoc: Digest,
        file: Arc<dyn ZtocFile>,
        spans: Arc<SpanTable>,
        shared: Arc<Shared>,
    ) -> Self {
        let meter = shared.meters.layer(&ztoc);
        Self {
            id,
            ztoc,
            spans,
            shared,
            slots: Arc::default(),
            sources: Sources::default(),
            meter,
            closed: CancellationToken::new(),
            file: Mutex::new(file),
            mending: Mending::default(),
            ahead: Mutex::default(),
            touched: Mutex::default(),
            listed: Mutex::default(),
            spoiled: Mutex::default(),
            full: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            barren: AtomicBool::new(false),
            completing: AtomicBool::new(false),
        }
    }

    /// Whether a span is to be brought that nobody waits for: it is not there in the form `want`, nobody brings it, and what
    /// the present sources have for it is not known to be wrong.
    pub(crate) fn lacks(&self, span: SpanId, want: SpanForm) -> bool {
        !self.has(span, want) && self.is_sound(span) && !self.slots.busy(span)
    }

    fn is_sound(&self, span: SpanId) -> bool {
        let generation = self.sources.generation();
        self.spoiled.lock().get(&span) != Some(&generation)
    }

    /// Returns the cache's name for a span.
    pub(crate) fn key(&self, span: SpanId, form: SpanForm) -> SpanKey {
        SpanKey { ztoc: self.ztoc, span, form }
    }

    /// Returns what a message calls a span.
    pub(crate) fn name(&self, span: SpanId) -> String {
        format!("span {} of the layer with zTOC {}", span.0, self.ztoc.short())
    }

    /// Whether a span is there in the form `want`, or better.
    pub(crate) fn has(&self, span: SpanId, want: SpanForm) -> bool {
        self.shared.cache.contains(&self.key(span, SpanForm::Plain))
            || (want == SpanForm::Compressed
                && self.shared.cache.contains(&self.key(span, SpanForm::Compressed)))
    }

    /// Asks for `part` of a span, inflated.
    pub(crate) fn want(&self, span: SpanId, part: std::ops::Range<usize>) -> Admission<Found> {
        let admission = self.slots.admit(span, SpanForm::Plain, Some(part), FetchClass::OnDemand, || {
            let memory = self.shared.recent.get(self.id, span).map(Found::Memory);
            memory.or_else(|| self.has(span, SpanForm::Plain).then_some(Found::Cached))
        });
        if matches!(admission, Admission::Join(_)) {
            self.shared.budget.kick();
        }
        admission
    }

    /// Asks for a span to be brought. Returns the permit when the caller has to bring it.
    pub(crate) fn bring(&self, span: SpanId, form: SpanForm, class: FetchClass) -> Option<FetchPermit> {
        let ready = || {
            let memory = form == SpanForm::Plain && self.shared.recent.contains(self.id, span);
            (memory || self.has(span, form)).then_some(())
        };
        match self.slots.admit(span, form, None, class, ready) {
            Admission::Lead(permit, _) => Some(permit),
            Admission::Ready(()) | Admission::Join(_) => None,
        }
    }

    /// Takes note of a read. Returns the permits for what a sequential reader will need next.
    pub(crate) fn note(self: &Arc<Self>, access: Access, first: SpanId) -> Vec<FetchPermit> {
        self.touched.lock().note(first, access.last, |span| self.compressed_len(span));
        let next = self.ahead.lock().note(access, self.spans.len(), self.shared.settings.read_ahead);
        let mut permits = Vec::new();
        let mut cached = Vec::new();
        for span in next.filter(|span| *span > first.0).map(SpanId) {
            match self.bring(span, SpanForm::Plain, FetchClass::ReadAhead) {
                Some(permit) => permits.push(permit),
                None => cached.push(self.key(span, SpanForm::Plain)),
            }
        }
        cached.retain(|key| self.shared.cache.contains(key));
        if !cached.is_empty() {
            // Asking the kernel takes a millisecond a span, which the reader need not wait for.
            let shared = Arc::clone(&self.shared);
            let work = move || cached.iter().for_each(|key| shared.cache.will_need(key));
            self.shared.workers.submit(Priority::new(FetchClass::ReadAhead), work);
        }
        permits
    }

    /// Sets work on `permits` going.
    pub(crate) fn lead(self: &Arc<Self>, permits: Vec<FetchPermit>) {
        if !permits.is_empty() {
            fetch::lead(self, permits);
        }
    }

    /// Whether it may have spans brought on a guess while readers wait: it is to be completed, as fast as that goes.
    pub(crate) fn is_hurried(&self) -> bool {
        self.completing.load(Ordering::Relaxed) && self.shared.settings.background.bytes_per_second.is_none()
    }

    /// Returns what the fetch of a range may cost.
    pub(crate) fn context(&self, class: FetchClass) -> FetchContext {
        FetchContext::new(Instant::now() + self.shared.settings.fetch_timeout, class)
    }

    /// Whether background work steps aside for work of `class`: while there is hope that bytes come. Somebody who reads
    /// again and again what cannot be had would else keep every other image from being completed.
    pub(crate) fn is_pressing(&self, class: FetchClass) -> bool {
        class > FetchClass::Background && !self.barren.load(Ordering::Relaxed)
    }

    /// Waits for `work` of `class`, which counts as demand for as long as it may.
    pub(crate) async fn demanding<T>(&self, class: FetchClass, work: impl Future<Output = T>) -> T {
        if self.is_pressing(class) { self.shared.demand.during(work).await } else { work.await }
    }

    /// Returns the zTOC as it is stored at present.
    pub(crate) fn file(&self) -> Arc<dyn ZtocFile> {
        self.file.lock().clone()
    }

    /// Returns the window of a span. Blocks on the local disk.
    pub(crate) fn window(&self, span: SpanId) -> Result<soci_ztoc::Window, ReadError> {
        window::load(self.file().path(), &self.spans, span)
    }

    /// Returns how long a span is when inflated.
    pub(crate) fn plain_len(&self, span: SpanId) -> u64 {
        let range = self.spans.uncompressed(span);
        range.end.0 - range.start.0
    }

    /// Returns how long a span is in the blob.
    pub(crate) fn compressed_len(&self, span: SpanId) -> u64 {
        let range = self.spans.compressed(span);
        range.end.0 - range.start.0
    }

    /// Remembers that what the present sources have for a span is wrong.
    pub(crate) fn spoil(&self, span: SpanId) {
        self.spoiled.lock().insert(span, self.sources.generation());
    }

    /// Whether every span is in the cache.
    pub(crate) fn is_complete(&self) -> bool {
        (0..self.spans.len()).all(|span| self.has(SpanId(span), SpanForm::Compressed))
    }

    /// Ends everything that is done for this layer.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        self.shared.recent.forget(self.id);
    }

    /// Whether there was no room for background work since the last call.
    pub(crate) fn take_full(&self) -> bool {
        self.full.swap(false, Ordering::Relaxed)
    }
}
