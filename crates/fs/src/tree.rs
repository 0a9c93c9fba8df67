//! The files of one layer as a compact, immutable arena.
//!
//! A node costs 64 bytes and a name in a directory 12 more plus its text, since a machine holds hundreds of layers and
//! most of their files are never touched. The tree keeps nothing of the zTOC it was built from. A directory's entries
//! are one sorted slice: a lookup is a binary search, and a position in it is a stable directory offset.
//!
//! **Numbers are a contract.** Nodes are numbered in the order in which the tar first names them (a directory that is
//! only implied comes before what implies it), and inode numbers follow from that alone. A later process that builds
//! the tree from the same zTOC can therefore answer a kernel that holds inode numbers of an earlier one.

use std::hash::RandomState;

use soci_ztoc::UncompressedOffset;

/// Number of a node in its tree; the root is number 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeIndex(pub(crate) u32);

impl NodeIndex {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    pub(crate) fn at(self) -> usize {
        self.0 as usize
    }
}

/// What a node is, with what only that kind has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    /// `first` and `count` select the slice of entries.
    Directory {
        opaque: bool,
        first: u32,
        count: u32,
        parent: u32,
    },
    /// `header_len` bytes of tar header stand right before `data`; `fingerprint` is of what the zTOC says of them.
    Regular {
        header_len: u32,
        data: UncompressedOffset,
        size: u64,
        fingerprint: u64,
    },
    /// Where the target's text is.
    Symlink {
        target: u32,
        len: u32,
    },
    /// A device of the kind in the mode; a whiteout is character device 0/0.
    Device {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// A hard link whose target the layer does not have: there is a name and nothing behind it.
    Broken,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    /// With the file type.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) nlink: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nanos: u32,
    /// Which set of extended attributes; 0 is the empty one.
    pub(crate) xattrs: u32,
    pub(crate) body: Body,
}

const _: () = assert!(size_of::<Node>() == 64);

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirEntry {
    name: u32,
    len: u32,
    pub(crate) node: NodeIndex,
}

impl DirEntry {
    pub(crate) fn new(name: u32, len: u32, node: NodeIndex) -> Self {
        Self { name, len, node }
    }
}

/// Extended attributes that one or more nodes have, by full name.
pub(crate) type XattrSet = Box<[(Box<[u8]>, Box<[u8]>)]>;

/// The files of one layer. See the module for what its numbers promise.
#[derive(Debug)]
pub struct LayerTree {
    pub(crate) nodes: Box<[Node]>,
    pub(crate) entries: Box<[DirEntry]>,
    /// All names and link targets.
    pub(crate) text: Box<[u8]>,
    pub(crate) xattrs: Box<[XattrSet]>,
    /// Whether the layer serves extended attributes at all.
    pub(crate) serves_xattrs: bool,
    /// Which attribute marks an opaque directory.
    pub(crate) opaque: &'static [u8],
    pub(crate) any_opaque: bool,
    pub(crate) broken: Box<[Box<[u8]>]>,
    /// Key of the fingerprints.
    pub(crate) key: RandomState,
}

impl LayerTree {
    /// Returns how many nodes there are, implied directories included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether the layer has nothing but its root directory.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the paths of hard links whose target the layer does not have: using one is an I/O error.
    ///
    /// At most a hundred are listed. Whoever can unpack the layer in another way may want to when there are any.
    pub fn broken_links(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.broken.iter().map(|path| &**path)
    }

    /// Returns the bytes of memory that the tree holds.
    pub fn memory(&self) -> usize {
        let xattrs: usize =
            self.xattrs.iter().flatten().map(|(name, value)| name.len() + value.len() + 32).sum();
        size_of_val(&*self.nodes) + size_of_val(&*self.entries) + self.text.len() + xattrs
    }

    /// Returns the node behind a path of cleaned components, not following links; `None` when there is none.
    pub fn find(&self, path: &[u8]) -> Option<NodeIndex> {
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
        parts.into_iter().try_fold(NodeIndex::ROOT, |at, part| self.child(at, part))
    }

    pub(crate) fn node(&self, index: NodeIndex) -> Option<&Node> {
        self.nodes.get(index.at())
    }

    /// Returns the entries of a directory, sorted by name; none of anything else.
    pub(crate) fn children(&self, index: NodeIndex) -> &[DirEntry] {
        match self.node(index).map(|node| node.body) {
            Some(Body::Directory { first, count, .. }) => {
                let first = first as usize;
                self.entries.get(first..first.saturating_add(count as usize)).unwrap_or_default()
            }
            _ => &[],
        }
    }

    pub(crate) fn child(&self, parent: NodeIndex, name: &[u8]) -> Option<NodeIndex> {
        let children = self.children(parent);
        let at = children.binary_search_by(|entry| self.name(entry).cmp(name)).ok()?;
        children.get(at).map(|entry| entry.node)
    }

    pub(crate) fn name(&self, entry: &DirEntry) -> &[u8] {
        self.slice(entry.name, entry.len)
    }

    pub(crate) fn slice(&self, start: u32, len: u32) -> &[u8] {
        let start = start as usize;
        self.text.get(start..start.saturating_add(len as usize)).unwrap_or_default()
    }

    /// Whether any node has an extended attribute, the mark of opaque directories included.
    pub fn any_xattrs(&self) -> bool {
        self.serves_xattrs && (self.any_opaque || self.xattrs.len() > 1)
    }

    /// Returns the extended attributes of `node` in the order in which they are listed.
    pub(crate) fn xattrs(&self, node: &Node) -> impl Iterator<Item = (&[u8], &[u8])> {
        let opaque = matches!(node.body, Body::Directory { opaque: true, .. });
        let own = self.xattrs.get(node.xattrs as usize).map(|set| &**set).unwrap_or_default();
        let mark = opaque.then_some((self.opaque, &b"y"[..]));
        let all = mark.into_iter().chain(own.iter().map(|(name, value)| (&**name, &**value)));
        all.filter(|_| self.serves_xattrs)
    }
}

impl LayerTree {
    /// Returns the names that lead to a directory from the root. For messages: it searches each parent's entries.
    pub(crate) fn path(&self, mut directory: NodeIndex) -> Vec<Vec<u8>> {
        let mut parts = Vec::new();
        while let Some(Body::Directory { parent, .. }) = self.node(directory).map(|node| node.body)
            && directory != NodeIndex::ROOT
        {
            let parent = NodeIndex(parent);
            let entry = self.children(parent).iter().find(|entry| entry.node == directory);
            parts.push(entry.map(|entry| self.name(entry).to_vec()).unwrap_or_default());
            directory = parent;
        }
        parts.reverse();
        parts
    }
}
