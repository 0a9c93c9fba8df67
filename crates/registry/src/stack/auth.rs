//! Authentication of one request to one origin: send, and when it is refused ask the authenticator what else to send.
//!
//! Token requests go through the challenging host's own client ([`HostTokens`]), so they trust what the host trusts, but for
//! `skip_verify`, which is for no other host, unless that one is configured so itself; they follow no redirect to another
//! origin, and the address they connect to is checked where the connection is made.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::{AUTHORIZATION, LOCATION};
use soci_auth::{AuthAttempt, MAX_ANSWER, Next, Origin, Refusal, TokenHttp, TokenHttpError, policy};
use soci_oci::{FetchContext, with_causes};
use url::Url;

use super::redirect::Hop;
use super::{Body, Session, limit, until};
use crate::client::Inner;
use crate::hosts::Host;
use crate::transport::{Failure, FailureKind, Patience, Route, TlsIdentity, Wire};

/// Redirects of a token request on its own origin.
const MAX_TOKEN_HOPS: usize = 3;
/// A token request never takes longer than this, whatever the caller has left.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(30);

/// An answer with what is known about its authorisation.
pub(crate) struct Authorised {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Body,
    pub(crate) anonymous: bool,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The request could not be sent or was not answered.
    Failed(Failure),
    /// The authenticator has nothing (more) to present.
    Auth { message: String, transient: bool },
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Sends one hop. With `attempt` a refusal is answered as often as the authenticator knows something to answer; without,
/// the answer is returned as it is.
pub(crate) async fn send(
    session: &Session,
    host: &Host,
    hop: &Hop<'_>,
    mut attempt: Option<&mut AuthAttempt>,
    context: &FetchContext,
) -> Result<Authorised, Refused> {
    let inner = &session.inner;
    let tokens: Arc<dyn TokenHttp> = Arc::new(HostTokens {
        inner: Arc::clone(inner),
        origin: hop.origin.clone(),
        identity: Arc::clone(&host.identity),
        dial_timeout: host.dial_timeout,
        deadline: Some(context.deadline),
    });
    loop {
        let mut headers = hop.headers.clone();
        let mut anonymous = true;
        if let Some(attempt) = attempt.as_deref_mut() {
            let header = attempt.authorization(&tokens).await.map_err(|error| Refused::Auth {
                transient: error.is_transient(),
                message: with_causes(&error),
            })?;
            if let Some(mut header) = header {
                header.set_sensitive(true);
                headers.insert(AUTHORIZATION, header);
                anonymous = false;
            }
        }
        let (status, headers, body) = connect(session, hop, headers, context).await?;
        let answer = Authorised { status, headers, body, anonymous };
        let Some(attempt) = attempt.as_deref_mut() else {
            return Ok(answer);
        };
        match status.as_u16() {
            401 | 403 => {}
            400..=599 => return Ok(answer),
            _ => {
                attempt.accepted(status);
                return Ok(answer);
            }
        }
        let Authorised { headers, body, .. } = answer;
        let excerpt = body.excerpt().await;
        let refusal = Refusal { status, headers: &headers, body: &excerpt };
        match attempt.refused(refusal, &tokens).await {
            Ok(Next::Retry) => {}
            Ok(Next::Final(denied)) => {
                return Err(Refused::Auth { message: denied.to_string(), transient: false });
            }
            Err(error) => {
                return Err(Refused::Auth { transient: error.is_transient(), message: with_causes(&error) });
            }
        }
        if context.remaining().is_zero() {
            return Err(Failure::new(FailureKind::Timeout, "the deadline passed while authenticating").into());
        }
    }
}

/// The innermost layers: a place in the limiter, then the connection.
async fn connect(
    session: &Session,
    hop: &Hop<'_>,
    headers: http::HeaderMap,
    context: &FetchContext,
) -> Result<(StatusCode, http::HeaderMap, Body), Failure> {
    let inner = &session.inner;
    let permit: limit::Permit = inner
        .limiter
        .acquire(&hop.origin, &context.priority, hop.deadline)
        .await
        .ok_or_else(|| Failure::new(FailureKind::Timeout, "no connection became free in time"))?;
    // An upload is answered when it has arrived, so only downloads have a limit for the head.
    let head = match &hop.body {
        Some(_) => hop.deadline,
        None => {
            let http = &inner.settings.http;
            let dial = hop.route.dial_timeout.unwrap_or(http.dial_timeout);
            until(dial.saturating_add(http.response_header_timeout), hop.deadline)
        }
    };
    let wire = Wire { method: hop.method.clone(), url: hop.url.clone(), headers, body: hop.body.clone() };
    let sent = Instant::now();
    let answer = inner.transport.send(&hop.route, wire, Patience { head }).await;
    match answer {
        Ok(mut response) => {
            let status = response.status();
            inner.meters.answered(hop.operation, hop.blob.as_ref(), status.as_u16(), sent.elapsed());
            // Without the query, which may be a signature.
            tracing::debug!(
                method = %hop.method,
                host = %hop.origin,
                path = hop.url.path(),
                status = status.as_u16(),
                elapsed_ms = sent.elapsed().as_millis(),
                "a request was answered"
            );
            let headers = std::mem::take(response.headers_mut());
            let stall = inner.settings.blob.stall_timeout;
            Ok((status, headers, Body::new(response, permit, hop.deadline, stall)))
        }
        Err(failure) => {
            inner.meters.failed(hop.operation);
            Err(failure)
        }
    }
}

/// Sends token requests on behalf of one host.
struct HostTokens {
    inner: Arc<Inner>,
    origin: Origin,
    identity: Arc<TlsIdentity>,
    dial_timeout: Option<Duration>,
    /// Of the request on whose behalf tokens are asked for, if it still is on its behalf.
    deadline: Option<Instant>,
}

impl HostTokens {
    async fn exchange(&self, request: &http::Request<Bytes>) -> Result<http::Response<Bytes>, String> {
        let mut url: Url =
            request.uri().to_string().parse().map_err(|_| "the realm is no address".to_owned())?;
        let first = Origin::of_url(&url).ok_or("the realm is neither http nor https")?;
        let shown = || format!("token endpoint {first}");
        let latest = Instant::now() + TOKEN_TIMEOUT;
        let deadline = self.deadline.map_or(latest, |deadline| deadline.min(latest));
        let same_host = policy::is_same_host(&self.origin, &url);
        if !same_host && let Some(address) = first.address() {
            policy::check_address(&self.origin, address).map_err(|error| error.to_string())?;
        }
        let route = Route {
            identity: match same_host {
                true => Arc::clone(&self.identity),
                false => Arc::new(self.inner.hosts.trust_elsewhere(&self.identity, &first).await),
            },
            dial_timeout: self.dial_timeout,
            guard: (!same_host).then(|| self.origin.clone()),
        };
        for _ in 0..MAX_TOKEN_HOPS {
            let wire = Wire {
                method: request.method().clone(),
                url: url.clone(),
                headers: request.headers().clone(),
                body: (!request.body().is_empty()).then(|| request.body().clone()),
            };
            let patience = Patience { head: deadline };
            let response = self
                .inner
                .transport
                .send(&route, wire, patience)
                .await
                .map_err(|failure| format!("{}: {failure}", shown()))?;
            if response.status().is_redirection()
                && let Some(location) = response.headers().get(LOCATION)
            {
                let target = location
                    .to_str()
                    .ok()
                    .and_then(|location| url.join(location).ok())
                    .ok_or_else(|| format!("{}: redirects to what is no address", shown()))?;
                if Origin::of_url(&target).as_ref() != Some(&first) {
                    return Err(format!("{}: redirects to another origin, nothing is sent there", shown()));
                }
                url = target;
                continue;
            }
            return collect(response, deadline).await.map_err(|message| format!("{}: {message}", shown()));
        }
        Err(format!("{}: redirects more than {MAX_TOKEN_HOPS} times", shown()))
    }
}

async fn collect(
    mut response: reqwest::Response,
    deadline: Instant,
) -> Result<http::Response<Bytes>, String> {
    let mut head = http::Response::new(Bytes::new());
    *head.status_mut() = response.status();
    *head.headers_mut() = response.headers().clone();
    let mut body = BytesMut::new();
    loop {
        let chunk = tokio::time::timeout_at(deadline.into(), response.chunk())
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|error| Failure::of_reqwest(error).to_string())?;
        let Some(chunk) = chunk else { break };
        if body.len() + chunk.len() > MAX_ANSWER {
            return Err(format!("the answer is longer than {MAX_ANSWER} bytes"));
        }
        body.extend_from_slice(&chunk);
    }
    *head.body_mut() = body.freeze();
    Ok(head)
}

#[async_trait]
impl TokenHttp for HostTokens {
    async fn send(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, TokenHttpError> {
        self.exchange(&request).await.map_err(TokenHttpError)
    }

    fn detached(self: Arc<Self>) -> Option<Arc<dyn TokenHttp>> {
        Some(Arc::new(Self {
            inner: Arc::clone(&self.inner),
            origin: self.origin.clone(),
            identity: Arc::clone(&self.identity),
            dial_timeout: self.dial_timeout,
            deadline: None,
        }))
    }
}
