//! A decoded zTOC: validated once, then read without errors.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use soci_oci::Digest;

use crate::entry::{Entry, EntryKind, low_u32, mode_bits};
use crate::error::{EntryFault, ZtocError};
use crate::limits::{DecodeLimits, MAX_EXPANSION};
use crate::mtime::Mtime;
use crate::offset::{SpanId, UncompressedOffset};
use crate::path;
use crate::span_table::{Compression, SMALL_FILE, Span, SpanTable};
use crate::tar;
use crate::wire::{Table, Tables, WireFault, schema};
use crate::{window, zinfo};

/// A validated zTOC; owns its buffer, entries are views into it.
///
/// After [`Ztoc::decode`] every accessor is infallible: all offsets were followed and all rules checked. Entries are in
/// tar order. Names may repeat (the later entry replaces the earlier, as when unpacking), and a hard link means the
/// latest *earlier* entry of its target's name, so chains of links end.
///
/// Source: `docs/ztoc-format.md`.
#[derive(Clone)]
pub struct Ztoc {
    bytes: Bytes,
    version: Range<usize>,
    build_tool: Range<usize>,
    entries: usize,
    spans: Arc<SpanTable>,
}

impl fmt::Debug for Ztoc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ztoc")
            .field("version", &self.version())
            .field("bytes", &self.bytes.len())
            .field("entries", &self.entries)
            .field("spans", &self.spans.len())
            .finish_non_exhaustive()
    }
}

impl Ztoc {
    /// Decodes and validates a zTOC. CPU-bound, without I/O; time and memory are proportional to `bytes`.
    ///
    /// Check the zTOC's own digest first: this proves that it is well formed, not that it is the right one.
    ///
    /// # Errors
    /// [`ZtocError`] names the rule that is broken.
    pub fn decode(bytes: Bytes, limits: &DecodeLimits) -> Result<Self, ZtocError> {
        limit("bytes", bytes.len() as u64, limits.bytes as u64)?;
        let root = Table::root(&bytes)?;
        let version = text(root, schema::ztoc::VERSION, "version")?;
        let build_tool = text(root, schema::ztoc::BUILD_TOOL, "build tool")?;
        let mut spans = decode_spans(root, limits)?;
        let toc = root.table(schema::ztoc::TOC)?.ok_or(ZtocError::Missing("toc"))?;
        let list = toc.tables(schema::toc::METADATA)?;
        limit("entries", list.len() as u64, limits.entries as u64)?;
        let mut check =
            EntryCheck { archive: spans.uncompressed_size, limits, header: 0, budget: budget(&bytes) };
        let mut from = 0;
        for index in 0..list.len() {
            let entry = check.entry(list, index).map_err(|fault| ZtocError::Entry { index, fault })?;
            if (1..=SMALL_FILE).contains(&entry.size) {
                spans.mark_small_file(entry.header.0, entry.data.0 + entry.size, &mut from);
            }
        }
        let entries = list.len();
        Ok(Self { version, build_tool, entries, spans: Arc::new(spans), bytes })
    }

    fn text(&self, range: &Range<usize>) -> &str {
        self.bytes.get(range.clone()).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// The version of the format, as written; any is accepted.
    pub fn version(&self) -> &str {
        self.text(&self.version)
    }

    /// What built the zTOC, as written.
    pub fn build_tool(&self) -> &str {
        self.text(&self.build_tool)
    }

    /// How the layer is compressed.
    pub fn compression(&self) -> Compression {
        self.spans.compression
    }

    /// Size of the layer blob.
    pub fn compressed_size(&self) -> u64 {
        self.spans.compressed_size
    }

    /// Size of the archive: up to and with its two blocks of zeros, without padding after them.
    pub fn uncompressed_size(&self) -> u64 {
        self.spans.uncompressed_size
    }

    /// The spans. They own their data: the table outlives the zTOC and its buffer.
    pub fn spans(&self) -> &Arc<SpanTable> {
        &self.spans
    }

    /// The bytes the zTOC was decoded from.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    fn list(&self) -> Option<Tables<'_>> {
        Table::root(&self.bytes).ok()?.table(schema::ztoc::TOC).ok()??.tables(schema::toc::METADATA).ok()
    }

    /// The entries, in tar order. Each step is O(1) and allocates nothing.
    pub fn entries(&self) -> Entries<'_> {
        Entries { list: self.list(), next: 0, len: self.entries, header: 0 }
    }
}

/// Iterator of [`Ztoc::entries`].
#[derive(Debug, Clone)]
pub struct Entries<'a> {
    list: Option<Tables<'a>>,
    next: usize,
    len: usize,
    header: u64,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        // Decoding walked every entry in this way, so neither of the two ends the iteration early.
        let file = self.list.filter(|_| self.next < self.len)?.get(self.next).ok()?;
        let entry = read_entry(file, self.header).ok()?;
        self.next += 1;
        self.header = tar::align(entry.data.0.saturating_add(entry.size));
        Some(entry)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.len - self.next, Some(self.len - self.next))
    }
}

