//! From the kernel's request to the file system's operation and back to the reply's bytes.
//!
//! Knows the protocol and nothing of descriptors or threads. No reply depends on an earlier request, no file handle
//! carries anything and forgotten inodes cost nothing, so any process with the same layer can answer the next request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use soci_layer::ReadChunks;
use zerocopy::{FromBytes, IntoBytes};

use crate::abi::{self, InHeader, opcode, open_flag};
use crate::attr::{self, Attr, Inode};
use crate::errno::FsError;
use crate::fs::{DirItem, LayerFs, Opened, ReadFuture, ReadReply};
use crate::meter::Operation;

/// Most bytes of one listing: what a kernel asks for is far less.
const MAX_LISTING: usize = 1 << 20;

/// How long the kernel may keep what it was told. Layers never change, so long is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheTimes {
    /// Of names.
    pub entry: Duration,
    /// Of attributes.
    pub attr: Duration,
    /// Of names that do not exist.
    pub negative: Duration,
}

impl Default for CacheTimes {
    /// A year each.
    fn default() -> Self {
        let year = Duration::from_secs(365 * 24 * 3600);
        Self { entry: year, attr: year, negative: year }
    }
}

/// What becomes of a request.
pub(crate) enum Answer {
    /// The kernel expects none.
    None,
    /// An errno.
    Error(Errno),
    /// The body is in the scratch buffer.
    Body,
    /// Content.
    Chunks(ReadChunks),
    /// Content that has to be waited for; the operation began then.
    Wait(ReadFuture, Instant),
    /// The reader that waits for the answer to this request got a signal.
    Interrupt(u64),
}

/// A request: the header and what follows it.
pub(crate) struct Request<'a> {
    pub(crate) header: InHeader,
    body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Splits what was read from the device; `None` when it is no request.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, body) = InHeader::read_from_prefix(bytes).ok()?;
        (header.len as usize == bytes.len()).then_some(Self { header, body })
    }

    fn arguments<T: FromBytes>(&self) -> Result<T, FsError> {
        T::read_from_prefix(self.body).map(|(arguments, _)| arguments).map_err(|_| FsError::Malformed)
    }

    /// Returns the name that stands `skip` bytes into the body and ends with a zero byte.
    fn name(&self, skip: usize) -> Result<&'a [u8], FsError> {
        let rest = self.body.get(skip..).ok_or(FsError::Malformed)?;
        let end = rest.iter().position(|byte| *byte == 0).ok_or(FsError::Malformed)?;
        rest.get(..end).ok_or(FsError::Malformed)
    }
}

/// Carries out a request. `out` is a scratch buffer, empty when called.
pub(crate) fn handle(
    fs: &Arc<LayerFs>,
    times: &CacheTimes,
    request: &Request<'_>,
    out: &mut Vec<u8>,
) -> Answer {
    let begun = Instant::now();
    let (operation, result) = match request.header.opcode {
        opcode::READ => return read(fs, request, begun),
        opcode::LOOKUP => (Operation::Lookup, lookup(fs, times, request, out)),
        opcode::GETATTR => match getattr(fs, times, request, out) {
            Ok(operation) => (operation, Ok(())),
            Err(error) => (Operation::Getattr, Err(error)),
        },
        opcode::READDIRPLUS => (Operation::Readdir, list(fs, Listing::Plus(times), request, out)),
        opcode::READDIR => (Operation::Readdir, list(fs, Listing::Names, request, out)),
        opcode::OPEN => (Operation::Open, open(fs, request, out)),
        opcode::READLINK => (Operation::Readlink, readlink(fs, request, out)),
        opcode::GETXATTR => (Operation::Getxattr, get_xattr(fs, request, out)),
        opcode::LISTXATTR => (Operation::Listxattr, list_xattrs(fs, request, out)),
        opcode::STATFS => (Operation::Statfs, statfs(fs, out)),
        opcode::FORGET | opcode::BATCH_FORGET => return Answer::None,
        opcode::INTERRUPT => {
            return match request.arguments::<abi::InterruptIn>() {
                Ok(interrupt) => Answer::Interrupt(interrupt.unique),
                Err(_) => Answer::None,
            };
        }
        opcode::RELEASE | opcode::RELEASEDIR | opcode::DESTROY => return Answer::Body,
        opcode::SETATTR
        | opcode::SYMLINK
        | opcode::MKNOD..=opcode::LINK
        | opcode::WRITE
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::CREATE
        | opcode::FALLOCATE
        | opcode::RENAME2
        | opcode::COPY_FILE_RANGE
        | opcode::TMPFILE => return Answer::Error(FsError::ReadOnly.errno()),
        // Among them OPENDIR, ACCESS, FLUSH and FSYNC: the kernel then does without, and does not ask again. Directories
        // opened without us are cached, and default_permissions decides on access.
        _ => return Answer::Error(FsError::Unsupported.errno()),
    };
    let failed = matches!(&result, Err(error) if !matches!(error, FsError::NoEntry | FsError::NoXattr | FsError::XattrsOff));
    fs.meter(operation, begun, 0, failed);
    match result {
        Ok(()) => Answer::Body,
        Err(error) => {
            out.clear();
            Answer::Error(error.errno())
        }
    }
}

