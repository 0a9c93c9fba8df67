//! One round over the hosts: the first that gives what was asked for ends it.
//!
//! A host that refuses, does not know, breaks the protocol or cannot be reached is passed over; the [table of
//! statuses](crate::status) says which. The last host of the list is the registry itself: what it says decides what the
//! whole round means, whatever its mirrors said. Hosts that were unreachable a moment ago are asked last.
//!
//! Nobody waits for better credentials before all hosts were asked. When the registry refuses too, those that refused are
//! asked again with every news, as long as the request has patience.

use std::sync::Arc;
use std::time::Duration;

use http::header::RETRY_AFTER;
use soci_auth::Origin;
use soci_oci::{FetchContext, FetchErrorKind};

use super::auth::Refused;
use super::redirect::{self, Trip};
use super::retry::retry_after;
use super::{Call, Expect, Journey, Reply, Session};
use crate::error::{CallError, Said, status_text};
use crate::hosts::Host;
use crate::range;
use crate::settings::without_query;
use crate::status::{Operation, Place, Verdict, verdict};
use crate::transport::{Failure, FailureKind};

/// Answers against the protocol for which a whole request is tried again.
const MAX_FAULTS: u32 = 1;

/// Why a round brought nothing.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) error: CallError,
    /// Set when another round may help; inside, how long the host asked to wait.
    pub(crate) again: Option<Option<Duration>>,
}

/// What went wrong at one host.
#[derive(Debug)]
struct Trouble {
    host: String,
    text: String,
    kind: FetchErrorKind,
    again: Option<Option<Duration>>,
    /// Whether a credential that is yet to come may be accepted.
    may_heal: bool,
    unsupported: bool,
    status: Option<u16>,
    code: Option<String>,
}

impl Trouble {
    fn new(host: String, kind: FetchErrorKind, text: impl Into<String>) -> Self {
        Self {
            host,
            text: text.into(),
            kind,
            again: None,
            may_heal: false,
            unsupported: false,
            status: None,
            code: None,
        }
    }

    fn later(mut self, after: Option<Duration>) -> Self {
        self.again = Some(after);
        self
    }
}

/// Asks the hosts for `call` in order.
pub(crate) async fn walk(
    session: &Session,
    call: &Call,
    journey: &mut Journey,
    context: &FetchContext,
) -> Result<Reply, Round> {
    let auth = &session.inner.auth;
    let mut since = auth.board().latest();
    let list = session.inner.hosts.of(session.image.registry()).await;
    let list = list.map_err(|error| hopeless(FetchErrorKind::Local, error.to_string()))?;
    let serving = match &call.fixed {
        Some(fixed) => vec![(0, &fixed.host)],
        None => serving(session, call, &list)?,
    };
    let mut troubles: Vec<(usize, &Arc<Host>, Trouble)> = Vec::new();
    for (position, host) in serving {
        match ask(session, host, call, journey, context).await {
            Ok(reply) => return Ok(reply),
            Err(trouble) => troubles.push((position, host, trouble)),
        }
        if context.remaining().is_zero() {
            break;
        }
    }
    troubles.sort_by_key(|(position, ..)| *position);
    while troubles.last().is_some_and(|(.., deciding)| deciding.may_heal)
        && auth.wait_for_news(since, context.patient_since, context.deadline).await
    {
        since = auth.board().latest();
        for (_, host, trouble) in troubles.iter_mut().filter(|(.., trouble)| trouble.may_heal) {
            match ask(session, host, call, journey, context).await {
                Ok(reply) => return Ok(reply),
                Err(still) => *trouble = still,
            }
        }
    }
    Err(sum_up(session, call, troubles.into_iter().map(|(.., trouble)| trouble).collect()))
}

/// Returns an end of the round that no other round would change.
fn hopeless(kind: FetchErrorKind, message: String) -> Round {
    Round { error: CallError::new(kind, message), again: None }
}

