//! What the operator decides about registries. Defaults equal the reference's.
//!
//! Filled by the daemon from `[http]`, `[blob]` and `[resolver.host]` and by the command line from its flags; nothing
//! here reads a file or the environment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use soci_auth::{Origin, Scheme};
use soci_oci::RegistryName;
use url::Url;

/// Everything that shapes how registries are talked to.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `User-Agent` of every request.
    pub user_agent: String,
    /// Time limits and retries of requests.
    pub http: HttpSettings,
    /// Time limits and retries of blob reads.
    pub blob: BlobSettings,
    /// Mirrors by registry (`host[:port]` as images name it), tried in order before everything else.
    pub mirrors: BTreeMap<String, Vec<Mirror>>,
    /// Directories in containerd's `certs.d` layout; the first that knows a host is used.
    pub hosts_dirs: Vec<PathBuf>,
    /// How long the files found there are trusted before they are looked at again.
    pub hosts_recheck: Duration,
    /// Which registries are reached by plain http though nothing else says so.
    pub plain_http: PlainHttp,
    /// TLS settings for the registry itself, beside those of its hosts directory.
    pub tls: TlsSettings,
    /// Whether proxies named by the environment are used. Loopback and metadata addresses never go through one.
    pub proxies: Proxies,
    /// How many requests one host gets at a time.
    pub concurrency: Concurrency,
    /// The size of the pieces a large blob is pushed in, in bytes; smaller blobs go in one request.
    pub push_chunk: u64,
}

/// `[http]`: limits of every request.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// To connect, TLS handshake included.
    pub dial_timeout: Duration,
    /// From sending a request to the head of its answer.
    pub response_header_timeout: Duration,
    /// From sending a request to the end of its answer.
    pub request_timeout: Duration,
    /// Retries after the first attempt.
    pub retries: Retries,
}

/// `[blob]`: limits of blob reads.
#[derive(Debug, Clone)]
pub struct BlobSettings {
    /// A whole ranged read, resumptions included.
    pub fetching_timeout: Duration,
    /// Retries and resumptions without progress between them.
    pub retries: Retries,
    /// How long a body may stand still before the connection counts as lost.
    pub stall_timeout: Duration,
}

/// How often and how far apart something is tried again.
#[derive(Debug, Clone)]
pub struct Retries {
    /// Retries after the first attempt.
    pub max: u32,
    /// The first delay; doubles each time.
    pub min_wait: Duration,
    /// The longest delay.
    pub max_wait: Duration,
}

/// A mirror of `[resolver.host]`.
#[derive(Debug, Clone)]
pub struct Mirror {
    pub(crate) origins: Vec<Origin>,
    pub(crate) path: String,
    /// Limit of one request to it, instead of the global one.
    pub(crate) request_timeout: MirrorTimeout,
    /// Whether the image's registry's credentials may be sent to it.
    pub(crate) credentials: MirrorCredentials,
}

/// The time limit of a request to a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorTimeout {
    /// That of `[http]`.
    Global,
    /// This long.
    Of(Duration),
    /// As long as the caller's deadline allows.
    Unlimited,
}

/// Which credentials a mirror may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorCredentials {
    /// Only those stored for the mirror's own host.
    Own,
    /// Also those that pulls brought for the image's registry: the operator said so.
    Forwarded,
}

/// Which registries are reached by plain http.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PlainHttp {
    /// https; a loopback registry is tried by https first, then by http.
    #[default]
    LoopbackOnly,
    /// Plain http for every registry (`--plain-http`).
    Always,
}

/// TLS for the registry itself.
#[derive(Debug, Clone, Default)]
pub struct TlsSettings {
    /// PEM files of authorities trusted beside the system's.
    pub ca: Vec<PathBuf>,
    /// PEM files of a client certificate and its key.
    pub client: Option<(PathBuf, PathBuf)>,
    /// Whether the server's certificate is checked, and those of other hosts to which it leads. That of one host alone is
    /// a matter of `hosts.toml`.
    pub verify: Verify,
}

/// Whether a server's certificate is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Verify {
    /// Against the system's and configured authorities.
    #[default]
    Yes,
    /// Not at all: anybody in between can read and answer.
    Skip,
}

