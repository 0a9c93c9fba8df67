//! The option itself: what a lookup answers from the synced secrets.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use parking_lot::Mutex;
use soci_auth::keychain::{
    Candidate, CandidateId, Finding, Keychain, KeychainError, Lookup, Outcome, Rejected,
};
use soci_auth::{AuthBoard, CredentialScope, Fingerprint};
use tokio_util::sync::CancellationToken;

use crate::matching::SecretKey;
use crate::settings::Settings;
use crate::store::{Match, SecretId};
use crate::synced::{Progress, Synced};

/// The most credentials of this option that one request may present.
const MAX_CANDIDATES: usize = 5;
/// For how many repositories it is remembered which secret was accepted last.
const MAX_ACCEPTED: usize = 4096;

/// The Kubernetes secrets keychain. Dropping it stops the sync.
#[derive(Debug)]
pub struct SecretsKeychain {
    synced: Arc<Synced>,
    first_sync: Duration,
    heard: Duration,
    started: Instant,
    accepted: Mutex<Accepted>,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Accepted {
    by_repository: HashMap<(String, String), CandidateId>,
    order: VecDeque<(String, String)>,
}

impl SecretsKeychain {
    /// Starts to sync, in a task of its own, and returns at once. Must be called inside a tokio runtime.
    pub fn start(settings: Settings, board: Arc<AuthBoard>) -> Arc<Self> {
        let stop = CancellationToken::new();
        let synced = Arc::new(Synced::new(board, settings.timing.revoked));
        let (first_sync, heard) = (settings.timing.first_sync, settings.timing.heard);
        tokio::spawn(crate::watch::run(synced.clone(), settings, stop.clone()));
        Arc::new(Self {
            synced,
            first_sync,
            heard,
            started: Instant::now(),
            accepted: Mutex::default(),
            stop,
        })
    }

    /// Returns the number of secrets held.
    pub fn len(&self) -> usize {
        self.synced.store().len()
    }

    /// Whether no secret is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns how far the sync is.
    pub fn progress(&self) -> Progress {
        self.synced.progress().clone()
    }

    /// Returns for how long the secrets were not known to be what the API server has: zero while they are followed and the
    /// server was heard of a moment ago, else since it was last heard of, or since the start.
    pub fn behind(&self) -> Duration {
        let progress = self.synced.progress();
        let silent = progress.last_success.unwrap_or(self.started).elapsed();
        match progress.complete && progress.trouble.is_none() && silent <= self.heard {
            true => Duration::ZERO,
            false => silent,
        }
    }

    /// Waits until the first sync ended, one way or the other, at most until [`Timing::first_sync`] after the start.
    ///
    /// [`Timing::first_sync`]: crate::settings::Timing::first_sync
    pub async fn ready(&self) {
        let deadline = tokio::time::Instant::from_std(self.started + self.first_sync);
        let mut progress = self.synced.subscribe();
        let settled = progress.wait_for(|progress| progress.complete || progress.failed);
        // Neither a passed deadline nor an ended sync is a reason to fail: the option is empty then.
        let _ = tokio::time::timeout_at(deadline, settled).await;
    }

