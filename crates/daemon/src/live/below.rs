//! What the layers below know about a directory, without looking through a mount of ours.
//!
//! A lazily mounted layer is asked in memory; an unpacked one on the disk, by descriptors that follow no link. The rules are
//! overlayfs': the topmost layer that has the name decides; a whiteout or anything that is no directory ends the search, as
//! does an opaque directory on the way.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{CWD, FileType, Mode, OFlags, fgetxattr, flistxattr, fstat, openat};
use rustix::io::Errno;
use soci_fs::{Inode, LayerFs};
use soci_layer::unpack::{Below, BelowError, DirAttr};

/// The overlay attribute of an opaque directory, in either form.
const OPAQUE: [&CStr; 2] = [c"trusted.overlay.opaque", c"user.overlay.opaque"];
const MAX_XATTR: usize = 64 << 10;

/// One layer below.
#[derive(Debug, Clone)]
pub enum Lower {
    /// Served by this process.
    Lazy(Arc<LayerFs>),
    /// Unpacked.
    Plain(PathBuf),
}

/// The layers below, topmost first.
#[derive(Debug, Default)]
pub struct Layers {
    lower: Vec<Lower>,
    /// Answers so far: a layer implies the same few directories again and again.
    known: Mutex<HashMap<Vec<u8>, Option<DirAttr>>>,
}

/// What one layer says about a directory.
enum Found {
    Dir(DirAttr),
    /// It has nothing of that name: the next layer is asked.
    Missing,
    /// It hides whatever is below.
    Hidden,
}

impl Layers {
    /// Returns the layers `lower`, topmost first.
    pub fn new(lower: Vec<Lower>) -> Self {
        Self { lower, known: Mutex::default() }
    }

    fn search(&self, path: &[u8]) -> Result<Option<DirAttr>, std::io::Error> {
        let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
        for lower in &self.lower {
            let found = match lower {
                Lower::Lazy(fs) => lazy(fs, &parts),
                Lower::Plain(root) => plain(root, &parts)?,
            };
            match found {
                Found::Dir(attr) => return Ok(Some(attr)),
                Found::Missing => {}
                Found::Hidden => return Ok(None),
            }
        }
        Ok(None)
    }
}

impl Below for Layers {
    fn dir(&self, path: &[u8]) -> Result<Option<DirAttr>, BelowError> {
        if let Some(known) = self.known.lock().get(path) {
            return Ok(known.clone());
        }
        let found = self
            .search(path)
            .map_err(|source| BelowError { path: String::from_utf8_lossy(path).into_owned(), source })?;
        self.known.lock().insert(path.to_vec(), found.clone());
        Ok(found)
    }
}

fn lazy(fs: &LayerFs, parts: &[&[u8]]) -> Found {
    let mut inode = Inode::ROOT;
    let mut opaque = is_opaque(fs, inode);
    for part in parts {
        let Ok(attr) = fs.lookup(inode, part) else {
            return if opaque { Found::Hidden } else { Found::Missing };
        };
        if FileType::from_raw_mode(attr.mode) != FileType::Directory {
            return Found::Hidden;
        }
        inode = attr.inode;
        opaque |= is_opaque(fs, inode);
    }
    let Ok(attr) = fs.getattr(inode) else { return Found::Missing };
    let names = fs.list_xattrs(inode).unwrap_or_default();
    let xattrs = names
        .split(|byte| *byte == 0)
        .filter(|name| {
            !name.is_empty() && !name.starts_with(b"trusted.") && !name.starts_with(b"user.overlay.")
        })
        .filter_map(|name| Some((name.to_vec(), fs.get_xattr(inode, name).ok()?.to_vec())))
        .collect();
    Found::Dir(DirAttr { mode: attr.mode & 0o7777, uid: attr.uid, gid: attr.gid, mtime: attr.mtime, xattrs })
}

fn is_opaque(fs: &LayerFs, inode: Inode) -> bool {
    OPAQUE.iter().any(|name| fs.get_xattr(inode, name.to_bytes()).is_ok_and(|value| value == b"y"))
}

fn plain(root: &PathBuf, parts: &[&[u8]]) -> Result<Found, std::io::Error> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let mut dir: OwnedFd = openat(CWD, root, flags, Mode::empty())?;
    let mut opaque = marked(&dir);
    for part in parts {
        let name = CString::new(*part).map_err(|_| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
        dir = match openat(&dir, name.as_c_str(), flags, Mode::empty()) {
            Ok(dir) => dir,
            Err(Errno::NOENT) if opaque => return Ok(Found::Hidden),
            Err(Errno::NOENT) => return Ok(Found::Missing),
            // A whiteout, a link, a file.
            Err(Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => return Ok(Found::Hidden),
            Err(error) => return Err(error.into()),
        };
        opaque |= marked(&dir);
    }
    let stat = fstat(&dir)?;
    let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or_default();
    Ok(Found::Dir(DirAttr {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: (stat.st_mtime, nanos),
        xattrs: xattrs(&dir)?,
    }))
}

fn marked(dir: &OwnedFd) -> bool {
    let mut value = [0_u8; 2];
    OPAQUE.iter().any(|name| matches!(fgetxattr(dir, *name, &mut value[..]), Ok(1) if value[0] == b'y'))
}

/// Names and values.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

fn xattrs(dir: &OwnedFd) -> Result<Xattrs, std::io::Error> {
    let mut names = vec![0_u8; MAX_XATTR];
    let length = match flistxattr(dir, &mut names[..]) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        length => length?,
    };
    let mut found = Vec::new();
    let mut value = vec![0_u8; MAX_XATTR];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.") || name.starts_with(b"user.overlay.") {
            continue;
        }
        let Ok(text) = CString::new(name) else { continue };
        if let Ok(length) = fgetxattr(dir, text.as_c_str(), &mut value[..]) {
            found.push((name.to_vec(), value[..length].to_vec()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn the_topmost_layer_decides() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str, mode: u32| {
            let path = root.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        make("low/a/b", 0o750);
        make("low/only", 0o711);
        make("low/hidden", 0o777);
        make("high/a", 0o701);
        std::fs::write(root.path().join("high/hidden"), b"").unwrap();
        symlink("a", root.path().join("high/link")).unwrap();
        let plain = |name: &str| Lower::Plain(root.path().join(name));
        let layers = Layers::new(vec![plain("high"), plain("low")]);
        let mode = |path: &[u8]| layers.dir(path).unwrap().map(|attr| attr.mode);
        assert_eq!(mode(b"a"), Some(0o701));
        assert_eq!(mode(b"a/b"), Some(0o750));
        assert_eq!(mode(b"only"), Some(0o711));
        assert_eq!(mode(b"hidden"), None);
        assert_eq!(mode(b"link"), None, "links are not followed");
        assert_eq!(mode(b"nothing"), None);
        assert!(mode(b"").is_some(), "the root itself");
    }
}
