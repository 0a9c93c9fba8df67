//! Compressed spans against the digests of the zTOC. What fails here is neither cached, served nor logged.

use bytes::Bytes;
use soci_ztoc::{SpanId, SpanTable};

/// Whether `pieces`, one after another, are the compressed bytes of span `id`: their length and their digest.
pub(crate) fn is_genuine(spans: &SpanTable, id: SpanId, pieces: &[Bytes]) -> bool {
    let range = spans.compressed(id);
    let len: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
    if len != range.end.0 - range.start.0 {
        return false;
    }
    let expected = spans.digest(id);
    let mut hasher = expected.hasher();
    pieces.iter().for_each(|piece| hasher.update(piece));
    hasher.finish() == *expected
}
