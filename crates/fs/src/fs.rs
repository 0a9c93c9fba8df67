//! A layer as a file system, without FUSE.
//!
//! All operations but one answer at once from memory. Only reading content may have to wait; then the caller gets a
//! future instead of an answer, and decides where it runs. There is no state per open file, so a handle carries nothing:
//! which files were checked against their tar header is remembered per inode.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::StatVfs;
use soci_layer::{RangeRead, ReadChunks};
use soci_oci::with_causes;
use soci_ztoc::UncompressedOffset;

use crate::attr::{self, Attr, Inode, Target, file_type};
use crate::errno::FsError;
use crate::header_check;
use crate::late::Late;
use crate::meter::{FsMeter, Operation};
use crate::state_dir::{self, LayerState};
use crate::tree::{Body, LayerTree, NodeIndex};

/// Whether a file is checked against its tar header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderCheck {
    /// Before its first byte is served, once per file.
    FirstRead,
    /// Never.
    Off,
}

/// What a layer's file system needs beside its files and bytes.
#[derive(Debug)]
pub struct FsOptions {
    /// The layer, for logs.
    pub layer: String,
    /// Whether files are checked against their tar headers.
    pub header_check: HeaderCheck,
    /// How long a read may take.
    pub read_timeout: Duration,
    /// What the hidden state directory tells; without it there is none.
    pub state: Option<Arc<dyn LayerState>>,
    /// A directory on the file system whose space the layer reports; never one inside a mount of ours.
    pub statfs: PathBuf,
    /// Who is told of operations.
    pub meter: Option<Arc<dyn FsMeter>>,
}

/// A read that waits for bytes. Dropping it gives the read up.
pub type ReadFuture = Pin<Box<dyn Future<Output = Result<ReadChunks, FsError>> + Send>>;

/// An answer to a read.
pub enum ReadReply {
    /// The bytes, or why there are none.
    Ready(Result<ReadChunks, FsError>),
    /// The bytes come later; at the latest when the read's time is over.
    Wait(ReadFuture),
}

impl std::fmt::Debug for ReadReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready(result) => f.debug_tuple("Ready").field(result).finish(),
            Self::Wait(_) => f.write_str("Wait"),
        }
    }
}

/// An open file: how the kernel may cache it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// The content never changes: what is cached stays cached.
    Immutable,
    /// The content changes: every read has to ask.
    Volatile,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirItem<'a> {
    /// The name.
    pub name: &'a [u8],
    /// Number of the file.
    pub inode: Inode,
    /// Its attributes; `None` of `.`, `..` and names with nothing behind them.
    pub attr: Option<Attr>,
    /// File type bits; 0 when they are not known.
    pub kind: u32,
    /// Offset of the item after this one.
    pub next: u64,
}

/// One layer as a read-only file system. Shared by all who serve it.
#[derive(Debug)]
pub struct LayerFs {
    tree: LayerTree,
    reader: Arc<dyn RangeRead>,
    options: FsOptions,
    state_name: Option<String>,
    /// A bit for each node whose tar header was found right.
    checked: Box<[AtomicU64]>,
    /// Whether the last read failed: the first of many failures is the one that is logged as a warning.
    failing: AtomicBool,
    last_error: Mutex<Option<String>>,
    late: Late,
}

/// The bytes of a file that a read asks for.
#[derive(Debug, Clone, Copy)]
struct Want {
    index: NodeIndex,
    at: UncompressedOffset,
    len: usize,
    header: Option<Header>,
}

/// A tar header that has to be checked first.
#[derive(Debug, Clone, Copy)]
struct Header {
    at: UncompressedOffset,
    len: usize,
    fingerprint: u64,
}

impl LayerFs {
    /// Returns the file system of `tree`, whose files' bytes come from `reader`.
    pub fn new(tree: LayerTree, reader: Arc<dyn RangeRead>, options: FsOptions) -> Arc<Self> {
        let words = match options.header_check {
            HeaderCheck::FirstRead => tree.len().div_ceil(64),
            HeaderCheck::Off => 0,
        };
        let state_name = options.state.as_deref().map(state_dir::file_name);
        Arc::new(Self {
            tree,
            reader,
            state_name,
            options,
            checked: (0..words).map(|_| AtomicU64::new(0)).collect(),
            failing: AtomicBool::new(false),
            last_error: Mutex::new(None),
            late: Late::default(),
        })
    }

    /// Returns the files.
    pub fn tree(&self) -> &LayerTree {
        &self.tree
    }

    /// Returns the layer as logs name it.
    pub fn layer(&self) -> &str {
        &self.options.layer
    }

    pub(crate) fn read_timeout(&self) -> Duration {
        self.options.read_timeout
    }

