//! Why no zTOC can be built for a layer.

use crate::error::ZtocError;
use crate::tar::{TarError, TarFault};

/// A layer that no zTOC can be built for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The span size cannot be used.
    #[error("span size {span_size}: {reason}")]
    SpanSize {
        /// As given.
        span_size: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The layer is not gzip though its media type says so.
    #[error("layer is not gzip but {found}")]
    NotGzip {
        /// What it looks like.
        found: &'static str,
    },
    /// The gzip data are corrupt.
    #[error("gzip data before byte {at} of the layer are corrupt: {what}")]
    Corrupt {
        /// Compressed position the decoder had reached.
        at: u64,
        /// The decoder's word.
        what: &'static str,
    },
    /// After the last gzip member comes something that is no gzip member.
    #[error("byte {at} of the layer follows a gzip member but begins no other")]
    Trailing {
        /// Compressed position of it.
        at: u64,
    },
    /// The layer ends inside a gzip member.
    #[error("layer ends after {at} bytes, in the middle of its gzip data")]
    Truncated {
        /// Size of the layer.
        at: u64,
    },
    /// The tar inside cannot be read or represented.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The tar has a PAX header for all members that follow, which a zTOC cannot express.
    #[error("tar at byte {at}: global pax headers cannot be represented in a ztoc")]
    GlobalPax {
        /// Position in the uncompressed tar.
        at: u64,
    },
    /// The layer has no byte.
    #[error("layer is empty")]
    Empty,
    /// The zTOC would be too large.
    #[error("ztoc would be larger than {limit} bytes; use a larger span size than {span_size} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
        /// The span size asked for.
        span_size: u64,
    },
    /// The zTOC would break a rule that readers enforce, for instance by a name that leaves the root directory.
    #[error("layer cannot be represented: {0}")]
    Unrepresentable(#[from] ZtocError),
    /// No memory for the decoder.
    #[error("out of memory")]
    Memory,
    /// The thread that hashes is gone.
    #[error("hashing thread ended early")]
    Hashing,
}

impl BuildError {
    /// Whether the layer is sound but of a form that zTOCs cannot describe, so that it is to be skipped with this reason;
    /// otherwise it is damaged, or the caller or the machine is at fault.
    pub fn is_unindexable(&self) -> bool {
        match self {
            Self::NotGzip { .. } | Self::GlobalPax { .. } | Self::Empty | Self::Unrepresentable(_) => true,
            Self::Tar(error) => matches!(error.fault, TarFault::Sparse | TarFault::Kind(_)),
            _ => false,
        }
    }
}
