//! Where a request goes (scheme, host, port) and whom a credential for it must belong to.

use std::fmt;
use std::net::IpAddr;

use soci_oci::{ImageRef, RegistryName, registry_identity};
use url::Url;

/// How a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// Plain http.
    Http,
    /// http over TLS.
    Https,
}

/// Scheme, host and port of a request. A credential never leaves the origin it is for.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    scheme: Scheme,
    host: String,
    port: u16,
}

/// Whom a credential is for: one image at one host.
#[derive(Debug, Clone)]
pub struct CredentialScope {
    /// The host that asks.
    pub origin: Origin,
    /// The image on whose behalf the request is made.
    pub image: ImageRef,
    /// Whether the origin is a mirror, not the image's own registry.
    pub mirror: bool,
    /// Whether the operator allows the registry's credentials at this mirror.
    pub forward: bool,
    /// The namespace of the pod that pulls, where known.
    pub namespace: Option<String>,
}

impl Scheme {
    /// Returns `http` or `https`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// Returns the port that need not be named.
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

impl Origin {
    /// Returns the origin of `host` (an IPv6 address in brackets) and `port`, the scheme's default when not given.
    pub fn new(scheme: Scheme, host: &str, port: Option<u16>) -> Self {
        Self { scheme, host: host.to_ascii_lowercase(), port: port.unwrap_or(scheme.default_port()) }
    }

    /// Returns the origin at which the registry itself is served, Docker Hub's other host included.
    pub fn of_registry(scheme: Scheme, registry: &RegistryName) -> Self {
        match registry.is_docker_hub() {
            true => Self::new(scheme, registry.endpoint(), None),
            false => Self::new(scheme, registry.host(), registry.port()),
        }
    }

    /// Returns the origin of an http or https URL, nothing for any other.
    pub fn of_url(url: &Url) -> Option<Self> {
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return None,
        };
        Some(Self::new(scheme, url.host_str()?, url.port()))
    }

    /// Returns the scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Returns the host, lower case; an IPv6 address keeps its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns `host`, or `host:port` when the port is not the scheme's default.
    pub fn authority(&self) -> String {
        match self.port == self.scheme.default_port() {
            true => self.host.clone(),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// Returns the host as an address, if it is a literal one.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.trim_start_matches('[').trim_end_matches(']').parse().ok()
    }

    /// Whether the host names this machine.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost"
            || self.host.ends_with(".localhost")
            || self.address().is_some_and(|address| address.to_canonical().is_loopback())
    }
}

impl CredentialScope {
    /// Returns the scope of `image` at its own registry.
    pub fn new(origin: Origin, image: ImageRef) -> Self {
        Self { origin, image, mirror: false, forward: false, namespace: None }
    }

    /// Returns the name under which a host-wide option (Docker config, secrets) looks: the image's registry as the
    /// image names it, or the mirror's own `host[:port]`.
    pub fn lookup_name(&self) -> String {
        match self.mirror {
            true => self.origin.authority(),
            false => self.image.registry().as_str().to_owned(),
        }
    }

    /// Returns the [identity](registry_identity) of [`CredentialScope::lookup_name`]. This is what the board counts
    /// generations by.
    pub fn identity(&self) -> String {
        registry_identity(&self.lookup_name().to_ascii_lowercase()).to_owned()
    }

    /// Whether `registry`, an identity, is the host that asks: over plain http, port 80 is no port there.
    pub(crate) fn is_at(&self, registry: &str) -> bool {
        identity(registry, self.origin.scheme) == identity(&self.lookup_name(), self.origin.scheme)
    }
}

/// Returns the canonical identity of a `host[:port]` reached by `scheme`.
pub(crate) fn identity(name: &str, scheme: Scheme) -> String {
    let name = name.to_ascii_lowercase();
    let bare = match scheme {
        Scheme::Https => None,
        Scheme::Http => name.strip_suffix(":80"),
    };
    registry_identity(bare.unwrap_or(&name)).to_owned()
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(url: &str) -> Origin {
        Origin::of_url(&url.parse().unwrap()).unwrap()
    }

    #[test]
    fn default_ports_are_not_shown() {
        assert_eq!(origin("https://REG.example:443/v2/").to_string(), "https://reg.example");
        assert_eq!(origin("http://reg.example:5000").to_string(), "http://reg.example:5000");
        assert_eq!(origin("https://reg.example"), Origin::new(Scheme::Https, "reg.example", Some(443)));
        assert!(Origin::of_url(&"file:///x".parse().unwrap()).is_none());
    }

    #[test]
    fn t30_loopback_hosts_are_recognised() {
        for url in
            ["http://localhost:5000", "http://[::1]:5000", "http://127.3.2.1", "http://[::ffff:127.0.0.1]"]
        {
            assert!(origin(url).is_loopback(), "{url}");
        }
        assert!(!origin("http://localhost.example").is_loopback());
    }

    #[test]
    fn identities_drop_default_ports_and_unify_docker_hub() {
        let hub: ImageRef = "nginx".parse().unwrap();
        let at = Origin::of_registry(Scheme::Https, hub.registry());
        assert_eq!(at.to_string(), "https://registry-1.docker.io");
        let mut scope = CredentialScope::new(at, hub);
        assert_eq!(scope.identity(), "docker.io");
        scope.mirror = true;
        scope.origin = origin("https://mirror.example:8443");
        assert_eq!(scope.identity(), "mirror.example:8443");
        scope.mirror = false;
        scope.image = "h.example:80/a".parse().unwrap();
        scope.origin = Origin::of_registry(Scheme::Http, scope.image.registry());
        assert_eq!(scope.identity(), scope.image.registry().identity(), "what pulls and secrets know it by");
        assert!(scope.is_at("h.example") && scope.is_at("h.example:80") && !scope.is_at("h.example:5000"));
        assert_eq!(identity("H.example:80", Scheme::Http), "h.example");
        assert_eq!(identity("H.example:80", Scheme::Https), "h.example:80");
    }
}
