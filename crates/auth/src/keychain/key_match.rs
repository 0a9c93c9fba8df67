//! Which key of a Docker config is for this image: a fixed order, whatever order the file has.
//!
//! | rank | key |
//! | --- | --- |
//! | 0 | Docker Hub's canonical `https://index.docker.io/v1/` |
//! | 1 | `host/path` whose path leads to the repository, the longest first (podman) |
//! | 2 | the registry as the image names it |
//! | 3 | the same registry under another name: `host:443`, an alias of Docker Hub |
//! | 4, 5 | with `https://`, with `http://` |
//! | 6 | with nothing but `/`, `/v1/`, `/v2/` as path |
//! | 7 | with a path that leads elsewhere: Docker reduces it to its host |
//!
//! Equal ranks are ordered by the key's bytes. A port is part of the name: `host:5000` is never `host`.

use std::cmp::Reverse;

use crate::CredentialScope;
use crate::origin::{Scheme, identity};

/// The key under which Docker keeps Docker Hub's credential, and by which helpers know it.
pub(crate) const HUB_KEY: &str = "https://index.docker.io/v1/";

/// What keys are matched against.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The registry as the image names it.
    pub(crate) name: String,
    identity: String,
    scheme: Scheme,
    repository: String,
}

/// The place of a key in the order; less is better.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    class: u8,
    path: Reverse<usize>,
    key: String,
}

impl Rank {
    /// Whether the key names this registry itself, not a path below it or above it.
    pub(crate) fn names_registry(&self) -> bool {
        !matches!(self.class, 1 | 7)
    }

    /// Whether the key names this registry without further ado.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.class, 0 | 2 | 3)
    }
}

impl Wanted {
    pub(crate) fn new(scope: &CredentialScope) -> Self {
        Self {
            name: scope.lookup_name(),
            identity: identity(&scope.lookup_name(), scope.origin.scheme()),
            scheme: scope.origin.scheme(),
            repository: scope.image.repository().to_owned(),
        }
    }

    /// Returns what a helper is asked for: Docker Hub's canonical key, or the registry as the image names it.
    pub(crate) fn server(&self) -> &str {
        if self.is_hub() { HUB_KEY } else { &self.name }
    }

    fn is_hub(&self) -> bool {
        self.identity == "docker.io"
    }

    /// Returns the rank of `key`; nothing when it is for another registry.
    pub(crate) fn rank(&self, key: &str) -> Option<Rank> {
        let ranked = |class, path: usize| Some(Rank { class, path: Reverse(path), key: key.to_owned() });
        if self.is_hub() && key == HUB_KEY {
            return ranked(0, 0);
        }
        let (scheme, rest) = match key.split_once("://") {
            None => (None, key),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (Some(Scheme::Https), rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (Some(Scheme::Http), rest),
            Some(_) => return None,
        };
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) => (host, Some(path)),
            None => (rest, None),
        };
        let scheme_of_port = scheme.unwrap_or(self.scheme);
        if host.is_empty() || identity(host, scheme_of_port) != self.identity {
            return None;
        }
        match (path, scheme) {
            (None, None) if host.eq_ignore_ascii_case(&self.name) => ranked(2, 0),
            (None, None) => ranked(3, 0),
            (None, Some(Scheme::Https)) => ranked(4, 0),
            (None, Some(Scheme::Http)) => ranked(5, 0),
            (Some("" | "v1" | "v1/" | "v2" | "v2/"), _) => ranked(6, 0),
            (Some(path), _) => {
                let path = path.trim_end_matches('/');
                let below = self.repository.strip_prefix(path);
                match below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
                    true => ranked(1, path.len()),
                    false => ranked(7, 0),
                }
            }
        }
    }

    /// Returns the entries whose key matches, best first.
    pub(crate) fn sort<'a, T>(&self, entries: &'a [(String, T)]) -> Vec<(Rank, &'a T)> {
        let mut matching: Vec<_> =
            entries.iter().filter_map(|(key, value)| Some((self.rank(key)?, value))).collect();
        matching.sort_by(|(a, _), (b, _)| a.cmp(b));
        matching
    }
}

