//! Why a read failed.
//!
//! One failed fetch ends many reads: whoever waits for the same span gets the same error, so it is cheap to clone. The
//! kind is all that a caller decides on; the text is for a person. Nothing here holds a secret, since the messages of
//! [`FetchError`] hold none.

use std::fmt;
use std::sync::Arc;

use soci_oci::{FetchError, FetchErrorKind};

/// What a caller of a read can do about its failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReadErrorKind {
    /// The deadline of the read passed. What was on its way goes on and may serve the next read.
    TimedOut,
    /// Every credential was refused at every source, or none was found where one is needed.
    Denied,
    /// No source has the content.
    NotFound,
    /// The network or the other side failed: a later read may succeed.
    Unavailable,
    /// The bytes are not those that the zTOC promises, from a fresh location too.
    Integrity,
    /// This machine failed: disk, memory, permissions.
    Local,
    /// The range lies outside the archive.
    OutOfBounds,
    /// The layer was closed while the read waited.
    Closed,
}

/// A read that failed. The message says what was read and why that failed; [`std::error::Error::source`] says more.
#[derive(Clone)]
pub struct ReadError(Arc<Inner>);

struct Inner {
    kind: ReadErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ReadError {
    /// Returns an error of `kind` that says `message`.
    pub fn new(kind: ReadErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: None }))
    }

    /// Returns an error of `kind` that says what was being done, because of `source`.
    pub fn because(
        kind: ReadErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: Some(source.into()) }))
    }

    /// Returns the error of a read that needed `what`, which could not be fetched.
    pub fn fetch(what: impl Into<String>, error: FetchError) -> Self {
        let kind = match error.kind() {
            FetchErrorKind::NotFound => ReadErrorKind::NotFound,
            FetchErrorKind::Denied => ReadErrorKind::Denied,
            FetchErrorKind::Unavailable | FetchErrorKind::Protocol => ReadErrorKind::Unavailable,
            FetchErrorKind::Integrity => ReadErrorKind::Integrity,
            FetchErrorKind::Local => ReadErrorKind::Local,
        };
        Self::because(kind, what, error)
    }

    /// Returns what can be done about it.
    pub fn kind(&self) -> ReadErrorKind {
        self.0.kind
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.0.message)?;
        match &self.0.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_refused_credential_stays_distinguishable() {
        let denied = FetchError::new(FetchErrorKind::Denied, "reg.example/app: 401, tried docker-config");
        let error = ReadError::fetch("span 3 of sha256:00", denied);
        assert_eq!(error.kind(), ReadErrorKind::Denied);
        assert_eq!(error.to_string(), "span 3 of sha256:00");
        assert_eq!(error.source().unwrap().to_string(), "reg.example/app: 401, tried docker-config");
    }
}
