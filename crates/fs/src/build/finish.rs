//! From the builder's maps to the arena: entries sorted by directory and name, links counted.

use super::{Builder, TreeError};
use crate::tree::{Body, DirEntry, LayerTree, NodeIndex};

/// Broken links that are listed by name.
const MAX_LISTED: usize = 100;

impl Builder<'_, '_> {
    pub(super) fn finish(mut self) -> Result<LayerTree, TreeError> {
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
