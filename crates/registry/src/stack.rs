//! The stack every request goes through, outermost first:
//!
//! deadline → [`retry`] → [`hosts`] → [`redirect`] → [`auth`] → [`limit`] → connection
//!
//! Each layer is one file and calls the next one by name, so that the order can be read here and nowhere else. The
//! deadline is the caller's ([`FetchContext`]); every layer waits until then at most. A [`Journey`] travels through all of
//! them: it is what one logical request has been through, so that a retry does not present refused credentials anew.

pub(crate) mod auth;
pub(crate) mod body;
pub(crate) mod health;
pub(crate) mod hosts;
pub(crate) mod limit;
pub(crate) mod redirect;
pub(crate) mod retry;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use soci_auth::{Access, AuthAttempt, CredentialScope, Origin};
use soci_oci::{Digest, FetchContext, ImageRef};
use url::Url;

use crate::client::Inner;
use crate::error::CallError;
use crate::hosts::Host;
use crate::settings::{MirrorCredentials, MirrorTimeout};
use crate::status::{Operation, Place};
pub(crate) use body::Body;

/// A request as the caller means it, before a host is chosen.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    /// The blob that is read.
    pub(crate) blob: Option<Digest>,
    pub(crate) method: Method,
    /// Below the repository: `manifests/latest`.
    pub(crate) path: String,
    pub(crate) query: Vec<(&'static str, String)>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    pub(crate) access: Access,
    /// What the body of the answer must be, where that can be told from its head.
    pub(crate) expect: Expect,
    /// Set when an earlier answer said where to go on: no other host is asked then.
    pub(crate) fixed: Option<Fixed>,
    /// Whether mirrors are passed over.
    pub(crate) past_mirrors: bool,
}

/// An address that a host named, on its own origin or elsewhere.
#[derive(Debug, Clone)]
pub(crate) struct Fixed {
    pub(crate) host: Arc<Host>,
    pub(crate) origin: Origin,
    pub(crate) url: Url,
}

/// What an answer must carry.
#[derive(Debug, Clone)]
pub(crate) enum Expect {
    /// Anything.
    Anything,
    /// This range of a blob of this size.
    Range(Range<u64>, u64),
}

/// An answer whose head says what was asked for.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
    pub(crate) host: Arc<Host>,
    /// The host's origin that was asked.
    pub(crate) origin: Origin,
    /// Who answered.
    pub(crate) place: Place,
    /// What answered.
    pub(crate) url: Url,
    /// The address that was asked first, for `Referer`.
    pub(crate) asked: Url,
    /// Whether a credential was sent.
    pub(crate) anonymous: bool,
}

/// For whom requests are made: an image, and everything shared.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) inner: Arc<Inner>,
    pub(crate) image: ImageRef,
}

/// What one logical request has been through.
#[derive(Debug, Default)]
pub(crate) struct Journey {
    attempts: Vec<(Origin, AuthAttempt)>,
    /// Whether a refused location was already exchanged for a fresh one.
    pub(crate) relocated: bool,
    /// Answers that broke the protocol so far.
    pub(crate) faults: u32,
}

impl Journey {
    /// Takes the attempt for `origin`, made anew when there is none.
    fn take(
        &mut self,
        session: &Session,
        host: &Host,
        origin: &Origin,
        access: &Access,
        deadline: Instant,
    ) -> AuthAttempt {
        if let Some(at) = self.attempts.iter().position(|(known, _)| known == origin) {
            return self.attempts.swap_remove(at).1;
        }
        session.inner.auth.attempt(scope(&session.image, host, origin), access.clone(), deadline)
    }

    fn put(&mut self, origin: Origin, attempt: AuthAttempt) {
        self.attempts.push((origin, attempt));
    }
}

/// Returns whom a credential must belong to that is sent to `host` for `image`.
pub(crate) fn scope(image: &ImageRef, host: &Host, origin: &Origin) -> CredentialScope {
    CredentialScope {
        mirror: host.is_mirror(),
        forward: host.credentials == MirrorCredentials::Forwarded,
        ..CredentialScope::new(origin.clone(), image.clone())
    }
}

impl Session {
    /// Sends `call` through the whole stack.
    pub(crate) async fn call(
        &self,
        call: &Call,
        journey: &mut Journey,
        context: &FetchContext,
    ) -> Result<Reply, CallError> {
        retry::call(self, call, journey, context).await
    }

    /// Returns the address of `call` at a host.
    pub(crate) fn url(&self, host: &Host, origin: &Origin, call: &Call) -> Result<Url, url::ParseError> {
        if let Some(fixed) = &call.fixed {
            return Ok(fixed.url.clone());
        }
        let mut url =
            Url::parse(&format!("{origin}{}/{}/{}", host.root, self.image.repository(), call.path))?;
        if !call.query.is_empty() || host.namespace.is_some() {
            let mut pairs = url.query_pairs_mut();
            for (key, value) in &call.query {
                pairs.append_pair(key, value);
            }
            if let Some(namespace) = &host.namespace {
                pairs.append_pair("ns", namespace);
            }
        }
        Ok(url)
    }

    /// Sends `call` to an address that `host` named in an earlier answer; headers and body are the call's.
    pub(crate) async fn at(
        &self,
        host: &Arc<Host>,
        origin: &Origin,
        url: Url,
        call: &Call,
        journey: &mut Journey,
        context: &FetchContext,
    ) -> Result<Reply, CallError> {
        let fixed = Fixed { host: Arc::clone(host), origin: origin.clone(), url };
        self.call(&Call { fixed: Some(fixed), ..call.clone() }, journey, context).await
    }

    /// Returns until when one exchange with `host` may last.
    pub(crate) fn exchange_deadline(&self, host: &Host, context: &FetchContext) -> Instant {
        let limit = match host.request_timeout {
            MirrorTimeout::Global => Some(self.inner.settings.http.request_timeout),
            MirrorTimeout::Of(limit) => Some(limit),
            MirrorTimeout::Unlimited => None,
        };
        limit.map_or(context.deadline, |limit| until(limit, context.deadline))
    }
}

/// Returns the earlier of `limit` from now and `deadline`.
pub(crate) fn until(limit: Duration, deadline: Instant) -> Instant {
    Instant::now().checked_add(limit).map_or(deadline, |at| at.min(deadline))
}

impl Call {
    /// Returns a call without body that reads.
    pub(crate) fn read(operation: Operation, method: Method, path: String) -> Self {
        Self {
            operation,
            blob: None,
            method,
            path,
            query: Vec::new(),
            headers: HeaderMap::new(),
            body: None,
            access: Access::Pull,
            expect: Expect::Anything,
            fixed: None,
            past_mirrors: false,
        }
    }
}
