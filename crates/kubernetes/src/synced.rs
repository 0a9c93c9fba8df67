//! What the sync knows: the secrets, how far it is, and what is wrong with which part of it.
//!
//! Several selections are followed at once, and each can be in trouble by itself: one namespace may be closed while the
//! others are followed. So trouble is kept for each, and for the connection they share, and is over for one when that
//! one was listed or its watch was opened.
//!
//! Locks are taken one after the other and never held across an await.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use soci_auth::{AuthBoard, Fingerprint, redact};
use soci_oci::with_causes;
use tokio::sync::watch;

use crate::change::Touched;
use crate::failure::Failure;
use crate::object::PullSecret;
use crate::secret::{MAX_ENTRIES, Payload, SecretError, SecretType};
use crate::selection::Selection;
use crate::store::{Applied, MAX_PAYLOAD_BYTES, Secret, SecretId, SecretStore};

/// For how many secrets it is remembered that their fault was told.
const MAX_FAULTY: usize = 4096;

/// What the sync knows, shared between its task and lookups.
#[derive(Debug)]
pub(crate) struct Synced {
    store: RwLock<SecretStore>,
    board: Arc<AuthBoard>,
    /// How long values are served after permission was revoked.
    revoked: Duration,
    progress: watch::Sender<Progress>,
    parts: Mutex<Parts>,
    /// The version of each secret that something is wrong with, as far as it was told.
    faulty: Mutex<HashMap<SecretId, String>>,
}

#[derive(Debug, Default)]
struct Parts {
    /// What is wrong with the connection, or with finding one.
    connection: Option<String>,
    selections: BTreeMap<Selection, Part>,
}

/// The state of one selection.
#[derive(Debug, Default)]
struct Part {
    /// Whether it was listed since the process started.
    listed: bool,
    trouble: Option<String>,
    /// Since when the server denies permission without a break.
    denied: Option<Instant>,
}

/// How far the sync is; for lookups, metrics and `explain`.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// When the first connection began to be listed.
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

impl Parts {
    /// What is wrong, if anything is.
    fn trouble(&self) -> Option<String> {
        self.connection.clone().or_else(|| self.selections.values().find_map(|part| part.trouble.clone()))
    }
}

impl Synced {
    /// Nothing is known yet.
    pub(crate) fn new(board: Arc<AuthBoard>, revoked: Duration) -> Self {
        Self {
            store: RwLock::default(),
            board,
            revoked,
            progress: watch::Sender::default(),
            parts: Mutex::default(),
            faulty: Mutex::default(),
        }
    }

    /// Whether the registry refused a credential within the last minute.
    pub(crate) fn was_refused(&self, host: &str, repository: &str, credential: Fingerprint) -> bool {
        self.board.was_refused(host, repository, credential)
    }

