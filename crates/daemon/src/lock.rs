//! One daemon per root directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Held for as long as the process uses the root directory; the kernel gives it back however the process ends.
#[derive(Debug)]
pub struct RootLock(#[expect(dead_code, reason = "held, not read")] File);

/// Why the root directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("root directory {root:?} is used by another soci-snapshotter-grpc{}: stop it, or use another --root", pid.map_or(String::new(), |pid| format!(" (process {pid})")))]
    Taken {
        /// The directory.
        root: PathBuf,
        /// Who has it, if it said so.
        pid: Option<u32>,
    },
    /// The lock file cannot be used.
    #[error("lock file {path:?}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl RootLock {
    /// Takes the lock of `root`, which exists.
    ///
    /// # Errors
    /// [`LockError`], naming the other process.
    pub fn take(root: &Path) -> Result<Self, LockError> {
        let path = root.join("lock");
        let io = |source| LockError::Io { path: path.clone(), source };
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        if let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(io(error.into()));
            }
            let mut text = String::new();
            let _ = file.take(32).read_to_string(&mut text);
            return Err(LockError::Taken { root: root.to_owned(), pid: text.trim().parse().ok() });
        }
        // The lock is held; its text only tells others by whom, and must not name somebody else.
        if let Err(error) = tell(&mut file) {
            tracing::warn!(%error, file = %path.display(), "the lock file does not say which process has it");
            let _ = file.set_len(0);
        }
        Ok(Self(file))
    }
}

/// Writes our number over what is there, which needs no space on a full disk.
fn tell(file: &mut File) -> io::Result<()> {
    let text = format!("{}\n", std::process::id());
    file.rewind()?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_daemon_is_refused_and_told_who_was_first() {
        let root = tempfile::tempdir().unwrap();
        let first = RootLock::take(root.path()).unwrap();
        let error = RootLock::take(root.path()).unwrap_err();
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        assert!(RootLock::take(root.path()).is_ok());
    }
}