    /// Returns the last failure of a read, if there was one.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    /// Whether attributes of the file may change while it is mounted: only those of the state directory do.
    pub fn is_volatile(inode: Inode) -> bool {
        matches!(inode.target(), Some(Target::StateDir | Target::StateFile))
    }

    pub(crate) fn meter(&self, operation: Operation, begun: Instant, bytes: u64, failed: bool) {
        tracing::trace!(
            layer = self.options.layer,
            ?operation,
            elapsed_us = begun.elapsed().as_micros(),
            bytes,
            failed,
            "served"
        );
        if let Some(meter) = &self.options.meter {
            meter.operation(operation, begun.elapsed(), bytes, failed);
        }
    }

    /// Returns the attributes of what is called `name` in a directory.
    ///
    /// # Errors
    /// [`FsError::NoEntry`] when there is no such name; [`FsError::BrokenLink`] when there is nothing behind it.
    pub fn lookup(&self, parent: Inode, name: &[u8]) -> Result<Attr, FsError> {
        match (parent.target().ok_or(FsError::Stale)?, name) {
            (Target::StateFile, _) => Err(FsError::NotDirectory),
            (Target::StateDir, b"..") => self.getattr(Inode::ROOT),
            (Target::StateDir, b".") => self.getattr(parent),
            (Target::StateDir, name) => match &self.state_name {
                Some(file) if file.as_bytes() == name => self.getattr(Inode::of(Target::StateFile)),
                _ => Err(FsError::NoEntry),
            },
            (Target::Node(index), b".") => self.node_attr(index),
            (Target::Node(index), name) => {
                let node = self.tree.node(index).ok_or(FsError::Stale)?;
                let Body::Directory { parent, .. } = node.body else { return Err(FsError::NotDirectory) };
                if name == b".." {
                    return self.node_attr(NodeIndex(parent));
                }
                match self.tree.child(index, name) {
                    Some(child) => self.node_attr(child),
                    None if index == NodeIndex::ROOT
                        && name == state_dir::NAME
                        && self.state_name.is_some() =>
                    {
                        self.getattr(Inode::of(Target::StateDir))
                    }
                    None => Err(FsError::NoEntry),
                }
            }
        }
    }

    fn node_attr(&self, index: NodeIndex) -> Result<Attr, FsError> {
        match self.tree.node(index) {
            None => Err(FsError::Stale),
            Some(_) => attr::of_node(&self.tree, index).ok_or(FsError::BrokenLink),
        }
    }

    /// Returns the attributes of a file.
    ///
    /// # Errors
    /// [`FsError::Stale`] when no file has that number.
    pub fn getattr(&self, inode: Inode) -> Result<Attr, FsError> {
        let (mode, size, nlink) = match inode.target().ok_or(FsError::Stale)? {
            Target::Node(index) => return self.node_attr(index),
            Target::StateDir => (file_type::DIRECTORY | 0o500, 4096, 2),
            Target::StateFile => (file_type::REGULAR | 0o400, self.state_file()?.len() as u64, 1),
        };
        if self.state_name.is_none() {
            return Err(FsError::Stale);
        }
        Ok(Attr { inode, size, mtime: (0, 0), mode, nlink, uid: 0, gid: 0, rdev: 0 })
    }

    fn state_file(&self) -> Result<Vec<u8>, FsError> {
        let state = self.options.state.as_deref().ok_or(FsError::Stale)?;
        Ok(state_dir::render(state, self.last_error.lock().as_deref()))
    }

