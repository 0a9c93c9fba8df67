//! Builds the tree from a zTOC's entries in two passes.
//!
//! The first pass takes the entries in tar order, as unpacking would: a directory named again gets new attributes,
//! anything else replaces what had its name, and a parent that has no entry is made. Hard links whose target comes
//! later wait for the second pass. One bad link costs one file; a name that cannot be unpacked costs the layer, because
//! then nobody knows what the layer should look like.
//!
//! Every step is bounded by the entries and [`MAX_NODES`], whatever the zTOC says. Cycles cannot arise: a directory is
//! only ever created under its parent, and links of links are followed with a count.

use std::collections::hash_map::Entry as Slot;
use std::collections::{HashMap, HashSet};
use std::hash::RandomState;

use soci_ztoc::{EntryKind, UncompressedOffset, Ztoc};
use thiserror::Error;

use crate::attr::file_type;
use crate::header_check::{self, Member};
use crate::overlay::{self, Meaning, OpaqueXattr};
use crate::path::{self, PathError};
use crate::tree::{Body, DirAttr, DirEntry, LayerTree, Node, NodeIndex, XattrSet};

/// Most nodes of one tree: 256 MiB of them. Layers with more than a million files are unheard of.
const MAX_NODES: usize = 4 << 20;
/// Symbolic links followed to find one parent directory, as Linux limits it.
const MAX_FOLLOWS: u32 = 40;
/// Symbolic links followed to find parents in the whole tree, so that a hostile layer cannot buy time.
const MAX_ALL_FOLLOWS: u32 = 100_000;
/// Longest target of a symbolic link that Linux has.
const MAX_TARGET: usize = 4095;
/// Limits of Linux on an extended attribute.
const MAX_XATTR_NAME: usize = 255;
const MAX_XATTR_VALUE: usize = 64 << 10;
/// Broken links that are listed by name.
const MAX_LISTED: usize = 100;

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

    fn path_of(&self, mut index: NodeIndex, name: &'a [u8]) -> Vec<u8> {
        let mut parts = vec![name];
        while index != NodeIndex::ROOT {
            parts.push(self.names.get(index.at()).copied().unwrap_or_default());
            let Body::Directory { parent, .. } = self.body(index) else { break };
            index = NodeIndex(parent);
        }
        parts.reverse();
        parts.join(&b'/')
    }

    /// Makes a directory that has no entry of its own (yet).
    fn imply(&mut self, parent: NodeIndex, name: &'a [u8]) -> Result<NodeIndex, TreeError> {
        // Also keeps deep chains of such directories cheap: their paths are not even put together.
        let is_new = self.new.contains(&parent);
        let below = if is_new { None } else { (self.options.implied)(&self.path_of(parent, name)) };
        let is_new = below.is_none();
        let attr = below.unwrap_or(DirAttr { mode: 0o755, ..DirAttr::default() });
        let xattrs = self.xattr_set(attr.xattrs.iter().map(|(name, value)| (&**name, &**value)));
        let node = Node {
            mode: file_type::DIRECTORY | (attr.mode & 0o7777),
            uid: attr.uid,
            gid: attr.gid,
            nlink: 2,
            mtime: attr.mtime.0,
            mtime_nanos: attr.mtime.1.min(999_999_999),
            xattrs,
            body: Body::Directory { opaque: false, first: 0, count: 0, parent: parent.0 },
        };
        let index = self.push(name, node)?;
        if index != NodeIndex::ROOT {
            self.children.insert((parent, name), index);
            if is_new {
                self.new.insert(index);
            }
        }
        Ok(index)
    }

    fn xattr_set<'x>(&mut self, xattrs: impl Iterator<Item = (&'x [u8], &'x [u8])>) -> u32 {
        if !self.options.xattrs {
            return 0;
        }
        let fits = |name: &[u8], value: &[u8]| {
            let name_ok = !name.is_empty() && name.len() <= MAX_XATTR_NAME && !name.contains(&0);
            name_ok && value.len() <= MAX_XATTR_VALUE && overlay::allowed(name)
        };
        let set: XattrSet = xattrs
            .filter(|(name, value)| fits(name, value))
            .map(|(name, value)| (Box::from(name), Box::from(value)))
            .collect();
        if set.is_empty() {
            return 0;
        }
        if let Some(known) = self.known_xattrs.get(&set) {
            return *known;
        }
        // Fits: there are no more sets than nodes.
        let index = u32::try_from(self.xattrs.len()).unwrap_or(0);
        self.xattrs.push(set.clone());
        self.known_xattrs.insert(set, index);
        index
    }

    /// Finds the directory at `path` from the root, following symbolic links as unpacking would; `make` says whether
    /// what is missing is made. `None` when it is not there, or no directory.
    fn directory(&mut self, path: &'a [u8], make: Missing) -> Result<Option<NodeIndex>, TreeError> {
        if let Some((text, index)) = self.last
            && text == path
        {
            return Ok(Some(index));
        }
        let mut at = NodeIndex::ROOT;
        let mut follows = 0;
        let mut todo: Vec<&'a [u8]> = path.split(|byte| *byte == b'/').rev().collect();
        while let Some(part) = todo.pop() {
            let Body::Directory { parent, .. } = self.body(at) else { return Ok(None) };
            match part {
                b"" | b"." => continue,
                b".." => {
                    at = NodeIndex(parent);
                    continue;
                }
                _ => {}
            }
            let Some(next) = self.children.get(&(at, part)).copied() else {
                if make == Missing::Fails || part.len() > path::NAME_MAX || part.contains(&0) {
                    return Ok(None);
                }
                at = self.imply(at, part)?;
                continue;
            };
            match self.body(next) {
                Body::Directory { .. } => at = next,
                Body::Symlink { target, .. } => {
                    follows += 1;
                    self.follows += 1;
                    if follows > MAX_FOLLOWS || self.follows > MAX_ALL_FOLLOWS {
                        return Ok(None);
                    }
                    let target = self.targets.get(target as usize).copied().unwrap_or_default();
                    if target.starts_with(b"/") {
                        at = NodeIndex::ROOT;
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev());
                }
                Body::Regular { .. } | Body::Device { .. } | Body::Fifo | Body::Broken => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn add(&mut self, member: &Member<'a>) -> Result<(), TreeError> {
        let named = |source| TreeError::Name { entry: lossy(member.name), source };
        let mut parts = path::components(member.name).map_err(named)?;
        let Some(last) = parts.next_back() else { return self.add_root(member) };
        if parts.any(|part| overlay::meaning(part) != Meaning::File) {
            return Ok(());
        }
        let meaning = overlay::meaning(last);
        if meaning == Meaning::Hidden {
            return Ok(());
        }
        let (text, _) = split(trim_dots(member.name));
        let Some(parent) = self.directory(text, Missing::IsMade)? else {
            return Err(TreeError::NotInDirectory(lossy(member.name)));
        };
        self.last = Some((text, parent));
        match meaning {
            Meaning::File => self.add_file(parent, last, member),
            Meaning::Whiteout(target) => self.add_whiteout(parent, target),
            Meaning::Opaque => {
                self.mark_opaque(parent);
                Ok(())
            }
            Meaning::Hidden => Ok(()),
        }
    }

    fn add_root(&mut self, member: &Member<'a>) -> Result<(), TreeError> {
        if member.kind != EntryKind::Directory {
            return Err(TreeError::Root);
        }
        self.overwrite(NodeIndex::ROOT, member);
        Ok(())
    }

    fn mark_opaque(&mut self, directory: NodeIndex) {
        if let Some(Body::Directory { opaque, .. }) =
            self.nodes.get_mut(directory.at()).map(|node| &mut node.body)
        {
            *opaque = true;
        }
    }

    fn add_whiteout(&mut self, parent: NodeIndex, target: &'a [u8]) -> Result<(), TreeError> {
        let node = Node {
            mode: file_type::CHARACTER,
            uid: 0,
            gid: 0,
            nlink: 1,
            mtime: 0,
            mtime_nanos: 0,
            xattrs: 0,
            body: Body::Device { major: 0, minor: 0 },
        };
        if !self.whiteouts.contains_key(&(parent, target)) {
            let index = self.push(target, node)?;
            self.whiteouts.insert((parent, target), index);
        }
        Ok(())
    }

    /// Gives the directory the attributes of an entry that names it again.
    fn overwrite(&mut self, index: NodeIndex, member: &Member<'a>) {
        let xattrs = self.xattr_set(member.xattrs());
        if let Some(node) = self.nodes.get_mut(index.at()) {
            let body = node.body;
            *node = Node { xattrs, body, ..plain(member, file_type::DIRECTORY) };
        }
    }

    fn add_file(&mut self, parent: NodeIndex, name: &'a [u8], member: &Member<'a>) -> Result<(), TreeError> {
        let present = self.children.get(&(parent, name)).copied();
        if let (EntryKind::Directory, Some(index)) = (member.kind, present)
            && matches!(self.body(index), Body::Directory { .. })
        {
            self.overwrite(index, member);
            return Ok(());
        }
        let index = match member.kind {
            EntryKind::HardLink => self.link(name, member)?,
            EntryKind::Regular
            | EntryKind::Symlink
            | EntryKind::CharDevice
            | EntryKind::BlockDevice
            | EntryKind::Directory
            | EntryKind::Fifo => self.create(parent, name, member)?,
        };
        match self.children.entry((parent, name)) {
            Slot::Occupied(mut slot) => {
                // A directory that goes takes what was in it along, and a link may have led here.
                slot.insert(index);
                self.last = None;
            }
            Slot::Vacant(slot) => {
                slot.insert(index);
            }
        }
        Ok(())
    }

    fn create(
        &mut self,
        parent: NodeIndex,
        name: &'a [u8],
        member: &Member<'a>,
    ) -> Result<NodeIndex, TreeError> {
        let (major, minor) = member.device;
        let (kind, body) = match member.kind {
            EntryKind::Directory => (
                file_type::DIRECTORY,
                Body::Directory { opaque: false, first: 0, count: 0, parent: parent.0 },
            ),
            EntryKind::Symlink => {
                if member.link.len() > MAX_TARGET {
                    return Err(TreeError::LongTarget(lossy(member.name), member.link.len()));
                }
                let target =
                    u32::try_from(self.targets.len()).map_err(|_| TreeError::TooManyNodes(self.max_nodes))?;
                self.targets.push(member.link);
                (file_type::SYMLINK, Body::Symlink { target, len: 0 })
            }
            EntryKind::CharDevice => (file_type::CHARACTER, Body::Device { major, minor }),
            EntryKind::BlockDevice => (file_type::BLOCK, Body::Device { major, minor }),
            EntryKind::Fifo => (file_type::FIFO, Body::Fifo),
            EntryKind::Regular => {
                let fingerprint = header_check::fingerprint(&self.key, member);
                let header_len = member.data.0.saturating_sub(member.header.0);
                // A header longer than 4 GiB is no header: the check of such a file fails.
                let header_len = u32::try_from(header_len).unwrap_or(u32::MAX);
                let (data, size) = (UncompressedOffset(member.data.0), member.size);
                (file_type::REGULAR, Body::Regular { header_len, data, size, fingerprint })
            }
            EntryKind::HardLink => (0, Body::Broken),
        };
        let xattrs = self.xattr_set(member.xattrs());
        let mut node = Node { xattrs, body, ..plain(member, kind) };
        if member.kind == EntryKind::Symlink {
            node.mode = file_type::SYMLINK | 0o777;
        }
        self.push(name, node)
    }

    /// Returns the node that a hard link leads to, or a placeholder until all entries are known.
    fn link(&mut self, name: &'a [u8], member: &Member<'a>) -> Result<NodeIndex, TreeError> {
        if let Some(target) = self.find(member.link)?
            && !matches!(self.body(target), Body::Directory { .. })
        {
            return Ok(target);
        }
        let placeholder = self.push(name, Node { body: Body::Broken, xattrs: 0, ..plain(member, 0) })?;
        self.pending.push((placeholder, member.link));
        Ok(placeholder)
    }

    /// Finds what a hard link's target names, not following a last symbolic link.
    fn find(&mut self, target: &'a [u8]) -> Result<Option<NodeIndex>, TreeError> {
        let Ok(mut parts) = path::components(target) else { return Ok(None) };
        let Some(last) = parts.next_back() else { return Ok(None) };
        let (text, _) = split(trim_dots(target));
        let Some(parent) = self.directory(text, Missing::Fails)? else { return Ok(None) };
        Ok(self.children.get(&(parent, last)).copied())
    }

    /// Decides what each waiting hard link leads to, links to links included.
    fn resolve_links(&mut self) -> Result<HashMap<NodeIndex, NodeIndex>, TreeError> {
        self.last = None;
        let pending = std::mem::take(&mut self.pending);
        let mut leads = HashMap::with_capacity(pending.len());
        for (placeholder, target) in &pending {
            if let Some(found) = self.find(target)?
                && !matches!(self.body(found), Body::Directory { .. })
            {
                leads.insert(*placeholder, found);
            }
        }
        for (placeholder, _) in &pending {
            let mut seen = Vec::new();
            let mut at = *placeholder;
            while let Some(next) = leads.get(&at).copied() {
                if next == at || seen.len() > pending.len() {
                    break;
                }
                seen.push(at);
                at = next;
            }
            // What leads in a circle leads nowhere: its first step becomes itself, which is broken.
            let end = if matches!(self.body(at), Body::Broken) { *placeholder } else { at };
            for step in seen {
                leads.insert(step, if end == *placeholder { step } else { end });
            }
        }
        Ok(leads)
    }

    fn finish(mut self) -> Result<LayerTree, TreeError> {
        let leads = self.resolve_links()?;
        let whiteouts = self.whiteouts.iter().filter(|(place, _)| !self.children.contains_key(*place));
        let mut rows: Vec<_> =
            self.children.iter().chain(whiteouts).map(|((at, name), node)| (*at, *name, *node)).collect();
        rows.sort_unstable();
        let mut text = Vec::with_capacity(rows.iter().map(|(_, name, _)| name.len()).sum());
        let mut entries = Vec::with_capacity(rows.len());
        for (row, (parent, name, node)) in rows.iter().enumerate() {
            let node = leads.get(node).copied().unwrap_or(*node);
            let (start, len) = append(&mut text, name)?;
            entries.push(DirEntry::new(start, len, node));
            let row = u32::try_from(row).map_err(|_| TreeError::TooManyNodes(self.max_nodes))?;
            if let Some(Body::Directory { first, count, .. }) =
                self.nodes.get_mut(parent.at()).map(|node| &mut node.body)
            {
                *first = if *count == 0 { row } else { *first };
                *count += 1;
            }
        }
        for node in &mut self.nodes {
            if let Body::Symlink { target, len } = &mut node.body {
                let place =
                    append(&mut text, self.targets.get(*target as usize).copied().unwrap_or_default())?;
                (*target, *len) = place;
            }
        }
        let mut tree = LayerTree {
            nodes: self.nodes.into_boxed_slice(),
            entries: entries.into_boxed_slice(),
            text: text.into_boxed_slice(),
            xattrs: self.xattrs.into_boxed_slice(),
            serves_xattrs: self.options.xattrs,
            opaque: self.options.opaque.name(),
            any_opaque: false,
            broken: Box::default(),
            key: self.key,
        };
        count_links(&mut tree);
        Ok(tree)
    }
}

/// What finding a directory does where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    IsMade,
    Fails,
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

fn plain(member: &Member<'_>, kind: u32) -> Node {
    Node {
        mode: kind | (member.mode & 0o7777),
        uid: member.uid,
        gid: member.gid,
        nlink: 0,
        mtime: member.mtime.0,
        mtime_nanos: member.mtime.1.min(999_999_999),
        xattrs: 0,
        body: Body::Broken,
    }
}

fn append(text: &mut Vec<u8>, piece: &[u8]) -> Result<(u32, u32), TreeError> {
    let start = u32::try_from(text.len()).map_err(|_| TreeError::TooMuchText)?;
    let len = u32::try_from(piece.len()).map_err(|_| TreeError::TooMuchText)?;
    text.extend_from_slice(piece);
    Ok((start, len))
}

/// Walks what can be reached from the root: counts names and subdirectories, and notes what leads nowhere.
fn count_links(tree: &mut LayerTree) {
    let mut counts = vec![0_u32; tree.nodes.len()];
    let mut any_opaque = false;
    let mut broken: Vec<Box<[u8]>> = Vec::new();
    let mut todo = vec![NodeIndex::ROOT];
    while let Some(directory) = todo.pop() {
        let mut subdirectories = 0_u32;
        any_opaque |=
            matches!(tree.node(directory).map(|node| node.body), Some(Body::Directory { opaque: true, .. }));
        for entry in tree.children(directory) {
            match tree.node(entry.node).map(|node| node.body) {
                Some(Body::Directory { .. }) => {
                    subdirectories += 1;
                    todo.push(entry.node);
                }
                Some(Body::Broken) | None => {
                    if broken.len() < MAX_LISTED {
                        broken.push(path(tree, directory, tree.name(entry)));
                    }
                }
                Some(Body::Regular { .. } | Body::Symlink { .. } | Body::Device { .. } | Body::Fifo) => {
                    if let Some(count) = counts.get_mut(entry.node.at()) {
                        *count += 1;
                    }
                }
            }
        }
        if let Some(count) = counts.get_mut(directory.at()) {
            *count = 2 + subdirectories;
        }
    }
    for (node, count) in tree.nodes.iter_mut().zip(counts) {
        node.nlink = count;
    }
    tree.any_opaque = any_opaque;
    tree.broken = broken.into_boxed_slice();
}

/// Returns the path of the entry called `name` in `directory`. For messages: it looks through each parent's entries.
fn path(tree: &LayerTree, directory: NodeIndex, name: &[u8]) -> Box<[u8]> {
    tree.path(directory).into_iter().chain([name.to_vec()]).collect::<Vec<_>>().join(&b'/').into()
}

#[cfg(test)]
mod tests;
