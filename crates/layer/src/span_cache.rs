//! Spans on disk, content-addressed, shared by everything that uses the same zTOC.
//!
//! ```text
//! <root>/sha256/<hex of the zTOC>/<span>.plain | <span>.compressed
//! <root>/tmp/<n>                                        removed at every start
//! ```
//!
//! Order of writes: temporary file, header, checksums, payload, rename; then the index in memory. Nothing is synced, so
//! nothing is trusted: an entry that fails a check is deleted and is a miss. A write that fails leaves no file. What is
//! in the cache was verified before it was put there.
//!
//! The size limit holds for the sum of file sizes. At the limit the least recently used entries go, but never one that
//! is being read, and never to make room for background work. What a prefetch list names takes the place of what nobody
//! asked for, and of nothing else. One daemon uses a root at a time.
//!
//! Lock order: `index`, then `handles`. No file is touched under either, but for renames and removals, which need the
//! index to be true. All calls block on the local disk.

mod entry;
mod index;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use soci_oci::{Digest, FetchClass};
use soci_ztoc::SpanId;

pub use self::entry::SpanKey;
use self::entry::{Entry, EntryError};
use self::index::CacheIndex;
use crate::buffers::Buffers;
use crate::slot::SpanForm;
use crate::sync::Mutex;

/// How many files stay open for the next read.
const HANDLES: usize = 32;

/// The part of the limit that a reader who needs room makes beyond that, so that the next ones need not sort again.
const EVICTED: u64 = 64;

/// The part of the limit that background work leaves free: more than one eviction makes, or it would fill again at once what
/// readers made room in, with what nobody asked for.
const LEFT_FREE: u64 = 32;

/// Limits of the cache.
#[derive(Debug, Clone, Default)]
pub struct CacheSettings {
    /// The sum of file sizes, at most. `None` is no limit.
    pub max_bytes: Option<u64>,
    /// The same, as percent of the space that is free or already the cache's when it is opened. The smaller limit holds.
    pub max_percent: Option<u8>,
}

/// What became of a span that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It is in the cache.
    Yes,
    /// There is no room, and what it is for does not justify making some.
    NoRoom,
    /// It came too late: nobody wants it any more.
    Unwanted,
}

/// The cache.
#[derive(Debug)]
pub struct SpanCache {
    root: PathBuf,
    max_bytes: Option<u64>,
    index: Mutex<CacheIndex>,
    /// Least recently used first.
    handles: Mutex<VecDeque<(SpanKey, Arc<Entry>)>>,
    next_temporary: AtomicU64,
    /// Buffers that reads are made into.
    buffers: Arc<Buffers>,
}

impl SpanCache {
    /// Opens the cache under `root`, made if it is missing; what an earlier process stored is found again.
    ///
    /// What cannot be listed or deleted is left alone: all of it can be fetched again.
    ///
    /// # Errors
    /// When `root` cannot be made.
    pub fn open(root: &Path, settings: CacheSettings) -> io::Result<Arc<Self>> {
        let temporary = root.join("tmp");
        for entry in found(&temporary) {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let delete = if is_dir { fs::remove_dir_all::<PathBuf> } else { fs::remove_file };
            if let Err(error) = delete(entry.path()) {
                let file = entry.path();
                tracing::warn!(%error, file = %file.display(), "a leftover of the span cache cannot be deleted");
            }
        }
        let mut cache = Self {
            root: root.to_owned(),
            max_bytes: settings.max_bytes,
            index: Mutex::default(),
            handles: Mutex::default(),
            next_temporary: AtomicU64::new(0),
            buffers: Buffers::new(4 << 20),
        };
        cache.scan();
        cache.make_temporary()?;
        if let Some(percent) = settings.max_percent {
            let space = free_bytes(root)?.saturating_add(cache.usage());
            let share = space / 100 * u64::from(percent.min(100));
            cache.max_bytes = Some(cache.max_bytes.map_or(share, |max| max.min(share)));
        }
        // The limit may be lower than the one before.
        if let Some(over) =
            cache.max_bytes.and_then(|max| cache.usage().checked_sub(max)).filter(|over| *over > 0)
        {
            cache.evict(over, FetchClass::OnDemand);
        }
        Ok(Arc::new(cache))
    }