impl std::fmt::Display for Rank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Origin;

    fn wanted(image: &str) -> Wanted {
        let image: soci_oci::ImageRef = image.parse().unwrap();
        let scheme = if image.registry().is_loopback() { Scheme::Http } else { Scheme::Https };
        Wanted::new(&CredentialScope::new(Origin::of_registry(scheme, image.registry()), image))
    }

    /// Returns the keys that match, best first.
    fn order<'a>(image: &str, keys: &[&'a str]) -> Vec<&'a str> {
        let entries: Vec<_> = keys.iter().map(|key| ((*key).to_owned(), *key)).collect();
        wanted(image).sort(&entries).into_iter().map(|(_, key)| *key).collect()
    }

    fn matches(key: &str, image: &str) -> bool {
        order(image, &[key]) == [key]
    }

    #[test]
    fn t16_key_equal_to_the_host_matches() {
        assert!(matches("reg.example", "reg.example/a:1"));
    }

    #[test]
    fn t17_key_with_https_and_path_matches() {
        for key in [
            "https://reg.example/v1/",
            "https://reg.example/v2",
            "https://reg.example/",
            "https://reg.example",
        ] {
            assert!(matches(key, "reg.example/a:1"), "{key}");
        }
    }

    #[test]
    fn t18_key_with_http_matches() {
        assert!(matches("http://reg.example", "reg.example/a:1"));
    }

    #[test]
    fn t19_t20_port_443_is_no_port() {
        assert!(matches("reg.example:443", "reg.example/a:1"));
        assert!(matches("https://reg.example:443", "reg.example/a:1"));
        assert!(matches("reg.example", "reg.example:443/a:1"));
    }

    #[test]
    fn t21_t22_another_port_is_another_registry() {
        assert!(!matches("reg.example:5000", "reg.example/a:1"));
        assert!(!matches("reg.example", "reg.example:5000/a:1"));
        assert!(matches("reg.example:5000", "reg.example:5000/a:1"));
    }

    #[test]
    fn t23_t24_docker_hub_has_many_names() {
        for key in [
            HUB_KEY,
            "docker.io",
            "index.docker.io",
            "registry-1.docker.io",
            "https://docker.io",
            "docker.io:443",
        ] {
            assert!(matches(key, "nginx"), "{key}");
        }
    }

    #[test]
    fn t25_docker_hubs_canonical_key_wins() {
        assert_eq!(order("nginx", &["docker.io", HUB_KEY]), [HUB_KEY, "docker.io"]);
        assert_eq!(
            order("nginx", &[HUB_KEY, "docker.io/library", "docker.io"]),
            [HUB_KEY, "docker.io/library", "docker.io"]
        );
    }

    #[test]
    fn t26_the_order_does_not_depend_on_the_file() {
        let best_first = [
            "reg.example/team/app",
            "reg.example/team",
            "reg.example",
            "reg.example:443",
            "https://reg.example",
            "https://reg.example:443",
            "http://reg.example",
            "https://reg.example/v1/",
            "reg.example/",
            "reg.example/other",
        ];
        let mut keys = best_first;
        for round in 0..1000 {
            keys.rotate_left(1);
            keys.swap(round % 10, (round * 7) % 10);
            assert_eq!(order("reg.example/team/app:1", &keys), best_first);
        }
    }

    #[test]
    fn t27_paths_match_whole_components_longest_first() {
        let keys = ["reg.example", "reg.example/team"];
        assert_eq!(order("reg.example/team/a", &keys)[0], "reg.example/team");
        assert_eq!(order("reg.example/teamx/a", &keys)[0], "reg.example");
        assert_eq!(
            order("reg.example/x", &["reg.example/team"]),
            ["reg.example/team"],
            "Docker's last resort"
        );
    }

    #[test]
    fn t28_keys_of_other_schemes_are_ignored() {
        assert!(!matches("nerdctl-experimental://reg.example:443/host/m:443", "reg.example/a"));
    }

    #[test]
    fn t29_case_does_not_matter() {
        assert!(matches("REG.Example", "reg.example/a"));
        assert!(matches("HTTPS://REG.Example/v1/", "reg.example/a"));
    }

    #[test]
    fn t30_an_ipv6_address_matches() {
        assert!(matches("[::1]:5000", "[::1]:5000/a"));
        assert!(!matches("[::1]", "[::1]:5000/a"));
    }

    #[test]
    fn t63_helpers_know_docker_hub_by_its_canonical_key() {
        assert_eq!(wanted("nginx").server(), HUB_KEY);
        assert_eq!(wanted("reg.example:443/a").server(), "reg.example:443");
    }

    #[test]
    fn plain_http_has_its_own_default_port() {
        assert!(matches("localhost:80", "localhost/a"));
        assert!(matches("localhost", "localhost:80/a"));
        assert!(!matches("reg.example:80", "reg.example/a"));
    }

    #[test]
    fn odd_keys_match_nothing_and_do_no_harm() {
        for key in ["", "/", "://", "https://", "user@reg.example", "*.example", ":443", "https:///v1/"] {
            assert!(!matches(key, "reg.example/a"), "{key}");
        }
    }
}
