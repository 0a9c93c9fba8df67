//! Which format the state beneath the root directory has.
//!
//! `<root>/version` is one line, `soci-snapshotter-grpc state <number>`. A daemon that finds a larger number than it knows does
//! not start, since it would take what it cannot read for damage and delete it. A file that is missing or cut says nothing:
//! it is written anew, beside its place and renamed; on a full disk at a later start.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::disk::is_full;

/// The format that this version writes, and the largest that it reads.
const FORMAT: u32 = 1;
const PREFIX: &str = "soci-snapshotter-grpc state ";
/// More than any line of ours, in bytes.
const MAX_SIZE: u64 = 256;

/// Why the state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// A later version wrote it.
    #[error(
        "root directory {root:?} has state of format {found}, this version reads up to {FORMAT}: start the newer \
         soci-snapshotter-grpc again, or use another --root"
    )]
    Newer {
        /// The directory.
        root: PathBuf,
        /// The format found.
        found: u32,
    },
    /// The file cannot be read or written.
    #[error("version file {path:?}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Compares the state beneath `root`, whose lock is held, with what this version knows, and notes its format. Blocks.
///
/// # Errors
/// [`VersionError::Newer`], or about the disk.
pub fn check(root: &Path) -> Result<(), VersionError> {
    let path = root.join("version");
    let io = |source| VersionError::Io { path: path.clone(), source };
    let mut text = String::new();
    match File::open(&path) {
        Ok(file) => {
            // Damage may be anything, also no text.
            let mut bytes = Vec::new();
            file.take(MAX_SIZE).read_to_end(&mut bytes).map_err(io)?;
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    let whole = text.strip_suffix('\n').and_then(|line| line.strip_prefix(PREFIX));
    match whole.and_then(|number| number.parse::<u32>().ok()) {
        Some(FORMAT) => Ok(()),
        Some(found) if found > FORMAT => Err(VersionError::Newer { root: root.to_owned(), found }),
        _ => match write(root, &path) {
            Err(error) if is_full(&error) => {
                tracing::warn!(%error, file = %path.display(), "no room to note the format of the state");
                Ok(())
            }
            written => written.map_err(io),
        },
    }
}

fn write(root: &Path, path: &Path) -> io::Result<()> {
    let next = root.join("version.next");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    writeln!(file, "{PREFIX}{FORMAT}")?;
    file.sync_all()?;
    fs::rename(&next, path)?;
    File::open(root)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_cut_at_any_byte_is_written_anew() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("version");
        check(root.path()).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            check(root.path()).unwrap();
            assert_eq!(fs::read(&path).unwrap(), whole, "cut at {cut}");
        }
        fs::write(&path, b"\xff\xfe\n").unwrap();
        check(root.path()).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_newer_format_is_refused_and_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("version");
        fs::write(&path, "soci-snapshotter-grpc state 2\n").unwrap();
        let error = check(root.path()).unwrap_err().to_string();
        assert!(error.contains("format 2") && error.contains("--root"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "soci-snapshotter-grpc state 2\n");
    }
}
