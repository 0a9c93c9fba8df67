//! Writes the members of a tar as files.
//!
//! One thread parses and writes, so that the order of members, on which hard links and replacements depend, is kept; it
//! is fed by the stream, whose decompression runs elsewhere. Whiteouts become what overlayfs reads: a character device
//! 0/0, or the opaque attribute on the directory. A later member replaces an earlier one of its name, but directories
//! are merged. Times of directories are set at the end, since writing into them changes them.
//!
//! The digest of the whole uncompressed stream, padding and trailing bytes included, is compared with the one in the
//! image's configuration before success is reported. Until then what is on disk is untrusted: unpack to a temporary
//! directory, and rename it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use soci_oci::{Digest, Hasher};
use soci_ztoc::EntryKind;
use soci_ztoc::tar::{Member, Parser, Step};
use tokio::sync::mpsc;

use super::names::{self, Meaning};
use super::tree::{self, Attr, Tree, failed};
use super::{Below, UnpackError};
use crate::{ReadError, TarStream};

/// Pieces that may wait for the thread that writes.
const QUEUE: usize = 8;
/// What a file's size is rounded up to in [`Usage::bytes`].
const BLOCK: u64 = 4096;

/// Which attribute marks a directory as opaque.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OpaqueXattr {
    /// `trusted.overlay.opaque`.
    #[default]
    Trusted,
    /// `user.overlay.opaque`, for overlay mounts with `userxattr`.
    User,
}

/// How a layer is unpacked.
#[derive(Debug, Clone, Default)]
pub struct ApplyOptions {
    /// Digest of the uncompressed layer, from the image's configuration. `None` only when the bytes are verified
    /// otherwise.
    pub diff_id: Option<Digest>,
    /// How opaque directories are marked.
    pub opaque: OpaqueXattr,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes of files, each rounded up to 4 KiB, with 4 KiB for each directory.
    pub bytes: u64,
    /// Files, directories and other things with an inode of their own.
    pub inodes: u64,
}

/// Unpacks `tar` into the directory `at`, which exists and is empty.
///
/// Dropping the future ends the work at the next piece of the tar; a thread may still write for a moment.
///
/// # Errors
/// [`UnpackError`]; then `at` holds a part of the layer and is to be removed.
pub async fn apply(
    mut tar: TarStream,
    at: &Path,
    below: Arc<dyn Below>,
    options: ApplyOptions,
) -> Result<Usage, UnpackError> {
    let (pieces, input) = mpsc::channel(QUEUE);
    let at = at.to_owned();
    let writer = tokio::task::spawn_blocking(move || write(input, &at, &*below, &options));
    loop {
        let piece = match tar.next().await {
            Some(Ok(piece)) => Piece::Bytes(piece),
            Some(Err(error)) => Piece::Failed(error),
            None => Piece::End,
        };
        let last = !matches!(piece, Piece::Bytes(_));
        // When the writer is gone its result says why.
        if pieces.send(piece).await.is_err() || last {
            break;
        }
    }
    drop(pieces);
    writer.await.map_err(|_| UnpackError::Thread)?
}

enum Piece {
    Bytes(Bytes),
    Failed(ReadError),
    End,
}

fn write(
    mut input: mpsc::Receiver<Piece>,
    at: &Path,
    below: &dyn Below,
    options: &ApplyOptions,
) -> Result<Usage, UnpackError> {
    let mut hasher = options.diff_id.as_ref().map(Digest::hasher);
    let mut parser = Parser::new();
    let mut apply = Apply {
        tree: Tree::open(at, below)?,
        opaque: options.opaque,
        file: None,
        directories: Vec::new(),
        usage: Usage::default(),
    };
    let mut ended = false;
    loop {
        let piece = match input.blocking_recv() {
            Some(Piece::Bytes(piece)) => piece,
            Some(Piece::Failed(error)) => return Err(error.into()),
            Some(Piece::End) => break,
            None => return Err(UnpackError::Thread),
        };
        if let Some(hasher) = &mut hasher {
            hasher.update(&piece);
        }
        let mut rest = &piece[..];
        while !ended {
            match parser.step(&mut rest)? {
                Step::More => break,
                Step::Member(member) => apply.member(*member)?,
                Step::Data(data) => apply.data(data)?,
                Step::Global(_) => {}
                Step::End => ended = true,
            }
        }
    }
    parser.finish()?;
    check(hasher, options)?;
    apply.finish()
}

fn check(hasher: Option<Hasher>, options: &ApplyOptions) -> Result<(), UnpackError> {
    match (hasher.map(Hasher::finish), options.diff_id) {
        (Some(got), Some(expected)) if got != expected => {
            Err(UnpackError::DiffId { expected: Box::new(expected), got: Box::new(got) })
        }
        _ => Ok(()),
    }
}

