//! Connections: one HTTP client per TLS identity, so that what one host trusts is never lent to another.
//!
//! HTTP/1.1 with several connections: ranged reads of 8–16 MB gain nothing from multiplexing, and one lost connection
//! costs one range. Redirects are followed by nobody here, retries are made by nobody here; both are layers of the
//! [stack](crate::stack). A client never sends a byte to a metadata or loopback address through a proxy.

pub(crate) mod failure;
mod guard;
pub(crate) mod tls;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use parking_lot::Mutex;
use soci_auth::Origin;
use url::Url;

use crate::settings::{HttpSettings, Proxies};
pub(crate) use failure::{Failure, FailureKind};
use guard::GuardedResolver;
pub(crate) use tls::TlsIdentity;

/// Clients kept at most. More TLS identities than that means that files change all the time.
const MAX_CLIENTS: usize = 128;
/// An idle connection older than this is closed: servers close theirs after 60 s or more.
const IDLE: Duration = Duration::from_secs(50);
/// Idle connections kept per host.
const MAX_IDLE: usize = 32;

/// Makes and keeps clients.
#[derive(Debug)]
pub(crate) struct Transport {
    http: HttpSettings,
    proxies: Proxies,
    user_agent: HeaderValue,
    roots: tls::Roots,
    clients: Mutex<HashMap<ClientKey, reqwest::Client>>,
}

/// What tells one client from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    identity: Arc<TlsIdentity>,
    dial_timeout: Duration,
    direct: bool,
    /// Set for token requests: the registry whose rules decide which addresses may be connected to.
    guard: Option<Origin>,
}

/// One request on the wire.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
}

/// Through which client a request goes.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub(crate) identity: Arc<TlsIdentity>,
    pub(crate) dial_timeout: Option<Duration>,
    pub(crate) guard: Option<Origin>,
}

/// Until when the head of an answer and the whole exchange are waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) head: Instant,
}

impl Transport {
    pub(crate) fn new(http: HttpSettings, proxies: Proxies, user_agent: &str) -> Result<Self, http::Error> {
        Ok(Self {
            http,
            proxies,
            user_agent: HeaderValue::from_str(user_agent)?,
            roots: tls::Roots::default(),
            clients: Mutex::default(),
        })
    }

    /// Sends a request and waits for the head of the answer.
    pub(crate) async fn send(
        &self,
        route: &Route,
        wire: Wire,
        patience: Patience,
    ) -> Result<reqwest::Response, Failure> {
        let origin = Origin::of_url(&wire.url)
            .ok_or_else(|| Failure::new(FailureKind::Address, "the address is neither http nor https"))?;
        let client = self.client(route, &origin)?;
        let mut request = reqwest::Request::new(wire.method, wire.url);
        *request.headers_mut() = wire.headers;
        *request.body_mut() = wire.body.map(reqwest::Body::from);
        match tokio::time::timeout_at(patience.head.into(), client.execute(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Failure::of_reqwest(error)),
            Err(_) => Err(Failure::new(FailureKind::Timeout, "no answer in time")),
        }
    }

    fn client(&self, route: &Route, origin: &Origin) -> Result<reqwest::Client, Failure> {
        let key = ClientKey {
            identity: Arc::clone(&route.identity),
            dial_timeout: route.dial_timeout.unwrap_or(self.http.dial_timeout),
            direct: self.proxies == Proxies::Never || stays_here(origin),
            guard: route.guard.clone(),
        };
        if let Some(client) = self.clients.lock().get(&key) {
            return Ok(client.clone());
        }
        let client = self.build(&key)?;
        let mut clients = self.clients.lock();
        if clients.len() >= MAX_CLIENTS {
            // Dropping a client closes only its idle connections; requests under way keep theirs.
            clients.clear();
        }
        Ok(clients.entry(key).or_insert(client).clone())
    }

    fn build(&self, key: &ClientKey) -> Result<reqwest::Client, Failure> {
        let tls = key.identity.client_config(&self.roots)?;
        let mut builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .connect_timeout(key.dial_timeout)
            .user_agent(self.user_agent.clone());
        if key.direct {
            builder = builder.no_proxy();
        }
        if let Some(registry) = &key.guard {
            builder = builder.dns_resolver(GuardedResolver::new(registry.clone()));
        }
        builder.build().map_err(|error| {
            Failure::because(FailureKind::Local, "no HTTP client can be made with these TLS settings", error)
        })
    }
}

/// Whether requests to `origin` must not go through a proxy: loopback and link-local (metadata) addresses.
fn stays_here(origin: &Origin) -> bool {
    origin.is_loopback()
        || origin.address().is_some_and(|address| match address.to_canonical() {
            std::net::IpAddr::V4(address) => {
                address.is_link_local() || address == std::net::Ipv4Addr::new(100, 100, 100, 200)
            }
            std::net::IpAddr::V6(address) => {
                address.is_unicast_link_local()
                    || address == std::net::Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_metadata_never_use_a_proxy() {
        let origin = |url: &str| Origin::of_url(&url.parse().unwrap()).unwrap();
        for url in [
            "https://localhost:5000",
            "http://127.0.0.9",
            "http://[::1]:5000",
            "http://169.254.169.254",
            "http://[fd00:ec2::254]",
            "http://100.100.100.200",
        ] {
            assert!(stays_here(&origin(url)), "{url}");
        }
        for url in ["https://reg.example", "https://10.0.0.1", "https://[fd00::1]"] {
            assert!(!stays_here(&origin(url)), "{url}");
        }
    }
}
