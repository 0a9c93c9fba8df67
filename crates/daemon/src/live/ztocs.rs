//! The zTOCs of mounted layers, under our root.
//!
//! `<root>/ztocs/<algorithm>/<hex>`, whole and synced before the Prepare that needs it is answered, so that a restart needs
//! neither network nor containerd. A file is named by its content and checked when it is read.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use soci_oci::Digest;
use soci_snapshotter::durable;

use crate::disk::is_full;

/// The directory of zTOCs. All calls block on the disk.
#[derive(Debug)]
pub struct Ztocs {
    root: PathBuf,
    next: AtomicU64,
}

impl Ztocs {
    /// Opens the directory beneath `root`, made if it is missing; what an earlier process left half done goes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(root: &Path) -> io::Result<Self> {
        let this = Self { root: root.join("ztocs"), next: AtomicU64::new(0) };
        match fs::read_dir(this.temporary()) {
            Ok(entries) => entries.into_iter().try_for_each(|entry| fs::remove_file(entry?.path()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        match this.make_dirs() {
            Err(error) if is_full(&error) => {
                tracing::warn!(%error, dir = %this.root.display(), "no room for directories of zTOCs");
            }
            made => made?,
        }
        Ok(this)
    }

    fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn make_dirs(&self) -> io::Result<()> {
        [self.temporary(), self.root.join("sha256"), self.root.join("sha512")]
            .iter()
            .try_for_each(|dir| DirBuilder::new().recursive(true).mode(0o700).create(dir))
    }

    /// Returns where `digest` is, or would be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.root.join(digest.algorithm()).join(digest.hex())
    }

    /// Stores `bytes`, whose digest was checked to be `digest`. Its content is durable when this returns, its name by the
    /// time that the record of a snapshot with it is.
    ///
    /// # Errors
    /// When they cannot be written; nothing is left then.
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        if fs::metadata(self.path(digest)).is_ok_and(|found| found.len() == bytes.len() as u64) {
            return Ok(());
        }
        self.replace(digest, bytes)
    }

    /// As [`Self::put`], whatever is there: it may be damaged.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn replace(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(digest);
        let temporary = self.temporary().join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        let write = || write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path));
        let written = match write() {
            // There was no room for the directories at start.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.make_dirs().and_then(|()| write()),
            written => written,
        };
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        match path.parent() {
            Some(parent) => durable::names_before_next_sync(parent),
            None => Ok(()),
        }
    }

    /// Reads `digest`, of at most `max` bytes; `None` when it is absent or larger, or not what its name says, and then it is
    /// gone. A larger one stays: it may be sound, and asked for as something else by whoever names digests.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, digest: &Digest, max: u64) -> io::Result<Option<Bytes>> {
        let path = self.path(digest);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > max {
            return Ok(None);
        }
        if !digest.verifies(&bytes) {
            tracing::warn!(ztoc = %digest, "a stored zTOC is damaged and dropped");
            let _ = fs::remove_file(&path);
            return Ok(None);
        }
        Ok(Some(bytes.into()))
    }

    /// Removes `digest`.
    pub fn remove(&self, digest: &Digest) {
        if let Err(error) = fs::remove_file(self.path(digest))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, ztoc = %digest, "a zTOC nobody needs cannot be removed");
        }
    }

    /// Returns all that are there.
    pub fn list(&self) -> Vec<Digest> {
        let mut all = Vec::new();
        for algorithm in ["sha256", "sha512"] {
            let Ok(entries) = fs::read_dir(self.root.join(algorithm)) else { continue };
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            all.extend(names.filter_map(|name| format!("{algorithm}:{name}").parse::<Digest>().ok()));
        }
        all
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_cut_at_any_byte_is_dropped() {
        let root = tempfile::tempdir().unwrap();
        let ztocs = Ztocs::open(root.path()).unwrap();
        let bytes = b"not really a zTOC";
        let digest = Digest::of(bytes);
        for cut in 0..bytes.len() {
            fs::write(ztocs.path(&digest), &bytes[..cut]).unwrap();
            assert_eq!(ztocs.read(&digest, 100).unwrap(), None, "cut at {cut}");
            assert!(!ztocs.path(&digest).exists());
        }
        ztocs.put(&digest, bytes).unwrap();
        assert_eq!(ztocs.read(&digest, 100).unwrap().unwrap(), bytes[..]);
        assert_eq!(ztocs.list(), [digest]);
        ztocs.remove(&digest);
        assert_eq!(ztocs.read(&digest, 100).unwrap(), None);
    }

    #[test]
    fn a_file_that_is_larger_than_is_asked_for_stays_and_is_replaced_where_it_is_damaged() {
        let root = tempfile::tempdir().unwrap();
        let ztocs = Ztocs::open(root.path()).unwrap();
        let bytes = b"not really a zTOC";
        let digest = Digest::of(bytes);
        ztocs.put(&digest, bytes).unwrap();
        assert_eq!(ztocs.read(&digest, 5).unwrap(), None);
        assert_eq!(ztocs.read(&digest, 100).unwrap().unwrap(), bytes[..], "a mount may need it");
        fs::write(ztocs.path(&digest), b"not really a zTOC, and more").unwrap();
        assert_eq!(ztocs.read(&digest, bytes.len() as u64).unwrap(), None);
        ztocs.put(&digest, bytes).unwrap();
        assert_eq!(ztocs.read(&digest, bytes.len() as u64).unwrap().unwrap(), bytes[..]);
    }

    #[test]
    fn directories_that_had_no_room_at_start_are_made_when_they_are_needed() {
        let root = tempfile::tempdir().unwrap();
        let ztocs = Ztocs::open(root.path()).unwrap();
        fs::remove_dir_all(root.path().join("ztocs")).unwrap();
        let digest = Digest::of(b"a zTOC");
        ztocs.put(&digest, b"a zTOC").unwrap();
        assert_eq!(ztocs.read(&digest, 100).unwrap().unwrap(), b"a zTOC"[..]);
    }

    #[test]
    fn a_half_written_file_replaces_nothing() {
        let root = tempfile::tempdir().unwrap();
        let ztocs = Ztocs::open(root.path()).unwrap();
        fs::write(root.path().join("ztocs/tmp/0"), b"half").unwrap();
        let ztocs = {
            drop(ztocs);
            Ztocs::open(root.path()).unwrap()
        };
        assert_eq!(fs::read_dir(root.path().join("ztocs/tmp")).unwrap().count(), 0);
        assert!(ztocs.list().is_empty());
    }
}
