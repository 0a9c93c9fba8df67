//! From a request to an answer: parse, authorise, dispatch, then delay, break and log as the script says.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use ::http::{Method, Request};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::accounts::{self, Verdict};
use super::{AuthMode, Shared, blobs, manifests, storage, uploads};
use crate::faults::{Action, Listener, RequestInfo, Seen};
use crate::http::body::{Break, Treatment};
use crate::http::serve::{Handled, Handler};
use crate::http::{Answer, Counter, Line, Piece, ReplyBody, into_response};
use crate::token_server;

/// The handler of one listener.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) shared: Arc<Shared>,
    pub(crate) listener: Listener,
}

/// What a request to the registry is about.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Base,
    Catalog,
    Blob(String, String),
    Manifest(String, String),
    Referrers(String, String),
    Tags(String),
    Uploads(String),
    Upload(String, String),
}

impl Target {
    fn parse(path: &str) -> Option<Self> {
        let rest = path.strip_prefix("/v2")?.trim_start_matches('/');
        if rest.is_empty() {
            return Some(Self::Base);
        }
        if rest == "_catalog" {
            return Some(Self::Catalog);
        }
        if let Some(repository) = rest.strip_suffix("/tags/list") {
            return Some(Self::Tags(repository.into()));
        }
        if let Some((repository, id)) = rest.split_once("/blobs/uploads") {
            let id = id.trim_matches('/');
            return Some(if id.is_empty() {
                Self::Uploads(repository.into())
            } else {
                Self::Upload(repository.into(), id.into())
            });
        }
        for (middle, make) in [
            ("/blobs/", Self::Blob as fn(String, String) -> Self),
            ("/manifests/", Self::Manifest),
            ("/referrers/", Self::Referrers),
        ] {
            if let Some((repository, object)) = rest.rsplit_once(middle)
                && !object.contains('/')
            {
                return Some(make(repository.into(), object.into()));
            }
        }
        None
    }

    fn repository(&self) -> Option<&str> {
        match self {
            Self::Base | Self::Catalog => None,
            Self::Blob(repository, _)
            | Self::Manifest(repository, _)
            | Self::Referrers(repository, _)
            | Self::Tags(repository)
            | Self::Uploads(repository)
            | Self::Upload(repository, _) => Some(repository),
        }
    }
}

impl Handler for Front {
    fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        line: Line,
    ) -> Pin<Box<dyn Future<Output = Handled> + Send>> {
        Box::pin(async move { self.answer(request, line).await })
    }
}

impl Front {
    async fn answer(&self, request: Request<Incoming>, line: Line) -> Handled {
        let (parts, body) = request.into_parts();
        let info = RequestInfo {
            listener: self.listener,
            method: parts.method,
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or("").to_owned(),
            range: parts.headers.get("range").and_then(|value| parse_range(value.to_str().ok()?)),
            headers: parts.headers,
        };
        let actions = self.shared.script.actions(&info);
        let (delay, link) = {
            let behaviour = self.shared.behaviour.lock();
            (behaviour.delay, behaviour.link.clone())
        };
        let mut treatment = Treatment { link, ..Treatment::default() };
        let mut instead = None;
        let mut shift = 0;
        let mut whole = false;
        let mut more = Vec::new();
        let mut wait = delay;
        let mut hangup = false;
        let mut lose = false;
        for action in actions {
            match action {
                Action::Status { status, headers, body } => {
                    let mut answer = Answer::new(status).bytes("application/json", body);
                    for (name, value) in headers {
                        answer.headers.remove(name.as_str());
                        answer.set(&name, &value);
                    }
                    instead = Some(answer);
                }
                Action::Redirect(to) => {
                    let own = format!("{}{}", self.shared.url(self.listener), info.path);
                    instead = Some(Answer::new(307).header("location", to.replace("{self}", &own)));
                }
                Action::Delay(delay) => wait += delay,
                Action::ShortBody(at) => treatment.breaks = Some(Break::Close(at)),
                Action::Reset(at) => treatment.breaks = Some(Break::Reset(at)),
                Action::Stall(at) => treatment.breaks = Some(Break::Stall(at)),
                Action::Corrupt(at) => treatment.corrupt = Some(at),
                Action::WrongRange(by) => shift = by,
                Action::IgnoreRange => whole = true,
                Action::Headers(headers) => more = headers,
                Action::Hangup => hangup = true,
                Action::LoseAnswer => lose = true,
            }
        }
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let counter = Counter::default();
        if hangup {
            self.record(&info, &Answer::new(500), 0, &counter);
            return None;
        }
        let mut seen_by_handler = info.clone();
        if whole {
            seen_by_handler.range = None;
        } else if let Some((start, end)) = seen_by_handler.range {
            seen_by_handler.range = Some((start + shift, end.map(|end| end + shift)));
        }
        let mut answer = match instead {
            Some(mut answer) => {
                answer.user = user_of(&info);
                answer
            }
            None => self.dispatch(&seen_by_handler, body).await?,
        };
        if lose {
            self.record(&info, &answer, 0, &counter);
            return None;
        }
        for (name, value) in more {
            if let Ok(name) = ::http::HeaderName::try_from(name.as_str()) {
                answer.headers.remove(name);
            }
            answer.set(&name, &value);
        }
        self.record(&info, &answer, answer.status.as_u16(), &counter);
        if info.method == Method::HEAD {
            if !answer.headers.contains_key("content-length") {
                let len = answer.piece.len().to_string();
                answer.set("content-length", &len);
            }
            return Some(into_response(answer, ReplyBody::empty()));
        }
        let piece = std::mem::replace(&mut answer.piece, Piece::empty());
        let body = ReplyBody::new(piece, treatment, line, counter);
        Some(into_response(answer, body))
    }

