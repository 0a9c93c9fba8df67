//! What is synced so that what a call was answered outlives a power cut.
//!
//! A sync waits for the disk to empty its own cache, which takes milliseconds, and so does each further one although
//! nothing is left to write. ext4 and XFS write changes of names and directories in the order in which they were made, so
//! there one file synced makes every earlier change durable; elsewhere each directory is synced as well.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::FsWord;

/// `f_type` of `statfs(2)`; ext2 and ext3 are ext4's here.
const EXT4: FsWord = 0xEF53;
const XFS: FsWord = 0x5846_5342;

/// Makes the content of `file` durable, and the names in `dirs` that were made before.
///
/// # Errors
/// When something cannot be synced.
pub fn sync(file: &File, dirs: &[&Path]) -> io::Result<()> {
    file.sync_all()?;
    if is_ordered(file) { Ok(()) } else { dirs.iter().try_for_each(|dir| File::open(dir)?.sync_all()) }
}

/// Makes the names in `dir` durable by the time of the next [`sync`] on this file system, or now where there is no order.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn names_before_next_sync(dir: &Path) -> io::Result<()> {
    let dir = File::open(dir)?;
    if is_ordered(&dir) { Ok(()) } else { dir.sync_all() }
}

fn is_ordered(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|found| in_order(found.f_type))
}

fn in_order(kind: FsWord) -> bool {
    matches!(kind, EXT4 | XFS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_systems_that_keep_the_order_are_trusted_with_it() {
        assert!(in_order(0xEF53) && in_order(0x5846_5342));
        // tmpfs, btrfs, overlay, NFS, f2fs.
        for kind in [0x0102_1994, 0x9123_683E, 0x794C_7630, 0x6969, 0xF2F5_2010] {
            assert!(!in_order(kind), "{kind:x}");
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error_where_it_is_synced() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("file")).unwrap();
        sync(&file, &[dir.path()]).unwrap();
        names_before_next_sync(dir.path()).unwrap();
        names_before_next_sync(&dir.path().join("absent")).unwrap_err();
    }
}
