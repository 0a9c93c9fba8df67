//! Scripted counterparts for the tests of this crate.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, Request, Response, StatusCode};
use parking_lot::Mutex;

use crate::{
    Candidate, CandidateId, Credential, CredentialScope, Keychain, KeychainError, Lookup, Outcome, Rejected,
    TokenHttp, TokenHttpError,
};

/// A token endpoint that answers by script and keeps what it was sent.
pub(crate) struct Script {
    answers: Mutex<VecDeque<Answer>>,
    otherwise: Option<Rule>,
    sent: Mutex<Vec<Sent>>,
}

type Rule = Box<dyn Fn(&Sent) -> (u16, String) + Send + Sync>;

pub(crate) type Answer = Result<(u16, String), String>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) line: String,
    pub(crate) authorization: Option<String>,
    pub(crate) body: String,
}

pub(crate) fn answer(status: u16, body: &str) -> Answer {
    Ok((status, body.to_owned()))
}

impl Script {
    pub(crate) fn new(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self { answers: Mutex::new(answers.into_iter().collect()), otherwise: None, sent: Mutex::default() }
    }

    /// Answers each request by `rule`.
    pub(crate) fn by(rule: impl Fn(&Sent) -> (u16, String) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { otherwise: Some(Box::new(rule)), ..Self::new([]) })
    }

    pub(crate) fn sent(&self) -> Vec<Sent> {
        self.sent.lock().clone()
    }
}

#[async_trait]
impl TokenHttp for Script {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, TokenHttpError> {
        let sent = Sent {
            line: format!("{} {}", request.method(), request.uri()),
            authorization: request
                .headers()
                .get(AUTHORIZATION)
                .map(|value| value.to_str().unwrap().to_owned()),
            body: String::from_utf8(request.body().to_vec()).unwrap(),
        };
        self.sent.lock().push(sent.clone());
        tokio::task::yield_now().await;
        let next = self.answers.lock().pop_front();
        let (status, body) = match (next, &self.otherwise) {
            (Some(answer), _) => answer.map_err(TokenHttpError)?,
            (None, Some(rule)) => rule(&sent),
            (None, None) => panic!("no answer left for {sent:?}"),
        };
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        Ok(response)
    }

    fn detached(self: Arc<Self>) -> Option<Arc<dyn TokenHttp>> {
        Some(self)
    }
}

/// An option whose content a test sets, and that keeps what happens to it.
#[derive(Debug)]
pub(crate) struct ScriptedKeychain {
    name: &'static str,
    remedy: &'static str,
    pub(crate) content: Mutex<Result<Vec<Credential>, String>>,
    pub(crate) lookups: Mutex<usize>,
    pub(crate) verdicts: Mutex<Vec<(CandidateId, Outcome)>>,
}

impl ScriptedKeychain {
    pub(crate) fn new(name: &'static str, content: Vec<Credential>) -> Arc<Self> {
        let content = Mutex::new(Ok(content));
        let remedy = match name {
            "cri" => "pull again",
            "kubernetes-secrets" => "check the secrets",
            _ => "log in",
        };
        Arc::new(Self { name, remedy, content, lookups: Mutex::default(), verdicts: Mutex::default() })
    }

    pub(crate) fn failing(name: &'static str, error: &str) -> Arc<Self> {
        let keychain = Self::new(name, Vec::new());
        *keychain.content.lock() = Err(error.to_owned());
        keychain
    }

    pub(crate) fn set(&self, content: Vec<Credential>) {
        *self.content.lock() = Ok(content);
    }

    fn find(&self) -> Result<Lookup, KeychainError> {
        let content = self.content.lock().clone().map_err(KeychainError)?;
        let candidate = |(at, credential)| Candidate::new(format!("entry {at}"), credential);
        let mut lookup = Lookup::empty(format!("{} entries", content.len()));
        lookup.candidates = content.into_iter().enumerate().map(candidate).collect();
        Ok(lookup)
    }
}

#[async_trait]
impl Keychain for ScriptedKeychain {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn lookup(&self, _scope: &CredentialScope, _rejected: &Rejected) -> Result<Lookup, KeychainError> {
        *self.lookups.lock() += 1;
        self.find()
    }

    async fn peek(&self, _scope: &CredentialScope) -> Option<Lookup> {
        self.find().ok()
    }

    fn remedy(&self) -> &'static str {
        self.remedy
    }

    fn verdict(&self, _scope: &CredentialScope, candidate: &CandidateId, outcome: Outcome) {
        self.verdicts.lock().push((candidate.clone(), outcome));
    }
}

/// Returns headers with these challenges.
pub(crate) fn challenges(values: &[&str]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for value in values {
        headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
    }
    headers
}

/// Installs `docker-credential-<suffix>` in `directory`, a shell script that runs there. It is written by another process, so
/// that no child of ours inherits the writable descriptor: the kernel refuses to run a file that is open for writing.
pub(crate) fn install_helper(directory: &Path, suffix: &str, body: &str) {
    let mut writer = Command::new("/bin/sh")
        .args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"])
        .arg(directory.join(format!("docker-credential-{suffix}")))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let script = format!("#!/bin/sh\ncd '{}'\n{body}\n", directory.display());
    writer.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(writer.wait().unwrap().success());
}
