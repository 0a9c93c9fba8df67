//! One reader of a layer.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use async_trait::async_trait;
use futures::StreamExt;
use smallvec::SmallVec;
use soci_oci::{BlobSource, Digest, FetchClass};
use soci_ztoc::{SpanId, SpanSlice, UncompressedOffset};

use crate::core::{Found, LayerCore};
use crate::meters::Event;
use crate::pool::LayerPool;
use crate::readahead::Access;
use crate::slot::{Admission, Parted, SpanForm};
use crate::sources::SourceId;
use crate::tar_stream::TarStream;
use crate::{RangeRead, ReadChunks, ReadError, ReadErrorKind};

/// How often one read comes again when the work it waited for vanished.
const ROUNDS: usize = 8;
/// Spans that one call of [`LayerReader::expect`] brings.
const EXPECTED: usize = 16;
/// How much of the tar one step of [`LayerReader::tar`] reads.
const TAR_STEP: usize = 1 << 20;

/// Reads one layer. Keeps it open, and its source in use, until dropped.
#[derive(Debug)]
pub struct LayerReader {
    pool: Weak<LayerPool>,
    core: Arc<LayerCore>,
    source: SourceId,
}

/// The parts of spans that make up a read.
type Slices = SmallVec<[SpanSlice; 4]>;

impl LayerReader {
    pub(crate) fn new(pool: Weak<LayerPool>, core: Arc<LayerCore>, source: SourceId) -> Self {
        Self { pool, core, source }
    }

    /// Opens the layer once more: `source` joins those it has, and is asked when they fail.
    pub fn also(&self, source: Arc<dyn BlobSource>) -> Arc<Self> {
        LayerPool::reopen(&self.pool, &self.core, source)
    }

    /// Returns the size of the layer's blob, in bytes.
    pub fn size(&self) -> u64 {
        self.core.spans.compressed_size()
    }

    /// Returns how many bytes of the blob are in the cache, in whichever form; all of them once every span is, though a blob
    /// has some that belong to none.
    pub fn fetched_bytes(&self) -> u64 {
        let spans = self.core.shared.cache.spans(&self.core.ztoc);
        let count = self.core.spans.len();
        let known: Vec<SpanId> = spans.into_iter().filter(|span| span.0 < count).collect();
        if known.len() == count as usize {
            return self.size();
        }
        known.into_iter().map(|span| self.core.compressed_len(span)).sum()
    }

    /// Returns how many bytes of the blob readers touched since the layer was opened, in whole spans, each counted once.
    pub fn needed_bytes(&self) -> u64 {
        self.core.touched.lock().bytes()
    }

    /// Whether every span is in the cache: then no read of this layer needs the network.
    pub fn is_complete(&self) -> bool {
        self.core.is_complete()
    }

    /// Has the layer completed in the background, until it is complete or closes. Returns at once.
    pub fn complete(&self) {
        self.complete_for(&self.core.ztoc);
    }

    /// As [`Self::complete`]; layers with the same `group` share one turn, so that an image with many layers does not
    /// outweigh one with few.
    pub fn complete_for(&self, group: &Digest) {
        self.core.completing.store(true, Ordering::Relaxed);
        self.core.shared.background.add(&self.core, false, *group);
    }

    /// Has `spans` fetched before anything that is done in the background. Ids outside the layer are left out, as are
    /// those that come twice. Returns how many were taken, and at once.
    pub fn prefetch(&self, spans: impl IntoIterator<Item = SpanId>) -> usize {
        let count = self.core.spans.len();
        let mut list = self.core.listed.lock();
        let mut seen = vec![false; count as usize];
        list.iter().for_each(|span| seen[span.0 as usize] = true);
        let mut taken = 0;
        for span in spans {
            match seen.get_mut(span.0 as usize) {
                Some(seen) if !*seen => {
                    *seen = true;
                    list.push_back(span);
                    taken += 1;
                    if list.len() == count as usize {
                        break;
                    }
                }
                _ => {}
            }
        }
        drop(list);
        if taken > 0 {
            self.core.shared.background.add(&self.core, true, self.core.ztoc);
        }
        taken
    }

    /// Has the spans of `ranges` fetched now, as for a sequential reader that is about to come; at most [`EXPECTED`] of
    /// them. What is there or on its way already costs nothing. Returns at once.
    pub fn expect(&self, ranges: impl IntoIterator<Item = Range<UncompressedOffset>>) {
        let core = &self.core;
        let covering = |range| core.spans.covering(range).into_iter().flatten().map(|slice| slice.id);
        let mut spans: Vec<SpanId> = ranges.into_iter().flat_map(covering).take(EXPECTED).collect();
        spans.sort_unstable();
        spans.dedup();
        let bring = |span| core.bring(span, SpanForm::Plain, FetchClass::ReadAhead);
        core.lead(spans.into_iter().filter_map(bring).collect());
    }

    /// Returns the whole tar as a stream; each piece has until `Settings::fetch_timeout` to arrive.
    pub fn tar(self: &Arc<Self>) -> TarStream {
        let reader = Arc::clone(self);
        let stream = futures::stream::try_unfold(0_u64, move |at| {
            let reader = Arc::clone(&reader);
            async move {
                let deadline = Instant::now() + reader.core.shared.settings.fetch_timeout;
                let chunks = reader.read_at(UncompressedOffset(at), TAR_STEP, deadline).await?;
                let next = at + chunks.len() as u64;
                Ok::<_, ReadError>((!chunks.is_empty()).then_some((chunks, next)))
            }
        });
        TarStream::new(stream.flat_map(|read| {
            let pieces: SmallVec<[_; 4]> = match read {
                Ok(chunks) => chunks.iter().cloned().map(Ok).collect(),
                Err(error) => SmallVec::from_iter([Err(error)]),
            };
            futures::stream::iter(pieces)
        }))
    }

