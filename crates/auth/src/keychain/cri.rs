//! Credentials that the kubelet passes with `PullImage`, kept in memory only.
//!
//! A pull leaves its credential here *before* it is forwarded, pending, under the reference; a pull that succeeded
//! confirms it, one that failed demotes it. So a wrong credential never takes the place of one that works, and a pull
//! without any takes nothing away.
//!
//! The kubelet never sends a credential again after the pull. When one expires, a lookup goes on to what other pulls
//! of the same registry brought and had confirmed, newest first: pulling any image of that registry heals all of them.
//! A confirmed arrival therefore bumps the registry's generation, which wakes readers that wait.
//!
//! The kubelet removes images by id, not by reference: the answer of each pull says which id the reference became.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use soci_oci::ImageRef;

use super::{Candidate, CandidateId, Finding, Keychain, KeychainError, Lookup, Outcome, Rejected};
use crate::{AuthBoard, CredentialScope, Fingerprint};

mod auth_config;
mod state;

pub use auth_config::AuthConfig;
use auth_config::Useless;
use state::{Entry, Login, State};

/// The most different credentials of other references that a lookup offers.
const FROM_REGISTRY: usize = 8;

/// The option `cri`: what pulls brought.
#[derive(Debug)]
pub struct CriStore {
    state: Mutex<State>,
    board: Arc<AuthBoard>,
}

/// A pull under way. Dropped without being confirmed, it demotes what it brought.
#[derive(Debug)]
pub struct PullTicket {
    store: Arc<CriStore>,
    image: ImageRef,
    brought: Option<Login>,
    confirmed: bool,
}

impl CriStore {
    /// Returns an empty store that reports to `board`.
    pub fn new(board: Arc<AuthBoard>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), board })
    }

    /// Returns the number of references with a credential.
    pub fn len(&self) -> usize {
        self.state.lock().references.len()
    }

    /// Whether no pull has left a credential.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes what a pull brings, before it is forwarded. `None` when `image` is not a reference: such a pull is
    /// containerd's to refuse.
    pub fn begin(
        self: &Arc<Self>,
        image: &str,
        auth: Option<AuthConfig>,
        namespace: Option<String>,
    ) -> Option<PullTicket> {
        let image: ImageRef = image.parse().ok()?;
        if let Some(namespace) = &namespace {
            self.board.note_pull(&image.key(), namespace);
        }
        let login = |auth: AuthConfig| match auth.credential()? {
            Some(credential) => Ok(Some((credential, auth.server()?))),
            None => Ok(None),
        };
        let brought = match auth.map_or(Ok(None), login) {
            Ok(Some((credential, server))) => {
                let login = Login { fingerprint: credential.fingerprint(), server };
                let mut state = self.state.lock();
                state.insert(&image, credential, login.clone());
                state.bound(&self.board);
                Some(login)
            }
            Ok(None) => None,
            Err::<_, Useless>(error) => {
                tracing::warn!(
                    %image, %error,
                    "the login of a pull is not used; correct the pull secret or the credential provider that it is from"
                );
                None
            }
        };
        Some(PullTicket { store: self.clone(), image, brought, confirmed: false })
    }

    /// Forgets an image that containerd removed, named by id or by reference: all references of the same id go, but for
    /// what pulls under way have brought.
    pub fn removed(&self, image: &str) {
        let mut state = self.state.lock();
        let key = image.parse::<ImageRef>().ok().map(|image| image.key());
        let id = match state.images.contains_key(image) {
            true => Some(image.to_owned()),
            false => key
                .as_ref()
                .and_then(|key| state.references.get(key))
                .and_then(|found| found.image_id.clone()),
        };
        let keys = id.and_then(|id| state.images.remove(&id)).unwrap_or_default();
        for key in keys.into_iter().chain(key) {
            state.removed(&key);
        }
    }
}

