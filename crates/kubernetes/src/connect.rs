//! From a kubeconfig to a client whose credentials are plain values.
//!
//! Token files and exec plugins are resolved here, not by kube: a token is trimmed, a plugin has a deadline, and when
//! anything it came from changes, expires or is refused, the whole connection is built anew.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use http::Uri;
use kube::Client;
use kube::config::{AuthInfo, Cluster, Config, ExecAuthCluster};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use soci_auth::redact;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::exec::{self, Described, ExecError};
use crate::kubeconfig::{self, Current, Fingerprint, LoadError, Location};
use crate::proxy::ProxyError;
use crate::settings::Settings;

/// How long before its end a credential is replaced.
const EARLIER: Duration = Duration::from_secs(10);

/// A client, and what it was made from.
pub(crate) struct Connection {
    pub(crate) client: Client,
    /// The API server, for messages.
    pub(crate) server: String,
    /// What an operator should mend though it works.
    pub(crate) notices: Vec<String>,
    /// Which API server it is.
    pub(crate) identity: ServerIdentity,
    location: Location,
    files: Vec<PathBuf>,
    /// That of the files as they were before they were read.
    fingerprint: Fingerprint,
    expires: Option<OffsetDateTime>,
    pub(crate) opened: Instant,
}

/// What two connections have in common that are to one API server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ServerIdentity {
    address: Uri,
    authority: Option<Vec<Vec<u8>>>,
    name: Option<String>,
}

/// An API server that cannot be talked to yet.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error("token file {path}")]
    TokenFile {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("token file {path} is empty")]
    EmptyToken { path: PathBuf },
    #[error("auth-provider {name:?} is not supported")]
    AuthProvider { name: String },
    #[error("the kubeconfig is {0}")]
    Config(String),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error("service account of the pod")]
    InCluster(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("client for {server}")]
    Client {
        server: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("reading the kubeconfig was interrupted")]
    Interrupted,
}

impl ConnectError {
    /// Returns what a person can do about it.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::Load(error) => error.advice(),
            Self::Exec(error) => error.advice(),
            Self::TokenFile { .. } | Self::EmptyToken { .. } => {
                "look what writes it, or correct tokenFile of the kubeconfig"
            }
            Self::AuthProvider { .. } => "use an exec plugin",
            Self::Config(_) => "mend it, or write it anew",
            Self::Proxy(_) => "correct it, or name none",
            Self::InCluster(_) => "let the pod mount its service account, or set kubeconfig_path",
            Self::Client { .. } => "check proxy-url, certificates and keys of the kubeconfig",
            Self::Interrupted => "it is read again",
        }
    }
}

impl Connection {
    /// Builds a client from what is at `location`.
    ///
    /// The state of each file is taken before the file is read: one that is replaced while a plugin runs has changed.
    pub(crate) async fn open(location: Location, settings: &Settings) -> Result<Self, ConnectError> {
        let Found { mut config, current, described, fingerprint } = match location.clone() {
            Location::Files(paths) => tokio::task::spawn_blocking(move || from_files(&paths))
                .await
                .map_err(|_| ConnectError::Interrupted)??,
            Location::InCluster => in_cluster()?,
        };
        let (user, expires) = resolve(current.user, &described, settings.timing.exec).await?;
        config.auth_info = user;
        let proxies = &settings.environment.proxies;
        config.proxy_url = proxies.choose(&config.cluster_url, described.cluster.proxy_url.as_deref())?;
        // Its retries wait silently for as long as the server says; what fails is to be told, and is tried again here.
        config.default_retry = false;
        let identity = ServerIdentity {
            address: config.cluster_url.clone(),
            authority: config.root_cert.clone(),
            name: config.tls_server_name.clone(),
        };
        let server = redact::text(&config.cluster_url.to_string());
        let client = Client::try_from(config)
            .map_err(|source| ConnectError::Client { server: server.clone(), source: Box::new(source) })?;
        let (files, mut notices) = (current.files, current.notices);
        notices.extend(kubeconfig::passed_over(settings, &location));
        let opened = Instant::now();
        Ok(Self { client, server, notices, identity, location, files, fingerprint, expires, opened })
    }

    /// Waits until a file that the connection was made from changes or another one is to be used, or its credential is about
    /// to expire.
    ///
    /// What a plugin says of the end is by its own clock, or the API server's. Where that is behind this machine's clock,
    /// every credential seems to have ended, so each is used for a while at least: the server refuses it when it has.
    pub(crate) async fn outdated(&self, settings: &Settings) {
        let timing = &settings.timing;
        let ends = self.expires.map(|expires| {
            let left = expires - OffsetDateTime::now_utc() - EARLIER;
            let left = Duration::try_from(left).unwrap_or_default();
            Instant::now() + left.max(timing.renewal.saturating_sub(self.opened.elapsed()))
        });
        loop {
            let left = ends.map_or(Duration::MAX, |ends| ends.saturating_duration_since(Instant::now()));
            tokio::time::sleep(left.min(timing.recheck)).await;
            if left <= timing.recheck
                || kubeconfig::locate(settings).as_ref() != Some(&self.location)
                || Fingerprint::of(&self.files) != self.fingerprint
            {
                return;
            }
        }
    }
}