/// Whether proxies are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Proxies {
    /// `HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY`.
    #[default]
    Environment,
    /// None.
    Never,
}

/// How many requests one host gets at a time.
#[derive(Debug, Clone, Copy)]
pub struct Concurrency {
    /// Requests at a time, bodies included.
    pub per_host: usize,
    /// How many of those are kept for work that somebody waits for.
    pub on_demand_reserve: usize,
}

/// Settings that make no sense.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SettingsError {
    /// A mirror's address.
    #[error("mirror {host:?}: {reason}; write it as https://host[:port]")]
    Mirror {
        /// What was written.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that must not be zero, or pairs that contradict.
    #[error("{0}")]
    Value(String),
    /// The user agent is no header value.
    #[error("user agent {0:?} holds characters that no header may have")]
    UserAgent(String),
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            user_agent: concat!("soci-snapshotter/", env!("CARGO_PKG_VERSION")).to_owned(),
            http: HttpSettings::default(),
            blob: BlobSettings::default(),
            mirrors: BTreeMap::new(),
            hosts_dirs: vec![PathBuf::from("/etc/containerd/certs.d")],
            hosts_recheck: Duration::from_secs(2),
            plain_http: PlainHttp::default(),
            tls: TlsSettings::default(),
            proxies: Proxies::default(),
            concurrency: Concurrency { per_host: 32, on_demand_reserve: 8 },
            push_chunk: 16 << 20,
        }
    }
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            dial_timeout: Duration::from_secs(3),
            response_header_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(300),
            retries: Retries::default(),
        }
    }
}

impl Default for BlobSettings {
    fn default() -> Self {
        Self {
            fetching_timeout: Duration::from_secs(300),
            retries: Retries::default(),
            stall_timeout: Duration::from_secs(10),
        }
    }
}

impl Default for Retries {
    fn default() -> Self {
        Self { max: 8, min_wait: Duration::from_millis(30), max_wait: Duration::from_secs(300) }
    }
}

impl Settings {
    /// Checks what types cannot say.
    ///
    /// # Errors
    /// [`SettingsError`] names the first value that makes no sense.
    pub fn check(&self) -> Result<(), SettingsError> {
        let value = |text: &str| Err(SettingsError::Value(text.to_owned()));
        if self.concurrency.on_demand_reserve >= self.concurrency.per_host {
            return value(
                "the on-demand reserve leaves no request for anything else: lower it or raise per_host",
            );
        }
        if self.push_chunk == 0 {
            return value("push chunk size is 0: blobs need at least one byte per request");
        }
        for (name, retries) in [("[http]", &self.http.retries), ("[blob]", &self.blob.retries)] {
            if retries.min_wait > retries.max_wait {
                return Err(SettingsError::Value(format!(
                    "{name}: the shortest wait of {:?} is longer than the longest of {:?}",
                    retries.min_wait, retries.max_wait
                )));
            }
        }
        if http::HeaderValue::from_str(&self.user_agent).is_err() {
            return Err(SettingsError::UserAgent(self.user_agent.clone()));
        }
        for registry in self.mirrors.keys() {
            RegistryName::new(registry).map_err(|_| {
                SettingsError::Value(format!("[resolver.host]: {registry:?} is no registry host"))
            })?;
        }
        Ok(())
    }
}