impl PullTicket {
    /// Notes that containerd pulled the image, as `image_id` where it said so.
    pub fn confirm(mut self, image_id: Option<String>) {
        self.confirmed = true;
        let key = self.image.key();
        let mut state = self.store.state.lock();
        let arrived = self.brought.as_ref().is_some_and(|login| state.confirm(&key, login));
        if let Some(id) = image_id {
            state.name_image(&key, id);
        }
        state.bound(&self.store.board);
        drop(state);
        if let Some(login) = self.brought.as_ref().filter(|_| arrived) {
            let (board, registry) = (&self.store.board, self.image.registry().identity());
            // A refusal of the same login from before this pull went well with it says nothing any more.
            board.accept(registry, self.image.repository(), login.fingerprint);
            board.bump(registry);
        }
    }
}

impl Drop for PullTicket {
    fn drop(&mut self) {
        if let Some(login) = self.brought.as_ref().filter(|_| !self.confirmed) {
            let mut state = self.store.state.lock();
            state.demote(&self.image.key(), login);
            state.bound(&self.store.board);
        }
    }
}

#[async_trait]
impl Keychain for CriStore {
    fn name(&self) -> &'static str {
        "cri"
    }

    async fn lookup(&self, scope: &CredentialScope, _rejected: &Rejected) -> Result<Lookup, KeychainError> {
        let key = scope.image.key();
        let registry = scope.image.registry().identity();
        let mut state = self.state.lock();
        let used = state.next();
        let mut candidates: Vec<Candidate> = Vec::new();
        let mut offered: HashSet<Fingerprint> = HashSet::new();
        if let Some(reference) = state.references.get_mut(&key) {
            reference.used = used;
            let mut own: Vec<&Entry> = reference.entries.iter().filter(|entry| entry.is_for(scope)).collect();
            own.sort_by_key(|entry| (entry.standing, Reverse(entry.sequence)));
            own.retain(|entry| offered.insert(entry.login.fingerprint));
            candidates.extend(own.iter().map(|entry| entry.candidate(&key)));
        }
        let others = state.registries.get(registry).into_iter().flatten();
        let others = others.filter(|(_, other)| **other != key).filter_map(|(sequence, other)| {
            let reference = state.references.get(other)?;
            let entry = reference.entries.iter().find(|entry| entry.sequence == sequence.0)?;
            (entry.is_for(scope) && offered.insert(entry.login.fingerprint)).then(|| entry.candidate(other))
        });
        candidates.extend(others.take(FROM_REGISTRY));
        let finding = format!(
            "{} of {} references offer a credential for {}",
            candidates.len(),
            state.references.len(),
            scope.image.name()
        );
        Ok(Lookup { candidates, findings: vec![Finding(finding)] })
    }

    async fn peek(&self, scope: &CredentialScope) -> Option<Lookup> {
        self.lookup(scope, &Rejected::default()).await.ok()
    }

    fn remedy(&self) -> &'static str {
        "pull an image of this registry again, so that the kubelet passes a login"
    }

    fn verdict(&self, _scope: &CredentialScope, _candidate: &CandidateId, _outcome: Outcome) {
        // What confirms an entry is containerd's pull: a refusal here may be of one repository only, and an expired
        // entry stays behind newer ones by its age.
    }
}

#[cfg(test)]
mod tests {
    use super::state::{MAX_REFERENCES, PER_REFERENCE};
    use super::*;
    use crate::Credential;
    use crate::{Origin, Scheme};

    fn auth(username: &str, password: &str) -> Option<AuthConfig> {
        let empty = String::new;
        Some(AuthConfig::new(username.into(), password.into(), empty(), empty(), empty(), empty()))
    }

    fn with_server(server: &str) -> Option<AuthConfig> {
        let empty = String::new;
        Some(AuthConfig::new("u".into(), "p".into(), empty(), server.into(), empty(), empty()))
    }

    fn store() -> Arc<CriStore> {
        CriStore::new(Arc::new(AuthBoard::new()))
    }

