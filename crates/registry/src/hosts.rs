//! The one ordered list of hosts for a registry: `[resolver.host]` mirrors, the hosts directory's, the registry itself.
//!
//! Every request of every kind walks this list; there is no other way to a registry. The list is made when it is first
//! needed and made anew when the files behind it have changed; a directory that becomes unusable is reported once per
//! change and the registry itself stays reachable.

mod dir;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::HeaderMap;
use parking_lot::Mutex;
use soci_auth::{Origin, Scheme};
use soci_oci::{RegistryName, with_causes};

use crate::hosts_toml::{Capabilities, HostTable};
use crate::settings::{MirrorCredentials, MirrorTimeout, PlainHttp, Settings, Verify};
use crate::status::Operation;
use crate::transport::TlsIdentity;
use crate::transport::tls::read_pem;
use dir::{Directory, Stamp};

/// Registries whose lists are kept; more than a node ever pulls from.
const MAX_LISTS: usize = 256;

/// A host of the list.
#[derive(Debug)]
pub(crate) struct Host {
    /// Where it may be: usually one. With two the first that speaks is kept: https, then http.
    pub(crate) origins: Vec<Origin>,
    /// Path of the API, without a slash at the end.
    pub(crate) root: String,
    pub(crate) capabilities: Capabilities,
    /// Headers the operator adds; never sent to another origin.
    pub(crate) headers: HeaderMap,
    pub(crate) identity: Arc<TlsIdentity>,
    pub(crate) dial_timeout: Option<Duration>,
    pub(crate) request_timeout: MirrorTimeout,
    /// The registry to name in `?ns=`, when this host is not that registry.
    pub(crate) namespace: Option<String>,
    pub(crate) credentials: MirrorCredentials,
}

impl Host {
    /// Whether this host is not the image's own registry.
    pub(crate) fn is_mirror(&self) -> bool {
        self.namespace.is_some()
    }

    /// Whether it may be asked for `operation`.
    pub(crate) fn serves(&self, operation: Operation) -> bool {
        match operation {
            Operation::Resolve => self.capabilities.resolve,
            Operation::Manifest | Operation::Blob => self.capabilities.pull,
            Operation::Referrers => self.capabilities.referrers,
            Operation::Exists
            | Operation::UploadStart
            | Operation::UploadChunk
            | Operation::UploadStatus
            | Operation::UploadFinish
            | Operation::ManifestPut
            | Operation::Delete => self.capabilities.push,
        }
    }

    /// Returns the first origin, which stands for the host in messages.
    pub(crate) fn name(&self) -> String {
        self.origins.first().map(ToString::to_string).unwrap_or_default()
    }
}

/// Makes and keeps the lists.
#[derive(Debug)]
pub(crate) struct Hosts {
    settings: Arc<Settings>,
    lists: Mutex<HashMap<RegistryName, Kept>>,
}

#[derive(Debug, Clone)]
struct Kept {
    list: Arc<[Arc<Host>]>,
    stamp: Stamp,
    looked: Instant,
}

/// Files of the command line that cannot be used: an error rather than a warning, since somebody asked for them.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(crate) struct HostsError(pub(crate) String);

impl Hosts {
    pub(crate) fn new(settings: Arc<Settings>) -> Self {
        Self { settings, lists: Mutex::default() }
    }

    /// Returns the hosts for `registry`, most preferred first; never empty.
    ///
    /// Looks at the files again when the last look is older than `hosts_recheck`; that happens on a blocking thread.
    pub(crate) async fn of(&self, registry: &RegistryName) -> Result<Arc<[Arc<Host>]>, HostsError> {
        let kept = self.lists.lock().get(registry).cloned();
        if let Some(kept) = &kept
            && kept.looked.elapsed() < self.settings.hosts_recheck
        {
            return Ok(Arc::clone(&kept.list));
        }
        let (settings, name) = (Arc::clone(&self.settings), registry.clone());
        let found =
            tokio::task::spawn_blocking(move || look(&settings, &name, kept)).await.map_err(|_| {
                HostsError(format!("the hosts of {registry} cannot be read: the task was cancelled"))
            })??;
        let list = Arc::clone(&found.list);
        let mut lists = self.lists.lock();
        if lists.len() >= MAX_LISTS && !lists.contains_key(registry) {
            lists.clear();
        }
        lists.insert(registry.clone(), found);
        Ok(list)
    }

