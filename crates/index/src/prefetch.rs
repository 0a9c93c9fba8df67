//! Prefetch artifacts: which spans of a layer are wanted before anything asks for them.

pub(crate) mod create;

use serde::{Deserialize, Serialize};
use soci_oci::{Descriptor, Digest, annotation, go_json, media_type};

/// The version this program writes, and the only one it reads.
pub const VERSION: &str = "1.0";

/// The content of a prefetch artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefetch {
    /// Always [`VERSION`].
    pub version: String,
    /// Ranges of spans; any order, possibly overlapping where others wrote them.
    pub prefetch_spans: Vec<SpanRange>,
}

/// A range of spans, both ends inclusive. As decoded, ends may be negative or in the wrong order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpanRange {
    /// First span.
    #[serde(default)]
    pub start_span: i32,
    /// Last span.
    #[serde(default)]
    pub end_span: i32,
    /// Lower is earlier; reserved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i64,
}

fn is_zero(priority: &i64) -> bool {
    *priority == 0
}

/// A prefetch artifact that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PrefetchError {
    /// Not the JSON of one.
    #[error("malformed prefetch artifact")]
    Malformed(#[source] serde_json::Error),
    /// Of another version.
    #[error("unsupported prefetch artifact version {0:?}")]
    Version(String),
    /// Without spans.
    #[error("prefetch artifact is empty")]
    Empty,
    /// With spans that the layer has not.
    #[error("prefetch range of spans {start} to {end} is outside of the layer's {spans} spans")]
    Range {
        /// First span of the range.
        start: i32,
        /// Last span of the range.
        end: i32,
        /// How many spans the layer has.
        spans: u32,
    },
}

impl SpanRange {
    /// Returns the spans from `start` to `end`, both inclusive.
    pub fn new(start: i32, end: i32) -> Self {
        Self { start_span: start, end_span: end, priority: 0 }
    }

    /// Returns how many spans it covers; zero when its ends are in the wrong order.
    pub fn len(&self) -> u64 {
        let len = i64::from(self.end_span) - i64::from(self.start_span) + 1;
        u64::try_from(len).unwrap_or(0)
    }

    /// Whether it covers no span.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Prefetch {
    /// Decodes an artifact. Its ranges are as they were written; see [`spans`](Self::spans).
    ///
    /// # Errors
    /// When it is malformed, of another version, or empty.
    pub fn decode(bytes: &[u8]) -> Result<Self, PrefetchError> {
        let prefetch: Self = serde_json::from_slice(bytes).map_err(PrefetchError::Malformed)?;
        if prefetch.version != VERSION {
            return Err(PrefetchError::Version(prefetch.version.chars().take(40).collect()));
        }
        if prefetch.prefetch_spans.is_empty() {
            return Err(PrefetchError::Empty);
        }
        Ok(prefetch)
    }

