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
use hyper_util::client::proxy::matcher::Matcher;
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
pub(crate) struct Transport {
    http: HttpSettings,
    /// Which addresses go through a proxy; none do when absent.
    proxies: Option<Matcher>,
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
            proxies: (proxies == Proxies::Environment).then(Matcher::from_env),
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
        let client = self.client(route, &wire.url, &origin)?;
        let mut request = reqwest::Request::new(wire.method, wire.url);
        *request.headers_mut() = wire.headers;
        *request.body_mut() = wire.body.map(reqwest::Body::from);
        match tokio::time::timeout_at(patience.head.into(), client.execute(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Failure::of_reqwest(error)),
            Err(_) => Err(Failure::new(FailureKind::Timeout, "no answer in time")),
        }
    }

    fn client(&self, route: &Route, url: &Url, origin: &Origin) -> Result<reqwest::Client, Failure> {
        let direct = stays_here(origin) || !self.is_proxied(url);
        let key = ClientKey {
            identity: Arc::clone(&route.identity),
            dial_timeout: route.dial_timeout.unwrap_or(self.http.dial_timeout),
            direct,
            // A proxy resolves the name itself, and what we connect to is the proxy, which may well be on this machine.
            guard: route.guard.clone().filter(|_| direct),
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

    /// Whether the environment names a proxy for `url`.
    fn is_proxied(&self, url: &Url) -> bool {
        let Some(proxies) = &self.proxies else { return false };
        url.as_str().parse().is_ok_and(|uri| proxies.intercept(&uri).is_some())
    }

    #[expect(clippy::disallowed_methods, reason = "here it is built")]
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

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport").field("http", &self.http).finish_non_exhaustive()
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
    fn a_token_request_through_a_proxy_is_not_guarded_against_the_proxys_own_address() {
        let mut transport = Transport::new(HttpSettings::default(), Proxies::Never, "test").unwrap();
        let url: Url = "https://auth.example/token".parse().unwrap();
        assert!(!transport.is_proxied(&url));
        transport.proxies =
            Some(Matcher::builder().all("http://localhost:3128").no("direct.example").build());
        let origin = Origin::of_url(&url).unwrap();
        let route = Route { identity: Arc::default(), dial_timeout: None, guard: Some(origin.clone()) };
        transport.client(&route, &url, &origin).unwrap();
        let direct: Url = "https://direct.example/token".parse().unwrap();
        transport.client(&route, &direct, &Origin::of_url(&direct).unwrap()).unwrap();
        let clients = transport.clients.lock();
        let mut kinds: Vec<(bool, bool)> =
            clients.keys().map(|key| (key.direct, key.guard.is_some())).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, [(false, false), (true, true)]);
    }

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
