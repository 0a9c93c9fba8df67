//! What the API server did wrong, and what is done about it.

use std::error::Error;
use std::time::Duration;

use kube::core::Status;
use soci_oci::causes;

/// The most of a message of the API server that is passed on, in bytes: a proxy may answer with a whole page.
const MAX_MESSAGE: usize = 300;

/// A list or a watch that failed. Never quotes a secret.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Nothing came.
    #[error("no answer within {limit:?} to {what}")]
    NoAnswer {
        /// What was asked for.
        what: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// A watch that is open and says nothing.
    #[error("not a word within {limit:?} of the watch of {what}")]
    Silent {
        /// What is watched.
        what: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// More than can be a secret.
    #[error("an answer with one secret is larger than the limit of {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The server says no, or says so within a watch.
    #[error("the API server answers {}", told(.status))]
    Status {
        /// What it says.
        status: Box<Status>,
        /// When to come back, where a header says so.
        after: Option<Duration>,
    },
    /// The connection failed.
    #[error("{0}")]
    Connection(#[source] Box<kube::Error>),
    /// The answer is not what an API server sends.
    #[error("the answer is not understood: {category} error at line {line}, column {column}")]
    Unreadable {
        /// `syntax`, `data` or `end of input`.
        category: &'static str,
        /// Where.
        line: usize,
        /// Where in the line.
        column: usize,
    },
    /// The answer does not say which version of the cluster it is.
    #[error("the answer has no resourceVersion")]
    NoVersion,
    /// What is asked for makes no request.
    #[error("request to the API server")]
    Request(#[from] kube::core::request::Error),
}

/// What is done about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// The server does not accept us: 401, TLS.
    ConnectAnew,
    /// It knows us and says no: 403.
    WaitForPermission,
    /// What was asked from is forgotten (410), or something was missed.
    ListAnew,
    /// It may go well the next time.
    TryAgain {
        /// The server does not want it earlier.
        after: Duration,
    },
}

impl Failure {
    pub(crate) fn unreadable(error: serde_json::Error) -> Self {
        use serde_json::error::Category;
        // What serde says of the data may quote it.
        let category = match error.classify() {
            Category::Io => "read",
            Category::Syntax => "syntax",
            Category::Data => "data",
            Category::Eof => "end of input",
        };
        Self::Unreadable { category, line: error.line(), column: error.column() }
    }

    pub(crate) fn remedy(&self) -> Remedy {
        match self {
            Self::Status { status, after } => match status.code {
                401 => Remedy::ConnectAnew,
                403 => Remedy::WaitForPermission,
                410 => Remedy::ListAnew,
                _ => {
                    // What limits rates says it in a header only.
                    let asked = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
                    let asked = Duration::from_secs(asked.into());
                    Remedy::TryAgain { after: after.unwrap_or_default().max(asked) }
                }
            },
            Self::Connection(error) if is_tls(error) => Remedy::ConnectAnew,
            Self::NoVersion | Self::Unreadable { .. } => Remedy::ListAnew,
            Self::Connection(_)
            | Self::NoAnswer { .. }
            | Self::Silent { .. }
            | Self::TooLarge { .. }
            | Self::Request(_) => Remedy::TryAgain { after: Duration::ZERO },
        }
    }

    /// Returns what a person can do about it.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::NoAnswer { .. } => "look whether the API server, or a proxy before it, hangs",
            Self::Silent { .. } => "look whether a proxy or a firewall drops connections",
            Self::TooLarge { .. } => {
                "look for it by `kubectl get secrets`, and delete what nobody needs of it"
            }
            Self::Status { status, .. } => match status.code {
                401 => "renew the token or the certificate of the kubeconfig's user",
                429 | 500.. => "look at the log of the API server, or of the proxy before it",
                _ => "check that `server` of the kubeconfig is the address of an API server",
            },
            Self::Connection(error) if is_tls(error) => {
                "check certificate-authority of the kubeconfig, and for whom the API server's certificate is"
            }
            Self::Connection(_) => "check that the API server runs, and that this node reaches it",
            Self::Unreadable { .. } | Self::NoVersion => {
                "check that `server` of the kubeconfig is the address of an API server"
            }
            Self::Request(_) => "correct `namespaces` of [kubeconfig_keychain]",
        }
    }
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Status { status, after: None },
            kube::Error::SerdeError(error) => Self::unreadable(error),
            other => Self::Connection(Box::new(other)),
        }
    }
}

fn told(status: &Status) -> String {
    let message = status.message.trim();
    let end = (0..=message.len().min(MAX_MESSAGE)).rev().find(|end| message.is_char_boundary(*end));
    format!("{} {}: {}", status.code, status.reason, &message[..end.unwrap_or(0)])
}

fn is_tls(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(|cause| cause.is::<rustls::Error>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, message: &str) -> Failure {
        Failure::Status { status: Box::new(Status::failure(message, "Reason").with_code(code)), after: None }
    }

    #[test]
    fn what_is_done_follows_from_the_code() {
        let again = |seconds| Remedy::TryAgain { after: Duration::from_secs(seconds) };
        for (code, expected) in [
            (401, Remedy::ConnectAnew),
            (403, Remedy::WaitForPermission),
            (410, Remedy::ListAnew),
            (429, again(0)),
            (500, again(0)),
        ] {
            assert_eq!(status(code, "").remedy(), expected, "{code}");
        }
        let status = Box::new(Status::failure("", "").with_code(503));
        let asked = Failure::Status { status, after: Some(Duration::from_secs(7)) };
        assert_eq!(asked.remedy(), again(7));
    }

    #[test]
    fn neither_a_page_of_a_proxy_nor_a_secret_gets_into_a_message() {
        let page = status(502, &"ä".repeat(10_000)).to_string();
        assert!(page.starts_with("the API server answers 502 Reason: ä") && page.len() < 400, "{page}");
        let error = serde_json::from_str::<u8>("\"hunter2\"").unwrap_err();
        assert!(error.to_string().contains("hunter2"), "serde quotes it");
        let error = Failure::from(kube::Error::SerdeError(error));
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        assert_eq!(error.remedy(), Remedy::ListAnew);
    }
}
