//! From paths inside an image to spans of its layers.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use soci_oci::Digest;
use soci_ztoc::{EntryKind, SpanTable, Ztoc};

use super::{Prefetch, SpanRange};
use crate::build::Observer;

/// Links that are followed for one path, as Linux does.
const MAX_LINKS: usize = 40;
/// Marks a file of the layers below as removed.
const WHITEOUT: &[u8] = b".wh.";
/// Marks a directory of the layers below as removed.
const OPAQUE: &[u8] = b".wh..wh..opq";

type Path = Vec<Vec<u8>>;

/// The layers of an image that have a zTOC, lowest first.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    digest: Digest,
    spans: std::sync::Arc<SpanTable>,
    files: HashMap<Path, File>,
    removed: HashSet<Path>,
    opaque: HashSet<Path>,
}

#[derive(Debug, Clone)]
struct File {
    kind: EntryKind,
    link: Vec<u8>,
    start: soci_ztoc::UncompressedOffset,
    /// Of the last byte: of the data, or of the header where there is none.
    last: soci_ztoc::UncompressedOffset,
}

impl Layers {
    /// Adds the next layer upwards.
    pub(crate) fn push(&mut self, digest: Digest, ztoc: &Ztoc) {
        let mut layer = Layer {
            digest,
            spans: std::sync::Arc::clone(ztoc.spans()),
            files: HashMap::new(),
            removed: HashSet::new(),
            opaque: HashSet::new(),
        };
        for entry in ztoc.entries() {
            let mut path = clean(entry.name);
            let Some(name) = path.last() else { continue };
            if name == OPAQUE {
                path.pop();
                layer.opaque.insert(path);
            } else if let Some(name) = name.strip_prefix(WHITEOUT) {
                let name = name.to_vec();
                path.pop();
                path.push(name);
                layer.removed.insert(path);
            } else {
                let end = entry.data.0.saturating_add(entry.size).max(entry.data.0);
                let file = File {
                    kind: entry.kind,
                    link: entry.link.to_vec(),
                    start: entry.data,
                    last: soci_ztoc::UncompressedOffset(end.saturating_sub(1).max(entry.data.0)),
                };
                layer.files.insert(path, file);
            }
        }
        self.layers.push(layer);
    }

    /// Returns the regular file that `path` leads to: its layer's position and the file.
    fn find(&self, path: &str) -> Option<(usize, &File)> {
        let mut pending: VecDeque<Vec<u8>> = clean(path.as_bytes()).into();
        let mut at: Path = Vec::new();
        let mut links = 0;
        let mut found = None;
        while let Some(component) = pending.pop_front() {
            if component == b".." {
                at.pop();
                continue;
            }
            at.push(component);
            found = self.visible(&at);
            let Some((_, file)) = found else { continue };
            if file.kind == EntryKind::Symlink {
                links += 1;
                if links > MAX_LINKS {
                    return None;
                }
                at.pop();
                if file.link.starts_with(b"/") {
                    at.clear();
                }
                for component in clean(&file.link).into_iter().rev() {
                    pending.push_front(component);
                }
            }
        }
        let (layer, mut file) = found?;
        while file.kind == EntryKind::HardLink {
            links += 1;
            file = self.layers[layer].files.get(&clean(&file.link)).filter(|_| links <= MAX_LINKS)?;
        }
        (file.kind == EntryKind::Regular).then_some((layer, file))
    }

    /// Returns the topmost entry for exactly `path` that no layer above it hides.
    fn visible(&self, path: &Path) -> Option<(usize, &File)> {
        for (position, layer) in self.layers.iter().enumerate().rev() {
            if let Some(file) = layer.files.get(path) {
                return Some((position, file));
            }
            let hides = |len: usize| {
                let prefix = &path[..len];
                layer.removed.contains(prefix) || (len < path.len() && layer.opaque.contains(prefix))
            };
            if (0..=path.len()).any(hides) {
                return None;
            }
        }
        None
    }
}

/// Splits a path into its components, without empty ones and `.`; `..` stays where it cannot be resolved by name.
fn clean(path: &[u8]) -> Path {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.map(<[u8]>::to_vec).collect()
}

/// Returns the prefetch artifacts for `paths`, with their layers, lowest first. Paths that lead nowhere are warned about.
pub(crate) fn create(images: &Layers, paths: &[String], observer: &dyn Observer) -> Vec<(Digest, Prefetch)> {
    let mut ranges: BTreeMap<usize, Vec<SpanRange>> = BTreeMap::new();
    for path in paths.iter().map(|path| path.trim()).filter(|path| !path.is_empty()) {
        match images.find(path) {
            Some((layer, file)) => {
                let spans = &images.layers[layer].spans;
                let id = |at| i32::try_from(spans.at(at).0).unwrap_or(i32::MAX);
                let range = SpanRange::new(id(file.start), id(file.last));
                ranges.entry(layer).or_default().push(range);
            }
            None => observer.warn(&format!("prefetch file {path} not found in any layer")),
        }
    }
    let merged = |(layer, ranges): (usize, _)| Some((images.layers[layer].digest, Prefetch::of(ranges)?));
    ranges.into_iter().filter_map(merged).collect()
}

#[cfg(test)]
mod tests;
