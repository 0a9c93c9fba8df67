//! All snapshots of one root: the index in memory over the records on disk.
//!
//! Directory layout beneath `snapshots/` (mode 0700), as the Go daemon's: `<id>/fs`, and `<id>/work` of active ones. Ids are
//! decimal numbers that are not used twice while a directory of that name is there. Directories without a record of ours
//! belong to the Go daemon when its `metadata.db` lies beside `snapshots/`; they are never touched then.
//!
//! Locking. `state` guards the index and is held for moments only. A name that an operation is about to create, rename or
//! remove is *taken* meanwhile: others wait for it, and the disk is synced without the lock, so that operations on different
//! snapshots share a journal commit. All names of an operation are taken at once, so there is no order to keep. A
//! [`Draft`] pins its parent: it cannot be removed while a child is being made.
//!
//! Everything here blocks on the disk; async callers use a blocking pool.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use soci_oci::labels::TARGET;

use crate::provider::{Ancestor, MountRecord, Reference, SnapshotDir};
use crate::records::{self, Kind, Record, RecordError, Time, Usage};
use crate::{Code, Error};

/// The longest chain of parents: overlay itself takes 500 lower directories.
const MAX_DEPTH: usize = 4096;

/// The snapshots of one root.
#[derive(Debug)]
pub struct Store {
    snapshots: PathBuf,
    /// Whether directories without a record may belong to the Go daemon.
    foreign: bool,
    state: Mutex<State>,
    /// Signalled when a taken name is given back.
    free: Condvar,
}

#[derive(Debug, Default)]
struct State {
    by_name: BTreeMap<String, Arc<Record>>,
    /// How many snapshots and drafts build on a name. Names without any have no entry.
    children: BTreeMap<String, usize>,
    /// Names that an operation is changing.
    taken: HashSet<String>,
    /// Ids whose directories are in use: of records and of drafts.
    ids: BTreeSet<u64>,
    next: u64,
}

/// A snapshot in the making: a directory, an id and a pinned parent. Dropped unwritten, it disappears.
#[derive(Debug)]
pub struct Draft {
    store: Arc<Store>,
    dir: SnapshotDir,
    parent: Option<String>,
    written: bool,
}

/// What a draft becomes.
#[derive(Debug, Default)]
pub struct Written {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What it takes on disk, where it is committed.
    pub usage: Option<Usage>,
    /// How it is mounted, where it is a lazy layer.
    pub lazy: Option<MountRecord>,
}

/// A snapshot found at start that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("snapshot directory {}", dir.display())]
pub struct Finding {
    /// The directory.
    pub dir: PathBuf,
    /// Whether it stays: what a container wrote is there or may be there, or only its parent is missing.
    pub kept: bool,
    /// What is wrong with it.
    #[source]
    pub error: RecordError,
}

/// Why a root cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be made or listed.
    #[error("snapshot directory {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
    /// A later version of this program wrote there.
    #[error("snapshot directory {}", .0.display())]
    Newer(PathBuf, #[source] RecordError),
}

