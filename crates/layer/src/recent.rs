//! The spans that were inflated last, in memory.
//!
//! A reader that asks for the next piece of a span gets a slice of the buffer it was inflated into. The bytes kept are
//! bounded, and everything here is also in the cache on disk unless that is full.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use soci_ztoc::SpanId;

/// Identifies an open layer within this process.
pub(crate) type LayerId = u64;

/// The spans, least recently used first.
#[derive(Debug)]
pub(crate) struct Recent {
    spans: Mutex<VecDeque<(LayerId, SpanId, Bytes)>>,
    most: u64,
}

impl Recent {
    /// Returns a memory of at most `most` bytes.
    pub(crate) fn new(most: u64) -> Self {
        Self { spans: Mutex::default(), most }
    }

    /// Returns the whole span, if it is remembered.
    pub(crate) fn get(&self, layer: LayerId, span: SpanId) -> Option<Bytes> {
        let mut spans = self.spans.lock();
        let at = spans.iter().rposition(|(l, s, _)| (*l, *s) == (layer, span))?;
        let found = spans.remove(at)?;
        let bytes = found.2.clone();
        spans.push_back(found);
        Some(bytes)
    }

    /// Whether the span is remembered.
    pub(crate) fn contains(&self, layer: LayerId, span: SpanId) -> bool {
        self.spans.lock().iter().any(|(l, s, _)| (*l, *s) == (layer, span))
    }

    /// Remembers a span; others are forgotten to make room. A span larger than the memory is not remembered.
    pub(crate) fn insert(&self, layer: LayerId, span: SpanId, bytes: Bytes) {
        let mut spans = self.spans.lock();
        let mut forgotten: Vec<_> = Vec::new();
        if let Some(at) = spans.iter().position(|(l, s, _)| (*l, *s) == (layer, span)) {
            forgotten.extend(spans.remove(at));
        }
        if bytes.len() as u64 <= self.most {
            spans.push_back((layer, span, bytes));
        }
        let mut total: u64 = spans.iter().map(|(_, _, bytes)| bytes.len() as u64).sum();
        while total > self.most {
            let Some(oldest) = spans.pop_front() else { break };
            total -= oldest.2.len() as u64;
            forgotten.push(oldest);
        }
        // Buffers go back to their list after the lock is released.
        drop(spans);
        drop(forgotten);
    }

    /// Forgets the spans of one layer.
    pub(crate) fn forget(&self, layer: LayerId) {
        self.spans.lock().retain(|(l, ..)| *l != layer);
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.spans.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_is_forgotten_first() {
        let recent = Recent::new(10);
        let bytes = Bytes::from_static(b"1234");
        recent.insert(1, SpanId(0), bytes.clone());
        recent.insert(1, SpanId(1), bytes.clone());
        assert!(recent.get(1, SpanId(0)).is_some());
        recent.insert(2, SpanId(0), bytes.clone());
        assert!(!recent.contains(1, SpanId(1)) && recent.contains(1, SpanId(0)));
        recent.insert(1, SpanId(9), Bytes::from_static(b"larger than all"));
        assert!(!recent.contains(1, SpanId(9)) && recent.contains(2, SpanId(0)));
        recent.forget(1);
        assert!(!recent.contains(1, SpanId(0)) && recent.contains(2, SpanId(0)));
    }
}
