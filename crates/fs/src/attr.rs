//! Attributes of a file, and the numbers by which the kernel knows it.
//!
//! Inode numbers follow from a node's place in the tree and nothing else: 1 is the root, 2 and 3 are the state directory
//! and its file, and every other node is its index plus 3.

use crate::tree::{Body, LayerTree, Node, NodeIndex};

/// File type bits of a mode.
pub(crate) mod file_type {
    pub(crate) const MASK: u32 = 0o170_000;
    pub(crate) const FIFO: u32 = 0o010_000;
    pub(crate) const CHARACTER: u32 = 0o020_000;
    pub(crate) const DIRECTORY: u32 = 0o040_000;
    pub(crate) const BLOCK: u32 = 0o060_000;
    pub(crate) const REGULAR: u32 = 0o100_000;
    pub(crate) const SYMLINK: u32 = 0o120_000;
}

/// Size that a directory reports, as most file systems do.
const DIRECTORY_SIZE: u64 = 4096;

/// Preferred size of I/O in bytes.
pub(crate) const BLOCK_SIZE: u32 = 4096;

/// Number by which the kernel and programs know a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Inode(pub u64);

/// What an inode number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A file of the layer.
    Node(NodeIndex),
    /// The hidden state directory.
    StateDir,
    /// The file in it.
    StateFile,
}

impl Inode {
    /// The root directory of a mount.
    pub const ROOT: Self = Self(1);

    /// Returns the number of `target`.
    pub fn of(target: Target) -> Self {
        match target {
            Target::Node(NodeIndex::ROOT) => Self::ROOT,
            Target::StateDir => Self(2),
            Target::StateFile => Self(3),
            Target::Node(index) => Self(u64::from(index.0) + 3),
        }
    }

    /// Returns what the number stands for; `None` for 0 and numbers too large for any tree.
    pub fn target(self) -> Option<Target> {
        match self.0 {
            0 => None,
            1 => Some(Target::Node(NodeIndex::ROOT)),
            2 => Some(Target::StateDir),
            3 => Some(Target::StateFile),
            number => u32::try_from(number - 3).ok().map(|index| Target::Node(NodeIndex(index))),
        }
    }
}

/// Attributes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Its number.
    pub inode: Inode,
    /// Length in bytes; of a symbolic link, that of its target.
    pub size: u64,
    /// Time of last change in seconds and nanoseconds since 1970; the only time a layer has.
    pub mtime: (i64, u32),
    /// Type and permission bits.
    pub mode: u32,
    /// Names that the file has; of a directory, 2 plus its subdirectories.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number in the kernel's 32-bit form; 0 of anything else.
    pub rdev: u32,
}

impl Attr {
    /// Returns the number of 512-byte blocks, counted in whole units of 4096 bytes.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(u64::from(BLOCK_SIZE)).saturating_mul(8)
    }

    /// Whether it is what overlayfs takes for a removed name: the character device 0/0.
    pub(crate) fn is_whiteout(&self) -> bool {
        self.mode & file_type::MASK == file_type::CHARACTER && self.rdev == 0
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.mode & file_type::MASK == file_type::DIRECTORY
    }
}

/// Returns the attributes of a node; `None` of a name with nothing behind it.
pub(crate) fn of_node(tree: &LayerTree, index: NodeIndex) -> Option<Attr> {
    let node: &Node = tree.node(index)?;
    let (size, rdev) = match node.body {
        Body::Directory { .. } => (DIRECTORY_SIZE, 0),
        Body::Regular { size, .. } => (size, 0),
        Body::Symlink { len, .. } => (u64::from(len), 0),
        Body::Device { major, minor } => (0, encode_device(major, minor)),
        Body::Fifo => (0, 0),
        Body::Broken => return None,
    };
    Some(Attr {
        inode: Inode::of(Target::Node(index)),
        size,
        mtime: (node.mtime, node.mtime_nanos),
        mode: node.mode,
        nlink: node.nlink,
        uid: node.uid,
        gid: node.gid,
        rdev,
    })
}

/// Returns a device number as FUSE carries it: 12 bits of major, 20 of minor, as in the kernel.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_follow_from_the_index_alone() {
        let node = |index| Target::Node(NodeIndex(index));
        let table = [(node(0), 1), (Target::StateDir, 2), (Target::StateFile, 3), (node(1), 4), (node(2), 5)];
        for (target, number) in table {
            assert_eq!(Inode::of(target), Inode(number));
            assert_eq!(Inode(number).target(), Some(target));
        }
        assert_eq!(Inode(0).target(), None);
        assert_eq!(Inode(u64::MAX).target(), None);
        let last = Inode::of(node(u32::MAX));
        assert_eq!(last.target(), Some(node(u32::MAX)));
    }

    #[test]
    fn device_numbers_have_the_kernels_form() {
        assert_eq!(encode_device(8, 1), 0x0801);
        assert_eq!(encode_device(0, 0), 0);
        assert_eq!(encode_device(0x123, 0x45678), 0x4561_2378);
    }

    #[test]
    fn blocks_count_whole_units() {
        let mut attr =
            Attr { inode: Inode::ROOT, size: 0, mtime: (0, 0), mode: 0, nlink: 1, uid: 0, gid: 0, rdev: 0 };
        for (size, blocks) in [(0, 0), (1, 8), (4096, 8), (4097, 16)] {
            attr.size = size;
            assert_eq!(attr.blocks(), blocks);
        }
    }
}