    /// Fills the index from the files, in the order of their times.
    fn scan(&self) {
        let mut all = Vec::new();
        for algorithm in ["sha256", "sha512"] {
            for layer in found(&self.root.join(algorithm)) {
                let name = layer.file_name();
                let digest =
                    name.to_str().and_then(|hex| format!("{algorithm}:{hex}").parse::<Digest>().ok());
                let Some(ztoc) = digest else { continue };
                for file in found(&layer.path()) {
                    let Some((span, form)) = parse_name(file.file_name().to_str()) else { continue };
                    let Ok(data) = file.metadata() else { continue };
                    all.push((data.modified().ok(), SpanKey { ztoc, span, form }, data.len()));
                }
            }
        }
        all.sort_by_key(|(time, ..)| *time);
        let mut index = self.index.lock();
        all.iter().for_each(|(_, key, bytes)| index.insert(key, *bytes, true));
    }

    /// Makes the directory for what is being written. On a full disk an entry goes for it; where there is none, it is made
    /// when it is needed, since a cache that does not open would keep the disk full.
    fn make_temporary(&self) -> io::Result<()> {
        let temporary = self.root.join("tmp");
        let made = match make_dir(&temporary) {
            Err(error) if is_full(&error) && self.evict(1, FetchClass::OnDemand) > 0 => make_dir(&temporary),
            made => made,
        };
        match made {
            Err(error) if is_full(&error) => {
                tracing::warn!(%error, dir = %self.root.display(), "no room for what is to be cached");
                Ok(())
            }
            made => made,
        }
    }

    /// Whether the entry is there, as far as is known without reading it.
    pub fn contains(&self, key: &SpanKey) -> bool {
        self.index.lock().contains(key)
    }

    /// Returns `range` of the stored form, half open, or `None` when it is not there or not what was written; then the
    /// entry is deleted.
    pub fn read(&self, key: &SpanKey, range: Range<usize>) -> Option<Bytes> {
        let entry = self.entry(key)?;
        match entry.read(range, &self.buffers) {
            Ok(bytes) => Some(bytes),
            Err(error) => self.failed(key, error),
        }
    }

    /// Returns the whole of the stored form, as [`SpanCache::read`] does.
    pub(crate) fn read_all(&self, key: &SpanKey) -> Option<Bytes> {
        let entry = self.entry(key)?;
        match entry.read(0..entry.len(), &self.buffers) {
            Ok(bytes) => Some(bytes),
            Err(error) => self.failed(key, error),
        }
    }

    /// Asks the kernel to read the entry ahead, if it is there.
    pub(crate) fn will_need(&self, key: &SpanKey) {
        if let Some(entry) = self.entry(key) {
            entry.will_need();
        }
    }

    fn entry(&self, key: &SpanKey) -> Option<Arc<Entry>> {
        if !self.index.lock().touch(key) {
            return None;
        }
        {
            let mut handles = self.handles.lock();
            if let Some(at) = handles.iter().rposition(|(held, _)| held == key) {
                let handle = handles.remove(at)?;
                let entry = Arc::clone(&handle.1);
                handles.push_back(handle);
                return Some(entry);
            }
        }
        let opened =
            File::open(self.path(key)).map_err(EntryError::from).and_then(|file| Entry::open(file, key));
        let entry = match opened {
            Ok(entry) => Arc::new(entry),
            Err(error) => return self.failed(key, error),
        };
        let mut handles = self.handles.lock();
        let oldest = if handles.len() >= HANDLES { handles.pop_front() } else { None };
        handles.push_back((*key, Arc::clone(&entry)));
        drop(handles);
        if let Some((_, entry)) = oldest {
            entry.touch();
        }
        Some(entry)
    }

    fn failed<T>(&self, key: &SpanKey, error: EntryError) -> Option<T> {
        match error {
            EntryError::Damaged(reason) => {
                tracing::warn!(ztoc = %key.ztoc, span = key.span.0, reason, "a cached span is damaged, fetching it again");
                self.remove(key);
            }
            EntryError::Io(error) if error.kind() == io::ErrorKind::NotFound => self.remove(key),
            EntryError::Io(error) if is_shortage(&error) => {
                tracing::debug!(ztoc = %key.ztoc, span = key.span.0, %error, "a cached span cannot be opened at present");
            }
            EntryError::Io(error) => {
                tracing::warn!(ztoc = %key.ztoc, span = key.span.0, %error, "a cached span cannot be read, fetching it again");
                self.remove(key);
            }
        }
        None
    }

