//! Hard links: to what is there already, and, once all entries are known, to what came later.

use std::collections::HashMap;

use super::directories::Missing;
use super::entries::plain;
use super::{Builder, TreeError, split, trim_dots};
use crate::header_check::Member;
use crate::path;
use crate::tree::{Body, Node, NodeIndex};

impl<'a> Builder<'a, '_> {
    /// Returns the node that a hard link leads to, or a placeholder until all entries are known.
    pub(super) fn link(&mut self, name: &'a [u8], member: &Member<'a>) -> Result<NodeIndex, TreeError> {
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
    pub(super) fn resolve_links(&mut self) -> Result<HashMap<NodeIndex, NodeIndex>, TreeError> {
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
}
