//! What each kind of entry does to the tree: makes a node, replaces one, hides a name, marks a directory.

use std::collections::hash_map::Entry as Slot;

use soci_ztoc::{EntryKind, UncompressedOffset};

use super::directories::Missing;
use super::{Builder, TreeError, lossy, split, trim_dots};
use crate::attr::file_type;
use crate::header_check::{self, Member};
use crate::overlay::{self, Meaning};
use crate::path;
use crate::tree::{Body, Node, NodeIndex};

/// Longest target of a symbolic link that Linux has.
const MAX_TARGET: usize = 4095;

impl<'a> Builder<'a, '_> {
    pub(super) fn add(&mut self, member: &Member<'a>) -> Result<(), TreeError> {
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
}

/// Returns what a node of `kind` has from its entry.
pub(super) fn plain(member: &Member<'_>, kind: u32) -> Node {
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
