//! Why a layer cannot be unpacked.

use soci_oci::Digest;
use soci_ztoc::tar::TarError;

use super::BelowError;
use crate::ReadError;

/// A layer that cannot be unpacked. What was written so far is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// Its bytes cannot be had.
    #[error("reading the layer to unpack")]
    Read(#[from] ReadError),
    /// It is no tar, or one that this machine cannot represent.
    #[error("parsing the layer to unpack")]
    Tar(#[from] TarError),
    /// A name that cannot be unpacked.
    #[error("{path:?}: {reason}")]
    Name {
        /// The name in the tar.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// The bytes are not those of the image.
    #[error(
        "the layer unpacks to {got}, the image says {expected}; the blob and the image do not belong together"
    )]
    DiffId {
        /// What the image's configuration says.
        expected: Box<Digest>,
        /// What came out.
        got: Box<Digest>,
    },
    /// A file cannot be made.
    #[error("{what} {path:?}")]
    File {
        /// What was being done.
        what: &'static str,
        /// The name in the layer.
        path: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The layers below cannot be asked.
    #[error("unpacking a layer")]
    Below(#[from] BelowError),
    /// The thread that writes has ended without an answer.
    #[error("the unpacking thread ended early")]
    Thread,
}
