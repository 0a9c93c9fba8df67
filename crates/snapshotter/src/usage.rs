//! Disk usage of a directory tree, as containerd counts it: blocks taken, each inode once.
//!
//! The walk goes by descriptors and never follows a symbolic link or leaves the file system, since a container may change
//! the tree meanwhile, and since a layer mounted beneath would be our own.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, statat};

use crate::records::Usage;

const OPEN: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::RDONLY);

/// Returns what the tree at `root` takes, `root` included. Blocks.
///
/// # Errors
/// When a directory cannot be read; entries that vanish meanwhile are not counted.
pub fn of(root: &Path) -> io::Result<Usage> {
    let top = openat(CWD, root, OPEN, Mode::empty())?;
    let stat = fstat(&top)?;
    let device = stat.st_dev;
    let mut count = Counter::default();
    count.add(&stat);
    let mut open = vec![Dir::new(top)?];
    while let Some(dir) = open.last_mut() {
        let Some(entry) = dir.read() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let parent = dir.fd()?;
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.st_dev == device => stat,
            Ok(_) | Err(rustix::io::Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        count.add(&stat);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            match openat(parent, name, OPEN, Mode::empty()) {
                Ok(child) => open.push(Dir::new::<OwnedFd>(child)?),
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(count.usage)
}

#[derive(Default)]
struct Counter {
    usage: Usage,
    /// Inodes with several links that were counted.
    seen: HashSet<u64>,
}

impl Counter {
    fn add(&mut self, stat: &rustix::fs::Stat) {
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !directory && stat.st_nlink > 1 && !self.seen.insert(stat.st_ino) {
            return;
        }
        self.usage.inodes += 1;
        self.usage.size += u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_count_once_and_symbolic_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/file"), vec![1; 100_000]).unwrap();
        std::fs::hard_link(root.join("a/file"), root.join("a/b/link")).unwrap();
        std::fs::write(dir.path().join("outside"), vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink(dir.path(), root.join("out")).unwrap();
        let usage = of(&root).unwrap();
        assert_eq!(usage.inodes, 5, "root, a, b, file, out");
        assert!((100_000..200_000).contains(&usage.size), "{usage:?}");
    }

    #[test]
    fn a_missing_tree_is_an_error() {
        assert!(of(Path::new("/nonexistent")).is_err());
    }
}
