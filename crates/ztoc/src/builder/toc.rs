//! The list of files of a layer, taken while its tar passes by.

use super::BuildError;
use crate::encode::FileRow;
use crate::entry::EntryKind;
use crate::mtime::Mtime;
use crate::tar::{Member, Parser, Step};

/// The name that makes its directory hide everything below it.
const OPAQUE: &[u8] = b".wh..wh..opq";

#[derive(Debug)]
pub(super) struct TocScan {
    parser: Parser,
    ended: bool,
    files: FileList,
    xattrs_needed: bool,
}

/// What a scan found.
#[derive(Debug)]
pub(super) struct ScannedToc {
    pub(super) files: FileList,
    /// Position after the archive's end, without padding.
    pub(super) archive_size: u64,
    pub(super) xattrs_needed: bool,
}

impl TocScan {
    pub(super) fn new() -> Self {
        Self { parser: Parser::new(), ended: false, files: FileList::default(), xattrs_needed: false }
    }

    pub(super) fn push(&mut self, mut tar: &[u8]) -> Result<(), BuildError> {
        while !self.ended {
            match self.parser.step(&mut tar)? {
                Step::More => return Ok(()),
                Step::Data(_) => {}
                Step::Member(member) => {
                    self.xattrs_needed |= member.name.ends_with(OPAQUE) || member.xattrs().next().is_some();
                    self.files.add(&member);
                }
                Step::Global(_) => return Err(BuildError::GlobalPax { at: self.parser.position() }),
                Step::End => self.ended = true,
            }
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<ScannedToc, BuildError> {
        self.parser.finish()?;
        let archive_size = self.parser.position();
        Ok(ScannedToc { files: self.files, archive_size, xattrs_needed: self.xattrs_needed })
    }
}

/// Files, packed: a zTOC is written from the last file to the first, so all must be kept until the end.
#[derive(Debug, Default)]
pub(super) struct FileList {
    /// In chunks, each freed as soon as it is written.
    chunks: Vec<Chunk>,
    files: usize,
    bytes: usize,
}

/// Some files in a row.
#[derive(Debug, Default)]
struct Chunk {
    packed: Vec<u8>,
    begins: Vec<usize>,
}

/// Size at which a chunk is full.
const CHUNK: usize = 1 << 20;

impl FileList {
    fn add(&mut self, member: &Member) {
        if self.chunks.last().is_none_or(|chunk| chunk.packed.len() >= CHUNK) {
            self.chunks.push(Chunk::default());
        }
        if let Some(chunk) = self.chunks.last_mut() {
            let before = chunk.packed.len();
            chunk.add(member);
            self.bytes += chunk.packed.len() - before;
            self.files += 1;
        }
    }

    /// Hands over the files from last to first, and frees them on the way.
    pub(super) fn for_each_backwards(mut self, each: &mut dyn FnMut(&FileRow<'_>)) {
        while let Some(chunk) = self.chunks.pop() {
            let rows =
                chunk.begins.iter().rev().filter_map(|begin| Unpack(chunk.packed.get(*begin..)?).row());
            rows.for_each(|row| each(&row));
        }
    }

    /// About how many bytes the files take in a zTOC.
    pub(super) fn encoded_size(&self) -> usize {
        self.files * 140 + self.bytes
    }
}

impl Chunk {
    fn add(&mut self, member: &Member) {
        self.begins.push(self.packed.len());
        let signed = |offset: u64| i64::try_from(offset).unwrap_or(i64::MAX);
        self.packed.push(member.kind.as_str().as_bytes()[0]);
        let numbers = [
            signed(member.data.0),
            signed(member.size),
            member.raw_mode,
            i64::from(member.uid()),
            i64::from(member.gid()),
            member.mtime.secs,
            i64::from(member.mtime.nanos),
            member.raw_dev_major,
            member.raw_dev_minor,
        ];
        for number in numbers {
            self.put_number(number);
        }
        for text in [&member.name, &member.link, &member.uname, &member.gname] {
            self.put_text(text);
        }
        self.put_number(i64::try_from(member.pax.len()).unwrap_or(0));
        for (key, value) in &member.pax {
            self.put_text(key);
            self.put_text(value);
        }
    }

    /// Zig-zag and seven bits a byte: small numbers, the usual ones, take a byte or two.
    fn put_number(&mut self, value: i64) {
        let mut rest = (value << 1 ^ value >> 63).cast_unsigned();
        while rest >= 0x80 {
            self.packed.push(low_byte(rest) | 0x80);
            rest >>= 7;
        }
        self.packed.push(low_byte(rest));
    }

    fn put_text(&mut self, text: &[u8]) {
        self.put_number(i64::try_from(text.len()).unwrap_or(0));
        self.packed.extend_from_slice(text);
    }
}

fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0] & 0x7f
}

/// Reads back what [`Chunk::add`] wrote; `None` cannot happen.
struct Unpack<'a>(&'a [u8]);

impl<'a> Unpack<'a> {
    fn row(mut self) -> Option<FileRow<'a>> {
        let kind = match self.byte()? {
            b'r' => EntryKind::Regular,
            b'h' => EntryKind::HardLink,
            b's' => EntryKind::Symlink,
            b'c' => EntryKind::CharDevice,
            b'b' => EntryKind::BlockDevice,
            b'd' => EntryKind::Directory,
            _ => EntryKind::Fifo,
        };
        let (data, size, mode) = (self.number()?, self.number()?, self.number()?);
        let (uid, gid) = (u32::try_from(self.number()?).ok()?, u32::try_from(self.number()?).ok()?);
        let mtime = Mtime { secs: self.number()?, nanos: u32::try_from(self.number()?).ok()? };
        let (dev_major, dev_minor) = (self.number()?, self.number()?);
        let (name, link, uname, gname) = (self.text()?, self.text()?, self.text()?, self.text()?);
        let records = usize::try_from(self.number()?).ok()?;
        let pax = (0..records).map(|_| Some((self.text()?, self.text()?))).collect::<Option<Vec<_>>>()?;
        Some(FileRow {
            name,
            kind,
            data,
            size,
            link,
            mode,
            uid,
            gid,
            uname,
            gname,
            mtime,
            dev_major,
            dev_minor,
            pax,
        })
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<i64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.number()?).ok()?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_size_are_read_back() {
        for value in [0, 1, -1, 63, 64, -65, 1 << 40, i64::MAX, i64::MIN] {
            let mut chunk = Chunk::default();
            chunk.put_number(value);
            assert_eq!(Unpack(&chunk.packed).number(), Some(value));
        }
    }
}
