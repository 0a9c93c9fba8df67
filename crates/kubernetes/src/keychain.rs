//! The option itself: what a lookup answers from the synced secrets.

use std::collections::{HashMap, HashSet, VecDeque};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use parking_lot::{Mutex, RwLock};
use soci_auth::keychain::{
    Candidate, CandidateId, Finding, Keychain, KeychainError, Lookup, Outcome, Rejected,
};
use soci_auth::{AuthBoard, CredentialScope, Fingerprint};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::object::PullSecret;
use crate::secret::{Payload, SecretType};
use crate::settings::Settings;
use crate::store::{Match, Secret, SecretId, SecretStore};

/// The most credentials of this option that one request may present.
const MAX_CANDIDATES: usize = 5;
/// For how many repositories it is remembered which credential was accepted last.
const MAX_ACCEPTED: usize = 4096;

/// The Kubernetes secrets keychain. Dropping it stops the sync.
#[derive(Debug)]
pub struct SecretsKeychain {
    synced: Arc<Synced>,
    first_sync: Duration,
    started: Instant,
    accepted: Mutex<Accepted>,
    stop: CancellationToken,
}

/// What the sync knows, shared between its task and lookups.
#[derive(Debug)]
pub(crate) struct Synced {
    store: RwLock<SecretStore>,
    board: Arc<AuthBoard>,
    revoked: Duration,
    progress: watch::Sender<Progress>,
    trouble: Mutex<Trouble>,
}

#[derive(Debug, Default)]
struct Trouble {
    /// The last message that was logged, so that a lasting condition is logged once.
    logged: Option<String>,
    /// Since when the server denies permission.
    denied: Option<Instant>,
}

/// How far the sync is; for lookups, metrics and `explain`.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Selections still to be listed for the first time over this connection.
    pending: usize,
    /// When this connection began to be listed.
    begun: Option<Instant>,
    /// Whether everything was listed once since the process started.
    pub complete: bool,
    /// Whether the first attempt failed: nobody needs to wait for it.
    pub failed: bool,
    /// When the server last said anything useful.
    pub last_success: Option<Instant>,
    /// What is wrong at present, without any secret.
    pub trouble: Option<String>,
}

#[derive(Debug, Default)]
struct Accepted {
    by_repository: HashMap<(String, String), Fingerprint>,
    order: VecDeque<(String, String)>,
}

impl SecretsKeychain {
    /// Starts to sync, in a task of its own, and returns at once. Must be called inside a tokio runtime.
    pub fn start(settings: Settings, board: Arc<AuthBoard>) -> Arc<Self> {
        let stop = CancellationToken::new();
        let synced = Arc::new(Synced {
            store: RwLock::default(),
            board,
            revoked: settings.timing.revoked,
            progress: watch::Sender::default(),
            trouble: Mutex::default(),
        });
        let first_sync = settings.timing.first_sync;
        tokio::spawn(crate::watch::run(synced.clone(), settings, stop.clone()));
        Arc::new(Self { synced, first_sync, started: Instant::now(), accepted: Mutex::default(), stop })
    }

    /// Returns the number of secrets held.
    pub fn len(&self) -> usize {
        self.synced.store.read().len()
    }

    /// Whether no secret is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns how far the sync is.
    pub fn progress(&self) -> Progress {
        self.synced.progress.borrow().clone()
    }

    /// Returns for how long the secrets were not known to be what the API server has: zero while they are followed, else
    /// since it was last heard of, or since the start.
    pub fn behind(&self) -> Duration {
        let progress = self.synced.progress.borrow();
        match progress.complete && progress.trouble.is_none() {
            true => Duration::ZERO,
            false => progress.last_success.unwrap_or(self.started).elapsed(),
        }
    }

    /// Waits until the first sync ended, one way or the other, at most until [`Timing::first_sync`] after the start.
    ///
    /// [`Timing::first_sync`]: crate::settings::Timing::first_sync
    pub async fn ready(&self) {
        let deadline = tokio::time::Instant::from_std(self.started + self.first_sync);
        let mut progress = self.synced.progress.subscribe();
        let settled = progress.wait_for(|progress| progress.complete || progress.failed);
        // Neither a passed deadline nor an ended sync is a reason to fail: the option is empty then.
        let _ = tokio::time::timeout_at(deadline, settled).await;
    }