    /// Returns the artifact of these ranges: sorted, those that overlap or adjoin made one. `None` when there are none.
    pub fn of(mut ranges: Vec<SpanRange>) -> Option<Self> {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_by_key(|range| (range.start_span, range.end_span));
        let mut merged: Vec<SpanRange> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start_span <= last.end_span.saturating_add(1) => {
                    last.end_span = last.end_span.max(range.end_span);
                }
                _ => merged.push(range),
            }
        }
        (!merged.is_empty()).then(|| Self { version: VERSION.to_owned(), prefetch_spans: merged })
    }

    /// Returns its bytes, as the Go tools write them.
    pub fn encode(&self) -> Vec<u8> {
        go_json::to_vec(self).expect("a prefetch artifact has string keys only")
    }

    /// Returns the descriptor of `bytes`, an encoded artifact, for the index of `layer`'s image.
    pub fn descriptor(bytes: &[u8], layer: &Digest) -> Descriptor {
        let mut descriptor = Descriptor::of(media_type::SOCI_PREFETCH, bytes);
        descriptor.annotations.insert(annotation::LAYER_DIGEST.to_owned(), layer.to_string());
        descriptor
    }

    /// Returns the half-open ranges of span ids in a layer of `spans` spans: sorted, disjoint, each inside the layer.
    ///
    /// # Errors
    /// [`PrefetchError::Range`] when any range is not inside the layer: then none of it can be trusted.
    pub fn spans(&self, spans: u32) -> Result<Vec<std::ops::Range<u32>>, PrefetchError> {
        let mut checked = Vec::with_capacity(self.prefetch_spans.len());
        for range in &self.prefetch_spans {
            let outside = PrefetchError::Range { start: range.start_span, end: range.end_span, spans };
            match (u32::try_from(range.start_span), u32::try_from(range.end_span)) {
                (Ok(start), Ok(end)) if start <= end && end < spans => checked.push(*range),
                _ => return Err(outside),
            }
        }
        let merged = Self::of(checked).map(|prefetch| prefetch.prefetch_spans).unwrap_or_default();
        let half_open = |range: SpanRange| {
            let start = u32::try_from(range.start_span).unwrap_or(0);
            start..u32::try_from(range.end_span).unwrap_or(0).saturating_add(1)
        };
        Ok(merged.into_iter().map(half_open).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_or_adjoin_become_one() {
        let ranges =
            [(9, 9), (2, 5), (3, 4), (6, 6), (0, 0), (1, -1)].map(|(start, end)| SpanRange::new(start, end));
        let prefetch = Prefetch::of(ranges.to_vec()).unwrap();
        assert_eq!(
            String::from_utf8(prefetch.encode()).unwrap(),
            "{\"version\":\"1.0\",\"prefetch_spans\":[{\"start_span\":0,\"end_span\":0},{\"start_span\":2,\
             \"end_span\":6},{\"start_span\":9,\"end_span\":9}]}"
        );
        assert_eq!(Prefetch::decode(&prefetch.encode()).unwrap(), prefetch);
        assert_eq!(Prefetch::of(Vec::new()), None);
    }

    #[test]
    fn a_priority_is_kept() {
        let text =
            b"{\"version\":\"1.0\",\"prefetch_spans\":[{\"start_span\":1,\"end_span\":2,\"priority\":-3}]}";
        let prefetch = Prefetch::decode(text).unwrap();
        assert_eq!(prefetch.prefetch_spans[0].priority, -3);
        assert_eq!(prefetch.encode(), text);
    }

    #[test]
    fn hostile_spans_are_refused() {
        for (start, end) in [(-1, 0), (0, i32::MAX), (3, 2), (0, 10), (i32::MIN, i32::MAX)] {
            let prefetch =
                Prefetch { version: VERSION.into(), prefetch_spans: vec![SpanRange::new(start, end)] };
            assert!(matches!(prefetch.spans(10), Err(PrefetchError::Range { .. })), "{start} {end}");
        }
        let prefetch = Prefetch {
            version: VERSION.into(),
            prefetch_spans: vec![SpanRange::new(4, 9), SpanRange::new(0, 0), SpanRange::new(4, 5)],
        };
        assert_eq!(prefetch.spans(10).unwrap(), [0..1, 4..10]);
    }

    #[test]
    fn other_versions_and_empty_ones_are_refused() {
        let error = |text: &str| Prefetch::decode(text.as_bytes()).unwrap_err().to_string();
        assert!(
            error("{\"version\":\"2.0\",\"prefetch_spans\":[]}")
                .contains("unsupported prefetch artifact version")
        );
        assert_eq!(error("{\"version\":\"1.0\",\"prefetch_spans\":[]}"), "prefetch artifact is empty");
        assert_eq!(error("{\"version\":\"1.0\"}"), "malformed prefetch artifact");
        assert_eq!(
            error("{\"version\":\"1.0\",\"prefetch_spans\":[{\"start_span\":9999999999}]}"),
            "malformed prefetch artifact"
        );
    }
}
