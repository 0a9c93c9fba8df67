//! Builds the tree from a zTOC's entries in two passes.
//!
//! The first pass takes the entries in tar order, as unpacking would: a directory named again gets new attributes,
//! anything else replaces what had its name, and a parent that has no entry is made. Hard links whose target comes
//! later wait for the second pass. A hard link without a target costs one file here and is listed, for whoever mounts to
//! judge: the daemon mounts no such layer, as unpacking it would fail too. A name that cannot be unpacked costs the layer,
//! because then nobody knows what the layer should look like.
//!
//! Every step is bounded by the entries and [`MAX_NODES`], whatever the zTOC says. Cycles cannot arise: a directory is
//! only ever created under its parent, and links of links are followed with a count.

mod directories;
mod entries;
mod finish;
mod links;

use std::collections::{HashMap, HashSet};
use std::hash::RandomState;

use soci_layer::unpack::DirAttr;
use soci_ztoc::Ztoc;
use thiserror::Error;

use crate::header_check::Member;
use crate::overlay::OpaqueXattr;
use crate::path::PathError;
use crate::tree::{Body, LayerTree, Node, NodeIndex, XattrSet};

/// Most nodes of one tree: 256 MiB of them. Layers with more than a million files are unheard of.
const MAX_NODES: usize = 4 << 20;

/// How a tree is built.
pub struct TreeOptions<'a> {
    /// Whether extended attributes are served.
    pub xattrs: bool,
    /// What marks an opaque directory.
    pub opaque: OpaqueXattr,
    /// Gives the attributes of a directory that has no entry, by its path without a leading slash, from the layers
    /// below; with `None` it is 0755, root's, of 1970.
    pub implied: &'a dyn Fn(&[u8]) -> Option<DirAttr>,
}

impl std::fmt::Debug for TreeOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TreeOptions")
            .field("xattrs", &self.xattrs)
            .field("opaque", &self.opaque)
            .finish_non_exhaustive()
    }
}

/// Why a layer cannot be shown as files.
#[derive(Debug, Error)]
pub enum TreeError {
    /// A name is no path.
    #[error("entry {entry:?} of the layer cannot be a file")]
    Name {
        /// The name as the tar has it.
        entry: String,
        /// What is wrong with it.
        source: PathError,
    },
    /// What a name says is its directory is none.
    #[error("entry {0:?} of the layer stands in something that is not a directory")]
    NotInDirectory(String),
    /// The root of the layer is said to be something else than a directory.
    #[error("the layer's root is not a directory")]
    Root,
    /// A symbolic link is longer than Linux allows.
    #[error("the target of symbolic link {0:?} is {1} bytes long, more than 4095")]
    LongTarget(String, usize),
    /// More files than a tree takes.
    #[error("the layer has more than {0} files and directories")]
    TooManyNodes(usize),
    /// More text than a tree takes.
    #[error("the names in the layer are more than 4 GiB")]
    TooMuchText,
}

impl LayerTree {
    /// Builds the tree of the layer that `ztoc` describes; keeps nothing of it.
    ///
    /// # Errors
    /// [`TreeError`] when the layer cannot be shown as files. Hard links without a target are no error: see
    /// [`LayerTree::broken_links`].
    pub fn build(ztoc: &Ztoc, options: &TreeOptions<'_>) -> Result<Self, TreeError> {
        Self::from_members(ztoc.entries().map(Member::of_entry), options, MAX_NODES)
    }

    pub(crate) fn from_members<'a>(
        members: impl Iterator<Item = Member<'a>>,
        options: &TreeOptions<'_>,
        max_nodes: usize,
    ) -> Result<Self, TreeError> {
        let mut builder = Builder::new(options, max_nodes)?;
        for member in members {
            builder.add(&member)?;
        }
        builder.finish()
    }
}

struct Builder<'a, 'o> {
    options: &'o TreeOptions<'o>,
    max_nodes: usize,
    /// Directories that no layer below has, so that none below has anything in them.
    new: HashSet<NodeIndex>,
    key: RandomState,
    nodes: Vec<Node>,
    /// Of each node, the name it was made under; for directories it stays the name.
    names: Vec<&'a [u8]>,
    children: HashMap<(NodeIndex, &'a [u8]), NodeIndex>,
    /// Names that layers below lose, and the node that says so.
    whiteouts: HashMap<(NodeIndex, &'a [u8]), NodeIndex>,
    /// Targets of symbolic links; a link's body holds its place here until the end.
    targets: Vec<&'a [u8]>,
    /// Placeholders of hard links whose target was not there yet, with the target.
    pending: Vec<(NodeIndex, &'a [u8])>,
    xattrs: Vec<XattrSet>,
    known_xattrs: HashMap<XattrSet, u32>,
    follows: u32,
    /// The directory in which the last entry stood, by its text: neighbours in a tar mostly share it.
    last: Option<(&'a [u8], NodeIndex)>,
}

impl<'a, 'o> Builder<'a, 'o> {
    fn new(options: &'o TreeOptions<'o>, max_nodes: usize) -> Result<Self, TreeError> {
        let mut builder = Self {
            options,
            max_nodes,
            new: HashSet::new(),
            key: RandomState::new(),
            nodes: Vec::new(),
            names: Vec::new(),
            children: HashMap::new(),
            whiteouts: HashMap::new(),
            targets: Vec::new(),
            pending: Vec::new(),
            xattrs: vec![XattrSet::default()],
            known_xattrs: HashMap::new(),
            follows: 0,
            last: None,
        };
        builder.imply(NodeIndex::ROOT, b"")?;
        Ok(builder)
    }

    fn push(&mut self, name: &'a [u8], node: Node) -> Result<NodeIndex, TreeError> {
        if self.nodes.len() >= self.max_nodes {
            return Err(TreeError::TooManyNodes(self.max_nodes));
        }
        let index = u32::try_from(self.nodes.len()).map_err(|_| TreeError::TooManyNodes(self.max_nodes))?;
        self.nodes.push(node);
        self.names.push(name);
        Ok(NodeIndex(index))
    }

    fn body(&self, index: NodeIndex) -> Body {
        self.nodes.get(index.at()).map_or(Body::Broken, |node| node.body)
    }
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Splits a name into the text of its directory and its last component, not cleaned.
fn split(name: &[u8]) -> (&[u8], &[u8]) {
    let end = name.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
    let name = name.get(..end).unwrap_or_default();
    match name.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (name.get(..at).unwrap_or_default(), name.get(at + 1..).unwrap_or_default()),
        None => (&[], name),
    }
}

/// Returns `name` without slashes and components `.` at its end, so that its last component is a real one.
fn trim_dots(mut name: &[u8]) -> &[u8] {
    loop {
        name = match name {
            [rest @ .., b'/'] => rest,
            [rest @ .., b'/', b'.'] => rest,
            _ => return name,
        }
    }
}

#[cfg(test)]
mod tests;
