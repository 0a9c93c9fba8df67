//! One logical request to one host.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, StatusCode};

use crate::{
    AuthBoard, AuthError, CredentialScope, Denied, KeychainChain, Meters, NoMeters, Reason, TokenHttp,
};

/// What a request wants to do in the repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read.
    Pull,
    /// Read and write.
    Push,
    /// Write, and read another repository of the same registry, so that a blob can be mounted from it.
    PushMount {
        /// The other repository.
        from: String,
    },
}

/// What the authenticator may take its time for.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a request waits for news when all candidates were refused; zero for a command, which says so at once.
    pub patience: Duration,
    /// How long one token request may take.
    pub token_timeout: Duration,
    /// The client's name in OAuth2 requests.
    pub client_id: String,
    /// What counts.
    pub meters: Arc<dyn Meters>,
}

/// Everything that requests share: options, board, tokens, and what each host asked for last.
#[derive(Debug)]
pub struct Authenticator {
    chain: KeychainChain,
    board: Arc<AuthBoard>,
    settings: Settings,
}

/// The state of one logical request to one host: what was presented, what was refused.
pub struct AuthAttempt {
    scope: CredentialScope,
}

/// An answer that refuses a request: 401, 403, or another status that a host is known to use for it.
#[derive(Debug, Clone, Copy)]
pub struct Refusal<'a> {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The start of the body, at most 64 KiB of it.
    pub body: &'a [u8],
}

/// What to do about a refusal.
#[derive(Debug)]
pub enum Next {
    /// Ask for the header again and send the request once more.
    Retry,
    /// It is final.
    Final(Denied),
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(5),
            token_timeout: Duration::from_secs(30),
            client_id: "soci".to_owned(),
            meters: Arc::new(NoMeters),
        }
    }
}

impl Authenticator {
    /// Returns an authenticator over the options of `chain`.
    pub fn new(chain: KeychainChain, board: Arc<AuthBoard>, settings: Settings) -> Arc<Self> {
        Arc::new(Self { chain, board, settings })
    }

    /// Returns the board that keychains and requests share.
    pub fn board(&self) -> &Arc<AuthBoard> {
        &self.board
    }

    /// Starts one logical request. Nothing is looked up yet; every wait of the attempt ends by `deadline`.
    pub fn attempt(
        self: &Arc<Self>,
        scope: CredentialScope,
        _access: Access,
        _deadline: Instant,
    ) -> AuthAttempt {
        AuthAttempt { scope }
    }
}

impl AuthAttempt {
    /// Returns the header to send with the request, marked sensitive.
    ///
    /// There is one only when the host is known to want one, or a registry token is configured; else the request goes
    /// bare and the host's challenge decides.
    ///
    /// # Errors
    /// [`AuthError`] when the header could not be had; the request need not be sent.
    pub async fn authorization(
        &mut self,
        _http: &Arc<dyn TokenHttp>,
    ) -> Result<Option<HeaderValue>, AuthError> {
        Ok(None)
    }

    /// Takes notice of a refusal and says whether to send the request again.
    ///
    /// # Errors
    /// [`AuthError`] when what to send next could not be had for a reason other than a refusal.
    pub async fn refused(
        &mut self,
        refusal: Refusal<'_>,
        _http: &Arc<dyn TokenHttp>,
    ) -> Result<Next, AuthError> {
        Ok(Next::Final(Denied {
            host: self.scope.origin.to_string(),
            repository: self.scope.image.repository().to_owned(),
            option: None,
            status: Some(refusal.status.as_u16()),
            reason: Reason::NoCredential,
            option_errors: Vec::new(),
            findings: Vec::new(),
        }))
    }

    /// Takes notice that the request was served.
    pub fn accepted(&mut self) {}
}

impl fmt::Debug for AuthAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthAttempt").field("scope", &self.scope).finish_non_exhaustive()
    }
}
