//! One file of a layer as the zTOC describes it.

use crate::mtime::Mtime;
use crate::offset::UncompressedOffset;
use crate::wire;

/// What kind of file an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A regular file.
    Regular,
    /// Another name for an earlier entry.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

impl EntryKind {
    /// Returns the word that a zTOC has for this kind.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Regular => "reg",
            Self::HardLink => "hardlink",
            Self::Symlink => "symlink",
            Self::CharDevice => "char",
            Self::BlockDevice => "block",
            Self::Directory => "dir",
            Self::Fifo => "fifo",
        }
    }

    /// Returns the kind that a zTOC's word names.
    pub fn parse(text: &[u8]) -> Option<Self> {
        Some(match text {
            b"reg" => Self::Regular,
            b"hardlink" => Self::HardLink,
            b"symlink" => Self::Symlink,
            b"char" => Self::CharDevice,
            b"block" => Self::BlockDevice,
            b"dir" => Self::Directory,
            b"fifo" => Self::Fifo,
            _ => return None,
        })
    }

    /// Whether data follow the header in the tar. For other kinds the header's size is meaningless and taken as 0.
    pub fn has_data(self) -> bool {
        matches!(self, Self::Regular)
    }
}

/// The prefix of the PAX records that carry extended attributes.
pub const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// The bits of a tar mode that count: permissions, setuid, setgid, sticky.
pub(crate) fn mode_bits(raw: i64) -> u32 {
    u32::try_from(raw & 0o7777).unwrap_or(0)
}

/// The low 32 bits, as the format truncates ids and device numbers.
pub(crate) fn low_u32(value: i64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// A view of one entry in a [`Ztoc`](crate::Ztoc)'s buffer.
///
/// `[header, data)` are the tar headers of the member with its extension headers; `[data, data + size)` are its bytes,
/// and lie inside the archive.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// The name as the tar has it: not cleaned, directories end in `/`, any bytes but NUL. Never leaves the root.
    pub name: &'a [u8],
    /// What kind of file it is.
    pub kind: EntryKind,
    /// The target of a link; empty for other kinds.
    pub link: &'a [u8],
    /// Where the first header block begins.
    pub header: UncompressedOffset,
    /// Where the data begin.
    pub data: UncompressedOffset,
    /// Number of data bytes; 0 for everything but regular files.
    pub size: u64,
    /// Permission, setuid, setgid and sticky bits only; the file type is `kind`.
    pub mode: u32,
    /// The mode field as the tar has it.
    pub raw_mode: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Owner's name, informational.
    pub uname: &'a [u8],
    /// Group's name, informational.
    pub gname: &'a [u8],
    /// Modification time; [`Mtime::YEAR_ONE`] when the zTOC's text is no time.
    pub mtime: Mtime,
    /// Major number of a device.
    pub dev_major: u32,
    /// Minor number of a device.
    pub dev_minor: u32,
    pub(crate) pax: wire::Tables<'a>,
}

impl<'a> Entry<'a> {
    /// Returns every PAX record of the member, ordered by key as the builder wrote them.
    pub fn pax(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let records = self.pax;
        (0..records.len()).filter_map(move |index| {
            let record = records.get(index).ok()?;
            Some((record.bytes(0).ok()?.unwrap_or_default(), record.bytes(1).ok()?.unwrap_or_default()))
        })
    }

    /// Returns the extended attributes: name without `SCHILY.xattr.`, and value, which is any bytes and may be empty.
    pub fn xattrs(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        self.pax().filter_map(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?, value)))
    }
}