    /// Gives the names of a directory from `offset` on to `sink` until it returns `false`, sorted, after `.` and `..`.
    ///
    /// Offset 0 is the beginning; [`DirItem::next`] continues after an item, also in a later process.
    ///
    /// # Errors
    /// [`FsError::NotDirectory`], [`FsError::Stale`].
    pub fn read_dir(
        &self,
        inode: Inode,
        offset: u64,
        mut sink: impl FnMut(DirItem<'_>) -> bool,
    ) -> Result<(), FsError> {
        let attr = self.getattr(inode)?;
        if !attr.is_dir() {
            return Err(FsError::NotDirectory);
        }
        let parent = self.lookup(inode, b"..")?.inode;
        let dots = [(&b"."[..], inode, 1), (b"..", parent, 2)];
        for (name, inode, next) in dots {
            let item = DirItem { name, inode, attr: None, kind: file_type::DIRECTORY, next };
            if offset < next && !sink(item) {
                return Ok(());
            }
        }
        let skip = offset.saturating_sub(2);
        let Some(Target::Node(index)) = inode.target() else {
            if let (Some(name), 0) = (&self.state_name, skip) {
                let file = self.getattr(Inode::of(Target::StateFile))?;
                let name = name.as_bytes();
                sink(DirItem {
                    name,
                    inode: file.inode,
                    attr: Some(file),
                    kind: file_type::REGULAR,
                    next: 3,
                });
            }
            return Ok(());
        };
        let children = self.tree.children(index);
        let first = usize::try_from(skip).unwrap_or(usize::MAX);
        for (entry, next) in children.iter().skip(first).zip(skip.saturating_add(3)..) {
            let attr = attr::of_node(&self.tree, entry.node);
            let item = DirItem {
                name: self.tree.name(entry),
                inode: Inode::of(Target::Node(entry.node)),
                attr,
                kind: attr.map_or(0, |attr| attr.mode & file_type::MASK),
                next,
            };
            if !sink(item) {
                break;
            }
        }
        Ok(())
    }

    /// Returns the target of a symbolic link as the layer has it.
    ///
    /// # Errors
    /// [`FsError::NotLink`], [`FsError::Stale`].
    pub fn readlink(&self, inode: Inode) -> Result<&[u8], FsError> {
        let Some(Target::Node(index)) = inode.target() else { return Err(FsError::NotLink) };
        match self.tree.node(index).ok_or(FsError::Stale)?.body {
            Body::Symlink { target, len } => Ok(self.tree.slice(target, len)),
            _ => Err(FsError::NotLink),
        }
    }

    /// Whether the file can be read, and how it may be cached.
    ///
    /// # Errors
    /// [`FsError::NotRegular`], [`FsError::Stale`].
    pub fn open(&self, inode: Inode) -> Result<Opened, FsError> {
        match inode.target().ok_or(FsError::Stale)? {
            Target::StateFile if self.state_name.is_some() => Ok(Opened::Volatile),
            Target::StateFile | Target::StateDir => Err(FsError::NotRegular),
            Target::Node(index) => match self.tree.node(index).ok_or(FsError::Stale)?.body {
                Body::Regular { .. } => Ok(Opened::Immutable),
                _ => Err(FsError::NotRegular),
            },
        }
    }

    /// Returns an extended attribute. An empty value is a value.
    ///
    /// # Errors
    /// [`FsError::NoXattr`]; [`FsError::XattrsOff`] when no file of the layer can have any, so that the kernel need not
    /// ask again.
    pub fn get_xattr(&self, inode: Inode, name: &[u8]) -> Result<&[u8], FsError> {
        if !self.tree.any_xattrs() {
            return Err(FsError::XattrsOff);
        }
        let Some(Target::Node(index)) = inode.target() else { return Err(FsError::NoXattr) };
        let node = self.tree.node(index).ok_or(FsError::Stale)?;
        self.tree.xattrs(node).find(|(key, _)| *key == name).map(|(_, value)| value).ok_or(FsError::NoXattr)
    }

    /// Returns the names of a file's extended attributes, each followed by a zero byte.
    ///
    /// # Errors
    /// [`FsError::XattrsOff`] when the layer is served without them.
    pub fn list_xattrs(&self, inode: Inode) -> Result<Vec<u8>, FsError> {
        if !self.tree.serves_xattrs {
            return Err(FsError::XattrsOff);
        }
        let Some(Target::Node(index)) = inode.target() else { return Ok(Vec::new()) };
        let node = self.tree.node(index).ok_or(FsError::Stale)?;
        let mut names = Vec::new();
        for (name, _) in self.tree.xattrs(node) {
            names.extend_from_slice(name);
            names.push(0);
        }
        Ok(names)
    }

    /// Returns the space of the local file system. Asks it, so it may block for a moment.
    ///
    /// # Errors
    /// [`FsError::Statfs`].
    pub fn statfs(&self) -> Result<StatVfs, FsError> {
        rustix::fs::statvfs(&self.options.statfs).map_err(FsError::Statfs)
    }

    /// Reads up to `len` bytes of a file from `offset` on; fewer only at its end.
    ///
    /// What is at hand is answered at once. A read that waits is over by the timeout of the options, whatever happens; much
    /// sooner when another read waited for the same bytes in vain a moment ago.
    pub fn read(self: &Arc<Self>, inode: Inode, offset: u64, len: usize) -> ReadReply {
        let want = match self.want(inode, offset, len) {
            Ok(Ok(want)) => want,
            Ok(Err(bytes)) => return ReadReply::Ready(Ok(bytes)),
            Err(error) => return ReadReply::Ready(Err(error)),
        };
        if let Some(result) = self.try_read(&want) {
            return ReadReply::Ready(result.map_err(|error| self.report(inode, offset, error)));
        }
        let fs = Arc::clone(self);
        let (begun, bytes) = (Instant::now(), offset..offset.saturating_add(want.len as u64));
        let time = self.late.time(inode, &bytes, begun);
        let deadline = begun + time.within(self.options.read_timeout);
        ReadReply::Wait(Box::pin(async move {
            let read = fs.wait_read(&want, deadline);
            let result = match tokio::time::timeout_at(deadline.into(), read).await {
                Ok(result) => result,
                Err(_) => Err(FsError::TimedOut),
            };
            match result {
                Ok(chunks) => {
                    fs.recovered();
                    Ok(chunks)
                }
                Err(error) => {
                    if error.is_of_time() {
                        fs.late.note(inode, bytes, begun, time, Instant::now());
                    }
                    Err(fs.report(inode, offset, error))
                }
            }
        }))
    }

    /// Returns what has to be read, or the bytes themselves when they are no content of the layer.
    fn want(&self, inode: Inode, offset: u64, len: usize) -> Result<Result<Want, ReadChunks>, FsError> {
        let index = match inode.target().ok_or(FsError::Stale)? {
            Target::Node(index) => index,
            Target::StateDir => return Err(FsError::NotRegular),
            Target::StateFile => {
                let file = Bytes::from(self.state_file()?);
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(file.len());
                let end = start.saturating_add(len).min(file.len());
                return Ok(Err(file.slice(start..end).into()));
            }
        };
        let Body::Regular { header_len, data, size, fingerprint } =
            self.tree.node(index).ok_or(FsError::Stale)?.body
        else {
            return Err(FsError::NotRegular);
        };
        let left = size.saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        if len == 0 {
            return Ok(Err(ReadChunks::new()));
        }
        // Inside the archive, since decoding the zTOC made sure that the whole file is.
        let at = UncompressedOffset(data.0.saturating_add(offset));
        let header = self.needs_check(index).then(|| Header {
            at: UncompressedOffset(data.0.saturating_sub(u64::from(header_len))),
            len: header_len as usize,
            fingerprint,
        });
        Ok(Ok(Want { index, at, len, header }))
    }

    fn needs_check(&self, index: NodeIndex) -> bool {
        let word = self.checked.get(index.at() / 64);
        word.is_some_and(|word| word.load(Ordering::Acquire) & (1 << (index.at() % 64)) == 0)
    }

    fn check(&self, want: &Want, header: &Header, bytes: ReadChunks) -> Result<(), FsError> {
        exactly(&bytes, header.len)?;
        header_check::check(&self.tree.key, header.fingerprint, header.at, &bytes.into_bytes())?;
        if let Some(word) = self.checked.get(want.index.at() / 64) {
            word.fetch_or(1 << (want.index.at() % 64), Ordering::Release);
        }
        Ok(())
    }

    /// Reads what is at hand; `None` when something is missing.
    fn try_read(&self, want: &Want) -> Option<Result<ReadChunks, FsError>> {
        let data = self.reader.try_read(want.at, want.len)?;
        let header = match &want.header {
            None => Ok(()),
            Some(header) => self.check(want, header, self.reader.try_read(header.at, header.len)?),
        };
        Some(header.and_then(|()| exactly(&data, want.len)).map(|()| data))
    }

    async fn wait_read(&self, want: &Want, deadline: Instant) -> Result<ReadChunks, FsError> {
        let data = self.reader.read_at(want.at, want.len, deadline);
        let data = match &want.header {
            None => data.await?,
            Some(header) => {
                let first = self.reader.read_at(header.at, header.len, deadline);
                let (first, data) = tokio::try_join!(first, data)?;
                self.check(want, header, first)?;
                data
            }
        };
        exactly(&data, want.len)?;
        Ok(data)
    }

    fn recovered(&self) {
        if self.failing.load(Ordering::Relaxed) && self.failing.swap(false, Ordering::Relaxed) {
            tracing::info!(layer = %self.options.layer, "reads of the layer work again");
        }
    }

    /// Logs a failed read and keeps it for the state file.
    fn report(&self, inode: Inode, offset: u64, error: FsError) -> FsError {
        let text = with_causes(&error);
        let layer = &self.options.layer;
        if self.failing.swap(true, Ordering::Relaxed) {
            tracing::debug!(%layer, inode = inode.0, offset, error = %text, "failed to read the file");
        } else {
            tracing::warn!(%layer, inode = inode.0, offset, error = %text, "failed to read the file");
        }
        *self.last_error.lock() = Some(text);
        error
    }
}

fn exactly(bytes: &ReadChunks, want: usize) -> Result<(), FsError> {
    match bytes.len() {
        got if got == want => Ok(()),
        got => Err(FsError::Length { want, got }),
    }
}