    pub(crate) fn store(&self) -> RwLockReadGuard<'_, SecretStore> {
        self.store.read()
    }

    pub(crate) fn progress(&self) -> watch::Ref<'_, Progress> {
        self.progress.borrow()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// A connection was made; these are going to be followed over it.
    pub(crate) fn begin(&self, selections: &[Selection]) {
        let mut parts = self.parts.lock();
        for selection in selections {
            parts.selections.entry(selection.clone()).or_default();
        }
        drop(parts);
        self.progress.send_modify(|progress| {
            progress.begun.get_or_insert_with(Instant::now);
        });
    }

    /// Takes a secret. Returns its id unless it has no name. A malformed one replaces what was there by nothing.
    pub(crate) fn apply(&self, object: PullSecret, selection: &Selection) -> Option<SecretId> {
        let kind = selection.kind;
        let id = id_of(&object, kind)?;
        let created = object.metadata.created();
        let payload = object.data.as_ref().and_then(|data| data.get(kind.data_key())?.as_deref());
        let payload = match payload {
            Some(base64) => Payload::parse(base64, kind),
            None => Err(SecretError::Missing(kind.data_key())),
        };
        let version = object.metadata.resource_version.as_deref().unwrap_or_default();
        let mut touched = Touched::default();
        let mut store = self.store.write();
        let (change, fault) = match payload {
            Ok(payload) => {
                let beyond = payload.beyond;
                let (applied, change) = store.apply(Secret { id: id.clone(), created, payload });
                let cut = (beyond > 0).then_some(Fault::TooManyEntries(beyond));
                (change, if applied == Applied::Full { Some(Fault::Full) } else { cut })
            }
            Err(error) => (store.remove(&id).unwrap_or_default(), Some(Fault::Unusable(error))),
        };
        touched.add(&change);
        drop((change, store));
        self.complain(&id, version, fault);
        touched.tell(&self.board);
        Some(id)
    }

    /// Logs what is wrong with a secret, once for each version of it: it comes again with every list.
    fn complain(&self, id: &SecretId, version: &str, fault: Option<Fault>) {
        let mut faulty = self.faulty.lock();
        let Some(fault) = fault else {
            faulty.remove(id);
            return;
        };
        if faulty.len() >= MAX_FAULTY && !faulty.contains_key(id) {
            faulty.clear();
        }
        if faulty.insert(id.clone(), version.to_owned()).as_deref() == Some(version) {
            return;
        }
        drop(faulty);
        tracing::warn!(namespace = %id.namespace, name = %id.name, error = %fault, "pull secret cannot be used");
    }

    /// Forgets a secret, which had the selection's type.
    pub(crate) fn delete(&self, object: &PullSecret, selection: &Selection) {
        let Some(id) = id_of(object, selection.kind) else { return };
        self.faulty.lock().remove(&id);
        self.remove(&[id]);
    }

    /// A list ended: what it did not have is gone.
    pub(crate) fn listed(&self, selection: &Selection, seen: &HashSet<SecretId>) {
        self.retain(selection, seen);
        let mut parts = self.parts.lock();
        parts.selections.entry(selection.clone()).or_default().listed = true;
        let complete = parts.selections.values().all(|part| part.listed);
        drop(parts);
        self.well(selection);
        let mut first = None;
        self.progress.send_modify(|progress| {
            if complete && !progress.complete {
                progress.complete = true;
                first = Some(progress.begun.map(|begun| begun.elapsed()).unwrap_or_default());
            }
        });
        if let Some(elapsed) = first {
            let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(secrets = self.store.read().len(), elapsed_ms, "pull secrets are synced");
            self.board.bump_all();
        }
    }

    /// This selection is followed: what was wrong with it, and with the connection, is over.
    pub(crate) fn well(&self, selection: &Selection) {
        let mut parts = self.parts.lock();
        let connection = parts.connection.take();
        let part = parts.selections.get_mut(selection);
        let own = part.and_then(|part| {
            part.denied = None;
            part.trouble.take()
        });
        let trouble = parts.trouble();
        drop(parts);
        if trouble.is_none() && (connection.is_some() || own.is_some()) && self.progress.borrow().complete {
            tracing::info!("pull secrets are followed again");
        }
        self.progress.send_modify(|progress| {
            progress.last_success = Some(Instant::now());
            progress.trouble = trouble;
        });
    }

    /// There is nothing to connect to, or it cannot be connected to; `what` says so.
    pub(crate) fn unconnected(&self, what: String) {
        let mut parts = self.parts.lock();
        let new = parts.connection.as_ref() != Some(&what);
        parts.connection = Some(what.clone());
        self.report(parts, what, new, true);
    }

    /// Something failed with a selection that will be tried again.
    pub(crate) fn failed(&self, selection: &Selection, server: &str, failure: &Failure) {
        let text = told(server, failure, failure.advice());
        self.trouble(selection, text, !matches!(failure, Failure::Silent { .. }));
    }

    /// The server knows us and says no. Returns whether the selection's secrets were dropped for it, so that they have to
    /// be listed when permission is back.
    pub(crate) fn denied(&self, selection: &Selection, server: &str) -> bool {
        self.trouble(
            selection,
            format!(
                "{server}: not permitted to list and watch {selection}; grant a ClusterRole with resources \
                 [\"secrets\"] and verbs [\"list\", \"watch\"] to the user of the kubeconfig"
            ),
            true,
        );
        let mut parts = self.parts.lock();
        let part = parts.selections.entry(selection.clone()).or_default();
        let since = *part.denied.get_or_insert_with(Instant::now);
        drop(parts);
        if since.elapsed() <= self.revoked {
            return false;
        }
        if self.retain(selection, &HashSet::new()) > 0 {
            tracing::warn!(
                "permission stays revoked: the synced {selection} are dropped; grant list and watch to have them back"
            );
        }
        true
    }

    /// `until_now` says whether the selection was followed up to this moment, where nothing else was known to be wrong.
    fn trouble(&self, selection: &Selection, text: String, until_now: bool) {
        let mut parts = self.parts.lock();
        // The connection stands, as far as it got.
        parts.connection = None;
        let part = parts.selections.entry(selection.clone()).or_default();
        let new = part.trouble.as_ref() != Some(&text);
        part.trouble = Some(text.clone());
        self.report(parts, text, new, until_now);
    }

    /// Tells what is wrong; logs it where it is new, so that a lasting condition is logged once.
    fn report(&self, parts: parking_lot::MutexGuard<'_, Parts>, text: String, new: bool, until_now: bool) {
        let trouble = parts.trouble();
        drop(parts);
        if new {
            tracing::warn!(error = %text, "pull secrets cannot be synced; it is tried again");
        }
        self.progress.send_modify(|progress| {
            if until_now && progress.complete && progress.trouble.is_none() {
                progress.last_success = Some(Instant::now());
            }
            progress.failed = true;
            progress.trouble = trouble;
        });
    }

    /// Drops the secrets of a selection that are not in `seen`, and returns how many they were.
    fn retain(&self, selection: &Selection, seen: &HashSet<SecretId>) -> usize {
        let stale = self.store.read().stale(selection.namespace.as_deref(), selection.kind, seen);
        self.remove(&stale);
        stale.len()
    }

    fn remove(&self, ids: &[SecretId]) {
        let mut touched = Touched::default();
        let mut store = self.store.write();
        for id in ids {
            touched.add(&store.remove(id).unwrap_or_default());
        }
        drop(store);
        touched.tell(&self.board);
    }
}

