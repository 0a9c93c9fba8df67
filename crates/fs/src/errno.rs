//! Why an operation of the file system failed, and the one number that the kernel is told.

// A new kind of failure is looked at here before it compiles.
#![deny(clippy::wildcard_enum_match_arm)]

use rustix::io::Errno;
use soci_layer::{ReadError, ReadErrorKind};
use thiserror::Error;

use crate::header_check::HeaderError;

/// Why an operation failed.
#[derive(Debug, Error)]
pub enum FsError {
    /// There is no such name.
    #[error("no such file")]
    NoEntry,
    /// The kernel asked for a number that this layer does not have.
    #[error("no file has this inode number")]
    Stale,
    /// A name was looked up in something else than a directory.
    #[error("not a directory")]
    NotDirectory,
    /// Something else than a regular file was opened for reading.
    #[error("not a regular file")]
    NotRegular,
    /// A link was asked of something that is none.
    #[error("not a symbolic link")]
    NotLink,
    /// The name is a hard link to a file that the layer does not have.
    #[error("the layer does not have the file that this hard link leads to")]
    BrokenLink,
    /// The file has no such extended attribute.
    #[error("no such extended attribute")]
    NoXattr,
    /// The caller's buffer is too small for the extended attributes.
    #[error("the buffer is too small")]
    Range,
    /// The layer is served without extended attributes.
    #[error("extended attributes are off")]
    XattrsOff,
    /// Layers never change.
    #[error("the file system is read-only")]
    ReadOnly,
    /// The operation means nothing here.
    #[error("operation not supported")]
    Unsupported,
    /// The kernel's request does not have the form it should.
    #[error("malformed request")]
    Malformed,
    /// The caller got a signal while it waited.
    #[error("interrupted")]
    Interrupted,
    /// The bytes did not arrive in time.
    #[error("no answer in time: see [blob] fetching_timeout_sec")]
    TimedOut,
    /// The layer's bytes cannot be had.
    #[error("cannot read the layer")]
    Read(#[from] ReadError),
    /// Fewer or more bytes came than the file has.
    #[error("{got} bytes came where {want} were asked for")]
    Length {
        /// Bytes asked for.
        want: usize,
        /// Bytes that came.
        got: usize,
    },
    /// The layer does not have this file where the zTOC says it is.
    #[error("the file is not what the zTOC says")]
    Header(#[from] HeaderError),
    /// The local file system could not be asked for its space.
    #[error("cannot ask for the space of the local file system")]
    Statfs(#[source] Errno),
}

impl FsError {
    /// Whether the bytes did not come though nothing is known to be wrong with them or with the credentials.
    pub(crate) fn is_of_time(&self) -> bool {
        let of_time = [ReadErrorKind::TimedOut, ReadErrorKind::Unavailable];
        matches!(self, Self::TimedOut) || matches!(self, Self::Read(error) if of_time.contains(&error.kind()))
    }

    /// Returns the number that the kernel is told.
    pub fn errno(&self) -> Errno {
        match self {
            Self::NoEntry => Errno::NOENT,
            Self::Stale => Errno::STALE,
            Self::NotDirectory => Errno::NOTDIR,
            Self::NotRegular | Self::BrokenLink => Errno::IO,
            Self::NotLink | Self::Malformed => Errno::INVAL,
            Self::NoXattr => Errno::NODATA,
            Self::Range => Errno::RANGE,
            Self::XattrsOff | Self::Unsupported => Errno::NOSYS,
            Self::ReadOnly => Errno::ROFS,
            Self::Interrupted => Errno::INTR,
            Self::TimedOut | Self::Length { .. } | Self::Header(_) => Errno::IO,
            Self::Read(error) => match error.kind() {
                ReadErrorKind::TimedOut
                | ReadErrorKind::Denied
                | ReadErrorKind::NotFound
                | ReadErrorKind::Unavailable
                | ReadErrorKind::Integrity
                | ReadErrorKind::Local
                | ReadErrorKind::OutOfBounds
                | ReadErrorKind::Closed => Errno::IO,
            },
            Self::Statfs(errno) => *errno,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failed_read_is_an_io_error() {
        for kind in [
            ReadErrorKind::TimedOut,
            ReadErrorKind::Denied,
            ReadErrorKind::NotFound,
            ReadErrorKind::Unavailable,
            ReadErrorKind::Integrity,
            ReadErrorKind::Local,
            ReadErrorKind::OutOfBounds,
            ReadErrorKind::Closed,
        ] {
            assert_eq!(FsError::Read(ReadError::new(kind, "x")).errno(), Errno::IO);
        }
    }
}
