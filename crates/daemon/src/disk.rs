//! What the state directory's file system has no room for.
//!
//! A daemon must start on a full disk: removing snapshots, which makes room, goes through it. So whatever a start writes
//! for later is left out when there is no room, and made when it is needed. A first start has nothing yet that could be
//! removed, and what it makes is what all the rest stands on: it fails and says where room is wanted.

use std::io;
use std::path::Path;

pub use soci_layer::is_full;

/// Adds to an error about the state beneath `root` what an operator does about it: where the file system is full, or nothing
/// can be written to it.
pub fn advised(root: &Path, error: anyhow::Error) -> anyhow::Error {
    let cause = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    let advice = match cause {
        Some(cause) if is_full(cause) => {
            "has no room: free space or inodes of its file system, or use another --root"
        }
        Some(cause) if cause.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            "must be on a file system that can be written to: mount it so, or use another --root"
        }
        _ => return error,
    };
    error.context(format!("root directory {root:?} {advice}"))
}