    fn find(&self, scope: &CredentialScope) -> Lookup {
        let host = scope.identity();
        let repository = scope.image.repository();
        let preferred =
            self.accepted.lock().by_repository.get(&(host.clone(), repository.to_owned())).copied();
        let store = self.synced.store.read();
        // One more than may be presented, so that the accepted one can be moved to the front of them.
        let mut found =
            store.lookup(&host, repository, scope.namespace.as_deref(), 4 * MAX_CANDIDATES, |_| false);
        if let Some(preferred) = preferred
            && let Some(at) = found.iter().position(|found| found.credential.fingerprint() == preferred)
        {
            found[..=at].rotate_right(1);
        }
        let total = store.len();
        drop(store);
        let candidate = |found: &Match| {
            Candidate::new(
                format!("secret {}/{}", found.id.namespace, found.id.name),
                found.credential.clone(),
            )
            .aged(age(found.created))
        };
        let mut candidates: Vec<Candidate> = Vec::new();
        for candidate in found.iter().map(candidate) {
            if candidates.iter().all(|known| known.id.fingerprint != candidate.id.fingerprint) {
                candidates.push(candidate);
            }
        }
        let mut findings =
            vec![Finding(format!("{total} secrets synced, {} match {}", found.len(), scope.image.name()))];
        findings.extend(found.iter().take(MAX_CANDIDATES).map(|found| {
            let slash = if found.key.path.is_empty() { "" } else { "/" };
            Finding(format!(
                "secret {}/{}: key {}{slash}{}",
                found.id.namespace, found.id.name, found.key.host, found.key.path
            ))
        }));
        findings.extend(self.synced.progress.borrow().trouble.clone().map(Finding));
        Lookup { candidates, findings }
    }
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

    async fn lookup(&self, scope: &CredentialScope, _rejected: &Rejected) -> Result<Lookup, KeychainError> {
        self.ready().await;
        let lookup = self.find(scope);
        let progress = self.synced.progress.borrow();
        match &progress.trouble {
            Some(trouble) if lookup.candidates.is_empty() && !progress.complete => {
                Err(KeychainError(trouble.clone()))
            }
            _ => Ok(lookup),
        }
    }

    async fn peek(&self, scope: &CredentialScope) -> Option<Lookup> {
        self.synced.progress.borrow().complete.then(|| self.find(scope))
    }

    fn verdict(&self, scope: &CredentialScope, candidate: &CandidateId, outcome: Outcome) {
        let key = (scope.identity(), scope.image.repository().to_owned());
        let mut accepted = self.accepted.lock();
        match outcome {
            Outcome::Accepted => {
                if accepted.by_repository.insert(key.clone(), candidate.fingerprint).is_none() {
                    accepted.order.push_back(key);
                }
                if accepted.order.len() > MAX_ACCEPTED
                    && let Some(oldest) = accepted.order.pop_front()
                {
                    accepted.by_repository.remove(&oldest);
                }
            }
            Outcome::Rejected => {
                if accepted.by_repository.get(&key) == Some(&candidate.fingerprint) {
                    accepted.by_repository.remove(&key);
                    accepted.order.retain(|known| *known != key);
                }
            }
        }
    }

    fn max_candidates(&self) -> usize {
        MAX_CANDIDATES
    }
}

impl Synced {
    /// A connection was made; `selections` lists are under way.
    pub(crate) fn begin(&self, selections: usize) {
        self.progress.send_modify(|progress| {
            progress.pending = selections;
            progress.begun = Some(Instant::now());
        });
    }

    /// There is nothing to connect to yet: lookups need not wait.
    pub(crate) fn initial_attempt_failed(&self) {
        self.progress.send_if_modified(|progress| !std::mem::replace(&mut progress.failed, true));
    }

    /// Takes a secret. Returns its id unless it has no name. A malformed one replaces what was there by nothing.
    pub(crate) fn apply(&self, object: PullSecret, kind: SecretType) -> Option<SecretId> {
        let id = id_of(&object)?;
        let created = object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        let payload = object.data.as_ref().and_then(|data| data.get(kind.data_key())?.as_deref());
        let payload = match payload {
            Some(base64) => Payload::parse(base64, kind),
            None => Err(crate::secret::SecretError::Missing(kind.data_key())),
        };
        let mut store = self.store.write();
        let mut hosts = store.hosts(&id);
        let changed = match payload {
            Ok(payload) => {
                hosts.extend(payload.entries.iter().map(|entry| entry.key.host.clone()));
                store.apply(Secret { id: id.clone(), created, kind, payload })
            }
            Err(error) => {
                tracing::warn!(namespace = %id.namespace, name = %id.name, %error, "pull secret cannot be used");
                store.remove(&id)
            }
        };
        drop(store);
        if changed {
            self.bump(hosts);
        }
        Some(id)
    }

