//! Who is told what the file systems do.

use std::time::Duration;

/// An operation of a layer's file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A name was looked up.
    Lookup,
    /// Attributes were asked for by name.
    Getattr,
    /// Attributes of an open file were asked for.
    GetattrOfFile,
    /// Attributes of a whiteout were asked for.
    GetattrOfWhiteout,
    /// A link was read.
    Readlink,
    /// A file was opened.
    Open,
    /// Content was read.
    Read,
    /// A directory was listed.
    Readdir,
    /// An extended attribute was asked for.
    Getxattr,
    /// Extended attributes were listed.
    Listxattr,
    /// Free space was asked for.
    Statfs,
}

/// Is told of each operation. Called on the threads that answer the kernel: it must be quick and never block.
pub trait FsMeter: Send + Sync + std::fmt::Debug {
    /// An operation took `elapsed`, gave `bytes` of content and, unless `failed`, succeeded. A name that does not exist
    /// is no failure.
    fn operation(&self, operation: Operation, elapsed: Duration, bytes: u64, failed: bool);
}
