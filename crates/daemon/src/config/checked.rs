//! The configuration as values that cannot be wrong.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use soci_oci::RegistryName;
use soci_registry::settings::{Insecure, Mirror as Host};

use super::address::{Family, TcpAddress};
use super::raw::{self, Raw};

/// What the daemon does, decided once.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Requests to registries.
    pub http: Http,
    /// Requests for parts of layers.
    pub blob: Http,
    /// How long a read of a file waits at most.
    pub read_timeout: Duration,
    /// How long mounting a layer may take.
    pub mount_timeout: Duration,
    /// Whether tar headers are compared with the zTOC when a file is first read.
    pub verify_headers: bool,
    /// Whether overlay is tried out at start.
    pub check_overlay: bool,
    /// Whether layers are completed in the background.
    pub background_fetch: bool,
    /// Bytes per second that this may take.
    pub background_rate: Option<u64>,
    /// How large the span cache may be.
    pub cache: Cache,
    /// Whether prefetch artifacts are honoured.
    pub prefetch: bool,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// How an index is found.
    pub discovery: Discovery,
    /// Whether a pull that is not lazy fails.
    pub strict: bool,
    /// Layers smaller than this many bytes are unpacked.
    pub min_layer_size: u64,
    /// Where metrics are served.
    pub metrics: Option<Listen>,
    /// Where the daemon's state is served.
    pub debug: Debug,
    /// The kubelet's pulls as a source of registry logins: containerd's image service.
    pub cri: Option<PathBuf>,
    /// Kubernetes secrets as such a source.
    pub kubernetes: Option<Kubernetes>,
    /// Mirrors by the host that images name.
    pub mirrors: BTreeMap<String, Vec<Mirror>>,
    /// Directory of containerd's per-host configuration.
    pub hosts_dir: Option<PathBuf>,
}

/// How large the span cache may be; the smaller limit holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// In bytes.
    pub max_bytes: Option<u64>,
    /// In percent of the space that is free or its own.
    pub max_percent: Option<u8>,
}

impl From<Cache> for soci_layer::CacheSettings {
    fn from(Cache { max_bytes, max_percent }: Cache) -> Self {
        Self { max_bytes, max_percent }
    }
}

/// Where the daemon's state is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Debug {
    /// Nowhere.
    Off,
    /// On this Unix socket.
    Unix(PathBuf),
    /// Nowhere, though this address asks for it: what is served is for root alone.
    Refused(String),
}

/// Which pull secrets are synced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubernetes {
    /// The kubeconfig, where one is named.
    pub kubeconfig: Option<PathBuf>,
    /// Of which namespaces; none for all.
    pub namespaces: Vec<String>,
    /// Whether secrets of the older type count.
    pub legacy_dockercfg: bool,
}

/// Time and patience for requests.
#[derive(Debug, Clone, PartialEq)]
pub struct Http {
    /// To connect.
    pub dial: Duration,
    /// Until the headers of an answer.
    pub headers: Duration,
    /// For a whole request.
    pub request: Duration,
    /// Attempts after the first.
    pub retries: u32,
    /// Shortest and longest pause between attempts.
    pub pause: (Duration, Duration),
}

/// How an image's index is found, besides being named by the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Discovery {
    /// Among the image's referrers.
    pub v1: bool,
    /// In the manifest's annotations.
    pub v2: bool,
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// An address of this machine.
    Tcp(TcpAddress),
    /// A Unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// A registry mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Host with an optional scheme, port and path, as configured.
    pub host: String,
    /// Whether it is spoken to without TLS.
    pub insecure: Insecure,
    /// For a whole request, where it differs.
    pub request: Option<Limit>,
    /// Whether logins of the registry that pulls bring are sent to it.
    pub forward_credentials: bool,
}

/// A limit that may be lifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// At most this.
    Within(Duration),
    /// No limit of its own.
    None,
}

/// A value that is well-formed but cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}", path.join("."))]
pub struct CheckError {
    /// The names of tables and keys that lead to it; one of a list is named by its number from zero.
    pub path: Vec<String>,
    /// The value, and what may stand there.
    pub what: String,
}

impl CheckError {
    fn new(path: &[&str], what: impl Into<String>) -> Self {
        Self { path: path.iter().map(|name| (*name).to_owned()).collect(), what: what.into() }
    }
}

