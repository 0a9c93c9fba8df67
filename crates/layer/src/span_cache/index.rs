//! What the span cache holds, in memory: sizes and last uses.

use std::collections::{BTreeMap, HashMap};

use soci_oci::{Digest, FetchClass};
use soci_ztoc::SpanId;

use super::SpanKey;
use crate::slot::SpanForm;

/// The entries of all layers. A tick counts uses.
#[derive(Debug, Default)]
pub(super) struct CacheIndex {
    layers: BTreeMap<Digest, HashMap<(SpanId, SpanForm), Known>>,
    total: u64,
    tick: u64,
    /// Bytes of entries that are being written.
    pub(super) coming: u64,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    bytes: u64,
    /// The tick of its last use, or [`UNASKED`].
    used: u64,
}

/// Stands for the last use of what nobody asked for: before all others.
const UNASKED: u64 = 0;

impl CacheIndex {
    /// Adds an entry, or replaces it: as just used, or as one that nobody asked for yet, which goes before all that were
    /// used.
    pub(super) fn insert(&mut self, key: &SpanKey, bytes: u64, asked_for: bool) {
        self.tick += 1;
        let known = Known { bytes, used: if asked_for { self.tick } else { UNASKED } };
        let old = self.layers.entry(key.ztoc).or_default().insert((key.span, key.form), known);
        self.total = self.total + bytes - old.map_or(0, |old| old.bytes);
    }

    /// Forgets an entry.
    pub(super) fn remove(&mut self, key: &SpanKey) {
        let Some(layer) = self.layers.get_mut(&key.ztoc) else { return };
        if let Some(old) = layer.remove(&(key.span, key.form)) {
            self.total -= old.bytes;
        }
        if layer.is_empty() {
            self.layers.remove(&key.ztoc);
        }
    }

    /// Forgets a layer.
    pub(super) fn remove_layer(&mut self, ztoc: &Digest) {
        if let Some(layer) = self.layers.remove(ztoc) {
            self.total -= layer.values().map(|known| known.bytes).sum::<u64>();
        }
    }

    pub(super) fn contains(&self, key: &SpanKey) -> bool {
        self.layers.get(&key.ztoc).is_some_and(|layer| layer.contains_key(&(key.span, key.form)))
    }

    /// Marks an entry as just used. Returns whether it is there.
    pub(super) fn touch(&mut self, key: &SpanKey) -> bool {
        self.tick += 1;
        let known = self.layers.get_mut(&key.ztoc).and_then(|layer| layer.get_mut(&(key.span, key.form)));
        match known {
            Some(known) => {
                known.used = self.tick;
                true
            }
            None => false,
        }
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Returns the bytes of a layer and how many entries they are in.
    pub(super) fn layer_total(&self, ztoc: &Digest) -> (u64, u64) {
        let total = |layer: &HashMap<_, Known>| layer.values().map(|known| known.bytes).sum();
        self.layers.get(ztoc).map_or((0, 0), |layer| (total(layer), layer.len() as u64))
    }

    pub(super) fn spans(&self, ztoc: &Digest) -> Vec<SpanId> {
        let mut spans: Vec<_> =
            self.layers.get(ztoc).into_iter().flat_map(|layer| layer.keys().map(|(span, _)| *span)).collect();
        spans.sort_unstable();
        spans.dedup();
        spans
    }

    pub(super) fn layers(&self) -> Vec<Digest> {
        self.layers.keys().copied().collect()
    }

    /// Returns the bytes of entries that nobody asked for.
    pub(super) fn unasked(&self) -> u64 {
        let all = self.layers.values().flat_map(HashMap::values);
        all.filter(|known| known.used == UNASKED).map(|known| known.bytes).sum()
    }

    /// Returns entries, least recently used first, that may go for `class` and together hold at least `bytes`; fewer when
    /// `held` ones are in the way.
    pub(super) fn victims(
        &self,
        bytes: u64,
        class: FetchClass,
        held: impl Fn(&SpanKey) -> bool,
    ) -> Vec<SpanKey> {
        let mut all: Vec<(u64, u64, SpanKey)> = self
            .layers
            .iter()
            .flat_map(|(ztoc, layer)| {
                layer.iter().map(|(&(span, form), known)| {
                    (known.used, known.bytes, SpanKey { ztoc: *ztoc, span, form })
                })
            })
            .collect();
        all.sort_unstable_by_key(|(used, ..)| *used);
        let mut freed = 0;
        let mut victims = Vec::new();
        for (used, size, key) in all {
            if freed >= bytes {
                break;
            }
            if class <= FetchClass::Prefetch && used != UNASKED {
                break;
            }
            if !held(&key) {
                freed += size;
                victims.push(key);
            }
        }
        victims
    }
}