    /// Offers what the secret accepted last holds now, then those by rank that were not refused lately, then some that were:
    /// an option that has a credential keeps it, however often that is refused.
    fn find(&self, scope: &CredentialScope, rejected: &Rejected) -> Lookup {
        let host = scope.identity();
        let repository = scope.image.repository();
        let repository_key = (host.clone(), repository.to_owned());
        let preferred = self.accepted.lock().by_repository.get(&repository_key).cloned();
        let store = self.synced.store();
        let matching = store.matching(&host, repository);
        let mut seen: HashSet<Fingerprint> = HashSet::new();
        let (mut known, mut accepted) = (preferred.is_none(), Vec::new());
        let (mut fresh, mut refused) = (Vec::new(), Vec::new());
        for found in matching.ranked(scope.namespace.as_deref()) {
            let print = found.entry.fingerprint;
            if fresh.len() >= MAX_CANDIDATES && known {
                break;
            }
            if !seen.insert(print) {
                continue;
            }
            // Its password may have been rotated since.
            let is_preferred = preferred
                .as_ref()
                .is_some_and(|preferred| preferred.fingerprint == print || names(&preferred.entry, found.id));
            known |= is_preferred;
            if rejected.holds(print) || self.synced.was_refused(&host, repository, print) {
                refused.push(found);
            } else if is_preferred {
                accepted.push(found);
            } else if fresh.len() < MAX_CANDIDATES {
                fresh.push(found);
            }
        }
        if !known {
            self.accepted.lock().forget(&repository_key);
        }
        refused.truncate(MAX_CANDIDATES);
        let offered: Vec<Match> = accepted.into_iter().chain(fresh).chain(refused).collect();
        let candidate = |found: &Match| Candidate {
            id: CandidateId { entry: entry(found.id), fingerprint: found.entry.fingerprint },
            credential: found.entry.credential.clone(),
            age: age(found.created),
        };
        let candidates = offered.iter().map(candidate).collect();
        let mut findings = vec![Finding(format!(
            "{} secrets synced, {} of their keys match {}",
            store.len(),
            matching.count(),
            scope.image.name()
        ))];
        findings.extend(offered.iter().take(MAX_CANDIDATES).map(|Match { id, entry, .. }| {
            let slash = if entry.key.path.is_empty() { "" } else { "/" };
            let SecretKey { host, path } = &entry.key;
            Finding(format!("{}: key {host}{slash}{path}", self::entry(id)))
        }));
        drop(offered);
        drop(store);
        findings.extend(self.synced.progress().trouble.clone().map(Finding));
        Lookup { candidates, findings }
    }
}

impl Accepted {
    fn note(&mut self, repository: (String, String), candidate: &CandidateId) {
        if self.by_repository.get(&repository) == Some(candidate) {
            return;
        }
        if self.by_repository.insert(repository.clone(), candidate.clone()).is_none() {
            self.order.push_back(repository);
        }
        if self.order.len() > MAX_ACCEPTED
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_repository.remove(&oldest);
        }
    }

    fn forget(&mut self, repository: &(String, String)) {
        if self.by_repository.remove(repository).is_some() {
            self.order.retain(|known| known != repository);
        }
    }
}

/// Returns what a secret is called for people.
fn entry(id: &SecretId) -> String {
    format!("secret {}/{}", id.namespace, id.name)
}

/// Whether this is what the secret is called.
fn names(entry: &str, id: &SecretId) -> bool {
    let rest = entry.strip_prefix("secret ").and_then(|rest| rest.strip_prefix(&*id.namespace));
    rest.and_then(|rest| rest.strip_prefix('/')) == Some(&*id.name)
}

/// Returns for how long a secret has existed by this machine's clock.
fn age(created: i64) -> Option<Duration> {
    let created = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(created).ok()?))?;
    SystemTime::now().duration_since(created).ok()
}

impl Drop for SecretsKeychain {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[async_trait]
impl Keychain for SecretsKeychain {
    fn name(&self) -> &'static str {
        "kubernetes-secrets"
    }

    async fn lookup(&self, scope: &CredentialScope, rejected: &Rejected) -> Result<Lookup, KeychainError> {
        self.ready().await;
        let lookup = self.find(scope, rejected);
        let progress = self.synced.progress();
        match &progress.trouble {
            Some(trouble) if lookup.candidates.is_empty() && (!progress.complete || self.is_empty()) => {
                Err(KeychainError(trouble.clone()))
            }
            _ => Ok(lookup),
        }
    }

    async fn peek(&self, scope: &CredentialScope) -> Option<Lookup> {
        // Looked at before the find, which looks again: a lock that is held twice may wait for a writer in between.
        let complete = self.synced.progress().complete;
        complete.then(|| self.find(scope, &Rejected::default()))
    }

    fn remedy(&self) -> &'static str {
        "check the pull secrets (kubectl get secrets -A --field-selector type=kubernetes.io/dockerconfigjson)"
    }

    fn verdict(&self, scope: &CredentialScope, candidate: &CandidateId, outcome: Outcome) {
        let key = (scope.identity(), scope.image.repository().to_owned());
        // A secret whose credential is refused stays the one to ask first: it is there that the next password comes.
        if outcome == Outcome::Accepted {
            self.accepted.lock().note(key, candidate);
        }
    }

    fn max_candidates(&self) -> usize {
        MAX_CANDIDATES
    }
}
