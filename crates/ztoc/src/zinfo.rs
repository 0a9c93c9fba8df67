//! The zinfo blob of a zTOC: where spans begin and what is needed to start there.

use std::ops::Range;

use crate::wire::{Table, WireFault, schema};

/// Bytes of the fixed part of a gzip zinfo.
pub(crate) const GZIP_HEAD: usize = 12;
/// Bytes of one checkpoint: two offsets, bits, window.
pub(crate) const GZIP_CHECKPOINT: usize = 8 + 8 + 1 + crate::inflate::WINDOW;

/// Why a zinfo blob is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ZinfoFault {
    /// The blob's length does not fit the number of checkpoints it claims.
    #[error("{len} bytes do not hold the {have} checkpoints claimed")]
    Length {
        /// Length of the blob.
        len: usize,
        /// Number of checkpoints it claims.
        have: i32,
    },
    /// There is no span at all.
    #[error("it has no spans")]
    Empty,
    /// The span size is not positive (or, for gzip, negative).
    #[error("its span size is {0}")]
    SpanSize(i64),
    /// An offset or size is negative.
    #[error("offset {0} is negative")]
    Negative(i64),
    /// A checkpoint begins in the middle of a byte that has fewer bits.
    #[error("span {span} begins {bits} bits before a byte")]
    Bits {
        /// The span.
        span: usize,
        /// What it has.
        bits: u8,
    },
    /// The plain tar's size is not that of the archive.
    #[error("it is for {zinfo} bytes, the archive has {archive}")]
    Size {
        /// The zinfo's.
        zinfo: u64,
        /// The zTOC's.
        archive: u64,
    },
    /// It is not a flatbuffer.
    #[error(transparent)]
    Wire(#[from] WireFault),
}

/// One checkpoint of a gzip stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// Compressed offset of the first whole byte.
    pub(crate) input: u64,
    /// Uncompressed offset of the first byte.
    pub(crate) output: u64,
    /// Leading bits taken from the byte before `input`.
    pub(crate) bits: u8,
    /// Where in the blob the window is; empty for the first checkpoint, which needs none.
    pub(crate) window: Range<usize>,
}

/// A gzip zinfo: span size and checkpoints, numbers checked one by one but not against each other.
pub(crate) fn parse_gzip(blob: &[u8]) -> Result<(i64, Vec<Checkpoint>), ZinfoFault> {
    let len = blob.len();
    let head = blob.get(..GZIP_HEAD).ok_or(ZinfoFault::Length { len, have: 0 })?;
    let have = i32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let span_size = i64_at(head, 4);
    if span_size < 0 {
        return Err(ZinfoFault::SpanSize(span_size));
    }
    let wrong = ZinfoFault::Length { len, have };
    let count = usize::try_from(have).map_err(|_| wrong)?;
    if count == 0 {
        return Err(ZinfoFault::Empty);
    }
    let stored = blob.len() - GZIP_HEAD;
    // Version 1 leaves the first checkpoint out, on the assumption of a gzip header of ten bytes.
    let first = match Some(stored) {
        size if size == count.checked_mul(GZIP_CHECKPOINT) => 0,
        size if size == (count - 1).checked_mul(GZIP_CHECKPOINT) => 1,
        _ => return Err(wrong),
    };
    let mut checkpoints = Vec::with_capacity(count);
    if first == 1 {
        checkpoints.push(Checkpoint { input: 10, output: 0, bits: 0, window: 0..0 });
    }
    for (index, bytes) in blob[GZIP_HEAD..].chunks_exact(GZIP_CHECKPOINT).enumerate() {
        let offset = |at| {
            let value = i64_at(bytes, at);
            u64::try_from(value).map_err(|_| ZinfoFault::Negative(value))
        };
        let span = index + first;
        let bits = bytes[16];
        if bits > 7 || (span == 0 && bits != 0) {
            return Err(ZinfoFault::Bits { span, bits });
        }
        let begin = GZIP_HEAD + index * GZIP_CHECKPOINT + 17;
        let window = if span == 0 { 0..0 } else { begin..begin + crate::inflate::WINDOW };
        checkpoints.push(Checkpoint { input: offset(0)?, output: offset(8)?, bits, window });
    }
    Ok((span_size, checkpoints))
}

/// The zinfo of a plain tar: its span size, checked against the archive's size.
pub(crate) fn parse_tar(blob: &[u8], archive: u64) -> Result<u64, ZinfoFault> {
    let table = Table::root(blob)?;
    let span_size = table.i64(schema::tar_zinfo::SPAN_SIZE)?;
    let size = table.i64(schema::tar_zinfo::SIZE)?;
    let size = u64::try_from(size).map_err(|_| ZinfoFault::Negative(size))?;
    if size != archive {
        return Err(ZinfoFault::Size { zinfo: size, archive });
    }
    if size == 0 {
        return Err(ZinfoFault::Empty);
    }
    u64::try_from(span_size).ok().filter(|size| *size > 0).ok_or(ZinfoFault::SpanSize(span_size))
}

/// `bytes` has at least `at + 8` bytes.
fn i64_at(bytes: &[u8], at: usize) -> i64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    i64::from_le_bytes(value)
}
