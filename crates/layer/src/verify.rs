//! Compressed spans against the digests of the zTOC. What fails here is neither cached, served nor logged.

use soci_oci::Hasher;
use soci_ztoc::{SpanId, SpanTable};

/// Whether `bytes` are the compressed bytes of span `id`: their length and their digest.
pub(crate) fn is_genuine(spans: &SpanTable, id: SpanId, bytes: &[u8]) -> bool {
    completes(spans.digest(id).hasher(), spans, id, bytes, 0)
}

/// As [`is_genuine`], of bytes whose first `hashed` went into `hasher` before.
pub(crate) fn completes(
    mut hasher: Hasher,
    spans: &SpanTable,
    id: SpanId,
    bytes: &[u8],
    hashed: usize,
) -> bool {
    let range = spans.compressed(id);
    let Some(rest) = bytes.get(hashed..) else { return false };
    bytes.len() as u64 == range.end.0 - range.start.0 && {
        hasher.update(rest);
        hasher.finish() == *spans.digest(id)
    }
}
