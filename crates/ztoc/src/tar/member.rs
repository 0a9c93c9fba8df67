//! One member of a tar, owned.

use crate::entry::{EntryKind, XATTR_PREFIX, low_u32, mode_bits};
use crate::mtime::Mtime;
use crate::offset::UncompressedOffset;

/// PAX records: unique keys in ascending byte order, with their values.
pub type PaxRecords = std::collections::BTreeMap<Vec<u8>, Vec<u8>>;

/// A file in a tar: the fields of [`Entry`](crate::Entry), owned, with extension headers applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The name as the tar has it: not cleaned, any bytes but NUL.
    pub name: Vec<u8>,
    /// What kind of file it is.
    pub kind: EntryKind,
    /// The target of a link. Other kinds may carry one too; it means nothing then.
    pub link: Vec<u8>,
    /// Where the first header block begins.
    pub header: UncompressedOffset,
    /// Where the data begin.
    pub data: UncompressedOffset,
    /// Number of data bytes; 0 for everything but regular files.
    pub size: u64,
    /// The mode field as the tar has it.
    pub raw_mode: i64,
    /// Owner as the tar has it.
    pub raw_uid: i64,
    /// Group as the tar has it.
    pub raw_gid: i64,
    /// Owner's name.
    pub uname: Vec<u8>,
    /// Group's name.
    pub gname: Vec<u8>,
    /// Modification time.
    pub mtime: Mtime,
    /// Major number of a device as the tar has it.
    pub raw_dev_major: i64,
    /// Minor number of a device as the tar has it.
    pub raw_dev_minor: i64,
    /// Every PAX record of this member's own extension header.
    pub pax: PaxRecords,
}

impl Member {
    /// Permission, setuid, setgid and sticky bits only; the file type is `kind`.
    pub fn mode(&self) -> u32 {
        mode_bits(self.raw_mode)
    }

    /// Owner, in the 32 bits a zTOC has for it.
    pub fn uid(&self) -> u32 {
        low_u32(self.raw_uid)
    }

    /// Group, in the 32 bits a zTOC has for it.
    pub fn gid(&self) -> u32 {
        low_u32(self.raw_gid)
    }

    /// Major number of a device.
    pub fn dev_major(&self) -> u32 {
        low_u32(self.raw_dev_major)
    }

    /// Minor number of a device.
    pub fn dev_minor(&self) -> u32 {
        low_u32(self.raw_dev_minor)
    }

    /// Returns the extended attributes: name without `SCHILY.xattr.`, and value, which is any bytes and may be empty.
    pub fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.pax.iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?, value.as_slice())))
    }

    /// Whether this is the member that `entry` of a zTOC describes: name, kind, link, offsets, size, mode, owner, time,
    /// devices and PAX records are equal.
    pub fn describes(&self, entry: &crate::Entry<'_>) -> bool {
        self.name == entry.name
            && self.kind == entry.kind
            && self.link == entry.link
            && self.header == entry.header
            && self.data == entry.data
            && self.size == entry.size
            && self.raw_mode == entry.raw_mode
            && self.uid() == entry.uid
            && self.gid() == entry.gid
            && self.mtime.in_ztoc() == entry.mtime
            && self.dev_major() == entry.dev_major
            && self.dev_minor() == entry.dev_minor
            && self.pax.iter().map(|(key, value)| (key.as_slice(), value.as_slice())).eq(entry.pax())
    }
}
