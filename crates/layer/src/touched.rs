//! Which spans readers touched: the last few, which tell where they will go on, and how much it is in all.

use std::collections::VecDeque;

use soci_ztoc::SpanId;

/// Places that are remembered in order.
const LATEST: usize = 16;

/// What readers of a layer touched since it was opened.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// The latest last.
    latest: VecDeque<SpanId>,
    /// A bit per span; as long as is needed.
    seen: Vec<u64>,
    /// Compressed bytes of the spans with a bit.
    bytes: u64,
}

impl Touched {
    /// Notes a read of the spans `first` to `last`, both included; `len` tells the size of one.
    pub(crate) fn note(&mut self, first: SpanId, last: SpanId, len: impl Fn(SpanId) -> u64) {
        if self.latest.back() != Some(&last) {
            if self.latest.len() == LATEST {
                self.latest.pop_front();
            }
            self.latest.push_back(last);
        }
        let words = last.0 as usize / 64 + 1;
        if self.seen.len() < words {
            self.seen.resize(words, 0);
        }
        for span in first.0..=last.0 {
            let (word, bit) = (span as usize / 64, 1_u64 << (span % 64));
            if let Some(word) = self.seen.get_mut(word)
                && *word & bit == 0
            {
                *word |= bit;
                self.bytes += len(SpanId(span));
            }
        }
    }

    /// Returns the places touched last, the latest first.
    pub(crate) fn latest(&self) -> Vec<SpanId> {
        self.latest.iter().rev().copied().collect()
    }

    /// Returns the compressed bytes of all spans that were touched, each counted once.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_span_counts_once() {
        let mut touched = Touched::default();
        let len = |span: SpanId| u64::from(span.0) + 1;
        touched.note(SpanId(1), SpanId(2), len);
        assert_eq!(touched.bytes(), 5);
        touched.note(SpanId(0), SpanId(2), len);
        assert_eq!(touched.bytes(), 6);
        touched.note(SpanId(130), SpanId(130), len);
        assert_eq!(touched.bytes(), 137);
        touched.note(SpanId(130), SpanId(130), len);
        assert_eq!((touched.bytes(), touched.latest()), (137, vec![SpanId(130), SpanId(2)]));
    }

    #[test]
    fn the_oldest_place_is_forgotten() {
        let mut touched = Touched::default();
        (0..100).for_each(|span| touched.note(SpanId(span), SpanId(span), |_| 1));
        let latest = touched.latest();
        assert_eq!((latest.len(), latest[0], touched.bytes()), (LATEST, SpanId(99), 100));
    }
}
