//! The token server: GET with basic credentials, POST as OAuth2, scopes honoured, and every oddity of real ones.

use std::sync::Arc;
use std::time::Duration;

use ::http::Method;
use bytes::Bytes;
use url::form_urlencoded;

use crate::faults::RequestInfo;
use crate::http::Answer;
use crate::registry::Shared;
use crate::registry::accounts::{Scope, Verdict, basic};

/// What the token server says about the life of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpiresIn {
    /// The truth.
    Real,
    /// Nothing, as some registries do.
    Omitted,
    /// This many seconds, whatever the truth.
    Says(u64),
}

/// How the token server answers a POST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostSupport {
    /// With a token.
    Accepted,
    /// With this status.
    Refused(u16),
}

/// The field that carries the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenField {
    /// `token`.
    Token,
    /// `access_token`.
    AccessToken,
    /// Both.
    Both,
}

/// How the token server behaves.
#[derive(Debug, Clone)]
pub struct TokenOptions {
    /// How long a token is good for.
    pub ttl: Duration,
    /// What is said about that.
    pub expires_in: ExpiresIn,
    /// How POST is answered.
    pub post: PostSupport,
    /// Whether only the first scope asked for is granted.
    pub first_scope_only: bool,
    /// The field that carries the token in the answer to a GET.
    pub field: TokenField,
}

impl Default for TokenOptions {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(300),
            expires_in: ExpiresIn::Real,
            post: PostSupport::Accepted,
            first_scope_only: false,
            field: TokenField::Token,
        }
    }
}

pub(crate) fn answer(shared: &Arc<Shared>, request: &RequestInfo, body: &Bytes) -> Answer {
    let options = shared.behaviour.lock().tokens.clone();
    let mut answer = match request.method {
        Method::GET => get(shared, &options, request),
        Method::POST => match options.post {
            PostSupport::Accepted => post(shared, &options, body),
            PostSupport::Refused(status) => Answer::error(status, "UNSUPPORTED", "no POST here"),
        },
        _ => Answer::error(405, "UNSUPPORTED", "no such method"),
    };
    answer.said = body.clone();
    answer
}

fn get(shared: &Arc<Shared>, options: &TokenOptions, request: &RequestInfo) -> Answer {
    let authorization = request.headers.get("authorization").and_then(|value| value.to_str().ok());
    let user = match authorization.map(basic) {
        None => None,
        Some(None) => return refused(None),
        Some(Some((user, password))) => match shared.accounts.password(&user, &password) {
            Verdict::Valid(user) => user,
            _ => return refused(Some(user)),
        },
    };
    let query: Vec<(String, String)> =
        form_urlencoded::parse(request.query.as_bytes()).into_owned().collect();
    let scopes: Vec<Scope> =
        query.iter().filter(|(key, _)| key == "scope").filter_map(|(_, value)| Scope::parse(value)).collect();
    let offline = query.iter().any(|(key, value)| key == "offline_token" && value == "true");
    let token = issue(shared, options, user.as_deref(), &scopes);
    let mut json = serde_json::Map::new();
    if options.field != TokenField::AccessToken {
        json.insert("token".into(), token.clone().into());
    }
    if options.field != TokenField::Token {
        json.insert("access_token".into(), token.into());
    }
    if let (true, Some(user)) = (offline, &user) {
        json.insert("refresh_token".into(), shared.accounts.issue_identity(user).into());
    }
    finish(options, json, user)
}

fn post(shared: &Arc<Shared>, options: &TokenOptions, body: &Bytes) -> Answer {
    let form: Vec<(String, String)> = form_urlencoded::parse(body).into_owned().collect();
    let field =
        |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).unwrap_or("");
    if field("client_id").is_empty() {
        return Answer::error(400, "UNSUPPORTED", "client_id is required");
    }
    let user = match field("grant_type") {
        "refresh_token" => match shared.accounts.identity(field("refresh_token")) {
            Some(user) => user,
            None => return refused(None),
        },
        "password" => match shared.accounts.password(field("username"), field("password")) {
            Verdict::Valid(Some(user)) => user,
            _ => return refused(Some(field("username").to_owned())),
        },
        _ => return Answer::error(400, "UNSUPPORTED", "unknown grant_type"),
    };
    let scopes: Vec<Scope> = field("scope").split(' ').filter_map(Scope::parse).collect();
    let token = issue(shared, options, Some(&user), &scopes);
    let mut json = serde_json::Map::new();
    json.insert("access_token".into(), token.into());
    if field("access_type") == "offline" {
        json.insert("refresh_token".into(), shared.accounts.issue_identity(&user).into());
    }
    finish(options, json, Some(user))
}

fn issue(shared: &Arc<Shared>, options: &TokenOptions, user: Option<&str>, scopes: &[Scope]) -> String {
    let asked = if options.first_scope_only { scopes.get(..1).unwrap_or_default() } else { scopes };
    shared.accounts.issue(user, asked, options.ttl)
}

fn finish(
    options: &TokenOptions,
    mut json: serde_json::Map<String, serde_json::Value>,
    user: Option<String>,
) -> Answer {
    match options.expires_in {
        ExpiresIn::Real => {
            json.insert("expires_in".into(), options.ttl.as_secs().into());
        }
        ExpiresIn::Says(seconds) => {
            json.insert("expires_in".into(), seconds.into());
        }
        ExpiresIn::Omitted => {}
    }
    let mut answer = Answer::new(200).bytes("application/json", serde_json::Value::Object(json).to_string());
    answer.user = user;
    answer
}

fn refused(user: Option<String>) -> Answer {
    let mut answer = Answer::error(401, "UNAUTHORIZED", "incorrect username or password");
    answer.user = user;
    answer
}
