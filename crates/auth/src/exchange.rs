//! From a credential to a token: the two token protocols.
//!
//! | credential | first | if the endpoint knows no such method (404, 405) |
//! | --- | --- | --- |
//! | pair | GET with Basic | POST, password grant |
//! | identity token | POST, refresh grant | error: a refresh token is never sent as a password |
//! | none | GET, bare | error |
//!
//! Answers are read leniently (`token` or `access_token`, a lifetime as number or text) and within caps.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use url::{Url, form_urlencoded};
use zeroize::Zeroizing;

use crate::credential::basic_header;
use crate::json::{self, Node};
use crate::{Credential, MAX_ANSWER, Secret, TokenHttp, TokenHttpError};

/// The longest token that is used, in bytes: it has to fit into a header.
const MAX_TOKEN: usize = 32 * 1024;
/// No token is kept longer, whatever its answer says.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// A token answer is a flat object.
const DEPTH: usize = 16;

/// Why there is no token. Messages name the realm without its query, never a body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// No answer.
    #[error("{realm} does not answer: {source}")]
    Transport {
        /// The realm.
        realm: String,
        /// What the transport said.
        source: TokenHttpError,
    },
    /// The endpoint refuses the credential.
    #[error("{realm} refuses the credential (status {status})")]
    Refused {
        /// The realm.
        realm: String,
        /// The status.
        status: u16,
    },
    /// The endpoint has no refresh grant.
    #[error(
        "{realm} does not take an identity token (status {status}); log in with a user name and password instead"
    )]
    NoRefreshGrant {
        /// The realm.
        realm: String,
        /// The status.
        status: u16,
    },
    /// The endpoint answers with another status: later may help.
    #[error("{realm} answers with status {status}")]
    Status {
        /// The realm.
        realm: String,
        /// The status.
        status: u16,
        /// What it says about when to come back, in seconds.
        retry_after: Option<u64>,
    },
    /// The answer holds no usable token.
    #[error("the answer of {realm} {why}")]
    Answer {
        /// The realm.
        realm: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The credential cannot be put into a request.
    #[error("the credential for {realm} cannot be put into a request")]
    Unsendable {
        /// The realm.
        realm: String,
    },
    /// The exchange took too long.
    #[error("{realm} took longer than {seconds} s")]
    TimedOut {
        /// The realm.
        realm: String,
        /// The limit.
        seconds: u64,
    },
    /// The task that asked for the token ended without one.
    #[error("the request to {realm} was abandoned")]
    Abandoned {
        /// The realm.
        realm: String,
    },
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(crate) struct TokenRequest {
    pub(crate) realm: Url,
    pub(crate) service: Option<String>,
    pub(crate) scopes: Vec<String>,
    /// `None` is anonymous.
    pub(crate) credential: Option<Credential>,
    pub(crate) client_id: String,
}

/// A token and how long it lives; no lifetime means "until it is refused".
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) token: Secret,
    pub(crate) life: Option<Duration>,
}

impl TokenRequest {
    /// Returns the realm as it may be shown.
    pub(crate) fn shown(&self) -> String {
        let mut shown = self.realm.clone();
        shown.set_query(None);
        crate::redact::url(&shown)
    }

    fn get(&self) -> Option<Request<Bytes>> {
        let mut url = self.realm.clone();
        url.set_fragment(None);
        if self.service.is_some() || !self.scopes.is_empty() {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            for scope in &self.scopes {
                query.append_pair("scope", scope);
            }
        }
        let mut request =
            Request::builder().method(Method::GET).uri(url.as_str()).header(ACCEPT, "application/json");
        if let Some(Credential::Basic { username, password }) = &self.credential {
            request = request.header(AUTHORIZATION, basic_header(username, password)?);
        }
        request.body(Bytes::new()).ok()
    }

    fn post(&self, credential: &Credential) -> Option<Request<Bytes>> {
        let (username, secret) = match credential {
            Credential::Basic { username, password } => (Some(username), password),
            Credential::IdentityToken(token) => (None, token),
            Credential::RegistryToken(_) => return None,
        };
        let mut form = Form::with_room_for(self, username.map_or(0, String::len) + secret.expose().len());
        match username {
            Some(username) => {
                form.add("grant_type", b"password");
                form.add("username", username.as_bytes());
                form.add("password", secret.expose());
            }
            None => {
                form.add("grant_type", b"refresh_token");
                form.add("refresh_token", secret.expose());
            }
        }
        self.service.iter().for_each(|service| form.add("service", service.as_bytes()));
        form.add("client_id", self.client_id.as_bytes());
        if !self.scopes.is_empty() {
            form.add("scope", self.scopes.join(" ").as_bytes());
        }
        let mut url = self.realm.clone();
        url.set_fragment(None);
        Request::builder()
            .method(Method::POST)
            .uri(url.as_str())
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Bytes::from_owner(form.0))
            .ok()
    }
}