    /// Returns what is trusted at `target`, another origin to which `host` led.
    ///
    /// That the host's certificate is not checked (`skip_verify`) holds for its name, whatever the port: who can answer
    /// for it there could as well have answered as the host itself. Any other host is checked, unless it is configured.
    pub(crate) async fn trust_at(&self, host: &Host, target: &Origin) -> TlsIdentity {
        match host.origins.iter().any(|origin| origin.host() == target.host()) {
            true => host.identity.without_clients(),
            false => self.trust_elsewhere(&host.identity, target).await,
        }
    }

    /// Returns what is trusted at `target`, a host that is not the one of `identity`: the authorities of that one, and what
    /// the operator configured for `target` as for a registry, be it a token server or a storage.
    pub(crate) async fn trust_elsewhere(&self, identity: &TlsIdentity, target: &Origin) -> TlsIdentity {
        let mut trust = identity.elsewhere();
        let Ok(name) = RegistryName::new(&target.authority()) else { return trust };
        // What cannot be read was told of by the look, and trusts nothing.
        let list = self.of(&name).await.unwrap_or_default();
        if let Some(own) = list.iter().find(|own| own.origins.contains(target)) {
            trust.authorities.extend(own.identity.authorities.iter().cloned());
            if own.identity.verify == Verify::Skip {
                trust.verify = Verify::Skip;
            }
        }
        trust
    }
}

/// Looks at the files; makes a new list when they changed.
fn look(settings: &Settings, registry: &RegistryName, kept: Option<Kept>) -> Result<Kept, HostsError> {
    let looked = Instant::now();
    let directory = settings.hosts_dirs.iter().find_map(|root| dir::find(root, registry));
    let mut stamp = Stamp::of(directory.as_deref());
    if let Some(kept) = kept
        && kept.stamp.path == stamp.path
        && kept.stamp.is_current()
    {
        return Ok(Kept { looked, ..kept });
    }
    let loaded = directory.map(|path| dir::load(path, &mut stamp)).unwrap_or_default();
    let list = build(settings, registry, loaded, &mut stamp)?;
    Ok(Kept { list, stamp, looked })
}

fn build(
    settings: &Settings,
    registry: &RegistryName,
    directory: Directory,
    stamp: &mut Stamp,
) -> Result<Arc<[Arc<Host>]>, HostsError> {
    let mut list = Vec::new();
    let own = |pem: &PathBuf| read_pem(pem).map_err(|error| HostsError(with_causes(&error)));
    let verify = settings.tls.verify;
    let mut base = TlsIdentity { verify, verify_elsewhere: verify, ..TlsIdentity::default() };
    for file in &settings.tls.ca {
        base.authorities.push(own(file)?);
        stamp.add(file);
    }
    if let Some((certificate, key)) = &settings.tls.client {
        base.clients.push((own(certificate)?, own(key)?));
        stamp.add(certificate);
        stamp.add(key);
    }
    // What is trusted for the registry is trusted for its mirrors too, but our certificate is shown to the registry only.
    let mirror_identity = Arc::new(base.without_clients());
    for mirror in mirrors(settings, registry) {
        list.push(Arc::new(Host {
            namespace: mirror.origins.first().and_then(|origin| namespace(registry, origin)),
            origins: mirror.origins.clone(),
            root: mirror.path.clone(),
            capabilities: Capabilities::READ,
            headers: HeaderMap::new(),
            identity: Arc::clone(&mirror_identity),
            dial_timeout: None,
            request_timeout: mirror.request_timeout,
            credentials: mirror.credentials,
        }));
    }
    for table in &directory.hosts {
        let Some(address) = &table.address else { continue };
        list.push(Arc::new(host(table, address.origin.clone(), &address.root, registry, &base, stamp)));
    }
    let server = match &directory.server.address {
        Some(address) => {
            host(&directory.server, address.origin.clone(), &address.root, registry, &base, stamp)
        }
        None => {
            let mut table = directory.server.clone();
            // Without `server` the keys at the top configure the registry itself, which can do everything.
            table.capabilities = None;
            let scheme = if settings.plain_http == PlainHttp::Always { Scheme::Http } else { Scheme::Https };
            let mut host = host(&table, Origin::of_registry(scheme, registry), "/v2", registry, &base, stamp);
            host.namespace = None;
            if scheme == Scheme::Https && registry.is_loopback() {
                host.origins.push(Origin::of_registry(Scheme::Http, registry));
            }
            host
        }
    };
    list.push(Arc::new(server));
    Ok(list.into())
}

