//! From an image reference to an `Authorization` header: keychains, chain, challenges, token cache.
//!
//! How a request uses it: [`Authenticator::attempt`] gives an [`AuthAttempt`] for one logical request to one host. It is
//! asked for a header before each sending, told when the answer is a refusal, and told when the request was served.
//!
//! Which credential is used, in this order:
//!
//! | question | answer |
//! | --- | --- |
//! | which option? | the first [keychain](Keychain) in the [chain](KeychainChain) that has a candidate; never another one while that has any, refused or not |
//! | which candidate? | the first one that was not refused in this request and does not rest after a refusal |
//! | how? | as the host's challenge wants it: Basic, or a token from its realm, if the [policy] allows that realm |
//! | refused? | a new token once; then all options anew from the first one; then the next candidate; then wait for news |
//!
//! Only keychains open files, only helpers start processes, and no socket is opened here: the registry crate lends its
//! client as [`TokenHttp`].

pub mod attempt;
pub mod board;
pub mod chain;
pub mod challenge;
pub mod children;
pub mod credential;
pub mod denied;
pub mod exchange;
pub mod explain;
#[doc(hidden)]
pub mod fuzzing;
pub mod keychain;
pub mod meters;
pub mod origin;
pub mod policy;
pub mod quirks;
pub mod redact;
pub mod secret;
pub mod token_http;

mod flight;
mod json;
mod known_hosts;
mod scopes;
#[cfg(test)]
mod testing;
mod token_cache;

pub use attempt::{Access, AuthAttempt, Authenticator, Next, Refusal, Settings};
pub use board::AuthBoard;
pub use chain::KeychainChain;
pub use credential::{Credential, Fingerprint};
pub use denied::{AuthError, Denied, Reason};
pub use keychain::{Candidate, CandidateId, Finding, Keychain, KeychainError, Lookup, Outcome, Rejected};
pub use meters::{Meters, NoMeters};
pub use origin::{CredentialScope, Origin, Scheme};
pub use secret::Secret;
pub use token_http::{MAX_ANSWER, TokenHttp, TokenHttpError};