    fn record(&self, info: &RequestInfo, answer: &Answer, status: u16, counter: &Counter) {
        let seen = Seen {
            request: info.clone(),
            user: answer.user.clone(),
            body: answer.said.clone(),
            status,
            bytes: 0,
        };
        self.shared.script.record(seen, Arc::clone(counter));
    }

    async fn dispatch(&self, info: &RequestInfo, body: Incoming) -> Option<Answer> {
        match self.listener {
            Listener::Storage => Some(storage::answer(&self.shared, info)),
            Listener::Token => {
                let body = body.collect().await.ok()?.to_bytes();
                Some(token_server::answer(&self.shared, info, &body))
            }
            Listener::Registry => {
                let Some(target) = Target::parse(&info.path) else {
                    return Some(Answer::error(404, "NOT_FOUND", "no such page"));
                };
                let user = match self.authorise(&target, info) {
                    Ok(user) => user,
                    Err(answer) => return Some(*answer),
                };
                let mut answer = self.registry(target, info, body).await?;
                answer.user = user;
                Some(answer)
            }
        }
    }

    async fn registry(&self, target: Target, info: &RequestInfo, body: Incoming) -> Option<Answer> {
        let shared = &self.shared;
        Some(match target {
            Target::Base => Answer::new(200)
                .header("docker-distribution-api-version", "registry/2.0")
                .bytes("application/json", "{}"),
            Target::Catalog => Answer::error(404, "UNSUPPORTED", "no catalog here"),
            Target::Blob(repository, digest) => blobs::answer(shared, info, &repository, &digest),
            Target::Manifest(repository, reference) => {
                let body = match info.method {
                    Method::PUT => body.collect().await.ok()?.to_bytes(),
                    _ => Bytes::new(),
                };
                manifests::answer(shared, info, &repository, &reference, body)
            }
            Target::Referrers(repository, digest) => manifests::referrers(shared, info, &repository, &digest),
            Target::Tags(repository) => manifests::tags(shared, info, &repository),
            Target::Uploads(repository) => uploads::start(shared, info, &repository, body).await?,
            Target::Upload(repository, id) => uploads::go_on(shared, info, &repository, &id, body).await?,
        })
    }

