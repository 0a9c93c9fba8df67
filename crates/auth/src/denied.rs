//! Why a request gets no further for lack of a credential: what an operator reads in the log.
//!
//! Messages name host, repository, the option that supplied the credential, the status, what other options said, and what
//! to do next; never a secret and never a query string.

use std::fmt;
use std::sync::Arc;

use crate::exchange::ExchangeError;
use crate::policy::PolicyError;

/// A request that is refused for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    /// Who refused: `https://host[:port]`.
    pub host: String,
    /// The repository that was asked for.
    pub repository: String,
    /// The option whose credential was refused last; nothing when no option had one.
    pub option: Option<&'static str>,
    /// The entry of that option that it is from.
    pub entry: Option<String>,
    /// The token server, `https://host[:port]`, where that refused and not the registry.
    pub token_server: Option<String>,
    /// The status of the last answer, of the registry or of its token endpoint.
    pub status: Option<u16>,
    /// What happened.
    pub reason: Reason,
    /// Options that could not tell, as `option: why`.
    pub option_errors: Vec<String>,
    /// What the other options said.
    pub findings: Vec<String>,
    /// What a person does so that an option has a credential.
    pub remedy: String,
}

/// What stands behind a [`Denied`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No option has a credential, and the host wants one.
    NoCredential,
    /// Every candidate of the option was refused.
    Refused,
    /// The credential was refused a moment ago and rests before it is tried again.
    Resting,
    /// The credential cannot be presented, for this reason.
    Incomplete(&'static str),
    /// The host refused without a challenge that can be answered.
    NoChallenge,
    /// The host refuses the request although a credential is not the matter.
    NotAuthentication,
    /// The request was sent as often as one may be.
    TooManyAttempts,
}

/// Why there is no `Authorization` header.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuthError {
    /// No credential gets the request any further.
    #[error(transparent)]
    Denied(Denied),
    /// The challenge names a realm to which no credential goes.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The token endpoint could not be asked or did not make sense: later may help.
    #[error("token for {repository} at {host}")]
    Token {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
        /// What went wrong.
        source: Arc<ExchangeError>,
    },
    /// The deadline of the request passed.
    #[error("credentials for {repository} at {host}: the deadline of the request passed")]
    Deadline {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
    },
}

impl AuthError {
    /// Whether trying the same again later may help without anybody changing a credential.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Denied(_) | Self::Policy(_) => false,
            Self::Token { .. } | Self::Deadline { .. } => true,
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, repository, .. } = self;
        let option = match (self.option, &self.entry) {
            (Some(option), Some(entry)) => format!("{option} ({entry})"),
            (option, _) => option.unwrap_or("none").to_owned(),
        };
        let who = match &self.token_server {
            Some(server) => format!("{server}, the token server of {host},"),
            None => host.clone(),
        };
        match self.reason {
            Reason::NoCredential => write!(f, "{who} refuses anonymous access to {repository}")?,
            Reason::Refused => write!(f, "{who} refuses the credential from {option} for {repository}")?,
            Reason::Resting => {
                write!(
                    f,
                    "{host} refused the credential from {option} for {repository} a moment ago, it is not tried again yet"
                )?;
            }
            Reason::Incomplete(why) => write!(f, "incomplete credential from {option} for {host}: {why}")?,
            Reason::NoChallenge => {
                write!(f, "{host} refuses access to {repository} without a challenge that can be answered")?
            }
            Reason::NotAuthentication => write!(f, "{host} refuses the request for {repository}")?,
            Reason::TooManyAttempts => {
                write!(f, "{host} refuses every answer to its challenge for {repository}")?
            }
        }
        if let Some(status) = self.status {
            write!(f, " (status {status})")?;
        }
        if !self.option_errors.is_empty() {
            write!(f, "; {}", self.option_errors.join("; "))?;
        }
        if self.option.is_none() && !self.findings.is_empty() {
            write!(f, "; looked at {}", self.findings.join("; "))?;
        }
        write!(f, "; {}", self.advice())
    }
}

impl Denied {
    /// Returns what to do about it.
    pub fn advice(&self) -> &str {
        match self.reason {
            Reason::NoCredential => &self.remedy,
            Reason::Refused | Reason::Resting | Reason::TooManyAttempts => {
                "renew that credential, or give it the right to this repository"
            }
            Reason::Incomplete(_) => "complete or remove that entry",
            Reason::NoChallenge | Reason::NotAuthentication => {
                "check that the host is a registry that serves this repository"
            }
        }
    }
}

impl Reason {
    /// Returns one word for it.
    pub fn code(self) -> &'static str {
        match self {
            Self::NoCredential => "no-credential",
            Self::Refused => "refused",
            Self::Resting => "resting",
            Self::Incomplete(_) => "incomplete",
            Self::NoChallenge => "no-challenge",
            Self::NotAuthentication => "not-authentication",
            Self::TooManyAttempts => "too-many-attempts",
        }
    }
}

impl std::error::Error for Denied {}
