//! Whether overlay works on the file system of the root directory.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::disk::is_full;

/// The file system of the root directory does not carry overlay.
#[derive(Debug, thiserror::Error)]
#[error("snapshotter is not supported: overlay on {root:?}: {step}")]
pub struct Unsupported {
    root: PathBuf,
    step: &'static str,
    #[source]
    source: io::Error,
}

impl Unsupported {
    /// Whether there was no room to try it.
    pub fn is_full(&self) -> bool {
        is_full(&self.source)
    }
}

/// Mounts an overlay of two layers beneath `root` and takes it away again. Blocks.
///
/// # Errors
/// [`Unsupported`], saying what failed.
pub fn check(root: &Path, userxattr: bool) -> Result<(), Unsupported> {
    let error = |step| move |source| Unsupported { root: root.to_owned(), step, source };
    let trial = root.join("trial");
    // That of a process that was killed; one daemon uses a root at a time.
    drop(Trial(trial.clone()));
    let guard = Trial(trial.clone());
    for name in ["lower1", "lower2", "upper", "work", "merged"] {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(trial.join(name))
            .map_err(error("cannot make directories"))?;
    }
    let untyped = fs::read_dir(&trial)
        .and_then(|mut entries| {
            entries.try_fold(false, |untyped, entry| Ok(untyped || !entry?.file_type()?.is_dir()))
        })
        .map_err(error("cannot list directories"))?;
    if untyped {
        return Err(error("directory entries carry no type (d_type)")(io::ErrorKind::Unsupported.into()));
    }
    let path = |name: &str| trial.join(name).display().to_string();
    let userxattr = if userxattr { ",userxattr" } else { "" };
    let options = format!(
        "lowerdir={}:{},upperdir={},workdir={}{userxattr}",
        path("lower2"),
        path("lower1"),
        path("upper"),
        path("work")
    );
    let options = std::ffi::CString::new(options)
        .map_err(|_| error("its path cannot be mounted")(io::ErrorKind::InvalidInput.into()))?;
    mount("overlay", trial.join("merged"), "overlay", MountFlags::empty(), options.as_c_str())
        .map_err(|errno| error("cannot mount")(errno.into()))?;
    drop(guard);
    Ok(())
}

/// Whether this process runs in a user namespace of its own, where overlay needs `userxattr`.
pub fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        let fields: Vec<&str> = map.split_whitespace().collect();
        fields != ["0", "0", "4294967295"]
    })
}

struct Trial(PathBuf);

impl Drop for Trial {
    fn drop(&mut self) {
        let _ = unmount(self.0.join("merged"), UnmountFlags::DETACH);
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_leaves_nothing() {
        if !rustix::process::geteuid().is_root() {
            panic!("needs root: mounts an overlay");
        }
        let root = tempfile::tempdir().unwrap();
        check(root.path(), false).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
