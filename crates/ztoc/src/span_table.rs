//! The spans of a layer: their ranges in both streams, their digests, and which of them cover a range.

use std::ops::Range;

use soci_oci::Digest;

use crate::offset::{CompressedOffset, SpanId, UncompressedOffset};
use crate::window::{WindowHash, WindowRef};

/// How a layer's tar is compressed, of the ways a zTOC can describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// One or more gzip members.
    Gzip,
    /// Not at all.
    Uncompressed,
}

/// Size of the largest file that counts as small, in bytes.
pub(crate) const SMALL_FILE: u64 = 1 << 20;

/// One span. `output` strictly increases from span to span, and so does the compressed range.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    /// Compressed offset of its first whole byte.
    pub(crate) input: u64,
    /// Uncompressed offset of its first byte.
    pub(crate) output: u64,
    /// Leading bits taken from the byte before `input`.
    pub(crate) bits: u8,
    pub(crate) digest: Digest,
    /// Where its window is in the zTOC, 0 for none (a zTOC begins with an offset, never with a window).
    pub(crate) window_at: u64,
    pub(crate) window_hash: WindowHash,
    /// A small file has bytes in it.
    pub(crate) small_files: bool,
}

impl Span {
    /// Compressed offset of its first byte, which it may share with the span before.
    pub(crate) fn start(&self) -> u64 {
        self.input - u64::from(self.bits != 0)
    }
}

/// The spans of one layer; validated, immutable, independent of the [`Ztoc`](crate::Ztoc) it came from.
///
/// There is at least one span. A layer's tar may end before its last spans do (padding after the end of the archive
/// belongs to no file): uncompressed ranges are cut at the end of the archive, so late ones can be empty.
#[derive(Debug)]
pub struct SpanTable {
    pub(crate) compression: Compression,
    pub(crate) compressed_size: u64,
    pub(crate) uncompressed_size: u64,
    pub(crate) span_size: u64,
    pub(crate) spans: Vec<Span>,
}

/// A range that is not inside the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bytes {}..{} are not inside the archive of {size} bytes", start.0, end.0)]
pub struct SpanError {
    /// Begin of the range asked for.
    pub start: UncompressedOffset,
    /// End of the range asked for.
    pub end: UncompressedOffset,
    /// Size of the archive.
    pub size: u64,
}

/// A part of a span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanSlice {
    /// The span.
    pub id: SpanId,
    /// Bytes of the span's uncompressed content, counted from its begin; never empty.
    pub part: Range<usize>,
}

impl SpanTable {
    /// Number of spans, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a table is never empty")]
    pub fn len(&self) -> u32 {
        u32::try_from(self.spans.len()).unwrap_or(u32::MAX)
    }

    /// How the layer is compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Size of the layer blob.
    pub fn compressed_size(&self) -> u64 {
        self.compressed_size
    }

    /// Size of the archive: up to and with its two blocks of zeros, without padding after them.
    pub fn uncompressed_size(&self) -> u64 {
        self.uncompressed_size
    }

    /// The span size that the builder was asked for; spans of gzip layers are a little larger.
    pub fn span_size(&self) -> u64 {
        self.span_size
    }