fn mirrors<'a>(settings: &'a Settings, registry: &RegistryName) -> &'a [crate::settings::Mirror] {
    let named = settings
        .mirrors
        .iter()
        .find(|(name, _)| RegistryName::new(name).is_ok_and(|name| name.identity() == registry.identity()));
    named.map_or(&[], |(_, mirrors)| mirrors.as_slice())
}

fn host(
    table: &HostTable,
    origin: Origin,
    root: &str,
    registry: &RegistryName,
    base: &TlsIdentity,
    stamp: &mut Stamp,
) -> Host {
    let namespace = namespace(registry, &origin);
    let mut identity = if namespace.is_some() { base.without_clients() } else { base.clone() };
    let configured = !table.ca.is_empty() || !table.client.is_empty() || table.verify.is_some();
    let mut read = |file: &PathBuf| {
        stamp.add(file);
        match read_pem(file) {
            Ok(pem) => Some(pem),
            Err(error) => {
                // The host stays in the list: without the file its certificate is not trusted, and that error says so.
                tracing::warn!(host = %origin, error = with_causes(&error), "a TLS file of a host cannot be used");
                None
            }
        }
    };
    identity.authorities.extend(table.ca.iter().filter_map(&mut read));
    let own = table.client.iter().filter_map(|(certificate, key)| {
        let pem = read(certificate)?;
        let key = key.as_ref().map_or(Some(pem.clone()), &mut read)?;
        Some((pem, key))
    });
    identity.clients.splice(..0, own);
    if let Some(verify) = table.verify {
        identity.verify = verify;
        if verify == Verify::Skip {
            tracing::warn!(host = %origin, "the certificate of this host is not checked (skip_verify)");
        }
    }
    let mut origins = vec![origin.clone()];
    if configured && origin.scheme() == Scheme::Http && origin.port() != 80 {
        // TLS is configured for a host that is called plain: as containerd does, TLS is tried first.
        origins.insert(0, Origin::new(Scheme::Https, origin.host(), Some(origin.port())));
    }
    Host {
        origins,
        root: root.to_owned(),
        capabilities: table.capabilities.unwrap_or(Capabilities::ALL),
        headers: table.headers.clone(),
        identity: Arc::new(identity),
        dial_timeout: table.dial_timeout,
        request_timeout: MirrorTimeout::Global,
        namespace,
        credentials: MirrorCredentials::Own,
    }
}

/// Returns the registry to name in `?ns=` at `origin`: nothing when `origin` is that registry.
fn namespace(registry: &RegistryName, origin: &Origin) -> Option<String> {
    let itself = Origin::of_registry(Scheme::Https, registry);
    let same = origin.host() == itself.host()
        && (origin.port() == itself.port() || (registry.port().is_none() && origin.port() == 80));
    (!same).then(|| registry.as_str().to_owned())
}

#[cfg(test)]
mod tests;
