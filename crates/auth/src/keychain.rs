//! One option of the contract (Docker config, CRI, Kubernetes secrets, `--user`): where credentials come from.
//!
//! A keychain answers a lookup with *all* its candidates for the scope, best first. It is told which were refused in
//! this request (so that a memo is bypassed) but does not have to leave them out: the [chain](crate::chain) does, since
//! "has only refused ones" and "has none" must not be confused — only the second lets the next option be asked.

pub mod cri;
pub mod docker_config;
pub mod docker_file;
pub mod explicit;
pub(crate) mod helper;
mod key_match;

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use crate::{Credential, CredentialScope, Fingerprint};

/// One option of the contract.
#[async_trait]
pub trait Keychain: Send + Sync + fmt::Debug {
    /// Returns the option's name: `docker-config`, `cri`, `kubernetes-secrets`, `--user`.
    fn name(&self) -> &'static str;

    /// Returns what the option has for `scope`, best first; no candidate means "not mine".
    ///
    /// `rejected` are the credentials that were refused in this request: an answer that is remembered from before their
    /// refusal is asked for anew.
    ///
    /// # Errors
    /// [`KeychainError`] when the option cannot tell: an error is not a credential, the next option is asked.
    async fn lookup(&self, scope: &CredentialScope, rejected: &Rejected) -> Result<Lookup, KeychainError>;

    /// Returns the same where it can be told at once, without starting a process or waiting for anybody.
    ///
    /// Nothing means "cannot tell". This serves the first, unchallenged request, which must not wait for a helper.
    async fn peek(&self, _scope: &CredentialScope) -> Option<Lookup> {
        None
    }

    /// Returns what a person does so that this option has a credential.
    fn remedy(&self) -> &'static str {
        "log in to the registry (docker login, nerdctl login) or configure a credential helper"
    }

    /// Takes notice of what the registry said about a candidate.
    fn verdict(&self, scope: &CredentialScope, candidate: &CandidateId, outcome: Outcome);

    /// Returns how many different candidates of this option one request may present.
    fn max_candidates(&self) -> usize {
        4
    }
}

/// A credential that an option offers.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Which one it is.
    pub id: CandidateId,
    /// What to present.
    pub credential: Credential,
    /// For how long the entry has been there, where the option knows: since the file was written, the helper answered,
    /// the pull came, the secret was created.
    pub age: Option<Duration>,
}

/// Names a candidate: the entry it comes from and the fingerprint of its credential.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CandidateId {
    /// The entry inside the option, for people: `auths key reg.example`, `docker-credential-ecr-login`.
    pub entry: String,
    /// The credential's fingerprint.
    pub fingerprint: Fingerprint,
}

/// The credentials that were refused in one request.
#[derive(Debug, Clone, Default)]
pub struct Rejected(HashSet<Fingerprint>);

/// What an option answered.
#[derive(Debug, Clone, Default)]
pub struct Lookup {
    /// Candidates, best first.
    pub candidates: Vec<Candidate>,
    /// What was looked at, for `soci auth explain`.
    pub findings: Vec<Finding>,
}

/// One line of what an option looked at. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding(pub String);

/// What the registry said about a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// A request that carried it was served.
    Accepted,
    /// It was refused.
    Rejected,
}

/// An option that cannot tell what it has. The message never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeychainError(pub String);

impl Candidate {
    /// Returns `credential`, found in `entry`.
    pub fn new(entry: impl Into<String>, credential: Credential) -> Self {
        let fingerprint = credential.fingerprint();
        Self { id: CandidateId { entry: entry.into(), fingerprint }, credential, age: None }
    }

    /// Returns the same with its age.
    pub fn aged(self, age: Option<Duration>) -> Self {
        Self { age, ..self }
    }
}

impl Rejected {
    /// Whether this candidate's credential was refused, whichever entry it comes from.
    pub fn contains(&self, candidate: &CandidateId) -> bool {
        self.holds(candidate.fingerprint)
    }

    /// Whether a credential with this fingerprint was refused.
    pub fn holds(&self, fingerprint: Fingerprint) -> bool {
        self.0.contains(&fingerprint)
    }

    /// Whether nothing was refused yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Leaves only those of which this is so.
    pub(crate) fn retain(&mut self, still: impl Fn(Fingerprint) -> bool) {
        self.0.retain(|fingerprint| still(*fingerprint));
    }

    /// Adds one. The set is bounded by the bound on refusals of a request.
    pub fn add(&mut self, fingerprint: Fingerprint) {
        self.0.insert(fingerprint);
    }
}

impl Lookup {
    /// Returns an answer without candidate.
    pub fn empty(finding: impl Into<String>) -> Self {
        Self { candidates: Vec::new(), findings: vec![Finding(finding.into())] }
    }

    /// Returns an answer with one candidate.
    pub fn one(candidate: Candidate, finding: impl Into<String>) -> Self {
        Self { candidates: vec![candidate], findings: vec![Finding(finding.into())] }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