    fn scope(image: &str) -> CredentialScope {
        let image: ImageRef = image.parse().unwrap();
        CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image)
    }

    async fn users(store: &CriStore, scope: &CredentialScope) -> Vec<String> {
        let lookup = store.lookup(scope, &Rejected::default()).await.unwrap();
        let name = |candidate: &Candidate| match &candidate.credential {
            Credential::Basic { username, .. } => username.clone(),
            other => other.kind().to_owned(),
        };
        lookup.candidates.iter().map(name).collect()
    }

    async fn users_of(store: &CriStore, image: &str) -> Vec<String> {
        users(store, &scope(image)).await
    }

    fn pull(store: &Arc<CriStore>, image: &str, user: &str) {
        store.begin(image, auth(user, "p"), None).unwrap().confirm(None);
    }

    #[tokio::test]
    async fn t65_a_credential_is_found_during_the_forwarded_call() {
        let store = store();
        let _under_way = store.begin("nginx", auth("u", "p"), None).unwrap();
        assert_eq!(users_of(&store, "docker.io/library/nginx:latest").await, ["u"]);
    }

    #[tokio::test]
    async fn t66_another_tag_gets_it_from_the_registry_once_confirmed() {
        let store = store();
        let under_way = store.begin("reg.example/a:1", auth("u", "p"), None).unwrap();
        assert!(
            users_of(&store, "reg.example/a:2").await.is_empty(),
            "pending ones stay with their reference"
        );
        under_way.confirm(None);
        assert_eq!(users_of(&store, "reg.example/a:2").await, ["u"]);
        assert!(users_of(&store, "other.example/a:2").await.is_empty());
        assert!(users_of(&store, "reg.example:5000/a:2").await.is_empty());
    }

    #[tokio::test]
    async fn t67_a_digest_outranks_the_tag() {
        let store = store();
        let digest = soci_oci::Digest::of(b"");
        pull(&store, &format!("reg.example/repo:tag@{digest}"), "u");
        let lookup =
            store.lookup(&scope(&format!("reg.example/repo@{digest}")), &Rejected::default()).await.unwrap();
        assert_eq!(lookup.candidates.len(), 1);
    }

    #[tokio::test]
    async fn t68_every_field_is_used() {
        let store = store();
        let empty = String::new;
        let fields = [
            AuthConfig::new(empty(), empty(), "dXNlcjpwYXNz".into(), empty(), empty(), empty()),
            AuthConfig::new(empty(), empty(), empty(), empty(), "t".into(), empty()),
            AuthConfig::new(empty(), empty(), empty(), empty(), empty(), "t".into()),
        ];
        for (at, (fields, expected)) in
            fields.into_iter().zip(["user", "identity token", "registry token"]).enumerate()
        {
            let image = format!("reg{at}.example/a");
            let _under_way = store.begin(&image, Some(fields), None).unwrap();
            assert_eq!(users_of(&store, &image).await, [expected]);
        }
    }

    #[tokio::test]
    async fn t69_a_server_address_must_name_the_registry() {
        for (server, expected) in [
            ("https://reg.example", true),
            ("reg.example", true),
            ("https://reg.example:443/v1/", true),
            ("https://other.example", false),
            ("reg.example:5000", false),
        ] {
            let store = store();
            store.begin("reg.example/a", with_server(server), None).unwrap().confirm(None);
            assert_eq!(!users_of(&store, "reg.example/a").await.is_empty(), expected, "{server}");
        }
    }

    /// Whether a registry is reached over plain http is known to those who ask it only, not to the pull.
    #[tokio::test(start_paused = true)]
    async fn t70_a_pull_over_plain_http_is_news_of_the_registry_that_refused() {
        let image: ImageRef = "reg.example:80/a:1".parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Http, image.registry()), image);
        let mut tls = scope.clone();
        tls.origin = Origin::new(Scheme::Https, "reg.example", None);
        tls.image = "reg.example/a:1".parse().unwrap();
        let who = Credential::basic("u", "p").fingerprint();
        for server in ["", "reg.example:80", "http://reg.example:80/v2/", "http://reg.example"] {
            let store = store();
            store.board.refuse(&scope.identity(), "a", who);
            let since = store.board.generation(&scope.identity());
            store.begin("reg.example:80/a:1", with_server(server), None).unwrap().confirm(None);
            assert_eq!(users(&store, &scope).await, ["u"], "{server}");
            assert!(store.board.generation(&scope.identity()) > since);
            assert!(!store.board.was_refused(&scope.identity(), "a", who));
            assert_eq!(users(&store, &tls).await, [""; 0], "another port over https");
        }
    }

    #[tokio::test]
    async fn t70_t71_another_image_of_the_registry_heals() {
        let store = store();
        let board = store.board.clone();
        pull(&store, "reg.example/a", "c1");
        let before = board.generation("reg.example");
        pull(&store, "reg.example/b", "c2");
        assert!(board.generation("reg.example") > before, "waiting readers are woken");
        assert_eq!(users_of(&store, "reg.example/a").await, ["c1", "c2"]);
    }

    #[tokio::test]
    async fn t72_t73_another_registry_or_a_failed_pull_does_not() {
        let store = store();
        let board = store.board.clone();
        pull(&store, "reg.example/a", "c1");
        let before = board.generation("reg.example");
        pull(&store, "reg.example:5000/b", "c2");
        pull(&store, "other.example/b", "c2");
        drop(store.begin("reg.example/b", auth("c3", "p"), None));
        assert_eq!(users_of(&store, "reg.example/a").await, ["c1"]);
        assert_eq!(board.generation("reg.example"), before);
    }

    #[tokio::test]
    async fn t74_a_pull_without_credential_takes_nothing_away() {
        let store = store();
        pull(&store, "reg.example/a", "u");
        store.begin("reg.example/a", None, None).unwrap().confirm(None);
        store.begin("reg.example/a", auth("", ""), None).unwrap().confirm(None);
        assert_eq!(users_of(&store, "reg.example/a").await, ["u"]);
    }

    #[tokio::test]
    async fn t75_the_good_one_of_several_comes_first() {
        let store = store();
        drop(store.begin("reg.example/a", auth("bad", "p"), None));
        pull(&store, "reg.example/a", "good");
        assert_eq!(users_of(&store, "reg.example/a").await, ["good", "bad"]);
        drop(store.begin("reg.example/a", auth("good", "p"), None));
        assert_eq!(
            users_of(&store, "reg.example/a").await,
            ["good", "bad"],
            "a later failure does not demote it"
        );
    }

    #[tokio::test]
    async fn t76_removal_by_id_forgets_every_reference_of_the_image() {
        let store = store();
        for tag in ["1", "2"] {
            let image = format!("reg.example/a:{tag}");
            store.begin(&image, auth("u", "p"), None).unwrap().confirm(Some("sha256:i".into()));
        }
        store.begin("reg.example/b", auth("u", "p"), None).unwrap().confirm(Some("sha256:j".into()));
        store.removed("sha256:i");
        assert_eq!(store.len(), 1);
        store.removed("reg.example/b");
        assert!(store.is_empty());
        assert!(store.state.lock().images.is_empty() && store.state.lock().registries.is_empty());
    }

    #[tokio::test]
    async fn t76_removal_of_the_old_image_keeps_what_a_pull_under_way_brought() {
        let store = store();
        let pull = |user| store.begin("reg.example/a:1", auth(user, "p"), None).unwrap();
        pull("old").confirm(Some("sha256:old".into()));
        for user in ["old", "new"] {
            let (first, second) = (pull(user), pull(user));
            store.removed("sha256:old");
            store.removed("reg.example/a:1");
            assert_eq!(users_of(&store, "reg.example/a:1").await, [user], "containerd calls back for it");
            assert!(users_of(&store, "reg.example/b").await.is_empty(), "it has not been proven yet");
            drop(first);
            store.removed("reg.example/a:1");
            assert_eq!(users_of(&store, "reg.example/a:1").await, [user], "one of two pulls goes on");
            second.confirm(Some("sha256:new".into()));
            assert_eq!(users_of(&store, "reg.example/b").await, [user]);
            store.removed("sha256:new");
            assert!(store.is_empty() && store.state.lock().images.is_empty());
            assert!(store.state.lock().registries.is_empty());
            pull("old").confirm(Some("sha256:old".into()));
        }
        drop(pull("failed"));
        store.removed("sha256:old");
        assert!(store.is_empty(), "a pull that failed holds nothing");
    }

    #[tokio::test]
    async fn t71_many_images_with_one_login_do_not_hide_another_of_the_registry() {
        let store = store();
        pull(&store, "reg.example/good", "good");
        for at in 0..2 * FROM_REGISTRY {
            pull(&store, &format!("reg.example/other:{at}"), "bad");
        }
        assert_eq!(users_of(&store, "reg.example/a").await, ["bad", "good"]);
        for at in 0..2 * FROM_REGISTRY {
            pull(&store, &format!("reg.example/more:{at}"), &format!("u{at}"));
        }
        assert_eq!(users_of(&store, "reg.example/a").await.len(), FROM_REGISTRY);
    }

    #[tokio::test]
    async fn t69_another_address_counts_once_its_pull_has_succeeded() {
        let store = store();
        store.begin("reg.example/a", with_server("reg.example"), None).unwrap().confirm(None);
        let wrong = store.begin("reg.example/a", with_server("https://other.example"), None).unwrap();
        assert_eq!(users_of(&store, "reg.example/a").await, ["u"]);
        drop(wrong);
        assert_eq!(users_of(&store, "reg.example/a").await, ["u"]);
        assert_eq!(users_of(&store, "reg.example/b").await, ["u"]);
    }

    #[tokio::test]
    async fn t88_a_login_that_cannot_be_read_is_none_and_told_with_what_to_do() {
        let (log, _guard) = soci_testkit::log::capture();
        let store = store();
        let empty = String::new;
        let long = "hunter2".repeat(10_000);
        for (user, password, auth, server, told) in [
            ("", "", "hunter2!", "", "field auth cannot be read: auth is not base64"),
            ("", "", "aHVudGVyMg==", "", "field auth cannot be read: auth holds no colon"),
            ("u", &long, "", "", "a field is longer than 65536 bytes"),
            ("u", "hunter2", "", "https://u:hunter2@no registry", "server_address is no registry"),
        ] {
            let [user, password, auth, server] = [user, password, auth, server].map(str::to_owned);
            let bad = AuthConfig::new(user, password, auth, server, empty(), empty());
            assert!(!format!("{bad:?}").contains("hunter2"));
            assert!(store.begin("reg.example/a", Some(bad), None).is_some(), "the pull goes on");
            assert!(store.is_empty());
            assert_eq!(log.warnings(told), 1, "{}", log.text());
        }
        let next = "image=reg.example/a:latest error=";
        assert_eq!((log.warnings(next), log.warnings("correct the pull secret")), (4, 4), "{}", log.text());
        assert!(!log.text().contains("hunter2"), "{}", log.text());
    }

    #[tokio::test]
    async fn t118_a_mirror_gets_the_registrys_credential_only_when_told() {
        let store = store();
        pull(&store, "reg.example/a", "u");
        let mut mirror = scope("reg.example/a");
        mirror.mirror = true;
        mirror.origin = Origin::new(Scheme::Https, "mirror.example", None);
        assert!(users(&store, &mirror).await.is_empty());
        mirror.forward = true;
        assert_eq!(users(&store, &mirror).await, ["u"]);
        store.begin("reg.example/b", with_server("https://mirror.example"), None).unwrap().confirm(None);
        mirror.forward = false;
        mirror.image = "reg.example/b".parse().unwrap();
        assert_eq!(users(&store, &mirror).await, ["u"]);
        mirror.forward = true;
        mirror.image = "other.example/c".parse().unwrap();
        for (server, expected) in [("third.example", 0), ("other.example", 1)] {
            store.begin("other.example/c", with_server(server), None).unwrap().confirm(None);
            assert_eq!(users(&store, &mirror).await.len(), expected, "named for {server}");
        }
    }

    #[tokio::test]
    async fn the_store_is_bounded_and_keeps_the_best_of_a_reference() {
        let store = store();
        pull(&store, "reg.example/a:1", "confirmed");
        for at in 0..10 {
            drop(store.begin("reg.example/a:1", auth(&format!("bad{at}"), "p"), None));
        }
        let users = users_of(&store, "reg.example/a:1").await;
        assert_eq!(users.len(), PER_REFERENCE);
        assert_eq!(users[0], "confirmed");
        for at in 0..MAX_REFERENCES + 5 {
            drop(store.begin(&format!("reg.example/b:{at}"), auth("u", "p"), None));
        }
        assert_eq!(store.len(), MAX_REFERENCES);
    }

    #[tokio::test]
    async fn a_mounted_image_keeps_its_credential_however_many_others_arrive() {
        let store = store();
        for image in ["reg.example/mounted:1", "reg.example/unmounted:1", "reg.example/free:1"] {
            pull(&store, image, image);
        }
        let held = |image: &str| store.state.lock().references.contains_key(image);
        let [mounted, unmounted] = ["mounted", "unmounted"].map(|name| format!("reg.example/{name}:1"));
        let pin = store.board.pin(&mounted);
        drop(store.board.pin(&unmounted));
        let crowd = |from: usize| {
            (from..from + MAX_REFERENCES + 5)
                .for_each(|at| pull(&store, &format!("reg.example/b:{at}"), "u"));
        };
        crowd(0);
        assert_eq!((held(&mounted), held(&unmounted), held("reg.example/free:1")), (true, false, false));
        assert_eq!(users_of(&store, &mounted).await[0], mounted);
        assert_eq!(store.len(), MAX_REFERENCES);
        drop(pin);
        crowd(MAX_REFERENCES + 5);
        assert!(!held(&mounted), "once it is unmounted it is like any other");
    }

    #[tokio::test]
    async fn a_pull_under_way_keeps_its_credential_however_many_others_arrive() {
        let store = store();
        let slow = store.begin("reg.example/slow:1", auth("slow", "p"), None).unwrap();
        for at in 0..MAX_REFERENCES + 5 {
            drop(store.begin(&format!("reg.example/b:{at}"), auth("u", "p"), None));
        }
        // Better ones of the same reference, too.
        for at in 0..PER_REFERENCE + 1 {
            pull(&store, "reg.example/slow:1", &format!("other{at}"));
        }
        assert_eq!(store.len(), MAX_REFERENCES);
        assert!(users_of(&store, "reg.example/slow:1").await.contains(&"slow".to_owned()));
        slow.confirm(None);
        let users = users_of(&store, "reg.example/slow:1").await;
        assert_eq!((users.len(), users[0].as_str()), (PER_REFERENCE, "slow"), "it was confirmed");
    }

    #[tokio::test]
    async fn pulls_under_way_beyond_the_bounds_are_kept_until_they_end() {
        let store = store();
        let begin = |image: &str, user: &str| store.begin(image, auth(user, "p"), None).unwrap();
        let same: Vec<_> =
            (0..PER_REFERENCE + 2).map(|at| begin("reg.example/a:1", &format!("u{at}"))).collect();
        assert_eq!(users_of(&store, "reg.example/a:1").await.len(), PER_REFERENCE + 2);
        let others: Vec<_> =
            (0..MAX_REFERENCES + 5).map(|at| begin(&format!("reg.example/b:{at}"), "u")).collect();
        assert_eq!(store.len(), MAX_REFERENCES + 6);
        drop(same);
        assert_eq!(store.len(), MAX_REFERENCES + 5);
        drop(others);
        assert_eq!(store.len(), MAX_REFERENCES);
    }
}
