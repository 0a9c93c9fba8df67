//! Which key of a pull secret speaks for which image.
//!
//! The kubelet's rules: a key without scheme is https, a leading `/v1/` or `/v2/` is dropped, the port must be the same,
//! the host has the same number of dot-separated labels and each is globbed by itself (so `*.io` does not match
//! `a.b.io`). On top of them: port 443 equals no port, the names of Docker Hub are one, and a path must end at a
//! component (`host/foo` is not for `host/foobar`).

use std::net::Ipv6Addr;

use soci_oci::RegistryName;

/// The longest key that is looked at, in bytes.
const MAX_KEY: usize = 1024;

/// A key of `auths`, normalised: a host (or a pattern of hosts) and a path of whole components.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SecretKey {
    /// Lower-case `host[:port]`, port 443 dropped, Docker Hub as `docker.io`; may hold `*`, `?`, `[…]`.
    pub host: String,
    /// Repository path without slashes at either end; empty for the whole registry.
    pub path: String,
}

impl SecretKey {
    /// Normalises a key as it stands in a secret; `None` for a scheme other than http and https, or no host.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_KEY {
            return None;
        }
        let rest = match text.split_once("://") {
            Some(("https" | "http" | "HTTPS" | "HTTP", rest)) => rest,
            Some(_) => return None,
            None => text,
        };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = path.trim_matches('/');
        let path = match path {
            "v1" | "v2" => "",
            _ => path.strip_prefix("v1/").or_else(|| path.strip_prefix("v2/")).unwrap_or(path),
        };
        let host = identity(&host.to_ascii_lowercase());
        (!host.is_empty() && !host.contains('@')).then(|| Self { host, path: path.to_owned() })
    }

    /// Whether the host is a pattern rather than a name, which only an IPv6 address is with a bracket.
    pub(crate) fn is_glob(&self) -> bool {
        let address = || self.host.strip_prefix('[').and_then(|rest| rest.split(']').next());
        self.host.contains(['*', '?'])
            || (self.host.contains('[') && address().is_none_or(|text| text.parse::<Ipv6Addr>().is_err()))
    }
}

/// What a pattern and every host that it matches have in common: the number of labels, and the port.
pub(crate) fn shape(host: &str) -> (usize, &str) {
    let (name, port) = split(host);
    (name.split('.').count(), port)
}

fn split(host: &str) -> (&str, &str) {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (name, port),
        _ => (host, ""),
    }
}

fn identity(host: &str) -> String {
    match RegistryName::new(host) {
        Ok(name) => name.identity().to_owned(),
        // A pattern is no registry name; only its default port is dropped.
        Err(_) => host.strip_suffix(":443").unwrap_or(host).to_owned(),
    }
}

/// Whether the host pattern `pattern` matches `host`, both as [`SecretKey::host`] has them.
pub(crate) fn host_matches(pattern: &str, host: &str) -> bool {
    let ((pattern, pattern_port), (host, port)) = (split(pattern), split(host));
    if pattern_port != port {
        return false;
    }
    if pattern == host {
        return true;
    }
    let labels = host.split('.');
    pattern.split('.').count() == labels.clone().count()
        && pattern.split('.').zip(labels).all(|(pattern, label)| glob(pattern.as_bytes(), label.as_bytes()))
}

/// Matches one label against `*`, `?` and `[…]`. Linear in the label for each star, so hostile patterns stay cheap.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        let step = match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some(b'?') => Some(p + 1),
            Some(b'[') => class(&pattern[p..], text[t]).map(|len| p + len),
            Some(byte) if *byte == text[t] => Some(p + 1),
            _ => None,
        };
        match (step, retry) {
            (Some(next), _) => (p, t) = (next, t + 1),
            (None, Some((after_star, from))) => {
                retry = Some((after_star, from + 1));
                (p, t) = (after_star, from + 1);
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Returns the length of the class at the start of `pattern` when `byte` is in it.
fn class(pattern: &[u8], byte: u8) -> Option<usize> {
    let end = pattern.iter().skip(1).position(|byte| *byte == b']')? + 1;
    let mut set = &pattern[1..end];
    let negated = matches!(set.first(), Some(b'^' | b'!'));
    if negated {
        set = &set[1..];
    }
    let mut found = false;
    while let Some((&first, rest)) = set.split_first() {
        match rest {
            [b'-', last, ..] => {
                found |= (first..=*last).contains(&byte);
                set = &rest[2..];
            }
            _ => {
                found |= first == byte;
                set = rest;
            }
        }
    }
    (found != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use soci_oci::ImageRef;

    use super::*;
    use crate::store::SecretStore;
    use crate::store::tests::secret;

    fn matches(key: &str, image: &str) -> bool {
        let mut store = SecretStore::default();
        store.apply(secret("n", "s", 1, &[(key, "u")]));
        let image: ImageRef = image.parse().unwrap();
        store.matching(image.registry().identity(), image.repository()).ranked(None).next().is_some()
    }

    #[test]
    fn t89_t97_keys_match_images_as_the_kubelet_does() {
        for (key, image, expected) in [
            ("reg.example", "reg.example/a:1", true),
            ("reg.example:80", "reg.example:80/a:1", true),
            ("reg.example", "reg.example:80/a:1", false),
            ("https://reg.example/v1/", "reg.example/a:1", true),
            ("https://reg.example/v2", "reg.example/a:1", true),
            ("http://reg.example", "reg.example/a:1", true),
            ("REG.Example", "reg.example/a:1", true),
            ("reg.example:443", "reg.example/a:1", true),
            ("reg.example", "reg.example:443/a:1", true),
            ("reg.example:5000", "reg.example/a:1", false),
            ("reg.example", "reg.example:5000/a:1", false),
            ("*.azurecr.io", "x.azurecr.io/a", true),
            ("*.azurecr.io", "x.y.azurecr.io/a", false),
            ("*.io", "a.b.io/x", false),
            ("reg?.example", "reg1.example/a", true),
            ("reg[12].example", "reg2.example/a", true),
            ("[rs]eg.example", "reg.example/a", true),
            ("[rs]eg.example:5000", "reg.example:5000/a", true),
            ("reg[!12].example", "reg2.example/a", false),
            ("reg.example/team", "reg.example/team/a", true),
            ("reg.example/team", "reg.example/teamx/a", false),
            ("reg.example/team/", "reg.example/team", true),
            ("https://index.docker.io/v1/", "nginx", true),
            ("docker.io", "nginx", true),
            ("registry-1.docker.io", "docker.io/team/a", true),
            ("nerdctl-experimental://reg.example:443/host/m:443", "reg.example/a", false),
            ("[::1]:5000", "[::1]:5000/a", true),
            ("", "reg.example/a", false),
        ] {
            assert_eq!(matches(key, image), expected, "{key} for {image}");
        }
    }

    #[test]
    fn a_hostile_pattern_is_answered_quickly() {
        let pattern = format!("{}b", "*a".repeat(400));
        assert!(!glob(pattern.as_bytes(), "a".repeat(500).as_bytes()));
        assert!(!glob(b"[", b"x"));
        assert!(!glob(b"[a-", b"a"));
    }
}
