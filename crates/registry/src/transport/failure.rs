//! Why a request got no answer.

use std::error::Error;
use std::fmt;

use soci_oci::causes;

/// What kind of trouble it was, as far as a decision depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// The name does not resolve, nothing listens, or no TLS is spoken there.
    Connect,
    /// The server's certificate is not trusted, or ours was refused. Trying again changes nothing.
    Certificate,
    /// No answer, or no further byte, in time.
    Timeout,
    /// The connection broke.
    Broken,
    /// The address cannot be used.
    Address,
    /// This machine's settings or files.
    Local,
}

/// A request that got no answer. Its text never holds an address's query or userinfo.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn because(
        kind: FailureKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    pub(crate) fn of_reqwest(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let kind = if certificate(&error) {
            FailureKind::Certificate
        } else if error.is_builder() {
            FailureKind::Address
        } else if error.is_connect() {
            FailureKind::Connect
        } else if error.is_timeout() {
            FailureKind::Timeout
        } else {
            FailureKind::Broken
        };
        let message = match kind {
            FailureKind::Certificate => format!(
                "TLS: {}; add its authority to the ca of the host or to the system's",
                innermost(&error)
            ),
            FailureKind::Connect => format!("cannot connect: {}", innermost(&error)),
            FailureKind::Timeout => "no answer in time".to_owned(),
            _ => format!("connection lost: {}", innermost(&error)),
        };
        Self { kind, message, source: Some(Box::new(error)) }
    }

    /// Whether the same request may succeed later without anybody changing a setting.
    pub(crate) fn is_transient(&self) -> bool {
        match self.kind {
            FailureKind::Connect | FailureKind::Timeout | FailureKind::Broken => true,
            FailureKind::Certificate | FailureKind::Address | FailureKind::Local => false,
        }
    }
}

fn innermost(error: &(dyn Error + 'static)) -> String {
    causes(error).last().map(ToString::to_string).unwrap_or_default()
}

fn certificate(error: &(dyn Error + 'static)) -> bool {
    use rustls::AlertDescription as Alert;
    causes(error).filter_map(|cause| cause.downcast_ref::<rustls::Error>()).any(|error| match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => true,
        rustls::Error::AlertReceived(alert) => matches!(
            alert,
            Alert::BadCertificate
                | Alert::CertificateRequired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
        ),
        _ => false,
    })
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
