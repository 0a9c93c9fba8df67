//! Through which proxy the API server is reached, as kubectl does.
//!
//! `proxy-url` of the cluster is always used. Without one it is `HTTPS_PROXY` (`HTTP_PROXY` for a server without TLS), unless
//! `NO_PROXY` names the API server or it is on this machine or link. kube would ask whether `NO_PROXY` names the *proxy*,
//! takes none of the variables for a server without TLS, and refuses a whole kubeconfig for a comma too many.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;

use http::Uri;
use http::uri::InvalidUri;
use hyper_util::client::proxy::matcher::Matcher;

/// What the environment says of proxies.
#[derive(Clone, Default)]
pub struct Proxies {
    /// `HTTPS_PROXY`, for servers with TLS.
    https: Option<String>,
    /// `HTTP_PROXY`, for servers without.
    http: Option<String>,
    /// `NO_PROXY`: what is reached directly.
    none: String,
}

/// A proxy whose address is none.
#[derive(Debug, thiserror::Error)]
#[error("{from} is not the address of a proxy")]
pub(crate) struct ProxyError {
    /// What names it.
    from: &'static str,
    #[source]
    source: InvalidUri,
}

impl fmt::Debug for Proxies {
    /// Shows nothing of what may hold a login.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxies").field("none", &self.none).finish_non_exhaustive()
    }
}

impl Proxies {
    /// Reads the variables, each by its name in capitals or else in small letters.
    pub fn of(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let read = |name: &str| {
            let names = [name.to_owned(), name.to_ascii_lowercase()];
            let mut values = names.iter().filter_map(|name| variable(name)?.into_string().ok());
            values.find(|value| !value.is_empty())
        };
        Self {
            https: read("HTTPS_PROXY"),
            http: read("HTTP_PROXY"),
            none: read("NO_PROXY").unwrap_or_default(),
        }
    }

    /// Returns the proxy for `server`, whose cluster names `own`.
    pub(crate) fn choose(&self, server: &Uri, own: Option<&str>) -> Result<Option<Uri>, ProxyError> {
        let named = own.filter(|url| !url.is_empty()).map(|url| ("proxy-url", url));
        let variable = match server.scheme_str() {
            Some("http") => self.http.as_deref().map(|url| ("HTTP_PROXY", url)),
            _ => self.https.as_deref().map(|url| ("HTTPS_PROXY", url)),
        };
        let named = named.or_else(|| variable.filter(|_| !self.is_direct(server)));
        named.map(|(from, url)| parse(url).map_err(|source| ProxyError { from, source })).transpose()
    }

    fn is_direct(&self, server: &Uri) -> bool {
        let host = server.host().unwrap_or_default();
        host.eq_ignore_ascii_case("localhost") || is_here(host) || self.exempts(server)
    }

    fn exempts(&self, server: &Uri) -> bool {
        let default = if server.scheme_str() == Some("http") { 80 } else { 443 };
        let port = server.port_u16().unwrap_or(default);
        self.none.split(',').map(str::trim).any(|entry| {
            let (name, only) = split(entry);
            let name = name.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(name);
            let is_named = || name == "*" || matches(name, server);
            !name.is_empty() && only.is_none_or(|only| only == port) && is_named()
        })
    }
}

/// An address without a scheme is one of http, as everywhere.
fn parse(url: &str) -> Result<Uri, InvalidUri> {
    match url.contains("://") {
        true => url.parse(),
        false => format!("http://{url}").parse(),
    }
}

/// Whether an address is of this machine, or of its link, which no proxy reaches.
fn is_here(host: &str) -> bool {
    let address = unbracketed(host).parse::<IpAddr>();
    address.is_ok_and(|address| match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
    })
}

/// Returns an entry of `NO_PROXY` without its port, and its port.
fn split(entry: &str) -> (&str, Option<u16>) {
    let is_whole = entry.contains('/') || entry.parse::<IpAddr>().is_ok();
    let (name, port) = match entry.rsplit_once(':') {
        Some((name, port)) if !is_whole && port.parse::<u16>().is_ok() => (name, port.parse().ok()),
        _ => (entry, None),
    };
    (unbracketed(name), port)
}

fn unbracketed(host: &str) -> &str {
    host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host)
}

