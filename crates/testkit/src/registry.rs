//! An in-process registry: the whole distribution API, authentication, redirects to storage, and faults on demand.
//!
//! Three listeners belong to one [`TestRegistry`]: the registry, the storage that blobs may be redirected to, and the
//! token server. All bind loopback, take requests over TLS unless told otherwise, and share one request log.

pub(crate) mod accounts;
mod blobs;
mod manifests;
mod route;
mod storage;
pub(crate) mod store;
mod uploads;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio_rustls::TlsAcceptor;

use crate::faults::{Fault, Listener, Script, Seen};
use crate::http::body::Link;
use crate::http::serve::{Server, bind};
use crate::tls::{ClientCertificates, TestCa};
use crate::token_server::TokenOptions;
use accounts::Accounts;
use store::Store;

/// How the registry asks for credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AuthMode {
    /// Not at all.
    #[default]
    None,
    /// `Basic`, at the registry.
    Basic,
    /// `Bearer`, with tokens of the token server.
    Bearer,
    /// `Basic` as ECR does it: an expired password is answered 403 without a challenge.
    Ecr,
}

/// What the registry makes of the referrers API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Referrers {
    /// Serves it.
    Api {
        /// Entries per page; 0 = all in one.
        page: usize,
        /// Whether it filters by artifact type itself and says so.
        filters: bool,
    },
    /// Answers 404, so that clients use the tag schema.
    Unsupported,
}

/// How a test registry starts. Everything about behaviour can be changed later by methods of [`TestRegistry`].
#[derive(Debug, Clone)]
pub struct Options {
    /// Address to bind; port 0 takes a free one.
    pub address: SocketAddr,
    /// Whether the listeners speak TLS.
    pub tls: bool,
    /// The authority that certifies the servers; made anew if absent.
    pub ca: Option<Arc<TestCa>>,
    /// More names the certificate is good for.
    pub names: Vec<String>,
    /// Whether clients need a certificate of the same authority.
    pub client_certificates: ClientCertificates,
    /// How credentials are asked for.
    pub auth: AuthMode,
    /// Users and passwords.
    pub users: Vec<(String, String)>,
    /// Whether anybody may pull.
    pub anonymous_pull: bool,
    /// How the token server behaves.
    pub tokens: TokenOptions,
    /// How long a redirect to storage stays good; absent = blobs are served by the registry itself.
    pub storage: Option<Duration>,
    /// The referrers API.
    pub referrers: Referrers,
    /// Where uploads are kept; in memory if absent.
    pub root: Option<PathBuf>,
    /// A name clients use instead of the address, e.g. `localhost`.
    pub host_name: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            tls: true,
            ca: None,
            names: Vec::new(),
            client_certificates: ClientCertificates::default(),
            auth: AuthMode::default(),
            users: Vec::new(),
            anonymous_pull: false,
            tokens: TokenOptions::default(),
            storage: None,
            referrers: Referrers::Api { page: 0, filters: true },
            root: None,
            host_name: None,
        }
    }
}

impl Options {
    /// Returns the defaults without TLS.
    pub fn plain() -> Self {
        Self { tls: false, ..Self::default() }
    }

    /// Asks for credentials as `auth` says, and knows this user.
    #[must_use]
    pub fn auth(mut self, auth: AuthMode, user: &str, password: &str) -> Self {
        self.auth = auth;
        self.users.push((user.to_owned(), password.to_owned()));
        self
    }

    /// Redirects blobs to storage by locations good for `ttl`.
    #[must_use]
    pub fn storage(mut self, ttl: Duration) -> Self {
        self.storage = Some(ttl);
        self
    }
}

/// A running registry. Dropped, it stops; [`TestRegistry::shutdown`] also waits for that.
#[derive(Debug)]
pub struct TestRegistry {
    shared: Arc<Shared>,
    servers: Vec<Server>,
}

/// What can be changed while it runs.
#[derive(Debug, Clone)]
pub(crate) struct Behaviour {
    pub(crate) auth: AuthMode,
    pub(crate) tokens: TokenOptions,
    pub(crate) storage: Option<Duration>,
    pub(crate) referrers: Referrers,
    pub(crate) challenges: Option<Vec<String>>,
    pub(crate) delay: Duration,
    pub(crate) link: Option<Arc<Link>>,
    /// Locations signed before this are refused.
    pub(crate) signed_after: Option<Instant>,
    pub(crate) chunk_min: Option<u64>,
    pub(crate) mount: bool,
}

