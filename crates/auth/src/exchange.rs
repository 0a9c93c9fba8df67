//! From a credential to a token: the two token protocols.

/// Why there is no token. Messages name the realm's host, never a query or a body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// No answer.
    #[error("asking {realm}")]
    Transport {
        /// The realm, without query.
        realm: String,
        /// What the transport said.
        source: crate::TokenHttpError,
    },
}