    /// Forgets a secret.
    pub(crate) fn delete(&self, object: &PullSecret) {
        let Some(id) = id_of(object) else { return };
        let mut store = self.store.write();
        let hosts = store.hosts(&id);
        store.remove(&id);
        drop(store);
        self.bump(hosts);
    }

    /// A list ended: what it did not have is gone.
    pub(crate) fn listed(&self, namespace: Option<&str>, kind: SecretType, seen: &HashSet<SecretId>) {
        let mut store = self.store.write();
        let gone = store.retain(namespace, kind, seen);
        let total = store.len();
        drop(store);
        if !gone.is_empty() {
            self.board.bump_all();
        }
        *self.trouble.lock() = Trouble::default();
        let mut first = None;
        self.progress.send_modify(|progress| {
            progress.pending = progress.pending.saturating_sub(1);
            progress.last_success = Some(Instant::now());
            progress.trouble = None;
            if progress.pending == 0 && !progress.complete {
                progress.complete = true;
                first = Some(progress.begun.map(|begun| begun.elapsed()).unwrap_or_default());
            }
        });
        if let Some(elapsed) = first {
            let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(secrets = total, elapsed_ms, "pull secrets are synced");
            self.board.bump_all();
        }
    }

    /// The server sent a change: what was wrong is over.
    pub(crate) fn heard(&self) {
        *self.trouble.lock() = Trouble::default();
        self.progress.send_if_modified(|progress| {
            progress.last_success = Some(Instant::now());
            progress.trouble.take().is_some()
        });
    }

    /// Something failed that will be tried again.
    pub(crate) fn failed(&self, server: &str, error: &dyn Error) {
        let mut text = format!("{server}: {error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            let message = error.to_string();
            if !text.ends_with(&message) {
                text = format!("{text}: {message}");
            }
            cause = error.source();
        }
        self.report(text);
    }

    /// The server knows us and says no.
    pub(crate) fn denied(&self, server: &str, kind: SecretType, namespace: Option<&str>) {
        let place =
            namespace.map_or_else(|| "in all namespaces".to_owned(), |namespace| format!("in {namespace}"));
        self.report(format!(
            "{server}: not permitted to list and watch secrets of type {} {place}; grant a ClusterRole with resources \
             [\"secrets\"] and verbs [\"list\", \"watch\"] to the user of the kubeconfig",
            kind.name()
        ));
        let since = *self.trouble.lock().denied.get_or_insert_with(Instant::now);
        if since.elapsed() > self.revoked && !self.store.read().is_empty() {
            tracing::warn!("permission to read secrets stays revoked; what was synced is dropped");
            self.store.write().clear();
            self.board.bump_all();
        }
    }

    fn report(&self, text: String) {
        let mut trouble = self.trouble.lock();
        if trouble.logged.as_ref() != Some(&text) {
            tracing::warn!(error = %text, "pull secrets cannot be synced; it is tried again");
            trouble.logged = Some(text.clone());
        }
        drop(trouble);
        self.progress.send_modify(|progress| {
            if progress.complete && progress.trouble.is_none() {
                // Until this moment it was followed.
                progress.last_success = Some(Instant::now());
            }
            progress.failed = true;
            progress.trouble = Some(text);
        });
    }

    fn bump(&self, hosts: Vec<String>) {
        let (patterns, literal): (Vec<_>, Vec<_>) =
            hosts.into_iter().partition(|host| host.contains(['*', '?']));
        if patterns.is_empty() {
            literal.iter().for_each(|host| self.board.bump(host));
        } else {
            self.board.bump_all();
        }
    }
}

fn id_of(object: &PullSecret) -> Option<SecretId> {
    let namespace = object.metadata.namespace.as_deref()?.into();
    let name = object.metadata.name.as_deref()?.into();
    Some(SecretId { namespace, name })
}
