//! Directories while a tree is built: found along symbolic links, and made where a name only implies them.

use soci_layer::unpack::DirAttr;

use super::{Builder, TreeError};
use crate::attr::file_type;
use crate::tree::{Body, Node, NodeIndex, XattrSet};
use crate::{overlay, path};

/// Symbolic links followed to find one parent directory, as Linux limits it.
const MAX_FOLLOWS: u32 = 40;
/// Symbolic links followed to find parents in the whole tree, so that a hostile layer cannot buy time.
const MAX_ALL_FOLLOWS: u32 = 100_000;
/// Limits of Linux on an extended attribute.
const MAX_XATTR_NAME: usize = 255;
const MAX_XATTR_VALUE: usize = 64 << 10;

/// What finding a directory does where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    IsMade,
    Fails,
}

impl<'a> Builder<'a, '_> {
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
    pub(super) fn imply(&mut self, parent: NodeIndex, name: &'a [u8]) -> Result<NodeIndex, TreeError> {
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

    pub(super) fn xattr_set<'x>(&mut self, xattrs: impl Iterator<Item = (&'x [u8], &'x [u8])>) -> u32 {
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
    pub(super) fn directory(
        &mut self,
        path: &'a [u8],
        make: Missing,
    ) -> Result<Option<NodeIndex>, TreeError> {
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
}