impl Store {
    /// Opens the store at `root` (the directory above `snapshots`), creating it when it is not there.
    ///
    /// Snapshots with damaged records are left out and returned as findings, and so are those that build on them, which
    /// stay listed: they work again once the parent is made again, and until then can be removed. What may hold the data
    /// of a container is not reclaimed for lack of a record.
    ///
    /// # Errors
    /// [`OpenError`] when the directory is unusable, or of a later version.
    pub fn open(root: &Path) -> Result<(Arc<Self>, Vec<Finding>), OpenError> {
        let snapshots = root.join("snapshots");
        let io = |error| OpenError::Io(snapshots.clone(), error);
        for dir in [root, &snapshots] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        }
        let foreign = root.join("metadata.db").exists();
        let mut state = State { next: 1, ..State::default() };
        let mut findings = Vec::new();
        for entry in fs::read_dir(&snapshots).map_err(io)? {
            let entry = entry.map_err(io)?;
            let Some(id) = id_of(&entry.file_name()) else { continue };
            state.next = state.next.max(id.saturating_add(1));
            let dir = entry.path();
            match records::read(&dir) {
                Ok(record) if record.id == id && !state.by_name.contains_key(&record.name) => {
                    records::drop_half_written(&dir);
                    state.ids.insert(id);
                    state.by_name.insert(record.name.clone(), Arc::new(record));
                }
                Err(RecordError::Missing) => {}
                Err(error @ RecordError::Newer { .. }) => return Err(OpenError::Newer(dir, error)),
                damaged => {
                    let error = damaged.err().unwrap_or(RecordError::Torn("of another directory"));
                    let kept = matches!(error, RecordError::Io(_)) || is_used(&dir);
                    if kept {
                        state.ids.insert(id);
                    }
                    if kept || !matches!(error, RecordError::Begun) {
                        findings.push(Finding { dir, kept, error });
                    }
                }
            }
        }
        findings.extend(state.orphans().map(|orphan| Finding {
            dir: snapshots.join(orphan.id.to_string()),
            kept: true,
            error: RecordError::Orphan,
        }));
        state.count_children();
        let state = Mutex::new(state);
        Ok((Arc::new(Self { snapshots, foreign, state, free: Condvar::new() }), findings))
    }

    /// Returns the directory of snapshot `id`.
    pub fn dir(&self, id: u64) -> SnapshotDir {
        SnapshotDir::new(&self.snapshots, id)
    }

    /// Returns the directory that holds all snapshots.
    pub fn snapshots(&self) -> &Path {
        &self.snapshots
    }

    /// Whether directories of the Go daemon may lie beside ours.
    pub fn has_foreign(&self) -> bool {
        self.foreign
    }

    /// Returns the record of `name`.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn get(&self, name: &str) -> Result<Arc<Record>, Error> {
        self.state.lock().by_name.get(name).cloned().ok_or_else(|| Error::not_found(name))
    }

    /// Returns all records, ordered by name.
    pub fn list(&self) -> Vec<Arc<Record>> {
        self.state.lock().by_name.values().cloned().collect()
    }

    /// Returns the snapshot `name` and everything below it, topmost first.
    ///
    /// # Errors
    /// [`Code::NotFound`] when `name` does not exist, [`Code::FailedPrecondition`] when an ancestor was lost.
    pub fn chain(&self, name: &str) -> Result<Vec<Ancestor>, Error> {
        let state = self.state.lock();
        let mut chain = Vec::new();
        let mut next = Some(name);
        while let Some(name) = next {
            let Some(record) = state.by_name.get(name) else {
                return Err(if chain.is_empty() { Error::not_found(name) } else { lost_parent(name) });
            };
            chain.push(Ancestor { dir: self.dir(record.id), record: Arc::clone(record) });
            if chain.len() > MAX_DEPTH {
                let message = format!("snapshot {name:?}: more than {MAX_DEPTH} parents");
                return Err(Error::new(Code::FailedPrecondition, message));
            }
            next = record.parent.as_deref();
        }
        Ok(chain)
    }

    /// Returns the committed snapshot that containerd finds for `target` on `parent`.
    pub fn committed(&self, target: &str, parent: Option<&str>) -> Option<Arc<Record>> {
        let state = self.state.lock();
        let fits = |record: &&Arc<Record>| {
            record.kind == Kind::Committed
                && record.parent.as_deref() == parent
                && record.labels.get(TARGET).is_some_and(|label| label == target)
        };
        let by_name = state.by_name.get(target).filter(fits);
        by_name.or_else(|| state.by_name.values().find(fits)).cloned()
    }

    /// Makes the directory of a new snapshot on `parent`. Blocks on the disk, but syncs nothing.
    ///
    /// # Errors
    /// [`Code::NotFound`] and [`Code::InvalidArgument`] about the parent, [`Code::Internal`] about the disk.
    pub fn draft(self: &Arc<Self>, parent: Option<&str>) -> Result<Draft, Error> {
        let id = {
            let mut state = self.state.lock();
            if let Some(parent) = parent {
                let record = state.by_name.get(parent).ok_or_else(|| {
                    Error::new(Code::NotFound, format!("missing parent {parent:?} bucket: not found"))
                })?;
                if record.kind != Kind::Committed {
                    let message = format!("parent {parent:?} is not committed snapshot");
                    return Err(Error::new(Code::InvalidArgument, message));
                }
                *state.children.entry(parent.to_owned()).or_default() += 1;
            }
            let id = state.next;
            state.next += 1;
            state.ids.insert(id);
            id
        };
        let draft = Draft {
            store: Arc::clone(self),
            dir: self.dir(id),
            parent: parent.map(str::to_owned),
            written: false,
        };
        draft.make_dirs().map_err(|error| {
            Error::because(Code::Internal, format!("make directory of snapshot {id}"), error)
        })?;
        Ok(draft)
    }

    /// Turns the active snapshot `key` into the committed one `name`. Labels replace those it had.
    ///
    /// # Errors
    /// containerd's: [`Code::AlreadyExists`], [`Code::NotFound`], [`Code::FailedPrecondition`], [`Code::InvalidArgument`].
    pub fn commit(
        self: &Arc<Self>,
        key: &str,
        name: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
        usage: Usage,
    ) -> Result<Arc<Record>, Error> {
        let _taken = self.take([key, name]);
        let (old, new) = {
            let mut state = self.state.lock();
            if state.by_name.contains_key(name) {
                return Err(Error::new(
                    Code::AlreadyExists,
                    format!("committed snapshot {name:?}: already exists"),
                ));
            }
            let old = state.by_name.get(key).cloned();
            let old = old.ok_or_else(|| {
                Error::new(Code::NotFound, format!("failed to get active snapshot {key:?}: not found"))
            })?;
            if old.kind != Kind::Active {
                return Err(Error::new(Code::FailedPrecondition, format!("snapshot {key:?} is not active")));
            }
            let new_parent = match (old.parent.as_deref(), parent) {
                (None, Some(parent)) => Some(state.rebase(parent)?),
                (Some(old), Some(new)) if old != new => {
                    let message = format!("cannot change parent of active snapshot {key:?} on commit");
                    return Err(Error::new(Code::InvalidArgument, message));
                }
                (old, _) => old.map(str::to_owned),
            };
            let now = Time::now();
            let new = Record {
                id: old.id,
                name: name.to_owned(),
                parent: new_parent,
                kind: Kind::Committed,
                labels,
                created: now,
                updated: now,
                usage: Some(usage),
                lazy: None,
            };
            (old, Arc::new(new))
        };
        let written = records::replace(self.dir(new.id).path(), &new);
        let mut state = self.state.lock();
        if let Err(error) = written {
            if old.parent != new.parent {
                state.unpin(new.parent.as_deref());
            }
            return Err(Error::because(Code::Internal, format!("write record of snapshot {name:?}"), error));
        }
        state.by_name.remove(key);
        state.by_name.insert(name.to_owned(), Arc::clone(&new));
        Ok(new)
    }

    /// Changes the labels of `name` by `change` and returns the new record.
    ///
    /// # Errors
    /// [`Code::NotFound`], what `change` returns, or [`Code::Internal`] about the disk.
    pub fn update(
        self: &Arc<Self>,
        name: &str,
        change: impl FnOnce(&mut BTreeMap<String, String>) -> Result<(), Error>,
    ) -> Result<Arc<Record>, Error> {
        self.replace(name, |record| {
            change(&mut record.labels)?;
            record.updated = Time::now();
            Ok(true)
        })
    }

    /// Notes that `reference` has the lazily mounted layer `name` too; `false` when that is known.
    ///
    /// # Errors
    /// As [`Store::update`].
    pub fn share(self: &Arc<Self>, name: &str, reference: Reference) -> Result<bool, Error> {
        let mut news = false;
        self.replace(name, |record| {
            news = record.lazy.as_mut().is_some_and(|lazy| lazy.share(reference));
            Ok(news)
        })?;
        Ok(news)
    }

    /// Writes the record of `name` anew when `change` says that it changed it.
    fn replace(
        self: &Arc<Self>,
        name: &str,
        change: impl FnOnce(&mut Record) -> Result<bool, Error>,
    ) -> Result<Arc<Record>, Error> {
        let _taken = self.take([name]);
        let old = self.get(name)?;
        let mut record = Record::clone(&old);
        if !change(&mut record)? {
            return Ok(old);
        }
        let record = Arc::new(record);
        records::replace(self.dir(record.id).path(), &record).map_err(|error| {
            Error::because(Code::Internal, format!("write record of snapshot {name:?}"), error)
        })?;
        self.state.lock().by_name.insert(name.to_owned(), Arc::clone(&record));
        Ok(record)
    }

    /// Removes the record of `name`. The directory stays until it is reclaimed.
    ///
    /// # Errors
    /// [`Code::NotFound`], [`Code::FailedPrecondition`] while others build on it, [`Code::Internal`] about the disk.
    pub fn remove(self: &Arc<Self>, name: &str) -> Result<Arc<Record>, Error> {
        let _taken = self.take([name]);
        let record = {
            let mut state = self.state.lock();
            let record = state.by_name.get(name).cloned().ok_or_else(|| Error::not_found(name))?;
            if state.children.contains_key(name) {
                let message = format!("cannot remove snapshot {name:?} with child");
                return Err(Error::new(Code::FailedPrecondition, message));
            }
            // Out of the index first, so that nobody builds on it meanwhile.
            state.by_name.remove(name);
            record
        };
        let retired = records::retire(self.dir(record.id).path());
        let mut state = self.state.lock();
        if let Err(error) = retired
            && error.kind() != io::ErrorKind::NotFound
        {
            state.by_name.insert(name.to_owned(), record);
            return Err(Error::because(Code::Internal, format!("remove record of snapshot {name:?}"), error));
        }
        state.unpin(record.parent.as_deref());
        state.ids.remove(&record.id);
        Ok(record)
    }

    /// Returns the directories beneath `snapshots` that belong to no snapshot and may be deleted.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn reclaimable(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.snapshots)? {
            let entry = entry?;
            let name = entry.file_name();
            let path = entry.path();
            let ours = |path: &Path| {
                !self.foreign || path.join(records::RECORD).exists() || path.join(records::REMOVED).exists()
            };
            let unused = match id_of(&name) {
                // Asked after listing: a draft has its id before its directory.
                Some(id) => !self.state.lock().ids.contains(&id) && ours(&path),
                None => !self.foreign && name.to_str().is_some_and(|name| name.starts_with("new-")),
            };
            if unused {
                found.push(path);
            }
        }
        Ok(found)
    }

    fn take<const N: usize>(self: &Arc<Self>, names: [&str; N]) -> Taken<N> {
        let mut state = self.state.lock();
        self.free.wait_while(&mut state, |state| names.iter().any(|name| state.taken.contains(*name)));
        state.taken.extend(names.iter().map(|name| (*name).to_owned()));
        Taken { store: Arc::clone(self), names: names.map(str::to_owned) }
    }
}