/// Returns the hosts of `list` that may be asked for `call`, with their places in it, in the order to ask them.
fn serving<'a>(
    session: &Session,
    call: &Call,
    list: &'a [Arc<Host>],
) -> Result<Vec<(usize, &'a Arc<Host>)>, Round> {
    let mut serving: Vec<(usize, &Arc<Host>)> =
        list.iter().enumerate().filter(|(_, host)| host.serves(call.operation)).collect();
    if call.past_mirrors {
        serving.retain(|(_, host)| !host.is_mirror());
    }
    if serving.is_empty() {
        let message = format!(
            "{} of {}: no host configured for {} has that capability; extend capabilities in its hosts.toml",
            call.operation.doing(),
            session.image.name(),
            session.image.registry(),
        );
        return Err(hopeless(FetchErrorKind::Local, message));
    }
    if is_write(call.operation) {
        serving.truncate(1);
    }
    let health = &session.inner.health;
    serving.sort_by_key(|(_, host)| host.origins.iter().all(|origin| health.is_down(origin)));
    Ok(serving)
}

/// Whether `operation` must not wander from one host to another.
fn is_write(operation: Operation) -> bool {
    match operation {
        Operation::Resolve | Operation::Manifest | Operation::Referrers | Operation::Blob => false,
        Operation::Exists
        | Operation::UploadStart
        | Operation::UploadChunk
        | Operation::UploadStatus
        | Operation::UploadFinish
        | Operation::ManifestPut
        | Operation::Delete => true,
    }
}

/// Asks one host, at the address it named itself or else at its own.
async fn ask(
    session: &Session,
    host: &Arc<Host>,
    call: &Call,
    journey: &mut Journey,
    context: &FetchContext,
) -> Result<Reply, Trouble> {
    let asked = match &call.fixed {
        Some(fixed) => {
            at(session, host, &fixed.origin, call, journey, context).await.map_err(|(trouble, _)| trouble)
        }
        None => ask_origins(session, host, call, journey, context).await,
    };
    asked.inspect_err(|trouble| {
        tracing::debug!(
            host = trouble.host,
            repository = session.image.repository(),
            operation = call.operation.doing(),
            reason = trouble.text,
            "a host did not serve a request"
        );
    })
}

/// Asks a host by its origins: an ambiguous one by https and then by http.
async fn ask_origins(
    session: &Session,
    host: &Arc<Host>,
    call: &Call,
    journey: &mut Journey,
    context: &FetchContext,
) -> Result<Reply, Trouble> {
    let origins = session.inner.health.order(&host.origins);
    let mut first: Option<Trouble> = None;
    for origin in origins {
        match at(session, host, origin, call, journey, context).await {
            Ok(reply) => return Ok(reply),
            Err((trouble, reached)) => {
                if reached {
                    return Err(trouble);
                }
                // The first one's trouble is the one to show: nobody configured the other scheme.
                first.get_or_insert(trouble);
            }
        }
    }
    Err(first.unwrap_or_else(|| Trouble::new(host.name(), FetchErrorKind::Local, "has no address")))
}

/// Asks one origin of a host. The flag tells whether something there answered or its certificate was refused.
async fn at(
    session: &Session,
    host: &Arc<Host>,
    origin: &Origin,
    call: &Call,
    journey: &mut Journey,
    context: &FetchContext,
) -> Result<Reply, (Trouble, bool)> {
    let name = origin.to_string();
    loop {
        let url = session.url(host, origin, call).map_err(|error| {
            (Trouble::new(name.clone(), FetchErrorKind::Local, format!("no address: {error}")), true)
        })?;
        let deadline = session.exchange_deadline(host, context);
        let trip = Trip {
            operation: call.operation,
            blob: call.blob,
            method: call.method.clone(),
            url,
            headers: &call.headers,
            body: &call.body,
            deadline,
        };
        let mut attempt = journey.take(session, host, origin, &call.access, context.deadline);
        let answer = redirect::follow(session, host, origin, trip, &mut attempt, context).await;
        let may_heal = attempt.may_heal();
        journey.put(origin.clone(), attempt);
        let reply = match answer {
            Ok(reply) => reply,
            Err(Refused::Auth { message, transient }) => {
                session.inner.health.spoke(&host.origins, origin);
                if host.is_mirror() {
                    // A mirror that refuses us may have waited for better credentials: it is asked last for a while.
                    session.inner.health.failed(origin);
                }
                let kind = if transient { FetchErrorKind::Unavailable } else { FetchErrorKind::Denied };
                let trouble = Trouble { may_heal, ..Trouble::new(name, kind, message) };
                return Err((if transient { trouble.later(None) } else { trouble }, true));
            }
            Err(Refused::Failed(failure)) => return Err(failed(session, call, origin, name, &failure)),
        };
        session.inner.health.answered(origin);
        session.inner.health.spoke(&host.origins, origin);
        let verdict = verdict(call.operation, reply.status.as_u16(), reply.place);
        if verdict == Verdict::Relocate && !journey.relocated {
            journey.relocated = true;
            continue;
        }
        return judge(call, journey, name, verdict, reply).await.map_err(|trouble| (trouble, true));
    }
}

