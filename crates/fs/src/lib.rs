//! The read-only layer file system and its FUSE session.