/// What the listeners share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) behaviour: Mutex<Behaviour>,
    pub(crate) accounts: Accounts,
    pub(crate) store: Store,
    pub(crate) script: Script,
    pub(crate) signatures: Mutex<Vec<(String, Instant)>>,
    scheme: &'static str,
    host: String,
    ca: Arc<TestCa>,
    addresses: [SocketAddr; 3],
}

impl Shared {
    pub(crate) fn url(&self, listener: Listener) -> String {
        let [registry, storage, token] = &self.addresses;
        let address = match listener {
            Listener::Registry => registry,
            Listener::Storage => storage,
            Listener::Token => token,
        };
        format!("{}://{}:{}", self.scheme, self.host, address.port())
    }
}

impl TestRegistry {
    /// Starts the three listeners.
    ///
    /// # Errors
    /// When an address cannot be bound, the root cannot be made, or a name is not one for a certificate.
    pub async fn start(options: Options) -> io::Result<Self> {
        let ca = match options.ca {
            Some(ca) => ca,
            None => Arc::new(TestCa::new("testkit CA")?),
        };
        let any_port = SocketAddr::new(options.address.ip(), 0);
        let (registry, registry_address) = bind(options.address).await?;
        let (storage, storage_address) = bind(any_port).await?;
        let (token, token_address) = bind(any_port).await?;
        let acceptor = |clients| -> io::Result<Option<TlsAcceptor>> {
            if !options.tls {
                return Ok(None);
            }
            let identity = ca.issue(&options.names)?;
            Ok(Some(TlsAcceptor::from(Arc::new(ca.server_config(&identity, clients)?))))
        };
        let tls = [
            acceptor(options.client_certificates)?,
            acceptor(ClientCertificates::Ignored)?,
            acceptor(options.client_certificates)?,
        ];
        let host = options.host_name.unwrap_or_else(|| match options.address.ip() {
            IpAddr::V4(address) if address.is_unspecified() => "127.0.0.1".to_owned(),
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        });
        let accounts = Accounts::default();
        for (user, password) in &options.users {
            accounts.set_password(user, password);
        }
        accounts.set_anonymous_pull(options.anonymous_pull);
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(Behaviour {
                auth: options.auth,
                tokens: options.tokens,
                storage: options.storage,
                referrers: options.referrers,
                challenges: None,
                delay: Duration::ZERO,
                link: None,
                signed_after: None,
                chunk_min: None,
                mount: true,
            }),
            accounts,
            store: Store::new(options.root)?,
            script: Script::default(),
            signatures: Mutex::default(),
            scheme: if options.tls { "https" } else { "http" },
            host,
            ca,
            addresses: [registry_address, storage_address, token_address],
        });
        let [registry_tls, storage_tls, token_tls] = tls;
        let handler = |listener| Arc::new(route::Front { shared: Arc::clone(&shared), listener });
        let servers = vec![
            Server::spawn(registry, registry_tls, handler(Listener::Registry)),
            Server::spawn(storage, storage_tls, handler(Listener::Storage)),
            Server::spawn(token, token_tls, handler(Listener::Token)),
        ];
        Ok(Self { shared, servers })
    }

    /// Stops listening, closes every connection, and waits for both.
    pub async fn shutdown(mut self) {
        for server in &mut self.servers {
            server.shutdown().await;
        }
    }

    /// Returns the address of the registry.
    pub fn addr(&self) -> SocketAddr {
        self.shared.addresses[0]
    }

    /// Returns `host:port` of the registry, as an image reference names it.
    pub fn host(&self) -> String {
        format!("{}:{}", self.shared.host, self.addr().port())
    }

    /// Returns `scheme://host:port` of one of the listeners.
    pub fn url(&self, listener: Listener) -> String {
        self.shared.url(listener)
    }

    /// Returns the reference of `name` (e.g. `team/app:1`) in this registry.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host())
    }

    /// Returns the authority that certified the servers.
    pub fn ca(&self) -> &Arc<TestCa> {
        &self.shared.ca
    }

    /// Returns the authority's certificate as PEM.
    pub fn ca_pem(&self) -> &str {
        self.shared.ca.pem()
    }

    /// Stores a blob and returns its digest, `sha256:…`.
    pub fn put_blob(&self, repository: &str, bytes: impl Into<Bytes>) -> String {
        self.shared.store.put_blob(repository, bytes.into())
    }

    /// Serves a file as a blob, streamed from where it is, and returns digest and size. Blocks while it is hashed.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn put_blob_file(&self, repository: &str, path: &Path) -> io::Result<(String, u64)> {
        self.shared.store.put_file(repository, path)
    }

    /// Stores a manifest under a tag or its digest, and returns the digest.
    pub fn put_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: impl Into<Bytes>,
    ) -> String {
        self.shared.store.put_manifest(repository, reference, media_type, bytes.into())
    }

    /// Returns a manifest's bytes, if it is there.
    pub fn manifest(&self, repository: &str, reference: &str) -> Option<Bytes> {
        self.shared.store.manifest(repository, reference)?.content.read().ok()
    }

    /// Returns a blob's bytes, if it is there.
    pub fn blob(&self, repository: &str, digest: &str) -> Option<Bytes> {
        self.shared.store.blob(repository, digest)?.read().ok()
    }

    /// Forgets a blob in a repository; returns whether it was there.
    pub fn delete_blob(&self, repository: &str, digest: &str) -> bool {
        self.shared.store.delete_blob(repository, digest)
    }

    /// Returns all requests so far, of all listeners, in the order of their answers.
    pub fn log(&self) -> Vec<Seen> {
        self.shared.script.log()
    }

    /// Returns the requests that came to `listener`.
    pub fn log_of(&self, listener: Listener) -> Vec<Seen> {
        self.log().into_iter().filter(|seen| seen.request.listener == listener).collect()
    }

    /// Empties the log.
    pub fn clear_log(&self) {
        self.shared.script.clear_log();
    }

    /// Adds a fault.
    pub fn fault(&self, fault: Fault) {
        self.shared.script.add(fault);
    }

    /// Ends all faults.
    pub fn clear_faults(&self) {
        self.shared.script.clear();
    }

    /// Adds a user or changes a password. Tokens already issued stay good.
    pub fn rotate_password(&self, user: &str, password: &str) {
        self.shared.accounts.set_password(user, password);
    }

    /// Lets a password expire: `Basic` and token requests refuse it, ECR mode says so in its own words.
    pub fn expire_password(&self, user: &str) {
        self.shared.accounts.expire_password(user);
    }

    /// Removes a user.
    pub fn remove_user(&self, user: &str) {
        self.shared.accounts.remove(user);
    }

    /// Restricts a user to the repositories named by calls of this, each with its actions (`pull`, `push`).
    pub fn restrict(&self, user: &str, repository: &str, actions: &[&str]) {
        self.shared.accounts.restrict(user, repository, actions);
    }

    /// Accepts `token` as an identity (refresh) token of `user`.
    pub fn add_identity_token(&self, token: &str, user: &str) {
        self.shared.accounts.set_identity_token(token, user);
    }

    /// Makes every token issued so far useless.
    pub fn revoke_tokens(&self) {
        self.shared.accounts.revoke_tokens();
    }

    /// Makes every identity token useless.
    pub fn revoke_identity_tokens(&self) {
        self.shared.accounts.revoke_identity_tokens();
    }

    /// Makes every storage location given out so far useless.
    pub fn expire_locations(&self) {
        self.shared.behaviour.lock().signed_after = Some(Instant::now());
    }

    /// Changes how credentials are asked for.
    pub fn set_auth(&self, auth: AuthMode) {
        self.shared.behaviour.lock().auth = auth;
    }

    /// Answers 401 with these `WWW-Authenticate` headers instead of its own; `{token}` stands for the token address.
    pub fn set_challenges(&self, challenges: Vec<String>) {
        self.shared.behaviour.lock().challenges = Some(challenges);
    }

    /// Changes the token server.
    pub fn set_tokens(&self, tokens: TokenOptions) {
        self.shared.behaviour.lock().tokens = tokens;
    }

    /// Changes whether blobs are redirected to storage, and how long a location is good.
    pub fn set_storage(&self, ttl: Option<Duration>) {
        self.shared.behaviour.lock().storage = ttl;
    }

    /// Changes the referrers API.
    pub fn set_referrers(&self, referrers: Referrers) {
        self.shared.behaviour.lock().referrers = referrers;
    }

    /// Changes whether blobs can be mounted from another repository.
    pub fn set_mount(&self, supported: bool) {
        self.shared.behaviour.lock().mount = supported;
    }

    /// Announces a smallest chunk (`OCI-Chunk-Min-Length`) for uploads.
    pub fn set_chunk_min(&self, bytes: Option<u64>) {
        self.shared.behaviour.lock().chunk_min = bytes;
    }

    /// Delays each answer by `delay` and sends all bodies together at no more than `bytes_per_second`.
    pub fn shape(&self, delay: Duration, bytes_per_second: Option<u64>) {
        let mut behaviour = self.shared.behaviour.lock();
        behaviour.delay = delay;
        behaviour.link = bytes_per_second.map(|rate| Arc::new(Link::new(rate)));
    }
}