/// What is on the disk, before anything is run.
struct Found {
    config: Config,
    current: Current,
    described: Described,
    fingerprint: Fingerprint,
}

/// Reads the kubeconfig that `paths` are together. Blocks on the disk.
fn from_files(paths: &[PathBuf]) -> Result<Found, ConnectError> {
    let before = Fingerprint::of(paths);
    let current = kubeconfig::load(paths)?;
    let fingerprint = before.and(current.files.get(paths.len()..).unwrap_or_default());
    let described = Described::of(&current.cluster)
        .map_err(|error| ConnectError::Config(kubeconfig::unquoted(&error)))?;
    Ok(Found { config: config_of(&described.cluster)?, current, described, fingerprint })
}

/// Reads the service account of the pod. Blocks on the disk.
fn in_cluster() -> Result<Found, ConnectError> {
    let config = Config::incluster().map_err(|source| ConnectError::InCluster(Box::new(source)))?;
    let files = [config.auth_info.token_file.clone().map(PathBuf::from), config.root_cert_file.clone()];
    let files: Vec<PathBuf> = files.into_iter().flatten().collect();
    let fingerprint = Fingerprint::of(&files);
    let (user, cluster) = (config.auth_info.clone(), Cluster::default());
    let current = Current { user, cluster, files, notices: Vec::new() };
    Ok(Found { config, current, described: Described::default(), fingerprint })
}

/// Turns `tokenFile` and `exec` into a token or certificate. A token file outranks an inline token, as in client-go.
async fn resolve(
    mut user: AuthInfo,
    cluster: &Described,
    exec_limit: Duration,
) -> Result<(AuthInfo, Option<OffsetDateTime>), ConnectError> {
    if let Some(provider) = &user.auth_provider {
        return Err(ConnectError::AuthProvider { name: provider.name.clone() });
    }
    if let Some(path) = user.token_file.take().filter(|path| !path.is_empty()).map(PathBuf::from) {
        let text = tokio::fs::read_to_string(&path)
            .await
            .map_err(|source| ConnectError::TokenFile { path: path.clone(), source })?;
        let text = Zeroizing::new(text);
        if text.trim().is_empty() {
            return Err(ConnectError::EmptyToken { path });
        }
        user.token = Some(text.trim().to_owned().into());
    }
    let mut expires = None;
    if let Some(plugin) = user.exec.take() {
        let credential = exec::run(&plugin, cluster, exec_limit).await?;
        expires = credential.expires;
        if let Some(token) = &credential.token {
            user.token = Some(token.as_str().to_owned().into());
        }
        if let Some((certificate, key)) = &credential.certificate {
            // kube wants PEM in base64, as it stands in a kubeconfig.
            use base64::Engine as _;
            let encode = |pem: &str| base64::engine::general_purpose::STANDARD.encode(pem);
            user.client_certificate_data = Some(encode(certificate));
            user.client_key_data = Some(encode(key).into());
            (user.client_certificate, user.client_key) = (None, None);
        }
    }
    Ok((user, expires))
}

/// Returns how a cluster is reached, but for the proxy.
///
/// kube does the same for a whole kubeconfig, and takes a proxy from the environment on the way: [`crate::proxy`].
fn config_of(cluster: &ExecAuthCluster) -> Result<Config, ConnectError> {
    let without = |what: String| ConnectError::Config(format!("without {what}"));
    let server = cluster.server.as_deref().filter(|server| !server.is_empty());
    let server = server.ok_or_else(|| without("a server address".to_owned()))?;
    let server: Uri = server.parse().map_err(|error| without(format!("a usable server address: {error}")))?;
    let mut config = Config::new(server);
    if let Some(pem) = &cluster.certificate_authority_data {
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let certificates = certificates.ok().filter(|certificates| !certificates.is_empty());
        let certificates = certificates.ok_or_else(|| {
            without("a usable certificate-authority: it is no PEM of certificates".to_owned())
        })?;
        config.root_cert = Some(certificates.iter().map(|certificate| certificate.to_vec()).collect());
    }
    config.accept_invalid_certs = cluster.insecure_skip_tls_verify.unwrap_or_default();
    config.tls_server_name = cluster.tls_server_name.clone().filter(|name| !name.is_empty());
    Ok(config)
}
