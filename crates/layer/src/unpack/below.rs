//! What the layers below know about a directory.
//!
//! A tar may have `a/b` without an entry for `a/`. Then `a` looks as it does in the layers below.

use std::fmt;

/// Attributes of a directory that a layer names without an entry of its own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DirAttr {
    /// Permission, setuid, setgid and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last change in seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Extended attributes by full name. Those of overlayfs (`trusted.*`) are not taken over.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The layers below cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("reading the attributes of /{path} in the layers below")]
pub struct BelowError {
    /// The directory, relative to the root of the layers.
    pub path: String,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// The layers below one that is unpacked.
pub trait Below: Send + Sync + fmt::Debug {
    /// Returns the attributes of the directory `path` (relative, clean, without links in it) in the topmost layer that
    /// has it; `None` when none has, or it is no directory there. May block on the local disk, but must not read through
    /// a mount that this process serves.
    ///
    /// # Errors
    /// [`BelowError`] when that cannot be found out.
    fn dir(&self, path: &[u8]) -> Result<Option<DirAttr>, BelowError>;
}

/// No layers below.
#[derive(Debug, Clone, Copy, Default)]
pub struct NothingBelow;

impl Below for NothingBelow {
    fn dir(&self, _path: &[u8]) -> Result<Option<DirAttr>, BelowError> {
        Ok(None)
    }
}