/// A form body that is wiped when the last holder lets go.
struct Form(Zeroizing<Vec<u8>>);

impl Form {
    fn with_room_for(request: &TokenRequest, secrets: usize) -> Self {
        let words = request.scopes.iter().map(String::len).sum::<usize>() + request.client_id.len();
        let service = request.service.as_ref().map_or(0, String::len);
        // Each byte takes at most three; the rest are the names.
        Self(Zeroizing::new(Vec::with_capacity(3 * (words + service + secrets + request.scopes.len()) + 256)))
    }

    fn add(&mut self, name: &str, value: &[u8]) {
        if !self.0.is_empty() {
            self.0.push(b'&');
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b'=');
        form_urlencoded::byte_serialize(value).for_each(|part| self.0.extend_from_slice(part.as_bytes()));
    }
}

/// Gets a token.
pub(crate) async fn exchange(http: &dyn TokenHttp, wanted: &TokenRequest) -> Result<Grant, ExchangeError> {
    let realm = wanted.shown();
    let unsendable = || ExchangeError::Unsendable { realm: realm.clone() };
    let first = match &wanted.credential {
        Some(Credential::RegistryToken(_)) => None,
        Some(identity @ Credential::IdentityToken(_)) => wanted.post(identity),
        Some(Credential::Basic { .. }) | None => wanted.get(),
    };
    let answer = send(http, first.ok_or_else(unsendable)?, &realm).await?;
    let unknown_method = matches!(answer.status(), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED);
    match &wanted.credential {
        Some(pair @ Credential::Basic { .. }) if unknown_method => {
            let answer = send(http, wanted.post(pair).ok_or_else(unsendable)?, &realm).await?;
            read(answer, realm)
        }
        Some(Credential::IdentityToken(_)) if unknown_method => {
            Err(ExchangeError::NoRefreshGrant { realm, status: answer.status().as_u16() })
        }
        _ => read(answer, realm),
    }
}

async fn send(
    http: &dyn TokenHttp,
    request: Request<Bytes>,
    realm: &str,
) -> Result<Response<Bytes>, ExchangeError> {
    http.send(request).await.map_err(|source| {
        let source = TokenHttpError(crate::redact::text(&source.0));
        ExchangeError::Transport { realm: realm.to_owned(), source }
    })
}

fn read(answer: Response<Bytes>, realm: String) -> Result<Grant, ExchangeError> {
    let status = answer.status();
    let refused = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => true,
        StatusCode::BAD_REQUEST => is_invalid_grant(answer.body()),
        _ => false,
    };
    if refused {
        return Err(ExchangeError::Refused { realm, status: status.as_u16() });
    }
    if !status.is_success() {
        let retry_after =
            answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        return Err(ExchangeError::Status { realm, status: status.as_u16(), retry_after });
    }
    grant(answer.body()).map_err(|why| ExchangeError::Answer { realm, why })
}

pub(crate) fn is_invalid_grant(body: &[u8]) -> bool {
    body.len() <= MAX_ANSWER
        && json::parse(body, DEPTH).is_ok_and(|node| {
            matches!(node.text("error"), Some("invalid_grant" | "unauthorized_client" | "access_denied"))
        })
}

