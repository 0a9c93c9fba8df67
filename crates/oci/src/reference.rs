//! Image references, normalised as Docker and containerd normalise them.

use std::fmt;
use std::str::FromStr;

use crate::{Digest, DigestError};

/// The longest reference accepted, in bytes (a repository name has at most 255).
const MAX_LEN: usize = 1024;

/// A normalised image reference: registry, repository and a tag or digest.
///
/// `nginx`, `nginx:latest` and `docker.io/library/nginx:latest` are one value. A reference with both a tag and a digest
/// keeps both for display and resolving; [`ImageRef::key`] drops the tag then.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageRef {
    registry: RegistryName,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The registry part of a reference: a host with an optional port, lower case, as the image names it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistryName(String);

/// A text that is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefError {
    /// Empty text.
    #[error("image reference is empty")]
    Empty,
    /// Longer than any valid reference.
    #[error("image reference is longer than {MAX_LEN} bytes")]
    TooLong,
    /// A part breaks the grammar.
    #[error("invalid reference {reference:?}: {part} is malformed")]
    Malformed {
        /// The whole text.
        reference: String,
        /// Which part: registry, repository or tag.
        part: &'static str,
    },
    /// The digest does not parse.
    #[error("invalid reference digest")]
    Digest(#[from] DigestError),
}

impl ImageRef {
    /// Returns the registry that the image names.
    pub fn registry(&self) -> &RegistryName {
        &self.registry
    }

    /// Returns the repository without the registry, e.g. `library/nginx`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns the tag, if one was given or implied.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest, if one was given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Returns `registry/repository`, without tag and digest.
    ///
    /// A registry of one word is in capitals, by which alone such a word is known for a host.
    pub fn name(&self) -> String {
        let registry = self.registry.as_str();
        match is_host(registry) {
            true => format!("{registry}/{}", self.repository),
            false => format!("{}/{}", registry.to_ascii_uppercase(), self.repository),
        }
    }

    /// Returns what the registry's manifest endpoint is asked for: the digest where there is one, else the tag.
    pub fn object(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    /// Returns the key under which credentials of a pull are kept: `repo:tag@digest` equals `repo@digest`.
    pub fn key(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{}@{digest}", self.name()),
            (None, tag) => format!("{}:{}", self.name(), tag.as_deref().unwrap_or("latest")),
        }
    }
}

impl RegistryName {
    /// Parses a `host[:port]`.
    ///
    /// # Errors
    /// [`RefError::Malformed`] when it is neither a domain nor an address.
    pub fn new(text: &str) -> Result<Self, RefError> {
        let text = text.to_ascii_lowercase();
        if !is_registry(&text) {
            return Err(RefError::Malformed { reference: text, part: "registry" });
        }
        Ok(Self(if text == "index.docker.io" { "docker.io".into() } else { text }))
    }

    /// Returns the text, `host[:port]`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the host without the port; an IPv6 address keeps its brackets.
    pub fn host(&self) -> &str {
        split_port(&self.0).0
    }

    /// Returns the port, if one is named.
    pub fn port(&self) -> Option<u16> {
        split_port(&self.0).1.and_then(|port| port.parse().ok())
    }

    /// Returns `host[:port]` to connect to: Docker Hub is served by another host than images name.
    pub fn endpoint(&self) -> &str {
        if self.is_docker_hub() { "registry-1.docker.io" } else { &self.0 }
    }

    /// Returns the [identity](registry_identity) by which credentials are compared.
    pub fn identity(&self) -> &str {
        registry_identity(&self.0)
    }

    /// Whether this is Docker Hub under any of its names.
    pub fn is_docker_hub(&self) -> bool {
        self.identity() == HUB
    }

    /// Whether the host is this machine: `localhost`, `127.0.0.0/8` or `::1`.
    pub fn is_loopback(&self) -> bool {
        let host = self.host().trim_start_matches('[').trim_end_matches(']');
        host == "localhost"
            || host.ends_with(".localhost")
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

/// Docker Hub's identity.
const HUB: &str = "docker.io";

/// Returns the identity of the registry `name`, a lower-case `host[:port]`: the default port 443 dropped, and the three names
/// of Docker Hub made one.
///
/// By its name alone, which is all that a pull or a secret tells: port 80 is kept, since whether a registry is reached over
/// plain http is known only to who makes the request, and a login for `host` is not one for `host:80`.
pub fn registry_identity(name: &str) -> &str {
    match name.strip_suffix(":443").unwrap_or(name) {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => HUB,
        bare => bare,
    }
}

fn split_port(text: &str) -> (&str, Option<&str>) {
    let host_end = text.rfind(']').map_or(0, |at| at + 1);
    match text[host_end..].rfind(':') {
        Some(at) => (&text[..host_end + at], Some(&text[host_end + at + 1..])),
        None => (text, None),
    }
}

/// Whether the first component of a reference is a registry, whatever its case.
fn is_host(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost"
}

fn is_registry(text: &str) -> bool {
    let (host, port) = split_port(text);
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return false;
    }
    if let Some(address) = host.strip_prefix('[') {
        return address
            .strip_suffix(']')
            .is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
    }
    !host.is_empty()
        && host.len() <= 253
        && host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        })
}