impl ExactSizeIterator for Entries<'_> {}

fn limit(what: &'static str, got: u64, limit: u64) -> Result<(), ZtocError> {
    if got > limit { Err(ZtocError::Limit { what, got, limit }) } else { Ok(()) }
}

fn text(root: Table<'_>, slot: usize, what: &'static str) -> Result<Range<usize>, ZtocError> {
    let (at, bytes) = root.located(slot)?.unwrap_or((0, &[]));
    std::str::from_utf8(bytes).map_err(|_| ZtocError::Text(what))?;
    Ok(at..at + bytes.len())
}

fn size(root: Table<'_>, slot: usize, what: &'static str) -> Result<u64, ZtocError> {
    let value = root.i64(slot)?;
    u64::try_from(value).map_err(|_| ZtocError::Negative { what, value })
}

fn decode_spans(root: Table<'_>, limits: &DecodeLimits) -> Result<SpanTable, ZtocError> {
    let compressed_size = size(root, schema::ztoc::COMPRESSED_SIZE, "compressed archive size")?;
    let uncompressed_size = size(root, schema::ztoc::UNCOMPRESSED_SIZE, "uncompressed archive size")?;
    let info = root.table(schema::ztoc::COMPRESSION)?.ok_or(ZtocError::Missing("compression info"))?;
    let (blob_at, blob) =
        info.located(schema::compression::CHECKPOINTS)?.ok_or(ZtocError::Missing("checkpoints"))?;
    let digests = info.tables(schema::compression::SPAN_DIGESTS)?;
    let max_span_id = info.i32(schema::compression::MAX_SPAN_ID)?;
    limit("spans", digests.len() as u64, u64::from(limits.spans))?;
    let count = |spans: usize| {
        let agreed =
            spans == digests.len() && usize::try_from(max_span_id).is_ok_and(|last| last + 1 == spans);
        if agreed { Ok(()) } else { Err(ZtocError::SpanCount { max_span_id, spans, digests: digests.len() }) }
    };
    let digest = |index: usize| -> Result<Digest, ZtocError> {
        let text = String::from_utf8_lossy(digests.bytes(index)?);
        let span = SpanId(u32::try_from(index).unwrap_or(u32::MAX));
        text.parse().map_err(|source| ZtocError::SpanDigest { span, source })
    };
    let mut spans = Vec::with_capacity(digests.len());
    let (compression, span_size) = match info.i8(schema::compression::ALGORITHM, schema::compression::GZIP)? {
        schema::compression::GZIP => {
            let (span_size, checkpoints) = zinfo::parse_gzip(blob)?;
            count(checkpoints.len())?;
            for (index, checkpoint) in checkpoints.into_iter().enumerate() {
                let window = &blob[checkpoint.window.clone()];
                spans.push(Span {
                    input: checkpoint.input,
                    output: checkpoint.output,
                    bits: checkpoint.bits,
                    digest: digest(index)?,
                    window_at: if window.is_empty() { 0 } else { (blob_at + checkpoint.window.start) as u64 },
                    window_hash: if window.is_empty() { [0; 16] } else { window::hash(window) },
                    small_files: false,
                });
            }
            (Compression::Gzip, u64::try_from(span_size).unwrap_or(0))
        }
        schema::compression::UNCOMPRESSED => {
            let span_size = zinfo::parse_tar(blob, compressed_size)?;
            let whole = compressed_size.div_ceil(span_size);
            count(usize::try_from(whole).unwrap_or(usize::MAX))?;
            for index in 0..digests.len() {
                let at = index as u64 * span_size;
                let digest = digest(index)?;
                spans.push(Span {
                    input: at,
                    output: at,
                    bits: 0,
                    digest,
                    window_at: 0,
                    window_hash: [0; 16],
                    small_files: false,
                });
            }
            (Compression::Uncompressed, span_size)
        }
        other => return Err(ZtocError::Compression(other)),
    };
    let table = SpanTable { compression, compressed_size, uncompressed_size, span_size, spans };
    check_spans(&table, limits)?;
    Ok(table)
}

/// Both ranges of every span are in order, inside the layer, and plausible.
fn check_spans(table: &SpanTable, limits: &DecodeLimits) -> Result<(), ZtocError> {
    if table.compression == Compression::Uncompressed && table.uncompressed_size > table.compressed_size {
        return Err(ZtocError::SpanOrder(SpanId(table.len() - 1)));
    }
    let mut end = (0, 0);
    for id in table.ids() {
        let span = table.span(id);
        // A checkpoint's first byte may be shared with the span before, no more.
        let first = id.0 == 0;
        let ordered = if first { span.output == 0 } else { span.input > end.0 && span.output > end.1 };
        if !ordered || (span.bits != 0 && span.input == 0) {
            return Err(ZtocError::SpanOrder(id));
        }
        end = (span.input, span.output);
        let compressed = table.compressed(id);
        if compressed.start >= compressed.end || compressed.end.0 > table.compressed_size {
            return Err(ZtocError::SpanOrder(id));
        }
        let uncompressed = table.uncompressed(id);
        let (compressed, uncompressed) =
            (compressed.end.0 - compressed.start.0, uncompressed.end.0.saturating_sub(uncompressed.start.0));
        limit("bytes in a span", uncompressed, limits.span_bytes)?;
        if uncompressed > compressed.saturating_mul(MAX_EXPANSION) {
            return Err(ZtocError::SpanExpansion { span: id, compressed, uncompressed });
        }
    }
    Ok(())
}

