//! What can go wrong with local content.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use soci_oci::{Digest, FetchError, FetchErrorKind};

/// An operation on a store that failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory of the soci store.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// containerd does not answer at its socket.
    #[error("cannot reach containerd at {}: {reason}; is it running, and is its address right?", address.display())]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// What the connection said.
        reason: String,
    },
    /// containerd refused a call.
    #[error("containerd: {action} {what}: {message} ({code:?})")]
    Containerd {
        /// What was being done.
        action: &'static str,
        /// To what: a digest, an image name, a lease.
        what: String,
        /// containerd's code.
        code: tonic::Code,
        /// containerd's words.
        message: String,
    },
    /// containerd took longer than a call may.
    #[error("containerd: {action} {what}: no answer within {} s", limit.as_secs())]
    Deadline {
        /// What was being done.
        action: &'static str,
        /// To what.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// The content that should be changed is not in the store.
    #[error("{0}: not found in the content store")]
    NotFound(String),
    /// An image or content of that name exists already.
    #[error("{0}: already exists")]
    Exists(String),
    /// The content's bytes are not those its digest names.
    #[error("{digest}: stored content is corrupt: {found}")]
    Corrupt {
        /// The digest asked for.
        digest: Digest,
        /// What was found in place of it.
        found: String,
    },
    /// Bytes given for storing are not those the descriptor names.
    #[error("{digest}: refusing to store other content: {found}")]
    Mismatch {
        /// The digest of the descriptor.
        digest: Digest,
        /// What was given in place of it.
        found: String,
    },
    /// More bytes than the reader allows.
    #[error("{digest}: content of {size} bytes is over the limit of {limit} bytes")]
    TooLarge {
        /// The digest asked for.
        digest: Digest,
        /// Its size in bytes.
        size: u64,
        /// The reader's limit in bytes.
        limit: u64,
    },
    /// What should be stored could not be read to its end.
    #[error("{digest}: reading the content to store")]
    Source {
        /// The digest of the descriptor.
        digest: Digest,
        /// What the source said.
        #[source]
        source: FetchError,
    },
    /// containerd answered what its protocol does not allow.
    #[error("containerd: {action} {what}: unexpected answer: {found}")]
    Protocol {
        /// What was being done.
        action: &'static str,
        /// To what.
        what: String,
        /// What was wrong with the answer.
        found: String,
    },
    /// A namespace that cannot be sent to containerd.
    #[error("invalid containerd namespace {0:?}")]
    Namespace(String),
}

impl StoreError {
    /// Wraps a failed file operation.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Whether the content is absent, as against unreadable.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
            || matches!(self, Self::Containerd { code: tonic::Code::NotFound, .. })
    }

    /// Returns what a reader of the content can do about it.
    pub fn fetch_kind(&self) -> FetchErrorKind {
        match self {
            Self::NotFound(_) | Self::Containerd { code: tonic::Code::NotFound, .. } => {
                FetchErrorKind::NotFound
            }
            Self::Unreachable { .. } | Self::Deadline { .. } | Self::Containerd { .. } => {
                FetchErrorKind::Unavailable
            }
            Self::Corrupt { .. } | Self::Mismatch { .. } => FetchErrorKind::Integrity,
            Self::Protocol { .. } | Self::TooLarge { .. } => FetchErrorKind::Protocol,
            Self::Source { source, .. } => source.kind(),
            Self::Io { .. } | Self::Exists(_) | Self::Namespace(_) => FetchErrorKind::Local,
        }
    }
}

impl From<StoreError> for FetchError {
    fn from(error: StoreError) -> Self {
        FetchError::because(error.fetch_kind(), "local content", error)
    }
}