/// Whether an address, a network or a domain with all beneath it holds the host of `server`.
fn matches(name: &str, server: &Uri) -> bool {
    Matcher::builder().all("http://proxy").no(name).build().intercept(server).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROXY: &str = "http://proxy.example:3128";

    fn chosen(none: &str, server: &str) -> Option<String> {
        let proxies = Proxies::of(|name| match name {
            "HTTPS_PROXY" => Some(PROXY.into()),
            "no_proxy" => Some(none.into()),
            _ => None,
        });
        let chosen = proxies.choose(&server.parse().unwrap(), None).unwrap();
        chosen.map(|uri| uri.to_string())
    }

    #[test]
    fn no_proxy_names_servers_not_proxies() {
        for (none, server, direct) in [
            ("", "https://api.example:6443", false),
            ("10.0.0.0/8,127.0.0.1", "https://10.1.2.3:6443", true),
            ("10.0.0.0/8,127.0.0.1", "https://11.1.2.3:6443", false),
            ("10.1.2.3", "https://10.1.2.3", true),
            ("10.1.2.3:6443", "https://10.1.2.3:6443", true),
            ("10.1.2.3:6443", "https://10.1.2.3", false),
            ("fd00::/8", "https://[fd00::1]:6443", true),
            ("fd00::1", "https://[fd00::1]:6443", true),
            ("[fd00::1]", "https://[fd00::1]:6443", true),
            ("[fd00::1]:6443", "https://[fd00::1]:6443", true),
            ("[fd00::1]:443", "https://[fd00::1]:6443", false),
            ("api.example", "https://API.example:6443", true),
            ("example", "https://api.example:6443", true),
            (".example", "https://api.example:6443", true),
            ("*.example", "https://api.example:6443", true),
            (" other , .example:6443 ,", "https://api.example:6443", true),
            ("api.example:443", "https://api.example", true),
            ("api.example:443", "https://api.example:6443", false),
            ("ample", "https://api.example:6443", false),
            ("other.example", "https://api.example:6443", false),
            ("*", "https://10.1.2.3:6443", true),
            ("*", "https://api.example", true),
            (",:6443,:,[,]", "https://api.example:6443", false),
            ("proxy.example", "https://api.example:6443", false),
            // This machine and its link.
            ("", "https://127.0.0.1:6443", true),
            ("", "https://127.8.9.1:6443", true),
            ("", "https://localhost:6443", true),
            ("", "https://[::1]:6443", true),
            ("", "https://[::ffff:127.0.0.1]:6443", true),
            ("", "https://169.254.1.1:6443", true),
        ] {
            let expected = (!direct).then(|| format!("{PROXY}/"));
            assert_eq!(chosen(none, server), expected, "{none:?} for {server}");
        }
    }

    #[test]
    fn the_clusters_own_proxy_is_always_used() {
        let proxies = Proxies::of(|name| (name == "NO_PROXY").then(|| "*".into()));
        for server in ["https://api.example", "https://127.0.0.1:6443"] {
            let chosen = proxies.choose(&server.parse().unwrap(), Some("https://own.example:1")).unwrap();
            assert_eq!(chosen.unwrap().to_string(), "https://own.example:1/");
        }
    }

    #[test]
    fn each_scheme_has_its_variable_and_a_proxy_needs_no_scheme() {
        let proxies = Proxies::of(|name| match name {
            "HTTPS_PROXY" => Some("".into()),
            "https_proxy" => Some("secure.example:1".into()),
            "HTTP_PROXY" => Some("http://user:hunter2@plain.example:2".into()),
            "http_proxy" => Some("http://other.example:3".into()),
            _ => None,
        });
        let chosen = |server: &str| proxies.choose(&server.parse().unwrap(), Some("")).unwrap().unwrap();
        assert_eq!(chosen("https://api.example").to_string(), "http://secure.example:1/");
        assert_eq!(chosen("http://api.example").to_string(), "http://user:hunter2@plain.example:2/");
        assert!(!format!("{proxies:?}").contains("hunter2"));
        let error = proxies.choose(&Uri::from_static("https://a"), Some("http://[hunter2")).unwrap_err();
        let told = soci_oci::with_causes(&error).to_string();
        assert!(told.contains("proxy-url is not") && !told.contains("hunter2"), "{told}");
    }
}