impl Mirror {
    /// Parses a mirror's `host`: a URL, or `host[:port]`. `insecure` is the key of that name: plain http.
    ///
    /// A URL's own scheme is honoured; without one it is https, or http when insecure; a loopback host without a scheme
    /// is tried by https first. A path replaces nothing: `/v2` is appended unless it ends in it.
    ///
    /// # Errors
    /// [`SettingsError::Mirror`] when it names no host or has a query, fragment or user.
    pub fn parse(host: &str, insecure: Insecure) -> Result<Self, SettingsError> {
        let error =
            |reason: &str| SettingsError::Mirror { host: without_query(host), reason: reason.to_owned() };
        let explicit = host.contains("://");
        let text = if explicit { host.to_owned() } else { format!("https://{host}") };
        let url = Url::parse(&text).map_err(|cause| error(&cause.to_string()))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(error("credentials do not belong into an address"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(error("an address of a mirror has no query and no fragment"));
        }
        let origin = Origin::of_url(&url).ok_or_else(|| error("only http and https are supported"))?;
        let http = || Origin::new(Scheme::Http, origin.host(), port_of(&url, host));
        let origins = match insecure {
            Insecure::Yes => {
                vec![if explicit && origin.scheme() == Scheme::Http { origin.clone() } else { http() }]
            }
            Insecure::No if !explicit && origin.is_loopback() => vec![origin.clone(), http()],
            Insecure::No => vec![origin.clone()],
        };
        let path = api_root(url.path());
        Ok(Self {
            origins,
            path,
            request_timeout: MirrorTimeout::Global,
            credentials: MirrorCredentials::Own,
        })
    }

    /// Sets the key `request_timeout_sec`: 0 = that of `[http]`, negative = none.
    #[must_use]
    pub fn request_timeout(mut self, seconds: i64) -> Self {
        self.request_timeout = match u64::try_from(seconds) {
            Ok(0) => MirrorTimeout::Global,
            Ok(seconds) => MirrorTimeout::Of(Duration::from_secs(seconds)),
            Err(_) => MirrorTimeout::Unlimited,
        };
        self
    }

    /// Sets which credentials it may see.
    #[must_use]
    pub fn credentials(mut self, credentials: MirrorCredentials) -> Self {
        self.credentials = credentials;
        self
    }
}

/// A mirror's `insecure` key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Insecure {
    /// Plain http.
    Yes,
    /// TLS, unless the address says `http://`.
    No,
}

/// Returns the port an address names, also where it is the default port of the scheme assumed for it.
fn port_of(url: &Url, text: &str) -> Option<u16> {
    let authority = text.split_once("://").map_or(text, |(_, rest)| rest);
    let authority = authority.split(['/', '?']).next().unwrap_or(authority);
    let written = authority.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    url.port().or(written)
}

/// Returns the path under which the API is served: `path` with `/v2` appended unless it ends in it.
pub(crate) fn api_root(path: &str) -> String {
    let path = path.trim_end_matches('/');
    if path.ends_with("/v2") { path.to_owned() } else { format!("{path}/v2") }
}

/// Drops query and fragment, which may hold signatures.
pub(crate) fn without_query(text: &str) -> String {
    text.split(['?', '#']).next().unwrap_or("").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_parsed_strictly() {
        let table = [
            ("https://m.example:5000", Insecure::No, "https://m.example:5000", "/v2"),
            ("m.example:5000", Insecure::No, "https://m.example:5000", "/v2"),
            ("m.example", Insecure::Yes, "http://m.example", "/v2"),
            ("m.example:443", Insecure::Yes, "http://m.example:443", "/v2"),
            ("http://m.example", Insecure::No, "http://m.example", "/v2"),
            ("https://m.example/", Insecure::No, "https://m.example", "/v2"),
            ("https://m.example/cache/", Insecure::No, "https://m.example", "/cache/v2"),
            ("https://m.example/v2", Insecure::No, "https://m.example", "/v2"),
        ];
        for (host, insecure, origin, path) in table {
            let mirror = Mirror::parse(host, insecure).unwrap();
            assert_eq!(mirror.origins[0].to_string(), origin, "{host}");
            assert_eq!(mirror.path, path, "{host}");
        }
        for host in ["", "ftp://m", "https://u:p@m", "https://m?a=b", "https://", "a b"] {
            let error = Mirror::parse(host, Insecure::No).unwrap_err().to_string();
            assert!(!error.contains("a=b"), "{error}");
        }
    }

    #[test]
    fn a_loopback_mirror_without_scheme_is_tried_by_https_first() {
        let mirror = Mirror::parse("localhost:5000", Insecure::No).unwrap();
        let origins: Vec<String> = mirror.origins.iter().map(ToString::to_string).collect();
        assert_eq!(origins, ["https://localhost:5000", "http://localhost:5000"]);
    }

    #[test]
    fn defaults_are_the_references() {
        let settings = Settings::default();
        settings.check().unwrap();
        assert_eq!(settings.http.retries.max, 8);
        assert_eq!(settings.http.dial_timeout, Duration::from_millis(3000));
        assert_eq!(settings.blob.retries.min_wait, Duration::from_millis(30));
    }
}
