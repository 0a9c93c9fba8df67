//! How a token request reaches the network: the registry crate lends its client, this crate opens no socket.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

/// Sends a token request.
///
/// The implementer follows no redirect to another origin, checks the address that it connects to with
/// [`policy::check_address`](crate::policy::check_address) when the realm is on another host than the registry, and
/// caps the body at [`MAX_ANSWER`] bytes. It never logs headers or body.
#[async_trait]
pub trait TokenHttp: Send + Sync {
    /// Sends `request`, returns the answer whatever its status.
    ///
    /// # Errors
    /// [`TokenHttpError`] when there is no answer.
    async fn send(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, TokenHttpError>;

    /// Returns the same for requests that outlive the one on whose behalf it was lent, where that is possible: tokens are
    /// renewed by it ahead of need.
    fn detached(self: Arc<Self>) -> Option<Arc<dyn TokenHttp>> {
        None
    }
}

/// The longest answer of a token endpoint that is read, in bytes.
pub const MAX_ANSWER: usize = 128 * 1024;

/// A token request without an answer. The message holds neither userinfo nor query values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TokenHttpError(pub String);