impl Draft {
    /// Returns its directory.
    pub fn dir(&self) -> &SnapshotDir {
        &self.dir
    }

    /// Returns the name of the parent.
    pub fn parent(&self) -> Option<&str> {
        self.parent.as_deref()
    }

    fn make_dirs(&self) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(self.dir.path())?;
        records::begin(self.dir.path())?;
        DirBuilder::new().mode(0o755).create(self.dir.fs())?;
        fs::set_permissions(self.dir.fs(), fs::Permissions::from_mode(0o755))
    }

    /// Makes the snapshot exist as `name`, durably.
    ///
    /// # Errors
    /// [`Code::AlreadyExists`], or [`Code::Internal`] about the disk. The draft is given back for another try.
    pub fn write(mut self, name: &str, kind: Kind, content: Written) -> Result<Arc<Record>, (Self, Error)> {
        let store = Arc::clone(&self.store);
        let _taken = store.take([name]);
        if store.state.lock().by_name.contains_key(name) {
            return Err((self, Error::exists(name)));
        }
        let now = Time::now();
        let record = Arc::new(Record {
            id: self.dir.id(),
            name: name.to_owned(),
            parent: self.parent.clone(),
            kind,
            labels: content.labels,
            created: now,
            updated: now,
            usage: content.usage,
            lazy: content.lazy,
        });
        if let Err(error) = self.write_record(&record) {
            // Perhaps all of it reached the disk but the answer is an error, so it must not be there at a restart.
            let _ = records::begin(self.dir.path());
            return Err((
                self,
                Error::because(Code::Internal, format!("write record of snapshot {name:?}"), error),
            ));
        }
        self.written = true;
        store.state.lock().by_name.insert(name.to_owned(), Arc::clone(&record));
        Ok(record)
    }

    fn write_record(&self, record: &Record) -> io::Result<()> {
        if record.kind == Kind::Active {
            let work = self.dir.work();
            match DirBuilder::new().mode(0o711).create(&work) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => fs::set_permissions(&work, fs::Permissions::from_mode(0o711))?,
            }
        }
        records::write_first(&self.store.snapshots, self.dir.path(), record)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.written {
            return;
        }
        // Deletes what an unused draft holds; anything more (a mount that stays, content) is left to the reclaimer.
        let dir = self.dir.path();
        for empty in [self.dir.fs(), self.dir.work()] {
            let _ = fs::remove_dir(empty);
        }
        if !self.dir.fs().exists() {
            let _ = fs::remove_file(dir.join(records::RECORD));
            let _ = fs::remove_dir(dir);
        }
        let mut state = self.store.state.lock();
        state.unpin(self.parent.as_deref());
        state.ids.remove(&self.dir.id());
    }
}

