//! Compressed spans against the digests of the zTOC. What fails here is neither cached, served nor logged.

use soci_ztoc::{SpanId, SpanTable};

/// Whether `bytes` are the compressed bytes of span `id`: their length and their digest.
pub(crate) fn is_genuine(spans: &SpanTable, id: SpanId, bytes: &[u8]) -> bool {
    let range = spans.compressed(id);
    bytes.len() as u64 == range.end.0 - range.start.0 && spans.digest(id).verifies(bytes)
}