fn failed(
    session: &Session,
    call: &Call,
    origin: &Origin,
    name: String,
    failure: &Failure,
) -> (Trouble, bool) {
    let reached = failure.kind != FailureKind::Connect;
    session.inner.health.doubt(origin);
    if failure.kind == FailureKind::Connect {
        session.inner.health.failed(origin);
    }
    let kind = match failure.kind {
        FailureKind::Local => FetchErrorKind::Local,
        FailureKind::Address => FetchErrorKind::Protocol,
        FailureKind::Connect | FailureKind::Certificate | FailureKind::Timeout | FailureKind::Broken => {
            FetchErrorKind::Unavailable
        }
    };
    let mut trouble = Trouble::new(name, kind, failure.to_string());
    trouble.unsupported = call.operation == Operation::Referrers && failure.kind == FailureKind::Address;
    (if failure.is_transient() { trouble.later(None) } else { trouble }, reached)
}

/// Decides what an answer is.
async fn judge(
    call: &Call,
    journey: &mut Journey,
    name: String,
    verdict: Verdict,
    reply: Reply,
) -> Result<Reply, Trouble> {
    let status = reply.status.as_u16();
    let whose = match reply.place {
        Place::Host => name,
        Place::Target => {
            let target = Origin::of_url(&reply.url).map(|origin| origin.to_string());
            format!("{name} (redirected to {})", target.unwrap_or_default())
        }
    };
    if verdict == Verdict::Done {
        let Expect::Range(wanted, size) = &call.expect else { return Ok(reply) };
        return match range::check(reply.status, &reply.headers, wanted, *size) {
            Ok(()) => Ok(reply),
            Err(fault) => {
                journey.faults += 1;
                let trouble = Trouble::new(whose, FetchErrorKind::Protocol, fault.to_string());
                Err(if journey.faults <= MAX_FAULTS { trouble.later(None) } else { trouble })
            }
        };
    }
    let after = reply.headers.get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
    let anonymous = reply.anonymous;
    let said = Said::parse(&reply.body.excerpt().await);
    let mut text = status_text(status);
    for part in [&said.code, &said.message].into_iter().flatten() {
        text.push_str(": ");
        text.push_str(part);
    }
    let kind = match verdict {
        Verdict::NextHost(kind) | Verdict::Final(kind) => kind,
        Verdict::Later => FetchErrorKind::Unavailable,
        Verdict::Relocate => FetchErrorKind::Denied,
        Verdict::Unsupported | Verdict::Done => FetchErrorKind::Protocol,
    };
    if kind == FetchErrorKind::NotFound && anonymous {
        text.push_str(" (asked without a credential: a registry may hide what needs one)");
    }
    if verdict == Verdict::Relocate {
        text.push_str(": a fresh location was refused too; check the clocks and the registry's storage");
    }
    let mut trouble = Trouble::new(whose, kind, text);
    trouble.unsupported = verdict == Verdict::Unsupported;
    trouble.status = Some(status);
    trouble.code = said.code;
    Err(if verdict == Verdict::Later { trouble.later(after) } else { trouble })
}

/// Makes one error of what all hosts said; the last one, the registry itself, decides.
fn sum_up(session: &Session, call: &Call, mut troubles: Vec<Trouble>) -> Round {
    let said: Vec<String> =
        troubles.iter().map(|trouble| format!("{}: {}", trouble.host, trouble.text)).collect();
    let message = format!(
        "{} {} of {}: {}",
        call.operation.doing(),
        without_query(call.path.rsplit('/').next().unwrap_or(&call.path)),
        session.image.name(),
        said.join("; "),
    );
    let Some(deciding) = troubles.pop() else {
        return Round { error: CallError::new(FetchErrorKind::Unavailable, message), again: Some(None) };
    };
    let mut error = CallError::new(deciding.kind, message);
    error.unsupported = deciding.unsupported;
    error.status = deciding.status;
    error.code = deciding.code;
    Round { error, again: deciding.again }
}