impl State {
    fn unpin(&mut self, parent: Option<&str>) {
        let Some(parent) = parent else { return };
        if let Some(count) = self.children.get_mut(parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(parent);
            }
        }
    }

    fn rebase(&mut self, parent: &str) -> Result<String, Error> {
        let record = self.by_name.get(parent).ok_or_else(|| {
            Error::new(Code::NotFound, format!("missing parent {parent:?} of snapshot: not found"))
        })?;
        if record.kind != Kind::Committed {
            return Err(Error::new(Code::FailedPrecondition, format!("parent {parent:?} is not committed")));
        }
        *self.children.entry(parent.to_owned()).or_default() += 1;
        Ok(parent.to_owned())
    }

    /// Returns the snapshots whose parents are lost: they cannot be mounted.
    fn orphans(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.by_name
            .values()
            .filter(|record| record.parent.as_ref().is_some_and(|parent| !self.by_name.contains_key(parent)))
    }

    fn count_children(&mut self) {
        for record in self.by_name.values() {
            if let Some(parent) = &record.parent {
                *self.children.entry(parent.clone()).or_default() += 1;
            }
        }
    }
}

/// Names that one operation may change.
struct Taken<const N: usize> {
    store: Arc<Store>,
    names: [String; N],
}

impl<const N: usize> Drop for Taken<N> {
    fn drop(&mut self) {
        let mut state = self.store.state.lock();
        for name in &self.names {
            state.taken.remove(name);
        }
        drop(state);
        self.store.free.notify_all();
    }
}

fn lost_parent(name: &str) -> Error {
    let message = format!(
        "snapshot {name:?}, which others build on, was lost: remove the containers and images that use it \
         (crictl rm, crictl rmi) and pull them again"
    );
    Error::new(Code::FailedPrecondition, message)
}

/// Whether somebody was given the directory to write to, and wrote: overlay itself leaves a directory in `work`.
fn is_used(dir: &Path) -> bool {
    let work = dir.join("work");
    let holds = |dir: &Path| dir.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    work.is_dir() && (holds(&work) || holds(&dir.join("fs")))
}

fn id_of(name: &std::ffi::OsStr) -> Option<u64> {
    let text = name.to_str()?;
    let id: u64 = text.parse().ok()?;
    (id.to_string() == text).then_some(id)
}

#[cfg(test)]
mod tests;