    /// Says who asks, or refuses.
    fn authorise(&self, target: &Target, info: &RequestInfo) -> Result<Option<String>, Box<Answer>> {
        let (mode, challenges) = {
            let behaviour = self.shared.behaviour.lock();
            (behaviour.auth, behaviour.challenges.clone())
        };
        if mode == AuthMode::None {
            return Ok(user_of(info));
        }
        let action = match info.method {
            Method::GET | Method::HEAD => "pull",
            _ => "push",
        };
        let repository = target.repository().unwrap_or("");
        let authorization = info.headers.get("authorization").and_then(|value| value.to_str().ok());
        let verdict = match (mode, authorization) {
            (_, None) => None,
            (AuthMode::Bearer, Some(value)) => Some(match accounts::bearer(value) {
                Some(token) if repository.is_empty() => match self.shared.accounts.token(token, "", "") {
                    Verdict::Insufficient(user) => Verdict::Valid(user),
                    other => other,
                },
                Some(token) => self.shared.accounts.token(token, repository, action),
                None => Verdict::Wrong(user_of(info)),
            }),
            (_, Some(value)) => Some(match accounts::basic(value) {
                Some((user, password)) => self.shared.accounts.password(&user, &password),
                None => Verdict::Wrong(None),
            }),
        };
        let challenge = |error: Option<&str>| {
            let mut answer = Answer::error(401, "UNAUTHORIZED", "authentication required");
            let token = format!("{}/token", self.shared.url(Listener::Token));
            for value in challenges.clone().unwrap_or_else(|| match mode {
                AuthMode::Bearer => {
                    let scope = match repository {
                        "" => String::new(),
                        name if action == "push" => format!(",scope=\"repository:{name}:pull,push\""),
                        name => format!(",scope=\"repository:{name}:pull\""),
                    };
                    let error = error.map(|error| format!(",error=\"{error}\"")).unwrap_or_default();
                    vec![format!("Bearer realm=\"{{token}}\",service=\"testkit\"{scope}{error}")]
                }
                _ => vec!["Basic realm=\"testkit\"".to_owned()],
            }) {
                answer.set("www-authenticate", &value.replace("{token}", &token));
            }
            answer
        };
        let answer = match &verdict {
            None if mode != AuthMode::Bearer && self.shared.accounts.may(None, repository, action) => {
                return Ok(None);
            }
            None => challenge(None),
            Some(Verdict::Valid(user)) if mode == AuthMode::Bearer => return Ok(user.clone()),
            Some(Verdict::Valid(user)) => {
                if repository.is_empty() || self.shared.accounts.may(user.as_deref(), repository, action) {
                    return Ok(user.clone());
                }
                Answer::error(403, "DENIED", "requested access to the resource is denied")
            }
            Some(Verdict::Expired(_)) if mode == AuthMode::Ecr => Answer::error(
                403,
                "DENIED",
                "Your authorization token has expired. Reauthenticate and try again.",
            ),
            Some(Verdict::Insufficient(_)) => challenge(Some("insufficient_scope")),
            Some(Verdict::Expired(_) | Verdict::Wrong(_)) => challenge(Some("invalid_token")),
        };
        let user = verdict.as_ref().and_then(Verdict::user).map(str::to_owned);
        Err(Box::new(Answer { user, ..answer }))
    }
}

/// Who a request says it is from, whether that is true or not.
fn user_of(info: &RequestInfo) -> Option<String> {
    let value = info.headers.get("authorization")?.to_str().ok()?;
    match accounts::basic(value) {
        Some((user, _)) => Some(user),
        None => accounts::bearer(value).map(|token| token.rsplit('-').next().unwrap_or("").to_owned()),
    }
}

fn parse_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (start, end) = value.strip_prefix("bytes=")?.split_once('-')?;
    let end = if end.is_empty() { None } else { Some(end.parse().ok()?) };
    Some((start.parse().ok()?, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_where_the_repository_ends() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let table = [
            ("/v2/", Some(Target::Base)),
            ("/v2/a/b/blobs/sha256:0", Some(Target::Blob(pair("a/b", "").0, pair("", "sha256:0").1))),
            ("/v2/a/manifests/latest", Some(Target::Manifest("a".into(), "latest".into()))),
            ("/v2/a/blobs/uploads/", Some(Target::Uploads("a".into()))),
            ("/v2/a/blobs/uploads/7", Some(Target::Upload("a".into(), "7".into()))),
            ("/v2/a/tags/list", Some(Target::Tags("a".into()))),
            ("/v2/a/referrers/sha256:0", Some(Target::Referrers("a".into(), "sha256:0".into()))),
            ("/elsewhere", None),
        ];
        for (path, expected) in table {
            assert_eq!(Target::parse(path), expected, "{path}");
        }
        assert_eq!(parse_range("bytes=5-9"), Some((5, Some(9))));
        assert_eq!(parse_range("bytes=5-"), Some((5, None)));
        assert_eq!(parse_range("bytes=-9"), None);
    }
}
