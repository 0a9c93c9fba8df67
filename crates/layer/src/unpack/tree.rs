//! The directory that a layer is unpacked into.
//!
//! Every name is resolved by the kernel below an open directory (`openat2` with `RESOLVE_IN_ROOT`): whatever links a
//! layer makes, absolute or with `..`, nothing outside is reached. Directories in use stay open, since a layer lists
//! the files of one directory after another; the handles are forgotten whenever something is removed, because then a path
//! may mean another directory.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::names::{self, show};
use super::{Below, DirAttr, UnpackError};

/// Directories that stay open.
const OPEN: usize = 64;
/// Links that are followed to make a directory, at most.
const LINKS: usize = 40;

/// The directory, and what is remembered about it.
pub(super) struct Tree<'a> {
    root: Rc<OwnedFd>,
    open: HashMap<Vec<u8>, Rc<OwnedFd>>,
    below: &'a dyn Below,
    /// Directories that the layer only implies, with their times, to be set at the end.
    pub(super) implied: Vec<(Vec<u8>, (i64, u32))>,
    /// Directories that were made.
    pub(super) made: u64,
}

/// Owner, bits, time and attributes of something that is made.
#[derive(Debug)]
pub(super) struct Attr<'a> {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: Vec<(&'a [u8], &'a [u8])>,
}

pub(super) fn failed<E: Into<io::Error>>(what: &'static str, path: &[u8]) -> impl FnOnce(E) -> UnpackError {
    let path = show(path);
    move |error| UnpackError::File { what, path, source: error.into() }
}

impl<'a> Tree<'a> {
    pub(super) fn open(at: &Path, below: &'a dyn Below) -> Result<Self, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, at, flags, Mode::empty())
            .map_err(failed("opening the directory to unpack to,", at.as_os_str().as_encoded_bytes()))?;
        Ok(Self { root: Rc::new(root), open: HashMap::new(), below, implied: Vec::new(), made: 0 })
    }

    /// Returns the directory `path`, made if it is missing, as the layers below have it.
    pub(super) fn dir(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, UnpackError> {
        self.dir_within(path, LINKS)
    }

    fn dir_within(&mut self, path: &[u8], links: usize) -> Result<Rc<OwnedFd>, UnpackError> {
        let Some((parent, name)) = names::split(path) else { return Ok(Rc::clone(&self.root)) };
        if let Some(open) = self.open.get(path) {
            return Ok(Rc::clone(open));
        }
        let dir = match self.resolve(path) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => {
                let parent_dir = self.dir_within(parent, links)?;
                match rustix::fs::mkdirat(&parent_dir, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) => {
                        self.made += 1;
                        self.as_below(path, &parent_dir, name)?;
                    }
                    // A link whose target is missing: containerd makes the target.
                    Err(Errno::EXIST) if links > 0 => {
                        let target = rustix::fs::readlinkat(&parent_dir, name, Vec::new())
                            .map_err(failed("reading the link", path))?;
                        let target = target.to_bytes();
                        let whole = match target.first() {
                            Some(b'/') => target.to_vec(),
                            _ => [parent, b"/", target].concat(),
                        };
                        let clean = match names::place(&whole) {
                            Some(place) if place.dir.is_empty() => place.name.to_vec(),
                            Some(place) => [&place.dir, &b"/"[..], place.name].concat(),
                            None => Vec::new(),
                        };
                        return self.dir_within(&clean, links - 1);
                    }
                    Err(error) => return Err(failed("making the directory", path)(error)),
                }
                self.resolve(path).map_err(failed("opening the directory", path))?
            }
            Err(error) => return Err(failed("opening the directory", path)(error)),
        };
        if self.open.len() >= OPEN {
            self.open.clear();
        }
        let dir = Rc::new(dir);
        self.open.insert(path.to_vec(), Rc::clone(&dir));
        Ok(dir)
    }

    fn resolve(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // EAGAIN: something was renamed meanwhile, and `..` could not be judged.
        let mut tries = 3;
        loop {
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) if tries > 0 => tries -= 1,
                done => return done,
            }
        }
    }

    /// Gives a directory that the layer only implies the attributes it has below, or root's and 0755.
    fn as_below(&mut self, path: &[u8], parent: &OwnedFd, name: &[u8]) -> Result<(), UnpackError> {
        let found = self.below.dir(path)?;
        let plain = DirAttr { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        let known = found.is_some();
        let below = found.unwrap_or(plain);
        let dir = open_dir(parent.as_fd(), name).map_err(failed("opening the directory", path))?;
        let xattrs = below.xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        let (uid, gid) = if known { (below.uid, below.gid) } else { own_ids() };
        let attr = Attr { uid, gid, mode: below.mode, mtime: below.mtime, xattrs };
        adorn(&dir, &attr, true).map_err(failed("setting the attributes of", path))?;
        if known {
            self.implied.push((path.to_vec(), below.mtime));
        }
        Ok(())
    }

    /// Forgets which directory a path means: to be called when anything was removed.
    pub(super) fn forget(&mut self) {
        self.open.clear();
    }
}

