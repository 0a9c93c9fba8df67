//! What the tests share: a client whose credentials are scripted, and a registry it trusts.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use parking_lot::Mutex;
use soci_auth::{
    AuthBoard, Authenticator, Candidate, CandidateId, Credential, CredentialScope, Keychain, KeychainChain,
    KeychainError, Lookup, Outcome, Rejected,
};
use soci_oci::{BlobSource, Digest, FetchClass, FetchContext, FetchError, ImageRef};
use soci_registry::settings::{Proxies, Retries};
use soci_registry::{NoMeters, Registry, Repository, Settings};
use soci_testkit::{Options, TestRegistry};
use tempfile::TempDir;

/// A keychain whose entries the test sets. As CRI's, its credentials are the image's registry's and go to a mirror only
/// when the operator forwards them; an entry named by a mirror's own host is that mirror's.
#[derive(Debug, Default)]
pub(crate) struct Script {
    entries: Mutex<HashMap<String, Vec<Credential>>>,
}

impl Script {
    pub(crate) fn set(&self, host: &str, credentials: Vec<Credential>) {
        self.entries.lock().insert(host.to_owned(), credentials);
    }
}

#[async_trait]
impl Keychain for Script {
    fn name(&self) -> &'static str {
        "script"
    }

    async fn lookup(&self, scope: &CredentialScope, _: &Rejected) -> Result<Lookup, KeychainError> {
        let own = match scope.mirror && !scope.forward {
            true => scope.lookup_name(),
            false => scope.image.registry().as_str().to_owned(),
        };
        let entries = self.entries.lock().get(&own).cloned().unwrap_or_default();
        let candidates =
            entries.into_iter().map(|credential| Candidate::new(own.clone(), credential)).collect();
        Ok(Lookup { candidates, findings: Vec::new() })
    }

    fn verdict(&self, _: &CredentialScope, _: &CandidateId, _: Outcome) {}
}

/// A client and what belongs to it.
pub(crate) struct Client {
    pub(crate) registry: Registry,
    pub(crate) keychain: Arc<Script>,
    pub(crate) board: Arc<AuthBoard>,
    pub(crate) dir: TempDir,
}

impl Client {
    /// Returns a client that trusts the authorities of `registries`, retries fast, and reads hosts from its own directory.
    pub(crate) fn new(registries: &[&TestRegistry], change: impl FnOnce(&mut Settings, &Path)) -> Self {
        Self::with_patience(registries, Duration::ZERO, change)
    }

    /// As [`Self::new`], but a request that is refused waits for news.
    pub(crate) fn with_patience(
        registries: &[&TestRegistry],
        patience: Duration,
        change: impl FnOnce(&mut Settings, &Path),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let retries =
            || Retries { max: 3, min_wait: Duration::from_millis(1), max_wait: Duration::from_millis(40) };
        let mut settings = Settings {
            hosts_dirs: vec![dir.path().join("certs.d")],
            hosts_recheck: Duration::ZERO,
            proxies: Proxies::Never,
            ..Settings::default()
        };
        settings.http.retries = retries();
        settings.blob.retries = retries();
        settings.blob.stall_timeout = Duration::from_secs(1);
        for (number, registry) in registries.iter().enumerate() {
            let file = dir.path().join(format!("ca-{number}.pem"));
            std::fs::write(&file, registry.ca_pem()).unwrap();
            settings.tls.ca.push(file);
        }
        change(&mut settings, dir.path());
        let keychain = Arc::new(Script::default());
        let board = Arc::new(AuthBoard::new());
        let auth_settings = soci_auth::Settings { patience, ..soci_auth::Settings::default() };
        let chain = KeychainChain::new(vec![Arc::clone(&keychain) as Arc<dyn Keychain>]);
        let auth = Authenticator::new(chain, Arc::clone(&board), auth_settings);
        let registry = Registry::new(settings, auth, Arc::new(NoMeters)).unwrap();
        Self { registry, keychain, board, dir }
    }

    pub(crate) fn repository(&self, image: &str) -> Repository {
        self.registry.repository(&image.parse::<ImageRef>().unwrap())
    }

    /// Writes a `hosts.toml` for a registry.
    pub(crate) fn hosts_toml(&self, host: &str, text: &str) {
        let directory = self.dir.path().join("certs.d").join(host);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("hosts.toml"), text).unwrap();
    }
}

/// Starts a registry with these options and a client that trusts it.
pub(crate) async fn start(options: Options) -> (TestRegistry, Client) {
    let registry = TestRegistry::start(options).await.unwrap();
    let client = Client::new(&[&registry], |_, _| {});
    (registry, client)
}

pub(crate) fn basic(user: &str, password: &str) -> Credential {
    Credential::basic(user, password)
}

pub(crate) fn context() -> FetchContext {
    within(Duration::from_secs(30))
}

pub(crate) fn within(time: Duration) -> FetchContext {
    FetchContext::new(Instant::now() + time, FetchClass::OnDemand)
}

/// Returns bytes that differ everywhere.
pub(crate) fn pattern(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes: Vec<u8> = (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect();
    Bytes::from(bytes)
}

pub(crate) fn digest(text: &str) -> Digest {
    text.parse().unwrap()
}

/// Reads a range of a blob whole.
pub(crate) async fn read(
    blob: &Arc<dyn BlobSource>,
    range: std::ops::Range<u64>,
    ctx: &FetchContext,
) -> Result<Vec<u8>, FetchError> {
    let mut stream = blob.open(range, ctx).await?;
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        all.extend_from_slice(&chunk?);
    }
    Ok(all)
}
