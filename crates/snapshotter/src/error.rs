//! What a caller is told when an operation fails.

use std::fmt;
use std::sync::Arc;

use soci_oci::with_causes;

/// containerd's classes of errors; each is one gRPC status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// The snapshot or its parent does not exist.
    NotFound,
    /// The name is taken, or the target of an extraction is there already: containerd takes that for success.
    AlreadyExists,
    /// The request cannot be right whatever the state.
    InvalidArgument,
    /// The request does not fit the state of the snapshot.
    FailedPrecondition,
    /// Something needed is missing for now; later may help.
    Unavailable,
    /// This snapshotter does not do that.
    Unimplemented,
    /// This machine failed.
    Internal,
}

/// A failed operation. Cheap to clone, since all who wait for one Prepare get its error.
#[derive(Clone)]
pub struct Error {
    code: Code,
    message: Arc<str>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Returns an error of class `code` that says `message`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into().into(), source: None }
    }

    /// Returns an error of class `code` that says what was being done, because of `source`.
    pub fn because(
        code: Code,
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { code, message: message.into().into(), source: Some(Arc::new(source)) }
    }

    /// Returns the class.
    pub fn code(&self) -> Code {
        self.code
    }

    pub(crate) fn not_found(name: &str) -> Self {
        Self::new(Code::NotFound, format!("snapshot {name:?} does not exist: not found"))
    }

    pub(crate) fn exists(name: &str) -> Self {
        Self::new(Code::AlreadyExists, format!("snapshot {name:?}: already exists"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.code, with_causes(self))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
