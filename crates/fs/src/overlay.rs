//! How an image's whiteouts become what overlayfs understands.
//!
//! In a tar, `.wh.x` says that `x` of the layers below is gone, and `.wh..wh..opq` that nothing of its directory's
//! lower versions shows. overlayfs wants a character device 0/0 called `x`, and an attribute on the directory. Attributes
//! of overlayfs's own that an image brings are dropped: they would let it point overlayfs anywhere.

/// Which extended attribute marks an opaque directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpaqueXattr {
    /// `trusted.overlay.opaque`: overlayfs mounted by root.
    Trusted,
    /// `user.overlay.opaque`: overlayfs mounted with `userxattr`.
    User,
}

impl OpaqueXattr {
    pub(crate) fn name(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.opaque",
            Self::User => b"user.overlay.opaque",
        }
    }
}

/// What the last component of a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning<'a> {
    /// A file of this layer.
    File,
    /// The named file of the layers below is gone.
    Whiteout(&'a [u8]),
    /// The directory it stands in hides its lower versions.
    Opaque,
    /// Something of the tool that made the layer; not shown.
    Hidden,
}

const PREFIX: &[u8] = b".wh.";
const META_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Returns what the last component `name` stands for.
pub(crate) fn meaning(name: &[u8]) -> Meaning<'_> {
    if name == OPAQUE {
        return Meaning::Opaque;
    }
    if name.starts_with(META_PREFIX) {
        return Meaning::Hidden;
    }
    match name.strip_prefix(PREFIX) {
        None => Meaning::File,
        Some(b"" | b"." | b"..") => Meaning::Hidden,
        Some(target) => Meaning::Whiteout(target),
    }
}

/// Whether an image may bring the extended attribute `name`: not those that overlayfs acts on, and none of the `trusted`
/// class, which containerd's unpack does not set either.
pub(crate) fn allowed(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.") && !name.starts_with(b"user.overlay.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_marker_has_its_meaning() {
        assert_eq!(meaning(b"x"), Meaning::File);
        assert_eq!(meaning(b".wh"), Meaning::File);
        assert_eq!(meaning(b".wh.x"), Meaning::Whiteout(b"x"));
        assert_eq!(meaning(b".wh..hidden"), Meaning::Whiteout(b".hidden"));
        assert_eq!(meaning(b".wh..wh..opq"), Meaning::Opaque);
        for name in [&b".wh."[..], b".wh..", b".wh...", b".wh..wh.plnk", b".wh..wh.aufs"] {
            assert_eq!(meaning(name), Meaning::Hidden);
        }
    }

    #[test]
    fn attributes_of_overlayfs_and_of_the_trusted_class_are_withheld() {
        assert!(!allowed(b"trusted.overlay.redirect") && !allowed(b"user.overlay.opaque"));
        assert!(!allowed(b"trusted.other"));
        assert!(allowed(b"trustedx") && allowed(b"security.capability") && allowed(b"user.overlays"));
    }
}