    /// Returns the parts of spans that cover a read, which is clamped at the end of the archive.
    fn slices(&self, at: UncompressedOffset, len: usize) -> Result<Slices, ReadError> {
        let size = self.core.spans.uncompressed_size();
        let start = at.0.min(size);
        let end = start.saturating_add(len as u64).min(size);
        let covering = self.core.spans.covering(UncompressedOffset(start)..UncompressedOffset(end));
        Ok(covering
            .map_err(|error| {
                ReadError::because(ReadErrorKind::OutOfBounds, "finding the spans of a read", error)
            })?
            .collect())
    }

    fn note(&self, at: UncompressedOffset, slices: &Slices) -> Vec<crate::slot::FetchPermit> {
        let (Some(first), Some(last)) = (slices.first(), slices.last()) else { return Vec::new() };
        let len = slices.iter().map(|slice| slice.part.len() as u64).sum();
        self.core.note(Access { at: at.0, len, last: last.id }, first.id)
    }

    /// Returns a part that is in memory or cached inflated.
    fn quick(&self, slice: &SpanSlice) -> Option<ReadChunks> {
        let core = &self.core;
        match core.shared.recent.get(core.id, slice.id) {
            Some(bytes) => cut(&bytes, slice),
            None => self.cached(slice),
        }
    }

    fn cached(&self, slice: &SpanSlice) -> Option<ReadChunks> {
        let key = self.core.key(slice.id, SpanForm::Plain);
        self.core.shared.cache.read(&key, slice.part.clone()).map(ReadChunks::from)
    }

    async fn fetch(&self, at: UncompressedOffset, slices: &Slices) -> Result<ReadChunks, ReadError> {
        let core = &self.core;
        let mut parts: SmallVec<[Option<ReadChunks>; 4]> = slices.iter().map(|_| None).collect();
        let mut leads = self.note(at, slices);
        for _ in 0..ROUNDS {
            let mut waits: SmallVec<[_; 4]> = SmallVec::new();
            for (index, slice) in slices.iter().enumerate() {
                let part = &mut parts[index];
                if part.is_some() {
                    continue;
                }
                match core.want(slice.id, slice.part.clone()) {
                    Admission::Ready(Found::Memory(bytes)) => *part = cut(&bytes, slice),
                    Admission::Ready(Found::Cached) => *part = self.cached(slice),
                    Admission::Join(waiter) => waits.extend(waiter.map(|waiter| (waiter, index))),
                    Admission::Lead(permit, waiter) => {
                        leads.push(permit);
                        waits.extend(waiter.map(|waiter| (waiter, index)));
                    }
                }
            }
            core.lead(std::mem::take(&mut leads));
            if !waits.is_empty() {
                let parts = &mut parts;
                let waiting = async {
                    for (waiter, index) in waits {
                        match waiter.part().await {
                            Parted::Chunks(chunks) => parts[index] = Some(chunks),
                            Parted::Failed(error) => return Err(error),
                            Parted::Again => {}
                        }
                    }
                    Ok(())
                };
                core.demanding(FetchClass::OnDemand, waiting).await?;
            }
            if parts.iter().all(Option::is_some) {
                let mut whole = ReadChunks::new();
                parts.into_iter().flatten().for_each(|part| whole.append(part));
                return Ok(whole);
            }
        }
        Err(ReadError::new(ReadErrorKind::Local, format!("the work for a read was abandoned {ROUNDS} times")))
    }
}

fn cut(bytes: &bytes::Bytes, slice: &SpanSlice) -> Option<ReadChunks> {
    (slice.part.end <= bytes.len()).then(|| bytes.slice(slice.part.clone()).into())
}

#[async_trait]
impl RangeRead for LayerReader {
    fn try_read(&self, at: UncompressedOffset, len: usize) -> Option<ReadChunks> {
        let slices = self.slices(at, len).ok()?;
        let mut whole = ReadChunks::new();
        for slice in &slices {
            whole.append(self.quick(slice)?);
        }
        let leads = self.note(at, &slices);
        self.core.lead(leads);
        self.core.meter.count(Event::ServedBytes, whole.len() as u64);
        Some(whole)
    }

    async fn read_at(
        &self,
        at: UncompressedOffset,
        len: usize,
        deadline: Instant,
    ) -> Result<ReadChunks, ReadError> {
        let slices = self.slices(at, len)?;
        self.core.meter.count(Event::Waited, 1);
        match tokio::time::timeout_at(deadline.into(), self.fetch(at, &slices)).await {
            Ok(Ok(chunks)) => {
                self.core.meter.count(Event::ServedBytes, chunks.len() as u64);
                Ok(chunks)
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let message = format!(
                    "reading {len} bytes at {} of the layer with zTOC {}: not there by the deadline",
                    at.0,
                    self.core.ztoc.short()
                );
                Err(ReadError::new(ReadErrorKind::TimedOut, message))
            }
        }
    }
}

impl Drop for LayerReader {
    fn drop(&mut self) {
        LayerPool::release(&self.pool, &self.core, self.source);
    }
}