/// What is wrong with one secret. Never quotes it.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0}; correct it, or delete it")]
    Unusable(SecretError),
    #[error(
        "it has {0} entries more than the {MAX_ENTRIES} that are kept of one secret; split it, or delete what nobody needs"
    )]
    TooManyEntries(usize),
    #[error("all of them together are over the limit of {MAX_PAYLOAD_BYTES} bytes; restrict namespaces")]
    Full,
}

/// One line from an error and its causes, without repeating what a cause says already, and without what an address may
/// hold of a login: that of a proxy is quoted by those who cannot use it. It ends with what to do.
pub(crate) fn told(place: &str, error: &dyn Error, advice: &str) -> String {
    redact::text(&format!("{place}: {}; {advice}", with_causes(error)))
}

fn id_of(object: &PullSecret, kind: SecretType) -> Option<SecretId> {
    let namespace = object.metadata.namespace.as_deref()?.into();
    let name = object.metadata.name.as_deref()?.into();
    Some(SecretId { namespace, name, kind })
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use serde_json::json;

    use super::*;

    fn selection(kind: SecretType) -> Selection {
        Selection { namespace: None, kind }
    }

    fn object(kind: SecretType, name: &str, auths: &serde_json::Value) -> PullSecret {
        let payload = match kind {
            SecretType::DockerConfigJson => json!({ "auths": auths }),
            SecretType::DockerCfg => auths.clone(),
        };
        let payload = base64::engine::general_purpose::STANDARD.encode(payload.to_string());
        serde_json::from_value(json!({
            "metadata": { "namespace": "n", "name": name, "resourceVersion": "1" },
            "data": { kind.data_key(): payload },
        }))
        .unwrap()
    }

    #[test]
    fn a_secret_that_is_made_anew_with_the_other_type_outlives_what_is_told_late_of_the_old_one() {
        let (new, old) = (SecretType::DockerCfg, SecretType::DockerConfigJson);
        let synced = Synced::new(Arc::new(AuthBoard::new()), Duration::ZERO);
        let auths = json!({ "reg.example": { "username": "u", "password": "p" } });
        synced.apply(object(new, "s", &auths), &selection(new));
        // The watch of the old one is behind: it was changed, it became malformed, it was deleted.
        synced.apply(object(old, "s", &auths), &selection(old));
        synced.apply(object(old, "s", &json!([])), &selection(old));
        synced.delete(&object(old, "s", &auths), &selection(old));
        assert_eq!(synced.store().len(), 1);
        synced.delete(&object(new, "s", &auths), &selection(new));
        assert_eq!(synced.store().len(), 0);
    }

    #[test]
    fn a_change_is_news_of_the_registries_whose_logins_changed() {
        let kind = SecretType::DockerConfigJson;
        let board = Arc::new(AuthBoard::new());
        let synced = Synced::new(Arc::clone(&board), Duration::ZERO);
        let login = |password: &str| json!({ "username": "u", "password": password });
        let auths = |pattern: &str, first: &str| {
            let mut auths: serde_json::Map<_, _> =
                (0..200).map(|at| (format!("r{at}.example"), login("same"))).collect();
            auths.insert("*.pattern.example".to_owned(), login(pattern));
            auths.insert("r0.example".to_owned(), login(first));
            serde_json::Value::Object(auths)
        };
        let apply = |name: &str, auths| synced.apply(object(kind, name, &auths), &selection(kind));
        let delete = |name: &str| synced.delete(&object(kind, name, &json!({})), &selection(kind));
        // Returns whether there was news of the first registry, and of another one.
        let news = |change: &dyn Fn()| {
            let hosts = ["r0.example", "r7.example"];
            let before = hosts.map(|host| board.generation(host));
            change();
            [0, 1].map(|at| board.generation(hosts[at]) > before[at])
        };
        assert_eq!(news(&|| drop(apply("s", auths("a", "a")))), [true, true], "all is new");
        assert_eq!(news(&|| drop(apply("s", auths("a", "b")))), [true, false], "one login of many");
        assert_eq!(news(&|| drop(apply("copy", auths("a", "b")))), [false, false], "one more copy");
        assert_eq!(news(&|| delete("s")), [false, false], "the copy is still there");
        assert_eq!(news(&|| drop(apply("copy", auths("b", "b")))), [true, true], "that of a pattern");
        assert_eq!(news(&|| delete("copy")), [true, true], "the last one");
        assert_eq!(news(&|| drop(apply("one", json!({ "r0.example": login("x") })))), [true, false]);
        assert_eq!(news(&|| drop(apply("one", json!({ "r7.example": login("x") })))), [true, true]);
    }
}