    /// All ids, in order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = SpanId> + DoubleEndedIterator + use<> {
        (0..self.spans.len()).map(|index| SpanId(u32::try_from(index).unwrap_or(u32::MAX)))
    }

    /// The id, if there is such a span. Ids from elsewhere (a prefetch artifact) must pass through here.
    pub fn id(&self, id: u32) -> Option<SpanId> {
        (id < self.len()).then_some(SpanId(id))
    }

    /// Ids come from this table; one from elsewhere is taken for the last span.
    fn index(&self, id: SpanId) -> usize {
        usize::try_from(id.0).unwrap_or(usize::MAX).min(self.spans.len() - 1)
    }

    pub(crate) fn span(&self, id: SpanId) -> &Span {
        &self.spans[self.index(id)]
    }

    /// Bytes of the layer blob before the first span: the header of the first gzip member. Empty for a plain tar.
    pub fn head(&self) -> Range<CompressedOffset> {
        CompressedOffset(0)..CompressedOffset(self.spans[0].start())
    }

    /// Bytes of the layer blob that hold the span. The last byte may also be the first of the next span.
    pub fn compressed(&self, id: SpanId) -> Range<CompressedOffset> {
        let end = self.spans.get(self.index(id) + 1).map_or(self.compressed_size, |next| next.input);
        CompressedOffset(self.span(id).start())..CompressedOffset(end)
    }

    /// Bytes of the archive that the span holds; disjoint from its neighbours'.
    pub fn uncompressed(&self, id: SpanId) -> Range<UncompressedOffset> {
        let start = self.span(id).output.min(self.uncompressed_size);
        let end = self.end(id).min(self.uncompressed_size);
        UncompressedOffset(start)..UncompressedOffset(end)
    }

    /// Where the next span begins, or the archive ends.
    fn end(&self, id: SpanId) -> u64 {
        self.spans.get(self.index(id) + 1).map_or(self.uncompressed_size, |next| next.output)
    }

    /// Whether decoding the span may yield more than its uncompressed range: padding after the archive.
    pub(crate) fn open_ended(&self, id: SpanId) -> bool {
        self.index(id) + 1 == self.spans.len() || self.end(id) > self.uncompressed_size
    }

    /// Digest of the span's compressed bytes.
    pub fn digest(&self, id: SpanId) -> &Digest {
        &self.span(id).digest
    }

    /// The span that holds the byte at `offset`; the last one for offsets past the end. O(log n).
    pub fn at(&self, offset: UncompressedOffset) -> SpanId {
        let after = self.spans.partition_point(|span| span.output <= offset.0);
        SpanId(u32::try_from(after.saturating_sub(1)).unwrap_or(u32::MAX))
    }

    /// Returns the spans that cover `range`, each with the part of the span to use.
    ///
    /// Offsets count bytes of the uncompressed tar; `range` is half open, and an empty range yields nothing. Parts come
    /// in order, are not empty, and their lengths add up to the range. O(log n + k). Never blocks.
    ///
    /// # Errors
    /// [`SpanError`] if `range` reaches past the archive or is reversed.
    ///
    /// Source: `docs/ztoc-format.md`, "Spans".
    pub fn covering(&self, range: Range<UncompressedOffset>) -> Result<SpanSlices<'_>, SpanError> {
        if range.start > range.end || range.end.0 > self.uncompressed_size {
            return Err(SpanError { start: range.start, end: range.end, size: self.uncompressed_size });
        }
        Ok(SpanSlices { table: self, next: self.at(range.start), range })
    }

    /// Whether a file of at most 1 MiB, its header included, has bytes in the span. Programs read such files whole and one
    /// beside the other; what lies amid a large file is sought out, or never needed.
    pub fn has_small_files(&self, id: SpanId) -> bool {
        self.span(id).small_files
    }

    /// Marks the spans of a small file whose header begins at `header` and whose data end at `end`. Files come in the order of
    /// the tar; `from`, at first 0, is moved on to the first span of this one.
    pub(crate) fn mark_small_file(&mut self, header: u64, end: u64, from: &mut usize) {
        while self.spans.get(*from + 1).is_some_and(|next| next.output <= header) {
            *from += 1;
        }
        let spans = self.spans.get_mut(*from..).unwrap_or_default();
        spans.iter_mut().take_while(|span| span.output < end).for_each(|span| span.small_files = true);
    }

    /// Where the span's window is.
    pub fn window(&self, id: SpanId) -> WindowRef {
        let span = self.span(id);
        let len = if span.window_at == 0 { 0 } else { crate::window::WINDOW_LEN as u64 };
        WindowRef { range: span.window_at..span.window_at + len, hash: span.window_hash }
    }
}

/// Iterator of [`SpanTable::covering`].
#[derive(Debug, Clone)]
pub struct SpanSlices<'a> {
    table: &'a SpanTable,
    next: SpanId,
    range: Range<UncompressedOffset>,
}

impl Iterator for SpanSlices<'_> {
    type Item = SpanSlice;

    fn next(&mut self) -> Option<SpanSlice> {
        if self.range.is_empty() {
            return None;
        }
        let id = self.next;
        let span = self.table.uncompressed(id);
        let end = self.range.end.min(span.end);
        // Decoding checked that a span's length fits a usize.
        let within =
            |offset: UncompressedOffset| usize::try_from(offset.0 - span.start.0).unwrap_or(usize::MAX);
        let part = within(self.range.start)..within(end);
        self.range.start = end;
        self.next = SpanId(id.0 + 1);
        Some(SpanSlice { id, part })
    }
}
