//! Whether the tar has the file that the zTOC promises where it promises it.
//!
//! zTOC and layer are verified each by its digest, but only this check ties one to the other: before the first byte of a
//! file is served, the tar header right before its data is parsed and compared with what the zTOC said. The tree does
//! not keep all that was said, only a keyed fingerprint of it: nobody outside the process knows the key, so a zTOC
//! cannot be made to collide.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use soci_ztoc::{Entry, EntryKind, UncompressedOffset, XATTR_PREFIX, tar};
use thiserror::Error;

/// One file of a layer, as the zTOC or the tar describes it.
#[derive(Debug, Clone)]
pub(crate) struct Member<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) kind: EntryKind,
    pub(crate) link: &'a [u8],
    pub(crate) header: UncompressedOffset,
    pub(crate) data: UncompressedOffset,
    pub(crate) size: u64,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    /// As in the tar.
    pub(crate) raw_mode: i64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (u32, u32),
    /// All PAX records in order of their keys.
    pub(crate) pax: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Member<'a> {
    pub(crate) fn of_entry(entry: Entry<'a>) -> Self {
        Self {
            name: entry.name,
            kind: entry.kind,
            link: entry.link,
            header: entry.header,
            data: entry.data,
            size: entry.size,
            mode: entry.mode,
            raw_mode: entry.raw_mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: (entry.mtime.secs, entry.mtime.nanos),
            device: (entry.dev_major, entry.dev_minor),
            pax: entry.pax().collect(),
        }
    }

    pub(crate) fn of_tar(member: &'a tar::Member) -> Self {
        Self {
            name: &member.name,
            kind: member.kind,
            link: &member.link,
            header: member.header,
            data: member.data,
            size: member.size,
            mode: member.mode(),
            raw_mode: member.raw_mode,
            uid: member.uid(),
            gid: member.gid(),
            mtime: (member.mtime.secs, member.mtime.nanos),
            device: (member.dev_major(), member.dev_minor()),
            pax: member.pax.iter().map(|(key, value)| (&**key, &**value)).collect(),
        }
    }

    pub(crate) fn xattrs(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        self.pax.iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?, *value)))
    }
}

/// Returns the fingerprint of all that a tar header says of `member`.
pub(crate) fn fingerprint(key: &RandomState, member: &Member<'_>) -> u64 {
    let mut hasher = key.build_hasher();
    // Slices hash their length too, so no two lists of fields run together.
    (member.name, member.kind, member.link, member.size, member.raw_mode).hash(&mut hasher);
    (member.uid, member.gid, member.mtime, member.device, &member.pax).hash(&mut hasher);
    hasher.finish()
}

/// Why a file's header is not what it should be.
#[derive(Debug, Error)]
pub enum HeaderError {
    /// There is no tar header.
    #[error("the layer has no tar header where the zTOC says one is")]
    Malformed(#[source] tar::TarError),
    /// The header takes fewer or more bytes than the zTOC says.
    #[error("the tar header does not end where the zTOC says the file's data begin")]
    Length,
    /// The header is of another file.
    #[error("the tar header and the zTOC do not describe the same file")]
    Differs,
}

/// Checks the tar `header` (all of its blocks) that stands at `position` against the fingerprint of a zTOC's entry.
pub(crate) fn check(
    key: &RandomState,
    expected: u64,
    position: UncompressedOffset,
    header: &[u8],
) -> Result<(), HeaderError> {
    let member = tar::parse_group(header, position).map_err(HeaderError::Malformed)?;
    if member.data.0.checked_sub(position.0) != Some(header.len() as u64) {
        return Err(HeaderError::Length);
    }
    match fingerprint(key, &Member::of_tar(&member)) == expected {
        true => Ok(()),
        false => Err(HeaderError::Differs),
    }
}
