//! One file of the span cache: a header, a checksum per 64 KiB, the payload.
//!
//! ```text
//! 0   8  magic and version          28  4  number of checksums
//! 8   4  form (0 compressed, 1 plain)   32 32  zTOC digest (the first 32 bytes of it)
//! 12  4  span id                    64  4  CRC-32 of bytes 0..64 and of the checksums
//! 16  8  payload length             68  -  checksums, little endian, then zero up to a multiple of 4096
//! 24  4  bytes per checksum             -  payload
//! ```
//!
//! The file is written under another name and renamed, without a sync: a crash may leave holes or a short file, which
//! the checksums tell. The header names what it is, so a file that was moved to another name is not served either.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use soci_oci::Digest;
use soci_ztoc::SpanId;

use crate::buffers::Buffers;
use crate::slot::SpanForm;

const MAGIC: &[u8; 8] = b"SOCISP\x00\x01";
/// A 4 KiB read checks this much.
const UNIT: usize = 64 << 10;
const HEAD: usize = 68;
const PAGE: usize = 4096;
/// No span is longer: what a header may claim is bounded before anything is allocated.
const MAX_PAYLOAD: u64 = 4 << 30;

/// Names one cached span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpanKey {
    /// Digest of the zTOC: the layer's own digest is not verified lazily, so it names nothing.
    pub ztoc: Digest,
    /// The span.
    pub span: SpanId,
    /// How it is stored.
    pub form: SpanForm,
}

/// Why an entry cannot be served.
#[derive(Debug)]
pub(super) enum EntryError {
    /// What is there is not what was written.
    Damaged(&'static str),
    /// It could not be read.
    Io(io::Error),
}

impl From<io::Error> for EntryError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Self::Damaged("it is cut short")
        } else {
            Self::Io(error)
        }
    }
}

fn head(key: &SpanKey, payload: u64, count: usize) -> io::Result<[u8; HEAD - 4]> {
    let too_many = |_| io::Error::other("too many checksums");
    let mut head = [0; HEAD - 4];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&u32::from(key.form == SpanForm::Plain).to_le_bytes());
    head[12..16].copy_from_slice(&key.span.0.to_le_bytes());
    head[16..24].copy_from_slice(&payload.to_le_bytes());
    head[24..28].copy_from_slice(&u32::try_from(UNIT).map_err(too_many)?.to_le_bytes());
    head[28..32].copy_from_slice(&u32::try_from(count).map_err(too_many)?.to_le_bytes());
    head[32..64].copy_from_slice(&key.ztoc.bytes()[..32]);
    Ok(head)
}

fn payload_at(count: usize) -> usize {
    (HEAD + 4 * count).next_multiple_of(PAGE)
}

/// Returns how many bytes an entry with `payload` bytes takes.
pub(super) fn file_size(payload: usize) -> u64 {
    (payload_at(payload.div_ceil(UNIT)) + payload) as u64
}

/// Writes an entry.
pub(super) fn write(mut file: &File, key: &SpanKey, payload: &[u8]) -> io::Result<()> {
    let sums: Vec<u8> = payload.chunks(UNIT).flat_map(|unit| crc32fast::hash(unit).to_le_bytes()).collect();
    let count = sums.len() / 4;
    let head = head(key, payload.len() as u64, count)?;
    let mut front = Vec::with_capacity(payload_at(count));
    front.extend(head);
    front.extend(sum_of(&head, &sums).to_le_bytes());
    front.extend(&sums);
    front.resize(payload_at(count), 0);
    file.write_all(&front)?;
    file.write_all(payload)
}

fn sum_of(head: &[u8], sums: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(sums);
    hasher.finalize()
}

/// An entry whose header was checked.
#[derive(Debug)]
pub(super) struct Entry {
    file: File,
    payload: usize,
    payload_at: u64,
    sums: Box<[u32]>,
}

impl Entry {
    /// Reads and checks the header of the entry in `file`.
    pub(super) fn open(file: File, key: &SpanKey) -> Result<Self, EntryError> {
        let mut fixed = [0; HEAD];
        file.read_exact_at(&mut fixed, 0)?;
        let number = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let payload = u64::from(number(16)) | u64::from(number(20)) << 32;
        if payload > MAX_PAYLOAD {
            return Err(EntryError::Damaged("its length is out of bounds"));
        }
        let payload =
            usize::try_from(payload).map_err(|_| EntryError::Damaged("its length is out of bounds"))?;
        let count = payload.div_ceil(UNIT);
        let expected = head(key, payload as u64, count)?;
        if fixed[..HEAD - 4] != expected {
            return Err(EntryError::Damaged("its header is not that of this span"));
        }
        let mut sums = vec![0; count * 4];
        file.read_exact_at(&mut sums, HEAD as u64)?;
        if sum_of(&expected, &sums) != number(HEAD - 4) {
            return Err(EntryError::Damaged("the checksum of its header is wrong"));
        }
        let sums =
            sums.chunks_exact(4).map(|sum| u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]])).collect();
        Ok(Self { file, payload, payload_at: payload_at(count) as u64, sums })
    }

    /// Returns how long the payload is.
    pub(super) fn len(&self) -> usize {
        self.payload
    }

    /// Returns `range` of the payload, half open; every unit that it touches is checked.
    pub(super) fn read(&self, range: Range<usize>, buffers: &Arc<Buffers>) -> Result<Bytes, EntryError> {
        if range.start > range.end || range.end > self.payload {
            return Err(EntryError::Damaged("it is shorter than the span"));
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let first = range.start / UNIT;
        let from = first * UNIT;
        let to = range.end.next_multiple_of(UNIT).min(self.payload);
        let mut buffer = buffers.take(to - from);
        self.file.read_exact_at(&mut buffer, self.payload_at + from as u64)?;
        for (unit, sum) in buffer.chunks(UNIT).zip(&self.sums[first..]) {
            if crc32fast::hash(unit) != *sum {
                return Err(EntryError::Damaged("a checksum is wrong"));
            }
        }
        Ok(buffer.freeze().slice(range.start - from..range.end - from))
    }

    /// Marks the entry as used: after a restart the time of the file is what is known of its last use.
    pub(super) fn touch(&self) {
        if let Err(error) = self.file.set_modified(std::time::SystemTime::now()) {
            tracing::debug!(%error, "cannot set the time of a cached span; it may be evicted too early");
        }
    }

    /// Asks the kernel to read the payload ahead of its use.
    pub(super) fn will_need(&self) {
        let _only_a_hint = rustix::fs::fadvise(
            &self.file,
            self.payload_at,
            std::num::NonZeroU64::new(self.payload as u64),
            rustix::fs::Advice::WillNeed,
        );
    }
}
