//! A FlatBuffer writer that lays bytes out as the reference's builder does.
//!
//! A FlatBuffer is written back to front. The same content can be laid out in many ways, and a zTOC's digest covers the
//! layout, so this writer repeats the order of operations of the reference's library: alignment of every item by its own
//! size, fields in the order they are added, trailing absent fields cut off the vtable, equal vtables shared.

use std::collections::HashMap;

/// The position of something already written, counted from the end of the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written(u32);

/// The format's own limit: offsets are 32 bits and signed in one place.
const MAX_LEN: usize = 1 << 31;

/// The buffer would exceed two GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overflow;

/// Writes one buffer. Errors are sticky: they show when the buffer is finished.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    /// Holds the content at its end; `head` is where it begins.
    buf: Vec<u8>,
    head: usize,
    min_align: usize,
    /// Offset of each field of the table being written, 0 when absent.
    fields: Vec<u32>,
    object_end: u32,
    /// Field offsets relative to the table, to where such a vtable was written.
    vtables: HashMap<Vec<u16>, u32>,
    overflow: bool,
}

impl Writer {
    /// A writer whose buffer has room for `capacity` bytes at once.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        let capacity = capacity.min(MAX_LEN);
        Self { buf: vec![0; capacity], head: capacity, min_align: 1, ..Self::default() }
    }

    fn len(&self) -> usize {
        self.buf.len() - self.head
    }

    fn offset(&self) -> u32 {
        // `reserve` keeps the length under 2^31.
        u32::try_from(self.len()).unwrap_or(u32::MAX)
    }

    fn reserve(&mut self, extra: usize) -> bool {
        if self.overflow || self.len().saturating_add(extra) >= MAX_LEN {
            self.overflow = true;
            return false;
        }
        if extra > self.head {
            let grown = (self.buf.len() * 2).max(self.len() + extra).clamp(1024, MAX_LEN);
            let mut buf = vec![0; grown];
            let head = grown - self.len();
            buf[head..].copy_from_slice(&self.buf[self.head..]);
            (self.buf, self.head) = (buf, head);
        }
        true
    }

    fn put(&mut self, bytes: &[u8]) {
        if self.reserve(bytes.len()) {
            let begin = self.head - bytes.len();
            self.buf[begin..self.head].copy_from_slice(bytes);
            self.head = begin;
        }
    }

    /// Pads so that after `additional` more bytes an item of `size` bytes is aligned.
    fn prep(&mut self, size: usize, additional: usize) {
        self.min_align = self.min_align.max(size);
        let padding = (self.len() + additional).wrapping_neg() & (size - 1);
        self.put(&[0; 8][..padding]);
    }

    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn put_len(&mut self, len: usize) {
        match u32::try_from(len) {
            Ok(len) => self.put_u32(len),
            Err(_) => self.overflow = true,
        }
    }

    /// A string: length, bytes, NUL.
    pub(crate) fn string(&mut self, bytes: &[u8]) -> Written {
        self.prep(4, bytes.len() + 1);
        self.put(&[0]);
        self.put(bytes);
        self.put_len(bytes.len());
        Written(self.offset())
    }

    /// A vector of bytes.
    pub(crate) fn byte_vector(&mut self, bytes: &[u8]) -> Written {
        self.prep(4, bytes.len());
        self.put(bytes);
        self.put_len(bytes.len());
        Written(self.offset())
    }

    /// A vector of offsets to things already written, in this order.
    pub(crate) fn offset_vector(&mut self, items: &[Written]) -> Written {
        self.prep(4, 4 * items.len());
        for item in items.iter().rev() {
            self.put_offset(*item);
        }
        self.put_len(items.len());
        Written(self.offset())
    }

    fn put_offset(&mut self, target: Written) {
        self.prep(4, 0);
        let distance = self.offset().saturating_sub(target.0).saturating_add(4);
        self.put_u32(distance);
    }

    /// Begins a table; nothing but its fields may be written until [`Writer::end_table`].
    pub(crate) fn start_table(&mut self, fields: usize) {
        self.fields.clear();
        self.fields.resize(fields, 0);
        self.object_end = self.offset();
    }

    fn add<const N: usize>(&mut self, slot: usize, bytes: [u8; N]) {
        self.prep(N, 0);
        self.put(&bytes);
        self.fields[slot] = self.offset();
    }

    pub(crate) fn add_i8(&mut self, slot: usize, value: i8, default: i8) {
        if value != default {
            self.add(slot, value.to_le_bytes());
        }
    }

    pub(crate) fn add_i32(&mut self, slot: usize, value: i32) {
        if value != 0 {
            self.add(slot, value.to_le_bytes());
        }
    }

    pub(crate) fn add_u32(&mut self, slot: usize, value: u32) {
        if value != 0 {
            self.add(slot, value.to_le_bytes());
        }
    }

    pub(crate) fn add_i64(&mut self, slot: usize, value: i64) {
        if value != 0 {
            self.add(slot, value.to_le_bytes());
        }
    }

    pub(crate) fn add_offset(&mut self, slot: usize, value: Written) {
        self.put_offset(value);
        self.fields[slot] = self.offset();
    }

    /// Ends the table begun last.
    pub(crate) fn end_table(&mut self) -> Written {
        self.prep(4, 0);
        self.put_u32(0);
        let table = self.offset();
        while self.fields.last() == Some(&0) {
            self.fields.pop();
        }
        let relative = |at: u32| u16::try_from(if at == 0 { 0 } else { table - at });
        let entries: Result<Vec<u16>, _> = self.fields.iter().map(|at| relative(*at)).collect();
        let Ok(entries) = entries else {
            self.overflow = true;
            return Written(table);
        };
        let vtable = match self.vtables.get(&entries) {
            Some(vtable) => *vtable,
            None => self.put_vtable(table, entries),
        };
        // The table's first word: how far back in the buffer its vtable lies.
        let distance = i64::from(vtable) - i64::from(table);
        let at = self.buf.len().saturating_sub(usize::try_from(table).unwrap_or(0));
        if let (Ok(distance), Some(word)) =
            (i32::try_from(distance), self.buf.get_mut(at..at.saturating_add(4)))
        {
            word.copy_from_slice(&distance.to_le_bytes());
        } else {
            self.overflow = true;
        }
        Written(table)
    }

    fn put_vtable(&mut self, table: u32, entries: Vec<u16>) -> u32 {
        for entry in entries.iter().rev() {
            self.put(&entry.to_le_bytes());
        }
        let size = u16::try_from(table - self.object_end).unwrap_or(u16::MAX);
        self.put(&size.to_le_bytes());
        let len = u16::try_from((entries.len() + 2) * 2).unwrap_or(u16::MAX);
        self.put(&len.to_le_bytes());
        let vtable = self.offset();
        self.vtables.insert(entries, vtable);
        vtable
    }

    /// Ends the buffer and returns it.
    pub(crate) fn finish(mut self, root: Written) -> Result<Vec<u8>, Overflow> {
        self.prep(self.min_align, 4);
        self.put_offset(root);
        if self.overflow {
            return Err(Overflow);
        }
        self.buf.drain(..self.head);
        Ok(self.buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Table;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::with_capacity(0);
        let name = writer.string(b"n\xffme");
        let inner: Vec<Written> = (0..3)
            .map(|value| {
                writer.start_table(2);
                writer.add_i64(1, value);
                writer.end_table()
            })
            .collect();
        let list = writer.offset_vector(&inner);
        writer.start_table(6);
        writer.add_offset(0, name);
        writer.add_u32(1, 7);
        writer.add_offset(4, list);
        writer.add_i8(2, 5, 1);
        let root = writer.end_table();
        let bytes = writer.finish(root).unwrap();

        let root = Table::root(&bytes).unwrap();
        assert_eq!(root.bytes(0).unwrap(), Some(&b"n\xffme"[..]));
        assert_eq!(root.u32(1).unwrap(), 7);
        assert_eq!(root.i8(2, 1).unwrap(), 5);
        assert_eq!(root.i64(3).unwrap(), 0);
        let list = root.tables(4).unwrap();
        let values: Vec<i64> =
            (0..list.len()).map(|index| list.get(index).unwrap().i64(1).unwrap()).collect();
        assert_eq!(values, [0, 1, 2]);
        assert!(list.get(3).is_err());
    }

    #[test]
    fn truncation_anywhere_is_a_fault_and_not_a_panic() {
        let mut writer = Writer::with_capacity(16);
        let name = writer.string(b"abc");
        writer.start_table(1);
        writer.add_offset(0, name);
        let root = writer.end_table();
        let bytes = writer.finish(root).unwrap();
        for len in 0..bytes.len() - 1 {
            let read = Table::root(&bytes[..len]).and_then(|root| root.bytes(0));
            assert!(!matches!(read, Ok(Some(b"abc"))), "{len}");
        }
    }
}