fn read(fs: &Arc<LayerFs>, request: &Request<'_>, begun: Instant) -> Answer {
    let arguments: abi::ReadIn = match request.arguments() {
        Ok(arguments) => arguments,
        Err(error) => return Answer::Error(error.errno()),
    };
    match fs.read(Inode(request.header.nodeid), arguments.offset, arguments.size as usize) {
        ReadReply::Wait(future) => Answer::Wait(future, begun),
        ReadReply::Ready(Ok(chunks)) => {
            fs.meter(Operation::Read, begun, chunks.len() as u64, false);
            Answer::Chunks(chunks)
        }
        ReadReply::Ready(Err(error)) => {
            fs.meter(Operation::Read, begun, 0, true);
            Answer::Error(error.errno())
        }
    }
}

fn wire_attr(attr: &Attr) -> abi::Attr {
    // The kernel reads the seconds as signed.
    let seconds = attr.mtime.0.cast_unsigned();
    abi::Attr {
        ino: attr.inode.0,
        size: attr.size,
        blocks: attr.blocks(),
        atime: seconds,
        mtime: seconds,
        ctime: seconds,
        atimensec: attr.mtime.1,
        mtimensec: attr.mtime.1,
        ctimensec: attr.mtime.1,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr::BLOCK_SIZE,
        flags: 0,
    }
}

fn wire_entry(attr: &Attr, times: &CacheTimes) -> abi::EntryOut {
    let volatile = LayerFs::is_volatile(attr.inode);
    let (entry, attr_time) =
        if volatile { (Duration::ZERO, Duration::ZERO) } else { (times.entry, times.attr) };
    abi::EntryOut {
        nodeid: attr.inode.0,
        generation: 0,
        entry_valid: entry.as_secs(),
        attr_valid: attr_time.as_secs(),
        entry_valid_nsec: entry.subsec_nanos(),
        attr_valid_nsec: attr_time.subsec_nanos(),
        attr: wire_attr(attr),
    }
}

fn lookup(fs: &LayerFs, times: &CacheTimes, request: &Request<'_>, out: &mut Vec<u8>) -> Result<(), FsError> {
    let entry = match fs.lookup(Inode(request.header.nodeid), request.name(0)?) {
        Ok(attr) => wire_entry(&attr, times),
        // Number 0 with a time is a "no" that the kernel keeps.
        Err(FsError::NoEntry) if !times.negative.is_zero() => abi::EntryOut {
            entry_valid: times.negative.as_secs(),
            entry_valid_nsec: times.negative.subsec_nanos(),
            ..abi::EntryOut::default()
        },
        Err(error) => return Err(error),
    };
    out.extend_from_slice(entry.as_bytes());
    Ok(())
}

fn getattr(
    fs: &LayerFs,
    times: &CacheTimes,
    request: &Request<'_>,
    out: &mut Vec<u8>,
) -> Result<Operation, FsError> {
    let attr = fs.getattr(Inode(request.header.nodeid))?;
    let valid = if LayerFs::is_volatile(attr.inode) { Duration::ZERO } else { times.attr };
    let reply = abi::AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        dummy: 0,
        attr: wire_attr(&attr),
    };
    out.extend_from_slice(reply.as_bytes());
    let flags = request.arguments::<u32>().unwrap_or_default();
    Ok(if attr.is_whiteout() {
        Operation::GetattrOfWhiteout
    } else if flags & abi::GETATTR_FH != 0 {
        Operation::GetattrOfFile
    } else {
        Operation::Getattr
    })
}

