//! Buffers that are used again.
//!
//! Inflating into pages the kernel has just handed out costs a quarter of the time, so buffers of span size and of read
//! size go back to a free list when the last slice of them is dropped. The list keeps a bounded number of bytes; beyond
//! it those that were not used for longest go back to the system: spans of one layer are of a size, and what is left of
//! another layer's work must not hold their place. Content of an earlier use is still in a buffer when it is handed out:
//! whoever takes one writes every byte that it lets others see.
//!
//! Each buffer is an anonymous map of its own. An allocator that gets megabytes back keeps them (glibc raises its
//! threshold for maps with the first that is freed), and the memory of a daemon would be what its busiest second took.

use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::MmapMut;
use parking_lot::Mutex;

/// Sizes are rounded up to this, so that spans of nearly equal size share buffers.
const GRAIN: usize = 256 << 10;

/// The free list.
pub(crate) struct Buffers {
    free: Mutex<Free>,
    /// How many bytes the list may hold.
    keep: usize,
}

#[derive(Default)]
struct Free {
    /// Least recently used first.
    list: VecDeque<Memory>,
    bytes: usize,
}

/// Memory of a buffer.
enum Memory {
    Mapped(MmapMut),
    /// Where the system has no more maps to give: a process may have 65,530.
    Allocated(Box<[u8]>),
}

impl Memory {
    fn new(len: usize) -> Self {
        match MmapMut::map_anon(len) {
            Ok(map) => Self::Mapped(map),
            Err(_) => Self::Allocated(vec![0; len].into_boxed_slice()),
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::Allocated(Box::default())
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Allocated(bytes) => bytes,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Allocated(bytes) => bytes,
        }
    }
}

impl Buffers {
    /// Returns an empty list that will keep at most `keep` bytes.
    pub(crate) fn new(keep: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), keep })
    }

    /// Returns a buffer of `len` bytes whose content is arbitrary.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let wanted = len.max(1).div_ceil(GRAIN).saturating_mul(GRAIN);
        let mut free = self.free.lock();
        // Of those that fit equally well the last used: it is in the processor's cache.
        let best = free
            .list
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, held)| held.len() >= wanted && held.len() / 2 <= wanted)
            .min_by_key(|(_, held)| held.len())
            .map(|(at, _)| at);
        let bytes = match best.and_then(|at| free.list.remove(at)) {
            Some(held) => {
                free.bytes -= held.len();
                held
            }
            None => {
                drop(free);
                Memory::new(wanted)
            }
        };
        Buffer { bytes, len, home: Arc::clone(self) }
    }

    /// Gives every free buffer back to the system.
    pub(crate) fn trim(&self) {
        let free = std::mem::take(&mut *self.free.lock());
        drop(free);
    }

    /// Returns how many bytes the list holds.
    pub(crate) fn free_bytes(&self) -> usize {
        self.free.lock().bytes
    }

    fn give_back(&self, bytes: Memory) {
        if bytes.len() > self.keep {
            return;
        }
        let mut free = self.free.lock();
        free.bytes += bytes.len();
        free.list.push_back(bytes);
        let mut over = Vec::new();
        while free.bytes > self.keep
            && let Some(oldest) = free.list.pop_front()
        {
            free.bytes -= oldest.len();
            over.push(oldest);
        }
        // Unmapping takes a while.
        drop(free);
        drop(over);
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({} bytes free, keeps {})", self.free_bytes(), self.keep)
    }
}

/// A buffer on loan; goes back when dropped.
pub(crate) struct Buffer {
    bytes: Memory,
    len: usize,
    home: Arc<Buffers>,
}

impl Buffer {
    /// Returns the buffer as bytes that can be sliced and shared; it goes back when the last slice is dropped.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.give_back(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_last_slice_is_dropped() {
        let buffers = Buffers::new(1 << 20);
        let mut buffer = buffers.take(1000);
        assert_eq!(buffer.len(), 1000);
        buffer[..3].copy_from_slice(b"abc");
        let address = buffer.as_ptr();
        let whole = buffer.freeze();
        let part = whole.slice(1..3);
        drop(whole);
        assert_eq!((buffers.free_bytes(), &part[..]), (0, &b"bc"[..]));
        drop(part);
        assert_eq!(buffers.free_bytes(), GRAIN);
        assert_eq!(buffers.take(5).as_ptr(), address);
    }

    #[test]
    fn the_list_is_bounded_and_trimmed() {
        let buffers = Buffers::new(3 * GRAIN);
        let held: Vec<_> = (0..5).map(|_| buffers.take(GRAIN)).collect();
        drop(held);
        assert_eq!(buffers.free_bytes(), 3 * GRAIN);
        buffers.trim();
        assert_eq!(buffers.free_bytes(), 0);
    }

    #[test]
    fn what_was_used_last_is_kept() {
        let buffers = Buffers::new(10 * GRAIN);
        drop([buffers.take(GRAIN), buffers.take(3 * GRAIN), buffers.take(3 * GRAIN)]);
        let span = buffers.take(9 * GRAIN);
        let address = span.as_ptr();
        drop(span);
        assert_eq!(buffers.free_bytes(), 9 * GRAIN);
        // One that is larger than all that may be kept takes nobody's place.
        drop(buffers.take(11 * GRAIN));
        assert_eq!(buffers.take(9 * GRAIN).as_ptr(), address);
    }

    #[test]
    fn a_large_buffer_is_not_spent_on_a_small_read() {
        let buffers = Buffers::new(64 * GRAIN);
        drop(buffers.take(20 * GRAIN));
        drop(buffers.take(GRAIN));
        assert_eq!(buffers.free_bytes(), 21 * GRAIN);
    }
}