fn is_repository(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && text.split('/').all(|component| {
            let bytes = component.as_bytes();
            let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            let separators_ok = component
                .split(|character: char| character.is_ascii_lowercase() || character.is_ascii_digit())
                .all(|run| matches!(run, "" | "." | "_" | "__") || run.bytes().all(|byte| byte == b'-'));
            bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric) && separators_ok
        })
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

impl FromStr for ImageRef {
    type Err = RefError;

    fn from_str(text: &str) -> Result<Self, RefError> {
        if text.is_empty() {
            return Err(RefError::Empty);
        }
        if text.len() > MAX_LEN {
            return Err(RefError::TooLong);
        }
        let malformed = |part| RefError::Malformed { reference: text.to_owned(), part };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        let (registry, rest) = match rest.split_once('/') {
            Some((first, rest)) if is_host(first) || first.bytes().any(|byte| byte.is_ascii_uppercase()) => {
                (RegistryName::new(first).map_err(|_| malformed("registry"))?, rest)
            }
            _ => (RegistryName("docker.io".into()), rest),
        };
        let (repository, tag) = match rest.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (rest, None),
        };
        let repository = if registry.0 == "docker.io" && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository.to_owned()
        };
        let hex64 = repository.strip_prefix("library/").is_some_and(|name| {
            name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        });
        if hex64 || !is_repository(&repository) {
            return Err(malformed("repository"));
        }
        if !tag.is_none_or(is_tag) {
            return Err(malformed("tag"));
        }
        let tag = match (&digest, tag) {
            (None, None) => Some("latest".to_owned()),
            (_, tag) => tag.map(str::to_owned),
        };
        Ok(Self { registry, repository, tag, digest })
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ImageRef {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn short_names_are_docker_hubs() {
        for text in
            ["nginx", "nginx:latest", "docker.io/nginx", "index.docker.io/library/nginx", "library/nginx"]
        {
            assert_eq!(parse(text).to_string(), "docker.io/library/nginx:latest", "{text}");
        }
        assert_eq!(parse("team/app:1").to_string(), "docker.io/team/app:1");
        assert_eq!(parse("localhost/app").registry().as_str(), "localhost");
        assert_eq!(parse("REG.Example/app").registry().as_str(), "reg.example");
    }

    #[test]
    fn a_registry_of_one_word_does_not_become_docker_hub() {
        // Found by the fuzz target `reference`: the capital letter alone says that it is a host.
        for text in ["aJ/b", "AJ/b:latest", "Aj/b"] {
            let image = parse(text);
            assert_eq!((image.registry().as_str(), image.repository()), ("aj", "b"), "{text}");
            assert_eq!(image.to_string(), "AJ/b:latest", "{text}");
            assert_eq!(parse(&image.to_string()), image, "{text}");
            assert_eq!(parse(&image.key()), image, "{text}");
        }
        assert_eq!(parse("LOCALHOST/b").to_string(), "localhost/b:latest");
        assert_eq!(parse("aj/b").registry().as_str(), "docker.io");
    }

    #[test]
    fn ports_and_addresses() {
        let image = parse("[::1]:5000/a/b:x");
        assert_eq!((image.registry().host(), image.registry().port()), ("[::1]", Some(5000)));
        assert!(image.registry().is_loopback());
        assert_eq!(parse("reg.example:443/a").registry().identity(), "reg.example");
        assert_eq!(parse("reg.example:5000/a").registry().identity(), "reg.example:5000");
        assert!(parse("127.0.0.5:1/a").registry().is_loopback());
        assert!(!parse("10.0.0.5:1/a").registry().is_loopback());
        assert_eq!(parse("nginx").registry().endpoint(), "registry-1.docker.io");
    }

    #[test]
    fn t67_a_digest_outranks_the_tag_in_the_key() {
        let digest = Digest::of(b"");
        let both = parse(&format!("reg.example/a:1@{digest}"));
        assert_eq!(both.key(), parse(&format!("reg.example/a@{digest}")).key());
        assert_ne!(parse("reg.example/a:1").key(), parse("reg.example/a:2").key());
        assert_eq!(both.object(), digest.to_string());
    }

    #[test]
    fn malformed_references_are_errors() {
        let hex = "a".repeat(64);
        for text in [
            "",
            "a b",
            "reg.example/",
            "reg.example/A",
            "a:",
            "a:t@sha256:0",
            "a//b",
            "a/-b",
            "-.x/a",
            "x.y:99999/a",
            &hex,
        ] {
            assert!(text.parse::<ImageRef>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_image_id_is_a_reference_of_no_use() {
        let id = format!("sha256:{}", "a".repeat(64));
        assert_eq!(parse(&id).repository(), "library/sha256");
    }
}