impl Config {
    /// Checks `raw`.
    ///
    /// # Errors
    /// [`CheckError`] naming the key, the value and what may stand there.
    pub fn check(raw: &Raw) -> Result<Self, CheckError> {
        let http = http(&raw.http);
        let blob = &raw.blob;
        let blob_http = Http {
            request: seconds(blob.fetching_timeout_sec, 300),
            retries: retries(blob.max_retries, http.retries),
            pause: (
                blob.min_wait_msec.map_or(http.pause.0, |value| millis(value, 30)),
                blob.max_wait_msec.map_or(http.pause.1, |value| millis(value, 300_000)),
            ),
            ..http.clone()
        };
        if !["", "db", "db-multi"].contains(&raw.metadata_store.as_str()) {
            let what = format!(
                "unknown metadata store type: {:?}; must be \"db\" or \"db-multi\"",
                raw.metadata_store
            );
            return Err(CheckError::new(&["metadata_store"], what));
        }
        let policy = raw.background_fetch.drop_policy.as_str();
        if !["oldest", "newest"].contains(&policy) {
            let what = format!("{policy:?}: must be \"oldest\" or \"newest\"");
            return Err(CheckError::new(&["background_fetch", "drop_policy"], what));
        }
        let store = raw.content_store.kind.as_str();
        if !["", "soci", "containerd"].contains(&store) {
            let what = format!("{store:?}: must be \"soci\" or \"containerd\"");
            return Err(CheckError::new(&["content_store", "type"], what));
        }
        parallel(&raw.pull_modes.parallel_pull_unpack, store)?;
        Ok(Self {
            read_timeout: blob_http.request,
            http,
            blob: blob_http,
            mount_timeout: seconds(raw.mount_timeout_sec, 30),
            verify_headers: !raw.disable_verification,
            check_overlay: !raw.skip_check_snapshotter_supported,
            background_fetch: !raw.background_fetch.disable,
            background_rate: positive(raw.background_fetch.max_bytes_per_second),
            cache: cache(&raw.span_cache)?,
            prefetch: raw.prefetch.enable,
            containerd: socket(&raw.content_store.containerd_address, "/run/containerd/containerd.sock"),
            discovery: Discovery { v1: raw.pull_modes.soci_v1.enable, v2: raw.pull_modes.soci_v2.enable },
            strict: raw.pull_modes.strict,
            min_layer_size: u64::try_from(raw.snapshotter.min_layer_size).unwrap_or(0),
            metrics: metrics(raw)?,
            debug: debug(&raw.debug_address),
            cri: raw
                .cri_keychain
                .enable_keychain
                .then(|| socket(&raw.cri_keychain.image_service_path, "/run/containerd/containerd.sock")),
            kubernetes: raw.kubeconfig_keychain.enable_keychain.then(|| Kubernetes {
                kubeconfig: path(&raw.kubeconfig_keychain.kubeconfig_path),
                namespaces: raw.kubeconfig_keychain.namespaces.clone(),
                legacy_dockercfg: raw.kubeconfig_keychain.legacy_dockercfg,
            }),
            mirrors: mirrors(&raw.resolver)?,
            hosts_dir: path(&raw.resolver.config_path),
        })
    }
}

