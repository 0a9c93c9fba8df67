//! A directory tree as values, and the differences of two: content, type, mode, owner, times, devices, xattrs, links.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// What a tree shows of one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Device number of a device node, else 0.
    pub device: u64,
    /// Length of a file or of a link's target; 0 for anything else (a directory's differs between file systems).
    pub size: u64,
    /// SHA-256 of a file's content.
    pub content: Option<[u8; 32]>,
    /// Where a symbolic link points.
    pub link: Option<Vec<u8>>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path, in order, that is the same file; none where it has one name only.
    pub same_as: Option<Vec<u8>>,
}

/// A tree: paths relative to its root (empty for the root itself).
pub type Tree = BTreeMap<Vec<u8>, Node>;

/// Walks `root` and reads every file to its end. Does not follow links nor cross into other mounts' parents. Blocks.
///
/// # Errors
/// The first thing that cannot be read, with its path.
pub fn walk(root: &Path) -> io::Result<Tree> {
    let mut tree = Tree::new();
    let mut names: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut left = vec![Vec::new()];
    while let Some(relative) = left.pop() {
        let path =
            if relative.is_empty() { root.to_owned() } else { root.join(OsStr::from_bytes(&relative)) };
        let located = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let meta = path.symlink_metadata().map_err(located)?;
        let kind = meta.file_type();
        if kind.is_dir() {
            for entry in path.read_dir().map_err(located)? {
                let name = entry.map_err(located)?.file_name().into_vec();
                let child =
                    if relative.is_empty() { name } else { [&relative, b"/".as_slice(), &name].concat() };
                left.push(child);
            }
            // Popped from the end: the first name of a hard link must be the first in order.
            left.sort_by(|a, b| b.cmp(a));
        }
        let link = if kind.is_symlink() {
            Some(path.read_link().map_err(located)?.into_os_string().into_vec())
        } else {
            None
        };
        let same_as = if !kind.is_dir() && meta.nlink() > 1 {
            let first = names.entry((meta.dev(), meta.ino())).or_insert_with(|| relative.clone());
            Some(first.clone())
        } else {
            None
        };
        let node = Node {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            device: meta.rdev(),
            size: if kind.is_file() || kind.is_symlink() { meta.size() } else { 0 },
            content: if kind.is_file() { Some(hash(&path).map_err(located)?) } else { None },
            link,
            xattrs: xattrs(&path).map_err(located)?,
            same_as,
        };
        tree.insert(relative, node);
    }
    Ok(tree)
}

fn hash(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&buffer[..read]);
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 * 1024];
    let length = rustix::fs::llistxattr(path, &mut names[..])?;
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 * 1024];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..])?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

/// Describes every difference between two trees, one line each, with the path first.
///
/// The times of directories in `timeless` are not compared: no archive entry states them, so they are those of unpacking.
pub fn differences(left: &Tree, right: &Tree, timeless: &BTreeSet<Vec<u8>>) -> Vec<String> {
    let mut lines = Vec::new();
    let paths: BTreeSet<&Vec<u8>> = left.keys().chain(right.keys()).collect();
    for path in paths {
        let shown = format!("/{}", path.escape_ascii());
        match (left.get(path), right.get(path)) {
            (Some(_), None) => lines.push(format!("{shown}: only on the left")),
            (None, Some(_)) => lines.push(format!("{shown}: only on the right")),
            (Some(ours), Some(theirs)) => {
                let mut theirs = theirs.clone();
                if timeless.contains(path) {
                    theirs.mtime = ours.mtime;
                }
                if *ours != theirs {
                    lines.push(format!("{shown}: {}", parts(ours, &theirs)));
                }
            }
            (None, None) => {}
        }
    }
    lines
}

fn parts(left: &Node, right: &Node) -> String {
    let mut parts = Vec::new();
    if left.mode != right.mode {
        parts.push(format!("mode {:o} and {:o}", left.mode, right.mode));
    }
    if (left.uid, left.gid) != (right.uid, right.gid) {
        parts.push(format!("owner {}:{} and {}:{}", left.uid, left.gid, right.uid, right.gid));
    }
    if left.mtime != right.mtime {
        parts.push(format!("mtime {:?} and {:?}", left.mtime, right.mtime));
    }
    if left.device != right.device {
        parts.push(format!("device {:#x} and {:#x}", left.device, right.device));
    }
    if left.size != right.size {
        parts.push(format!("size {} and {}", left.size, right.size));
    } else if left.content != right.content {
        parts.push("content".to_owned());
    }
    if left.link != right.link {
        parts.push("link target".to_owned());
    }
    if left.xattrs != right.xattrs {
        let show = |map: &BTreeMap<Vec<u8>, Vec<u8>>| {
            let pairs =
                map.iter().map(|(key, value)| format!("{}={}", key.escape_ascii(), value.escape_ascii()));
            pairs.collect::<Vec<_>>().join(",")
        };
        parts.push(format!("xattrs [{}] and [{}]", show(&left.xattrs), show(&right.xattrs)));
    }
    if left.same_as != right.same_as {
        let show = |name: &Option<Vec<u8>>| name.as_ref().map(|name| name.escape_ascii().to_string());
        parts.push(format!("hard link of {:?} and {:?}", show(&left.same_as), show(&right.same_as)));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_difference_is_named() {
        let make = || {
            let directory = tempfile::tempdir().unwrap();
            std::fs::create_dir(directory.path().join("d")).unwrap();
            std::fs::write(directory.path().join("d/a"), b"one").unwrap();
            std::fs::hard_link(directory.path().join("d/a"), directory.path().join("d/b")).unwrap();
            std::os::unix::fs::symlink("a", directory.path().join("d/l")).unwrap();
            directory
        };
        let (one, two) = (make(), make());
        let timeless: BTreeSet<Vec<u8>> = walk(one.path()).unwrap().into_keys().collect();
        let compare = || differences(&walk(one.path()).unwrap(), &walk(two.path()).unwrap(), &timeless);
        assert_eq!(compare(), Vec::<String>::new());
        std::fs::write(two.path().join("d/a"), b"two").unwrap();
        assert_eq!(compare(), ["/d/a: content", "/d/b: content"]);
        std::fs::remove_file(two.path().join("d/b")).unwrap();
        assert_eq!(
            compare(),
            ["/d/a: content; hard link of Some(\"d/a\") and None", "/d/b: only on the left"]
        );
    }
}
