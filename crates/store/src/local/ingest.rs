//! One piece of content on its way into the soci store.

use std::fs::{self, File, TryLockError};
use std::hash::{BuildHasher as _, RandomState};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use soci_oci::{Descriptor, Digest, Hasher};

use crate::StoreError;

/// How old an unlocked file must be before it counts as abandoned: a writer locks its file just after creating it.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// A file in `ingest/` that becomes content when it is whole. Dropped before that, it is removed.
#[derive(Debug)]
pub(super) struct Ingest {
    file: File,
    temporary: Temporary,
    target: PathBuf,
    digest: Digest,
    expected: u64,
    written: u64,
    hasher: Hasher,
}

/// A path that is removed when it goes out of scope.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already after a commit; a leftover is cleaned by the next open.
        let _ = fs::remove_file(&self.0);
    }
}

impl Ingest {
    /// Creates and locks the file that `descriptor`'s content is written to.
    pub(super) fn begin(layout: &Path, descriptor: &Descriptor) -> Result<Self, StoreError> {
        let digest = descriptor.digest;
        let temporary = Temporary(layout.join("ingest").join(format!("{}_{}", digest.hex(), suffix())));
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(&temporary.0);
        let file = file.map_err(StoreError::io("creating", &temporary.0))?;
        file.lock().map_err(StoreError::io("locking", &temporary.0))?;
        let target = layout.join("blobs").join(digest.algorithm()).join(digest.hex());
        Ok(Self {
            file,
            temporary,
            target,
            digest,
            expected: descriptor.size,
            written: 0,
            hasher: digest.hasher(),
        })
    }

    /// Appends the next bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.written = self.written.saturating_add(bytes.len() as u64);
        if self.written > self.expected {
            let found = format!("more than the {} bytes announced", self.expected);
            return Err(StoreError::Mismatch { digest: self.digest, found });
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(StoreError::io("writing", &self.temporary.0))
    }

    /// Verifies what was written and makes it content, on disk before this returns.
    pub(super) fn commit(self) -> Result<(), StoreError> {
        let Self { file, temporary, target, digest, expected, written, hasher } = self;
        if written != expected {
            let found = format!("{written} of the {expected} bytes announced");
            return Err(StoreError::Mismatch { digest, found });
        }
        let actual = hasher.finish();
        if actual != digest {
            return Err(StoreError::Mismatch { digest, found: actual.to_string() });
        }
        let path = &temporary.0;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o444);
        file.set_permissions(mode).map_err(StoreError::io("setting the mode of", path))?;
        file.sync_all().map_err(StoreError::io("flushing", path))?;
        let directory = target.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory).map_err(StoreError::io("creating", directory))?;
        fs::rename(path, &target).map_err(StoreError::io("renaming into", &target))?;
        let opened = File::open(directory).map_err(StoreError::io("opening", directory))?;
        opened.sync_all().map_err(StoreError::io("flushing", directory))
    }
}

/// Returns a name part that no other writer has.
pub(super) fn suffix() -> String {
    let random = RandomState::new().hash_one(std::process::id());
    format!("{random:016x}")
}

/// Removes what writers that are gone left behind. What cannot be removed is left to the next time.
pub(super) fn clean(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let age = metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
        if !metadata.is_file() || age.is_none_or(|age| age < ABANDONED_AFTER) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = File::options().write(true).open(&path) else { continue };
        match file.try_lock() {
            Ok(()) => match fs::remove_file(&path) {
                Ok(()) => tracing::debug!(path = %path.display(), "removed an abandoned write"),
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "cannot remove an abandoned write")
                }
            },
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}
