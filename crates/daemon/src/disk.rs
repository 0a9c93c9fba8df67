//! What the state directory's file system has no room for.
//!
//! A daemon must start on a full disk: removing snapshots, which makes room, goes through it. So whatever a start writes
//! for later is left out when there is no room, and made when it is needed.

pub use soci_layer::is_full;