fn http(raw: &raw::Http) -> Http {
    Http {
        dial: millis(raw.dial_timeout_msec, 3000),
        headers: millis(raw.response_header_timeout_msec, 3000),
        request: millis(raw.request_timeout_msec, 300_000),
        retries: retries(Some(raw.max_retries), 8),
        pause: (millis(raw.min_wait_msec, 30), millis(raw.max_wait_msec, 300_000)),
    }
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

fn cache(raw: &raw::SpanCache) -> Result<Cache, CheckError> {
    let percent = u8::try_from(raw.max_percent).ok().filter(|percent| (1..=100).contains(percent));
    let percent = percent.ok_or_else(|| {
        CheckError::new(&["span_cache", "max_percent"], format!("{}: must be from 1 to 100", raw.max_percent))
    })?;
    let max_percent = (raw.max_bytes >= 0).then_some(percent);
    Ok(Cache { max_bytes: positive(raw.max_bytes), max_percent })
}

fn debug(address: &str) -> Debug {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    match path {
        "" => Debug::Off,
        path if path.starts_with('/') => Debug::Unix(PathBuf::from(path)),
        _ => Debug::Refused(address.to_owned()),
    }
}

/// Zero is the default, as in the Go daemon; less than that is none.
fn retries(value: Option<i64>, default: u32) -> u32 {
    match value {
        None | Some(0) => default,
        Some(value) => u32::try_from(value).unwrap_or(0),
    }
}

fn millis(value: i64, default: u64) -> Duration {
    Duration::from_millis(u64::try_from(value).ok().filter(|&value| value > 0).unwrap_or(default))
}

fn seconds(value: i64, default: u64) -> Duration {
    Duration::from_secs(u64::try_from(value).ok().filter(|&value| value > 0).unwrap_or(default))
}

fn path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

fn socket(text: &str, default: &str) -> PathBuf {
    let text = text.strip_prefix("unix://").unwrap_or(text);
    PathBuf::from(if text.is_empty() { default } else { text })
}

fn parallel(raw: &raw::Parallel, store: &str) -> Result<(), CheckError> {
    let error = |key, what: &str| Err(CheckError::new(&["pull_modes", "parallel_pull_unpack", key], what));
    if !is_size(&raw.concurrent_download_chunk_size) {
        let size = &raw.concurrent_download_chunk_size;
        let what = format!("invalid size format: {size:?} must be like \"8mb\"");
        return error("concurrent_download_chunk_size", &what);
    }
    if !raw.enable && !raw.experimental_parallel_pull_as_fallback {
        return Ok(());
    }
    if store != "containerd" && !raw.discard_unpacked_layers {
        return error(
            if raw.enable { "enable" } else { "experimental_parallel_pull_as_fallback" },
            "parallel_pull_unpack mode requires containerd content store (content_store.type = \"containerd\") \
             or discard_unpacked_layers = true",
        );
    }
    if raw.max_concurrent_downloads > 0
        && raw.max_concurrent_downloads < raw.max_concurrent_downloads_per_image
    {
        return error("max_concurrent_downloads", "global download limit less than per-image download limit");
    }
    if raw.max_concurrent_unpacks > 0 && raw.max_concurrent_unpacks < raw.max_concurrent_unpacks_per_image {
        return error("max_concurrent_unpacks", "global unpack limit less than per-image unpack limit");
    }
    Ok(())
}

fn is_size(text: &str) -> bool {
    let text = text.trim().to_ascii_lowercase();
    let number = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let unit = &text[number.len()..];
    text.is_empty()
        || matches!(unit, "" | "b" | "kb" | "mb" | "gb")
            && number.trim().parse::<f64>().is_ok_and(|number| number.is_finite() && number >= 0.0)
}

fn metrics(raw: &Raw) -> Result<Option<Listen>, CheckError> {
    if raw.no_prometheus || raw.metrics_address.is_empty() {
        return Ok(None);
    }
    let family = match raw.metrics_network.as_str() {
        "tcp" | "" => Family::Any,
        "tcp4" => Family::V4,
        "tcp6" => Family::V6,
        "unix" => return Ok(Some(Listen::Unix(PathBuf::from(&raw.metrics_address)))),
        other => {
            let what = format!("{other:?}: must be \"tcp\", \"tcp4\", \"tcp6\" or \"unix\"");
            return Err(CheckError::new(&["metrics_network"], what));
        }
    };
    let address = TcpAddress::parse(&raw.metrics_address, family);
    address
        .map(|address| Some(Listen::Tcp(address)))
        .map_err(|what| CheckError::new(&["metrics_address"], what))
}

fn mirrors(raw: &raw::Resolver) -> Result<BTreeMap<String, Vec<Mirror>>, CheckError> {
    let mut hosts = BTreeMap::new();
    for (host, configured) in &raw.host {
        if RegistryName::new(host).is_err() {
            let what = format!("{host:?} is no registry host; write it as images name it, host[:port]");
            return Err(CheckError::new(&["resolver", "host", host], what));
        }
        let mut mirrors = Vec::new();
        for (number, mirror) in configured.mirrors.iter().enumerate() {
            let number = number.to_string();
            let path = ["resolver", "host", host, "mirrors", &number, "host"];
            if mirror.host.trim().is_empty() {
                return Err(CheckError::new(&path, "a mirror without host"));
            }
            let insecure = if mirror.insecure { Insecure::Yes } else { Insecure::No };
            Host::parse(&mirror.host, insecure).map_err(|error| CheckError::new(&path, error.to_string()))?;
            let request = match mirror.request_timeout_sec {
                0 => None,
                ..0 => Some(Limit::None),
                value => Some(Limit::Within(seconds(value, 1))),
            };
            mirrors.push(Mirror {
                host: mirror.host.clone(),
                insecure,
                request,
                forward_credentials: mirror.forward_credentials,
            });
        }
        hosts.insert(host.clone(), mirrors);
    }
    Ok(hosts)
}