    /// Stores a span; `class` says what for. `wanted` is asked when nothing is left but to make it visible: a layer that
    /// closes first and is removed then leaves nothing behind.
    ///
    /// # Errors
    /// When it cannot be written; nothing of it stays behind.
    pub fn put(
        &self,
        key: &SpanKey,
        payload: &[u8],
        class: FetchClass,
        wanted: impl FnOnce() -> bool,
    ) -> io::Result<Stored> {
        let bytes = entry::file_size(payload.len());
        let Some(_room) = self.make_room(bytes, class) else { return Ok(Stored::NoRoom) };
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join("tmp").join(number.to_string());
        let written = match self.write(&temporary, key, payload) {
            // The disk is full below our limit: others use it. Ours may go to make room for what a reader needs.
            Err(error) if is_full(&error) && class == FetchClass::OnDemand => {
                if self.evict(bytes.saturating_mul(2), class) == 0 {
                    Err(error)
                } else {
                    self.write(&temporary, key, payload)
                }
            }
            written => written,
        };
        let stored = written.and_then(|()| {
            let path = self.path(key);
            let mut index = self.index.lock();
            if !wanted() {
                return Ok(Stored::Unwanted);
            }
            match fs::rename(&temporary, &path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    path.parent().map_or(Ok(()), make_dir)?;
                    fs::rename(&temporary, &path)?;
                }
                renamed => renamed?,
            }
            index.insert(key, bytes, class > FetchClass::Background);
            Ok(Stored::Yes)
        });
        if !matches!(stored, Ok(Stored::Yes)) {
            let _may_not_exist = fs::remove_file(&temporary);
        }
        stored
    }

    fn write(&self, temporary: &Path, key: &SpanKey, payload: &[u8]) -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = match options.open(temporary) {
            // There was no room for the directory at start.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                temporary.parent().map_or(Ok(()), make_dir)?;
                options.open(temporary)?
            }
            opened => opened?,
        };
        entry::write(&file, key, payload)
    }

    /// Sets `bytes` of the limit aside, after evicting what may be evicted for `class`; `None` when they do not fit.
    fn make_room(&self, bytes: u64, class: FetchClass) -> Option<Room<'_>> {
        let Some(max) = self.max_bytes else { return Some(Room { cache: self, bytes: 0 }) };
        if bytes > max {
            return None;
        }
        if class == FetchClass::Background {
            return self.set_aside(bytes, for_background(max)).ok();
        }
        if class == FetchClass::Prefetch && !self.has_room(bytes, class) {
            return None;
        }
        let missing = match self.set_aside(bytes, max) {
            Ok(room) => return Some(room),
            Err(missing) => missing,
        };
        // In a large cache a little more than needed, so that the next ones need not sort again.
        let more = if max / EVICTED > bytes { max / EVICTED } else { 0 };
        self.evict(missing.saturating_add(more), class);
        self.set_aside(bytes, max).ok()
    }

    /// Whether there is room for `bytes` of what no reader waits for, within the limit and on the disk: what is fetched and
    /// then not stored is fetched for nothing.
    pub(crate) fn has_room(&self, bytes: u64, class: FetchClass) -> bool {
        let within = |max: u64| {
            if class == FetchClass::Background {
                return self.set_aside(bytes, for_background(max)).is_ok();
            }
            self.set_aside(bytes, max).err().is_none_or(|missing| missing <= self.index.lock().unasked())
        };
        // What cannot be told is found out.
        self.max_bytes.is_none_or(within) && free_bytes(&self.root).map_or(true, |free| free > bytes)
    }

    /// Sets `bytes` aside, or returns how many are missing.
    fn set_aside(&self, bytes: u64, max: u64) -> Result<Room<'_>, u64> {
        let mut index = self.index.lock();
        match index.total().saturating_add(index.coming).saturating_add(bytes).saturating_sub(max) {
            0 => {
                index.coming += bytes;
                Ok(Room { cache: self, bytes })
            }
            missing => Err(missing),
        }
    }

    /// Removes least recently used entries of at least `bytes` in all, of those that may go for `class`. Returns how many
    /// went.
    fn evict(&self, bytes: u64, class: FetchClass) -> usize {
        let mut index = self.index.lock();
        let mut handles = self.handles.lock();
        let held =
            |key: &SpanKey| handles.iter().any(|(held, entry)| held == key && Arc::strong_count(entry) > 1);
        let victims = index.victims(bytes, class, held);
        handles.retain(|(key, _)| !victims.contains(key));
        drop(handles);
        for key in &victims {
            index.remove(key);
            let _gone_is_gone = fs::remove_file(self.path(key));
        }
        victims.len()
    }

    /// Removes one entry.
    pub fn remove(&self, key: &SpanKey) {
        let mut index = self.index.lock();
        index.remove(key);
        self.handles.lock().retain(|(held, _)| held != key);
        let _gone_is_gone = fs::remove_file(self.path(key));
    }

    /// Removes everything of one layer.
    ///
    /// # Errors
    /// When its directory cannot be removed; what is left is found again at the next start.
    pub fn remove_layer(&self, ztoc: &Digest) -> io::Result<()> {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let (dir, aside) = (self.layer_dir(ztoc), self.root.join("tmp").join(number.to_string()));
        let doomed = {
            let mut index = self.index.lock();
            // Not in one moment where the disk has no room for that; what somebody stores meanwhile is a miss then.
            let moved = fs::rename(&dir, &aside).is_ok();
            index.remove_layer(ztoc);
            self.handles.lock().retain(|(held, _)| held.ztoc != *ztoc);
            if moved { aside } else { dir }
        };
        match fs::remove_dir_all(&doomed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the layers that have entries.
    pub fn layers(&self) -> Vec<Digest> {
        self.index.lock().layers()
    }

    /// Returns the spans of a layer that are there in any form, each once, in order.
    pub fn spans(&self, ztoc: &Digest) -> Vec<SpanId> {
        self.index.lock().spans(ztoc)
    }

    /// Returns the sum of all file sizes, in bytes.
    pub fn usage(&self) -> u64 {
        self.index.lock().total()
    }

    /// Returns the most that [`Self::usage`] may be, in bytes; `None` when there is no limit.
    pub fn limit(&self) -> Option<u64> {
        self.max_bytes
    }

    /// Returns the sum of one layer's file sizes, in bytes, and how many files these are.
    pub fn layer_usage(&self, ztoc: &Digest) -> (u64, u64) {
        self.index.lock().layer_total(ztoc)
    }

    /// Closes the files that are kept open and frees buffers: for an idle node.
    pub fn trim(&self) {
        let handles = std::mem::take(&mut *self.handles.lock());
        handles.iter().for_each(|(_, entry)| entry.touch());
        self.buffers.trim();
    }

    fn layer_dir(&self, ztoc: &Digest) -> PathBuf {
        self.root.join(ztoc.algorithm()).join(ztoc.hex())
    }

    fn path(&self, key: &SpanKey) -> PathBuf {
        let form = match key.form {
            SpanForm::Plain => "plain",
            SpanForm::Compressed => "compressed",
        };
        self.layer_dir(&key.ztoc).join(format!("{}.{form}", key.span.0))
    }
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(dir)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Returns how much of the limit `max` background work may fill.
fn for_background(max: u64) -> u64 {
    max - max / LEFT_FREE
}

/// Bytes of the limit that belong to an entry that is being written: two writers do not fill the same gap.
struct Room<'a> {
    cache: &'a SpanCache,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.cache.index.lock().coming -= self.bytes;
    }
}

fn parse_name(name: Option<&str>) -> Option<(SpanId, SpanForm)> {
    let (span, form) = name?.split_once('.')?;
    let form = match form {
        "plain" => SpanForm::Plain,
        "compressed" => SpanForm::Compressed,
        _ => return None,
    };
    Some((SpanId(span.parse().ok()?), form))
}

/// Whether the disk, its inodes or a quota are used up.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether descriptors or memory are short: the file itself may be fine.
fn is_shortage(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    matches!(errno, Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM))
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Returns what can be listed of a directory: nothing when it is missing or no directory.
fn found(path: &Path) -> Vec<fs::DirEntry> {
    let listed = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    if let Err(error) = &listed
        && !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
    {
        tracing::warn!(%error, dir = %path.display(), "cached spans cannot be listed; they are fetched again");
    }
    listed.unwrap_or_default()
}

#[cfg(test)]
#[cfg(not(feature = "shuttle"))]
mod tests;

#[cfg(test)]
#[cfg(feature = "shuttle")]
mod races;
