//! Redirects of one request, followed by hand.
//!
//! At most ten. With the first change of scheme, host or port everything that was meant for the origin is dropped —
//! `Authorization`, cookies, the operator's own headers, our certificate — and stays dropped, also when the chain comes
//! back; `skip_verify` is for no other host, which can have its own. A target on another origin is never answered a challenge, and https is never
//! left for http.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header::{AUTHORIZATION, COOKIE, LOCATION, PROXY_AUTHORIZATION};
use http::{HeaderMap, Method};
use soci_auth::{AuthAttempt, Origin, Scheme};
use soci_oci::{Digest, FetchContext};
use url::Url;

use super::auth::{self, Refused};
use super::{Reply, Session};
use crate::hosts::Host;
use crate::status::{Operation, Place};
use crate::transport::{Failure, FailureKind, Route};

/// Redirects that are followed.
const MAX_HOPS: usize = 10;

/// One request to one address.
pub(crate) struct Hop<'a> {
    pub(crate) operation: Operation,
    /// The blob that is read.
    pub(crate) blob: Option<Digest>,
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) origin: Origin,
    pub(crate) headers: HeaderMap,
    pub(crate) body: &'a Option<Bytes>,
    pub(crate) route: Route,
    /// Until when the exchange may last.
    pub(crate) deadline: Instant,
}

/// A request to follow.
pub(crate) struct Trip<'a> {
    pub(crate) operation: Operation,
    /// The blob that is read.
    pub(crate) blob: Option<Digest>,
    pub(crate) method: Method,
    pub(crate) url: Url,
    /// Headers of the request itself; the host's own are added here.
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a Option<Bytes>,
    pub(crate) deadline: Instant,
}

/// Follows a request that starts at `origin`, one of `host`'s. An address elsewhere is asked without credentials.
pub(crate) async fn follow(
    session: &Session,
    host: &Arc<Host>,
    origin: &Origin,
    trip: Trip<'_>,
    attempt: &mut AuthAttempt,
    context: &FetchContext,
) -> Result<Reply, Refused> {
    let asked = trip.url.clone();
    let mut url = trip.url;
    let mut at_home = true;
    for _ in 0..=MAX_HOPS {
        let here = Origin::of_url(&url).ok_or_else(|| {
            Failure::new(FailureKind::Address, "redirected to what is neither http nor https")
        })?;
        at_home &= here == *origin;
        let mut headers = trip.headers.clone();
        let identity = if at_home {
            for (name, value) in &host.headers {
                headers.append(name.clone(), value.clone());
            }
            Arc::clone(&host.identity)
        } else {
            for name in [AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION] {
                headers.remove(name);
            }
            Arc::new(session.inner.hosts.trust_at(host, &here).await)
        };
        let hop = Hop {
            operation: trip.operation,
            blob: trip.blob,
            method: trip.method.clone(),
            url: url.clone(),
            origin: here,
            headers,
            body: trip.body,
            route: Route { identity, dial_timeout: host.dial_timeout, guard: None },
            deadline: trip.deadline,
        };
        let attempt = at_home.then_some(&mut *attempt);
        let answer = auth::send(session, host, &hop, attempt, context).await?;
        let location = matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308)
            .then(|| answer.headers.get(LOCATION))
            .flatten();
        let Some(location) = location else {
            return Ok(Reply {
                status: answer.status,
                headers: answer.headers,
                body: answer.body,
                host: Arc::clone(host),
                origin: origin.clone(),
                place: if at_home { Place::Host } else { Place::Target },
                url,
                asked,
                anonymous: answer.anonymous,
            });
        };
        let next = location
            .to_str()
            .ok()
            .and_then(|location| url.join(location).ok())
            .ok_or_else(|| Failure::new(FailureKind::Address, "redirected to what is no address"))?;
        allowed(trip.operation, &hop.origin, &next)?;
        url = next;
    }
    Err(Failure::new(FailureKind::Address, format!("redirected more than {MAX_HOPS} times")).into())
}

/// Whether a redirect from `from` to `to` is followed.
pub(crate) fn allowed(operation: Operation, from: &Origin, to: &Url) -> Result<(), Failure> {
    let refuse = |message: String| Err(Failure::new(FailureKind::Address, message));
    let Some(target) = Origin::of_url(to) else {
        return refuse("redirected to what is neither http nor https".to_owned());
    };
    if from.scheme() == Scheme::Https && target.scheme() == Scheme::Http {
        return refuse(format!("redirected from https to plain http at {}, refused", target.host()));
    }
    if operation == Operation::Referrers && target != *from {
        // Some registries send unknown API calls to a login page.
        return refuse(format!("redirected to {target}, where no registry API is expected"));
    }
    match operation {
        Operation::Blob
        | Operation::Manifest
        | Operation::Resolve
        | Operation::Referrers
        | Operation::Exists => Ok(()),
        Operation::UploadStart
        | Operation::UploadChunk
        | Operation::UploadStatus
        | Operation::UploadFinish
        | Operation::ManifestPut
        | Operation::Delete => match target == *from {
            true => Ok(()),
            false => refuse(format!("a write was redirected to {target}, refused")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t112_redirects_that_are_refused() {
        let from = |url: &str| Origin::of_url(&url.parse().unwrap()).unwrap();
        let table = [
            (Operation::Blob, "https://r.example", "https://s.example/x", true),
            (Operation::Blob, "https://r.example", "http://r.example/x", false),
            (Operation::Blob, "https://r.example", "ftp://r.example/x", false),
            (Operation::Blob, "http://r.example", "http://s.example/x", true),
            (Operation::Manifest, "https://r.example", "https://s.example/x", true),
            (Operation::Referrers, "https://r.example", "https://s.example/x", false),
            (Operation::Referrers, "https://r.example", "https://r.example/x", true),
            (Operation::ManifestPut, "https://r.example", "https://r.example/x", true),
            (Operation::ManifestPut, "https://r.example", "https://r.example:444/x", false),
        ];
        for (operation, origin, to, expected) in table {
            let found = allowed(operation, &from(origin), &to.parse().unwrap());
            assert_eq!(found.is_ok(), expected, "{operation:?} {origin} -> {to}");
        }
    }
}