/// How many bytes of text and how many PAX records the entries of a zTOC may refer to in all. Writers may share equal
/// texts, but each entry and record takes space of its own, so an honest zTOC stays far below.
fn budget(bytes: &[u8]) -> Budget {
    Budget { text: bytes.len().saturating_mul(4), records: bytes.len() / 4 }
}

struct Budget {
    text: usize,
    records: usize,
}

impl Budget {
    fn text(&mut self, bytes: &[u8]) -> Result<(), EntryFault> {
        self.text = self.text.checked_sub(bytes.len()).ok_or(EntryFault::Amplification)?;
        Ok(())
    }
}

struct EntryCheck<'a> {
    archive: u64,
    limits: &'a DecodeLimits,
    header: u64,
    budget: Budget,
}

impl EntryCheck<'_> {
    /// Returns the entry, whose data end inside the archive.
    fn entry<'t>(&mut self, list: Tables<'t>, index: usize) -> Result<Entry<'t>, EntryFault> {
        let entry = read_entry(list.get(index)?, self.header)?;
        for name in [entry.name, entry.link] {
            if name.len() > self.limits.name {
                return Err(EntryFault::NameLength { len: name.len(), limit: self.limits.name });
            }
            if name.contains(&0) {
                return Err(EntryFault::Nul);
            }
        }
        for text in [entry.name, entry.link, entry.uname, entry.gname] {
            self.budget.text(text)?;
        }
        if path::escapes(entry.name) {
            return Err(EntryFault::Escape);
        }
        if entry.kind == EntryKind::HardLink && (entry.link.is_empty() || path::same(entry.name, entry.link))
        {
            return Err(EntryFault::HardLink);
        }
        self.place(&entry)?;
        self.budget.records =
            self.budget.records.checked_sub(entry.pax.len()).ok_or(EntryFault::Amplification)?;
        for index in 0..entry.pax.len() {
            let record = entry.pax.get(index)?;
            self.budget.text(record.bytes(schema::pax::KEY)?.unwrap_or_default())?;
            self.budget.text(record.bytes(schema::pax::VALUE)?.unwrap_or_default())?;
        }
        Ok(entry)
    }

    /// Where the entry is in the archive; also where the next header begins.
    fn place(&mut self, entry: &Entry<'_>) -> Result<(), EntryFault> {
        let data = entry.data.0;
        if !data.is_multiple_of(tar::BLOCK as u64) {
            return Err(EntryFault::Alignment(data));
        }
        let group = data.checked_sub(self.header).filter(|size| *size >= tar::BLOCK as u64);
        let group = group.ok_or(EntryFault::Order { header: self.header, data })?;
        if group > tar::MAX_GROUP {
            return Err(EntryFault::HeaderSize(group));
        }
        let end = data.checked_add(entry.size).filter(|end| *end <= self.archive);
        let end = end.ok_or(EntryFault::OutOfArchive { data, size: entry.size })?;
        self.header = tar::align(end);
        Ok(())
    }
}

fn read_entry(file: Table<'_>, header: u64) -> Result<Entry<'_>, EntryFault> {
    let text = |slot| -> Result<&[u8], WireFault> { Ok(file.bytes(slot)?.unwrap_or_default()) };
    let offset = |slot| -> Result<u64, EntryFault> {
        u64::try_from(file.i64(slot)?).map_err(|_| EntryFault::Negative)
    };
    let kind = EntryKind::parse(text(schema::file::KIND)?).ok_or(EntryFault::Kind)?;
    let raw_mode = file.i64(schema::file::MODE)?;
    Ok(Entry {
        name: text(schema::file::NAME)?,
        kind,
        link: text(schema::file::LINK)?,
        header: UncompressedOffset(header),
        data: UncompressedOffset(offset(schema::file::OFFSET)?),
        size: if kind.has_data() { offset(schema::file::SIZE)? } else { 0 },
        mode: mode_bits(raw_mode),
        raw_mode,
        uid: file.u32(schema::file::UID)?,
        gid: file.u32(schema::file::GID)?,
        uname: text(schema::file::UNAME)?,
        gname: text(schema::file::GNAME)?,
        mtime: Mtime::parse_rfc3339(text(schema::file::MTIME)?).unwrap_or(Mtime::YEAR_ONE),
        dev_major: low_u32(file.i64(schema::file::DEV_MAJOR)?),
        dev_minor: low_u32(file.i64(schema::file::DEV_MINOR)?),
        pax: file.tables(schema::file::PAX)?,
    })
}