/// Who makes directories that nobody says anything about.
fn own_ids() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

pub(super) fn open_dir(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Sets owner, attributes, then bits (an owner that changes clears setuid), of an open file or directory.
pub(super) fn adorn(file: &OwnedFd, attr: &Attr<'_>, dir_or_file: bool) -> Result<(), io::Error> {
    let (uid, gid) = ids(attr)?;
    rustix::fs::fchown(file, Some(uid), Some(gid))?;
    for (name, value) in &attr.xattrs {
        settle(name, dir_or_file, rustix::fs::fsetxattr(file, *name, value, XattrFlags::empty()))?;
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(attr.mode & 0o7777))?;
    Ok(())
}

/// Sets owner and attributes, and bits unless it is a link, of something that cannot be opened.
pub(super) fn adorn_at(dir: &OwnedFd, name: &[u8], attr: &Attr<'_>, link: bool) -> Result<(), io::Error> {
    let (uid, gid) = ids(attr)?;
    rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !attr.xattrs.is_empty() {
        // There is no lsetxattr relative to a directory before Linux 6.13; its path through /proc is as safe.
        let path = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
        for (key, value) in &attr.xattrs {
            settle(key, false, rustix::fs::lsetxattr(&path[..], *key, value, XattrFlags::empty()))?;
        }
    }
    if !link {
        rustix::fs::chmodat(dir, name, Mode::from_raw_mode(attr.mode & 0o7777), AtFlags::empty())?;
    }
    Ok(())
}

fn ids(attr: &Attr<'_>) -> Result<(Uid, Gid), Errno> {
    // All ones means "leave it" to the kernel.
    if attr.uid == u32::MAX || attr.gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    Ok((Uid::from_raw(attr.uid), Gid::from_raw(attr.gid)))
}

/// An attribute that this file system cannot hold is left out, as by containerd: `user.*` exists on files and
/// directories only.
fn settle(name: &[u8], dir_or_file: bool, done: Result<(), Errno>) -> Result<(), Errno> {
    match done {
        Err(Errno::NOTSUP) => Ok(()),
        Err(Errno::PERM) if name.starts_with(b"user.") && !dir_or_file => Ok(()),
        done => done,
    }
}

/// Returns times as the kernel takes them. Times before 1970 and those that do not fit become 1970.
pub(super) fn times((secs, nanos): (i64, u32)) -> Timestamps {
    let fits = (0..=i64::MAX / 1_000_000_000).contains(&secs) && nanos < 1_000_000_000;
    let time = match fits {
        true => Timespec { tv_sec: secs, tv_nsec: i64::from(nanos) },
        false => Timespec { tv_sec: 0, tv_nsec: 0 },
    };
    Timestamps { last_access: time, last_modification: time }
}

/// Removes whatever `name` is, directories with all they hold. Returns whether it was there.
pub(super) fn remove(dir: BorrowedFd<'_>, name: &[u8]) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) => return Ok(true),
        Err(Errno::NOENT) => return Ok(false),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    empty(open_dir(dir, name)?)?;
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

/// Removes what is in a directory: depth first, with a stack of its own, as names may nest deeper than a thread's stack.
fn empty(top: OwnedFd) -> Result<(), Errno> {
    let mut stack = vec![(top, Vec::new())];
    while let Some((dir, _)) = stack.last() {
        let mut deeper = None;
        for entry in rustix::fs::Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
                Err(Errno::ISDIR) => {
                    deeper = Some((open_dir(dir.as_fd(), name)?, name.to_vec()));
                    break;
                }
                done => done?,
            }
        }
        match deeper {
            Some(deeper) => stack.push(deeper),
            None => {
                let name = stack.pop().map(|(_, name)| name);
                if let (Some((parent, _)), Some(name)) = (stack.last(), name) {
                    rustix::fs::unlinkat(parent, &name[..], AtFlags::REMOVEDIR)?;
                }
            }
        }
    }
    Ok(())
}

/// Whether `name` is a directory.
pub(super) fn is_dir(dir: &OwnedFd, name: &[u8]) -> Result<bool, Errno> {
    let data = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(data.st_mode) == FileType::Directory)
}