fn open(fs: &LayerFs, request: &Request<'_>, out: &mut Vec<u8>) -> Result<(), FsError> {
    let arguments: abi::OpenIn = request.arguments()?;
    // O_ACCMODE: anything but reading.
    if arguments.flags & 3 != 0 {
        return Err(FsError::ReadOnly);
    }
    let open_flags = match fs.open(Inode(request.header.nodeid))? {
        Opened::Immutable => open_flag::KEEP_CACHE | open_flag::NOFLUSH,
        Opened::Volatile => open_flag::DIRECT_IO | open_flag::NOFLUSH,
    };
    out.extend_from_slice(abi::OpenOut { fh: 0, open_flags, backing_id: 0 }.as_bytes());
    Ok(())
}

fn readlink(fs: &LayerFs, request: &Request<'_>, out: &mut Vec<u8>) -> Result<(), FsError> {
    out.extend_from_slice(fs.readlink(Inode(request.header.nodeid))?);
    Ok(())
}

/// Answers with the size when asked for 0 bytes, else with the value when it fits.
fn reply_sized(value: &[u8], size: u32, out: &mut Vec<u8>) -> Result<(), FsError> {
    let len = u32::try_from(value.len()).map_err(|_| FsError::Range)?;
    match size {
        0 => out.extend_from_slice(abi::XattrOut { size: len, padding: 0 }.as_bytes()),
        size if len > size => return Err(FsError::Range),
        _ => out.extend_from_slice(value),
    }
    Ok(())
}

fn get_xattr(fs: &LayerFs, request: &Request<'_>, out: &mut Vec<u8>) -> Result<(), FsError> {
    let arguments: abi::XattrIn = request.arguments()?;
    let name = request.name(size_of::<abi::XattrIn>())?;
    reply_sized(fs.get_xattr(Inode(request.header.nodeid), name)?, arguments.size, out)
}

fn list_xattrs(fs: &LayerFs, request: &Request<'_>, out: &mut Vec<u8>) -> Result<(), FsError> {
    let arguments: abi::XattrIn = request.arguments()?;
    reply_sized(&fs.list_xattrs(Inode(request.header.nodeid))?, arguments.size, out)
}

fn statfs(fs: &LayerFs, out: &mut Vec<u8>) -> Result<(), FsError> {
    let space = fs.statfs()?;
    let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let reply = abi::StatfsOut {
        blocks: space.f_blocks,
        bfree: space.f_bfree,
        bavail: space.f_bavail,
        files: space.f_files,
        ffree: space.f_ffree,
        bsize: small(space.f_bsize),
        namelen: 255,
        frsize: small(space.f_frsize),
        padding: 0,
        spare: [0; 6],
    };
    out.extend_from_slice(reply.as_bytes());
    Ok(())
}

/// What is told of each name.
#[derive(Clone, Copy)]
enum Listing<'a> {
    Names,
    /// The attributes too.
    Plus(&'a CacheTimes),
}

fn list(fs: &LayerFs, listing: Listing<'_>, request: &Request<'_>, out: &mut Vec<u8>) -> Result<(), FsError> {
    let arguments: abi::ReadIn = request.arguments()?;
    let room = (arguments.size as usize).min(MAX_LISTING);
    fs.read_dir(Inode(request.header.nodeid), arguments.offset, |item| push_item(listing, &item, room, out))
}

/// Appends an item if it fits.
fn push_item(listing: Listing<'_>, item: &DirItem<'_>, room: usize, out: &mut Vec<u8>) -> bool {
    let head = match listing {
        Listing::Names => 0,
        Listing::Plus(_) => size_of::<abi::EntryOut>(),
    };
    let end = (out.len() + head + size_of::<abi::Dirent>() + item.name.len()).next_multiple_of(8);
    let Ok(namelen) = u32::try_from(item.name.len()) else { return true };
    if end > room {
        return false;
    }
    if let Listing::Plus(times) = listing {
        // Without attributes the number is 0, and the kernel takes the name only.
        let entry = item.attr.map(|attr| wire_entry(&attr, times)).unwrap_or_default();
        out.extend_from_slice(entry.as_bytes());
    }
    let dirent = abi::Dirent { ino: item.inode.0, off: item.next, namelen, kind: item.kind >> 12 };
    out.extend_from_slice(dirent.as_bytes());
    out.extend_from_slice(item.name);
    out.resize(end, 0);
    true
}
