//! What the state directory's file system has no room for.
//!
//! A daemon must start on a full disk: removing snapshots, which makes room, goes through it. So whatever a start writes
//! for later is left out when there is no room, and made when it is needed.

use std::io;

/// Whether the disk, its inodes or a quota are used up.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
