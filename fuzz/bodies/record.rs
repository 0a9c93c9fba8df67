//! What the fuzz target of the snapshots' records does with its input, so that an ordinary test replays its corpus.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test")]

use soci_oci::Digest;
use soci_snapshotter::records;

/// Decodes `data` as a record, and as the content of one whose digest is right: past the digest nothing may be taken for
/// granted either, since another version may have written it. What decodes is the same again after it was written.
pub fn snapshot_record(data: &[u8]) {
    let _ = records::decode(data);
    let header = format!("soci-snapshot 1 {}\n", Digest::of(data));
    let Ok(record) = records::decode(&[header.as_bytes(), data, b"\n"].concat()) else { return };
    assert_eq!(records::decode(&records::encode(&record)).unwrap(), record);
    let info = record.info();
    assert!(info.created >= std::time::UNIX_EPOCH && info.updated >= std::time::UNIX_EPOCH);
}
