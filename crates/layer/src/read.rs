//! What the file system reads from: any range of a layer's tar, as slices.
//!
//! This seam is all that the file system knows of layers. A read is first tried in place, without a task; only when
//! bytes have to be fetched or inflated is it awaited. Bytes that come out are verified, and never made up.

use std::fmt;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use smallvec::SmallVec;
use soci_ztoc::UncompressedOffset;

use crate::ReadError;

/// The bytes of one read, in order, as slices of buffers that others may hold too. No slice is empty.
///
/// Holding it keeps the buffers from being used again: write it out and drop it.
#[derive(Clone, Default)]
pub struct ReadChunks {
    chunks: SmallVec<[Bytes; 3]>,
    len: usize,
}

impl ReadChunks {
    /// Returns no bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `bytes`; nothing happens when they are empty.
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.len += bytes.len();
            self.chunks.push(bytes);
        }
    }

    /// Appends the slices of `other`.
    pub fn append(&mut self, other: ReadChunks) {
        self.len += other.len;
        self.chunks.extend(other.chunks);
    }

    /// Returns how many bytes there are in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the slices in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Bytes> {
        self.chunks.iter()
    }

    /// Returns all bytes in one piece; copies when there is more than one slice.
    pub fn into_bytes(mut self) -> Bytes {
        match self.chunks.len() {
            0 => Bytes::new(),
            1 => self.chunks.swap_remove(0),
            _ => {
                let mut whole = Vec::with_capacity(self.len);
                self.chunks.iter().for_each(|chunk| whole.extend_from_slice(chunk));
                whole.into()
            }
        }
    }
}

impl From<Bytes> for ReadChunks {
    fn from(bytes: Bytes) -> Self {
        let mut chunks = Self::new();
        chunks.push(bytes);
        chunks
    }
}

impl<'a> IntoIterator for &'a ReadChunks {
    type Item = &'a Bytes;
    type IntoIter = std::slice::Iter<'a, Bytes>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Debug for ReadChunks {
    /// Lengths only: content is nobody's business.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadChunks({} bytes in {} slices)", self.len, self.chunks.len())
    }
}

/// Ranges of one layer's uncompressed tar.
#[async_trait]
pub trait RangeRead: Send + Sync + fmt::Debug + 'static {
    /// Returns the `len` bytes from `at` on when all of them are in memory or in the cache on disk, without a task hop.
    ///
    /// The range is clamped at the end of the archive. `None` says nothing but "use [`RangeRead::read_at`]". May block
    /// for a local disk read, never for the network, another reader or inflation.
    fn try_read(&self, at: UncompressedOffset, len: usize) -> Option<ReadChunks>;

    /// Returns the `len` bytes from `at` on, clamped at the end of the archive; fetches what is missing.
    ///
    /// Dropping the future gives up this read only: work that others share, or may use next, goes on.
    ///
    /// # Errors
    /// [`ReadError`] when any byte of the range cannot be had by `deadline`. The next read tries again.
    async fn read_at(
        &self,
        at: UncompressedOffset,
        len: usize,
        deadline: Instant,
    ) -> Result<ReadChunks, ReadError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_never_empty_and_lengths_add_up() {
        let mut chunks = ReadChunks::from(Bytes::new());
        assert!(chunks.is_empty() && chunks.iter().next().is_none());
        chunks.push(Bytes::from_static(b"ab"));
        chunks.push(Bytes::new());
        let mut all = ReadChunks::from(Bytes::from_static(b"x"));
        all.append(chunks);
        all.push(Bytes::from_static(b"c"));
        assert_eq!((all.len(), all.iter().count()), (4, 3));
        assert_eq!(all.clone().into_bytes(), "xabc");
        assert_eq!(all.into_iter().map(Bytes::len).sum::<usize>(), 4);
    }
}
