//! What the tests of the sync share: a home directory, a keychain over it, and what one looks at.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "not every test uses everything, and a test fails by panicking"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use soci_auth::keychain::{Keychain, Rejected};
use soci_auth::{AuthBoard, Credential, CredentialScope, Origin, Scheme};
use soci_kubernetes::{Environment, SecretsKeychain, Settings, Timing};
use soci_oci::ImageRef;
use soci_testkit::kube_api::KubeApi;

pub(crate) const TYPE: &str = "kubernetes.io/dockerconfigjson";
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) board: Arc<AuthBoard>,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), board: Arc::new(AuthBoard::new()) }
    }

    pub(crate) fn settings(&self) -> Settings {
        let mut settings =
            Settings::new(Environment { home: self.dir.path().to_owned(), ..Environment::default() });
        settings.timing = Timing {
            appear: Duration::from_millis(20),
            recheck: Duration::from_millis(100),
            back_off: (Duration::from_millis(10), Duration::from_millis(200)),
            denied: Duration::from_millis(200),
            ..Timing::default()
        };
        settings
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let new = path.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    /// Replaces the kubeconfig.
    pub(crate) fn login(&self, api: &KubeApi, user: &serde_json::Value) {
        self.write(".kube/config", &api.kubeconfig(user));
    }

    pub(crate) fn start(&self, settings: Settings) -> Arc<SecretsKeychain> {
        SecretsKeychain::start(settings, self.board.clone())
    }

    pub(crate) async fn synced(&self, api: &KubeApi) -> Arc<SecretsKeychain> {
        self.synced_with(api, self.settings()).await
    }

    pub(crate) async fn synced_with(&self, api: &KubeApi, settings: Settings) -> Arc<SecretsKeychain> {
        self.login(api, &json!({ "token": "t" }));
        let keychain = self.start(settings);
        keychain.ready().await;
        assert!(keychain.progress().complete, "{:?}", keychain.progress());
        keychain
    }
}

pub(crate) fn auths(host: &str, user: &str) -> String {
    json!({ "auths": { host: { "username": user, "password": "p" } } }).to_string()
}

pub(crate) fn put(api: &KubeApi, namespace: &str, name: &str, host: &str, user: &str) {
    api.put(namespace, name, TYPE, &[(".dockerconfigjson", &auths(host, user))]);
}

pub(crate) async fn users(keychain: &SecretsKeychain, image: &str) -> Vec<String> {
    let image: ImageRef = image.parse().unwrap();
    let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
    let lookup = keychain.lookup(&scope, &Rejected::default()).await.unwrap_or_default();
    let name = |credential: &Credential| match credential {
        Credential::Basic { username, .. } => username.clone(),
        other => other.kind().to_owned(),
    };
    lookup.candidates.iter().map(|candidate| name(&candidate.credential)).collect()
}

/// Waits until the users for an image are these. Polls, since the sync has no other observer.
pub(crate) async fn eventually(keychain: &SecretsKeychain, image: &str, expected: &[&str]) {
    let deadline = Instant::now() + LONG;
    loop {
        let found = users(keychain, image).await;
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{found:?} instead of {expected:?}: {:?}", keychain.progress());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn count(api: &KubeApi, verb: &str) -> usize {
    api.log().iter().filter(|logged| logged.verb == verb && logged.status == 200).count()
}

/// Waits until another watch than those so far is open.
pub(crate) async fn resumed(api: &KubeApi, before: usize) {
    until("the watch is resumed", || count(api, "watch") > before).await;
}

/// Waits until nothing is wrong and nothing is behind.
pub(crate) async fn healed(keychain: &SecretsKeychain) {
    until("all is well", || keychain.progress().trouble.is_none() && keychain.behind() == Duration::ZERO)
        .await;
}

/// Waits until what is wrong is told in these words.
pub(crate) async fn told(keychain: &SecretsKeychain, words: &str) {
    until(words, || keychain.progress().trouble.is_some_and(|trouble| trouble.contains(words))).await;
}