pub(crate) fn grant(body: &[u8]) -> Result<Grant, &'static str> {
    if body.len() > MAX_ANSWER {
        return Err("is longer than 128 KiB");
    }
    let node = json::parse(body, DEPTH).map_err(|_| "is not JSON")?;
    let token = ["token", "access_token"]
        .into_iter()
        .filter_map(|name| node.text(name))
        .find(|text| !text.is_empty());
    let token = token.ok_or("holds no token")?;
    if token.len() > MAX_TOKEN {
        return Err("holds a token longer than 32 KiB");
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("holds a token that no header can carry");
    }
    let seconds = match node.get("expires_in") {
        Some(Node::Number(seconds)) => Some(*seconds),
        Some(Node::Text(text)) => text.trim().parse().ok(),
        _ => None,
    };
    let life = seconds
        .filter(|seconds: &f64| *seconds >= 0.0)
        .map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_LIFE).min(LONGEST_LIFE));
    Ok(Grant { token: Secret::new(token), life })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Script, answer};

    fn request(credential: Option<Credential>) -> TokenRequest {
        TokenRequest {
            realm: "https://auth.example/token?keep=a%2Cb#frag".parse().unwrap(),
            service: Some("reg example".into()),
            scopes: vec!["repository:a:pull,push".into(), "repository:b:pull".into()],
            credential,
            client_id: "soci".into(),
        }
    }

    #[tokio::test]
    async fn t105_get_keeps_the_realms_query_and_repeats_the_scope() {
        let script = Script::new([answer(200, r#"{"token":"T"}"#)]);
        let grant = exchange(&script, &request(Some(Credential::basic("u", "p:q")))).await.unwrap();
        assert_eq!(grant.token.expose(), b"T");
        let sent = script.sent();
        assert_eq!(
            sent[0].line,
            "GET https://auth.example/token?keep=a%2Cb&service=reg+example&scope=repository%3Aa%3Apull%2Cpush&scope=repository%3Ab%3Apull"
        );
        assert_eq!(sent[0].authorization.as_deref(), Some("Basic dTpwOnE="));
    }

    #[tokio::test]
    async fn anonymous_requests_carry_nothing() {
        let script = Script::new([answer(200, r#"{"token":"T"}"#)]);
        exchange(&script, &request(None)).await.unwrap();
        assert_eq!(script.sent()[0].authorization, None);
    }

    #[tokio::test]
    async fn t34_an_identity_token_goes_by_refresh_grant_only() {
        let identity = || request(Some(Credential::IdentityToken(Secret::new("R+/"))));
        let script =
            Script::new([answer(200, r#"{"access_token":"T","refresh_token":"x"}"#), answer(405, "")]);
        exchange(&script, &identity()).await.unwrap();
        let sent = script.sent();
        assert_eq!(sent[0].line, "POST https://auth.example/token?keep=a%2Cb");
        assert_eq!(
            sent[0].body,
            "grant_type=refresh_token&refresh_token=R%2B%2F&service=reg+example&client_id=soci&scope=repository%3Aa%3Apull%2Cpush+repository%3Ab%3Apull"
        );
        let error = exchange(&script, &identity()).await.unwrap_err();
        assert!(matches!(error, ExchangeError::NoRefreshGrant { status: 405, .. }), "{error}");
        assert_eq!(script.sent().len(), 2, "no second try with it as a password");
    }

    #[tokio::test]
    async fn a_pair_falls_back_to_the_password_grant() {
        for status in [404, 405] {
            let script = Script::new([answer(status, ""), answer(200, r#"{"access_token":"T"}"#)]);
            exchange(&script, &request(Some(Credential::basic("u", vec![0xff])))).await.unwrap();
            assert!(script.sent()[1].body.starts_with("grant_type=password&username=u&password=%FF&"));
            assert_eq!(script.sent()[1].authorization, None);
        }
    }

    #[tokio::test]
    async fn what_refuses_the_credential_and_what_is_trouble() {
        let realm = "https://auth.example/token".to_owned();
        for (status, body, expected) in [
            (401, "", ExchangeError::Refused { realm: realm.clone(), status: 401 }),
            (403, "", ExchangeError::Refused { realm: realm.clone(), status: 403 }),
            (
                400,
                r#"{"error":"invalid_grant"}"#,
                ExchangeError::Refused { realm: realm.clone(), status: 400 },
            ),
            (
                400,
                r#"{"error":"invalid_request"}"#,
                ExchangeError::Status { realm: realm.clone(), status: 400, retry_after: None },
            ),
            (500, "", ExchangeError::Status { realm: realm.clone(), status: 500, retry_after: None }),
            (302, "", ExchangeError::Status { realm: realm.clone(), status: 302, retry_after: None }),
            (200, "{}", ExchangeError::Answer { realm: realm.clone(), why: "holds no token" }),
            (200, "<html>", ExchangeError::Answer { realm: realm.clone(), why: "is not JSON" }),
            (
                200,
                r#"{"token":"a\nb"}"#,
                ExchangeError::Answer { realm: realm.clone(), why: "holds a token that no header can carry" },
            ),
        ] {
            let script = Script::new([answer(status, body)]);
            assert_eq!(exchange(&script, &request(None)).await.unwrap_err(), expected, "{status} {body}");
        }
    }

    #[test]
    fn t106_answers_are_read_leniently() {
        let life = |body: &str| grant(body.as_bytes()).unwrap().life.map(|life| life.as_secs());
        for (body, expected) in [
            (r#"{"access_token":"T"}"#, None),
            (r#"{"token":"","access_token":"T","expires_in":null}"#, None),
            (r#"{"Token":"T","expires_in":300}"#, Some(300)),
            (r#"{"token":"T","expires_in":"300"}"#, Some(300)),
            (r#"{"token":"T","expires_in":299.5,"issued_at":5}"#, Some(299)),
            (r#"{"token":"T","expires_in":-1}"#, None),
            (r#"{"token":"T","expires_in":1e300}"#, Some(86400)),
            (r#"{"token":"T","expires_in":[]}"#, None),
        ] {
            assert_eq!(life(body), expected, "{body}");
        }
        let long = format!(r#"{{"token":"{}"}}"#, "x".repeat(MAX_TOKEN + 1));
        assert!(grant(long.as_bytes()).is_err());
        assert!(grant(&vec![b' '; MAX_ANSWER + 1]).is_err());
    }
}