/// The state between members.
struct Apply<'a> {
    tree: Tree<'a>,
    opaque: OpaqueXattr,
    /// The file whose data come next.
    file: Option<Open>,
    /// Directories with entries of their own, with their times.
    directories: Vec<(Vec<u8>, (i64, u32))>,
    usage: Usage,
}

struct Open {
    file: OwnedFd,
    member: Member,
    left: u64,
}

impl Apply<'_> {
    fn member(&mut self, member: Member) -> Result<(), UnpackError> {
        let Some(place) = names::place(&member.name) else { return Ok(()) };
        let dir = self.tree.dir(&place.dir)?;
        match names::meaning(place.name)? {
            Meaning::Opaque => self.make_opaque(&dir, &member.name),
            Meaning::Whiteout(hidden) => self.white_out(&dir, hidden, &member),
            Meaning::File => {
                let path = match place.dir.is_empty() {
                    true => place.name.to_vec(),
                    false => [&place.dir, &b"/"[..], place.name].concat(),
                };
                let name = place.name.to_vec();
                self.file(&dir, &name, path, member)
            }
        }
    }

    fn make_opaque(&self, dir: &OwnedFd, path: &[u8]) -> Result<(), UnpackError> {
        let name = match self.opaque {
            OpaqueXattr::Trusted => "trusted.overlay.opaque",
            OpaqueXattr::User => "user.overlay.opaque",
        };
        rustix::fs::fsetxattr(dir, name, b"y", XattrFlags::empty()).map_err(failed("marking as opaque", path))
    }

    fn white_out(&mut self, dir: &OwnedFd, hidden: &[u8], member: &Member) -> Result<(), UnpackError> {
        let made = rustix::fs::mknodat(dir, hidden, FileType::CharacterDevice, Mode::empty(), 0);
        match made {
            Ok(()) => {}
            // The layer has both: what is hidden is what lies below, and a directory hides that by being opaque.
            Err(Errno::EXIST) => {
                return match tree::open_dir(dir.as_fd(), hidden) {
                    Ok(dir) => self.make_opaque(&dir, &member.name),
                    Err(_) => Ok(()),
                };
            }
            Err(error) => return Err(failed("making the whiteout", &member.name)(error)),
        }
        self.usage.inodes += 1;
        let attr = Attr { xattrs: Vec::new(), ..attr(member, self.opaque) };
        tree::adorn_at(dir, hidden, &attr, true).map_err(failed("setting the owner of", &member.name))
    }

    fn file(
        &mut self,
        dir: &Rc<OwnedFd>,
        name: &[u8],
        path: Vec<u8>,
        member: Member,
    ) -> Result<(), UnpackError> {
        let what = match member.kind {
            EntryKind::Directory => return self.directory(dir, name, path, &member),
            EntryKind::Regular => "making the file",
            EntryKind::HardLink => "making the hard link",
            EntryKind::Symlink => "making the symbolic link",
            EntryKind::CharDevice | EntryKind::BlockDevice => "making the device",
            EntryKind::Fifo => "making the pipe",
        };
        let mut made = self.make(dir, name, &member)?;
        if matches!(made, Err(Errno::EXIST)) {
            tree::remove(dir.as_fd(), name).map_err(failed("replacing", &path))?;
            self.tree.forget();
            made = self.make(dir, name, &member)?;
        }
        let file = made.map_err(failed(what, &path))?;
        self.usage.inodes += u64::from(member.kind != EntryKind::HardLink);
        match file {
            Some(file) => {
                let size = member.size;
                self.usage.bytes += size.next_multiple_of(BLOCK);
                self.file = Some(Open { file, member, left: size });
                self.data(&[])
            }
            None => {
                let attr = attr(&member, self.opaque);
                // The bits of a symbolic link cannot be set, and mean nothing.
                let link = match member.kind {
                    EntryKind::Symlink => true,
                    EntryKind::HardLink => is_link(dir, name).map_err(failed("looking at", &path))?,
                    _ => false,
                };
                tree::adorn_at(dir, name, &attr, link).map_err(failed("setting the attributes of", &path))?;
                rustix::fs::utimensat(dir, name, &tree::times(attr.mtime), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(failed("setting the time of", &path))
            }
        }
    }

    /// Makes what `member` is. Returns the file of a regular one.
    fn make(
        &mut self,
        dir: &Rc<OwnedFd>,
        name: &[u8],
        member: &Member,
    ) -> Result<Result<Option<OwnedFd>, Errno>, UnpackError> {
        let mode = Mode::from_raw_mode(member.mode());
        let device = |kind| {
            let device = rustix::fs::makedev(member.dev_major(), member.dev_minor());
            rustix::fs::mknodat(dir, name, kind, mode, device).map(|()| None)
        };
        Ok(match member.kind {
            EntryKind::Regular => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600)).map(Some)
            }
            EntryKind::Symlink => rustix::fs::symlinkat(&member.link[..], dir, name).map(|()| None),
            EntryKind::HardLink => {
                let reason = "a hard link to the root";
                let target = names::place(&member.link)
                    .ok_or_else(|| UnpackError::Name { path: names::show(&member.name), reason })?;
                let from = self.tree.dir(&target.dir)?;
                rustix::fs::linkat(&from, target.name, dir, name, AtFlags::empty()).map(|()| None)
            }
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                let fits = |number: i64| u32::try_from(number).is_ok();
                if !fits(member.raw_dev_major) || !fits(member.raw_dev_minor) {
                    let reason = "a device number does not fit into 32 bits";
                    return Err(UnpackError::Name { path: names::show(&member.name), reason });
                }
                match member.kind {
                    EntryKind::CharDevice => device(FileType::CharacterDevice),
                    _ => device(FileType::BlockDevice),
                }
            }
            EntryKind::Fifo => rustix::fs::mknodat(dir, name, FileType::Fifo, mode, 0).map(|()| None),
            EntryKind::Directory => rustix::fs::mkdirat(dir, name, mode).map(|()| None),
        })
    }

    fn directory(
        &mut self,
        parent: &Rc<OwnedFd>,
        name: &[u8],
        path: Vec<u8>,
        member: &Member,
    ) -> Result<(), UnpackError> {
        let made = match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Err(Errno::EXIST) if !tree::is_dir(parent, name).map_err(failed("looking at", &path))? => {
                tree::remove(parent.as_fd(), name).map_err(failed("replacing", &path))?;
                self.tree.forget();
                rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)).map(|()| true)
            }
            Err(Errno::EXIST) => Ok(false),
            made => made.map(|()| true),
        };
        if made.map_err(failed("making the directory", &path))? {
            self.tree.made += 1;
        }
        let dir = tree::open_dir(parent.as_fd(), name).map_err(failed("opening the directory", &path))?;
        let attr = attr(member, self.opaque);
        tree::adorn(&dir, &attr, true).map_err(failed("setting the attributes of", &path))?;
        self.directories.push((path, attr.mtime));
        Ok(())
    }

    /// Writes data of the open file; completes the file with its last byte.
    fn data(&mut self, mut data: &[u8]) -> Result<(), UnpackError> {
        let Some(open) = &mut self.file else { return Ok(()) };
        while !data.is_empty() {
            match rustix::io::write(&open.file, data) {
                Ok(written) => {
                    data = &data[written..];
                    open.left = open.left.saturating_sub(written as u64);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(failed("writing", &open.member.name)(error)),
            }
        }
        if open.left == 0
            && let Some(Open { file, member, .. }) = self.file.take()
        {
            let attr = attr(&member, self.opaque);
            tree::adorn(&file, &attr, true).map_err(failed("setting the attributes of", &member.name))?;
            rustix::fs::futimens(&file, &tree::times(attr.mtime))
                .map_err(failed("setting the time of", &member.name))?;
        }
        Ok(())
    }

    /// Sets the times of directories.
    fn finish(mut self) -> Result<Usage, UnpackError> {
        let implied = std::mem::take(&mut self.tree.implied);
        let directories = std::mem::take(&mut self.directories);
        for (path, mtime) in implied.into_iter().chain(directories) {
            // It may have been replaced since.
            let Ok(dir) = self.tree.dir(&path) else { continue };
            rustix::fs::futimens(&dir, &tree::times(mtime)).map_err(failed("setting the time of", &path))?;
        }
        self.usage.inodes += self.tree.made;
        self.usage.bytes += self.tree.made * BLOCK;
        Ok(self.usage)
    }
}

fn is_link(dir: &OwnedFd, name: &[u8]) -> Result<bool, Errno> {
    let data = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(data.st_mode) == FileType::Symlink)
}

/// Returns the attributes of a member. Those that would speak to overlayfs are not an image's to set.
fn attr(member: &Member, opaque: OpaqueXattr) -> Attr<'_> {
    let overlay = |name: &[u8]| {
        name.starts_with(b"trusted.") || opaque == OpaqueXattr::User && name.starts_with(b"user.overlay.")
    };
    Attr {
        uid: member.uid(),
        gid: member.gid(),
        mode: member.mode(),
        mtime: (member.mtime.secs, member.mtime.nanos),
        xattrs: member.xattrs().filter(|(name, _)| !overlay(name)).collect(),
    }
}
