//! What a pull secret holds: the entries of its `auths`, and nothing else of it.
//!
//! `credsStore` and `credHelpers` inside a secret are ignored: whoever may create a secret must not choose a program
//! that runs as root.

use std::collections::BTreeMap;

use base64::Engine as _;
use sha2::{Digest as _, Sha256};
use soci_auth::keychain::docker_file::{Form, parse_auths};
use soci_auth::{Credential, Fingerprint};
use zeroize::Zeroizing;

use crate::matching::SecretKey;

/// The largest payload that is parsed, in bytes; the API server stores at most 1 MiB.
const MAX_SIZE: usize = 1 << 20;
/// The most entries of one secret that are kept: no registry login has that many, and each is an entry of the index.
pub(crate) const MAX_ENTRIES: usize = 4096;

/// The two types of pull secrets, the usual one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum SecretType {
    /// `kubernetes.io/dockerconfigjson`.
    DockerConfigJson,
    /// `kubernetes.io/dockercfg`, the older one: a bare map of entries.
    DockerCfg,
}

impl SecretType {
    /// Returns the type's name, which is what the field selector asks for.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::DockerConfigJson => "kubernetes.io/dockerconfigjson",
            Self::DockerCfg => "kubernetes.io/dockercfg",
        }
    }

    /// Returns the key of the payload in the secret's data.
    pub(crate) fn data_key(self) -> &'static str {
        match self {
            Self::DockerConfigJson => ".dockerconfigjson",
            Self::DockerCfg => ".dockercfg",
        }
    }
}

/// The usable entries of one secret.
#[derive(Debug, Clone)]
pub(crate) struct Payload {
    /// Hash of the payload, by which copies of one secret are recognised.
    pub digest: [u8; 32],
    /// Size of the payload in bytes.
    pub size: usize,
    /// The entries in the order of their keys; those of one key, which may be spelled in several ways, as they stand.
    pub entries: Vec<Entry>,
    /// How many more it has than are kept.
    pub beyond: usize,
}

/// One entry of a secret.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// For which images.
    pub key: SecretKey,
    /// What to present.
    pub credential: Credential,
    /// By which it is told from others.
    pub fingerprint: Fingerprint,
}

/// A secret that cannot be used. Never quotes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SecretError {
    /// The data key of its type is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// More than a secret can hold.
    #[error("payload of {0} bytes is larger than the limit of {MAX_SIZE}")]
    TooLarge(usize),
    /// Not base64.
    #[error("payload is not base64")]
    Base64,
    /// Not the JSON of such a secret.
    #[error("payload is malformed: {0}")]
    Malformed(String),
}

impl Payload {
    /// Parses the base64 text that the API server gives. An entry that cannot be used is left out.
    ///
    /// # Errors
    /// [`SecretError`] when the payload as a whole cannot be read.
    pub(crate) fn parse(base64: &str, kind: SecretType) -> Result<Self, SecretError> {
        if base64.len() / 4 * 3 > MAX_SIZE {
            return Err(SecretError::TooLarge(base64.len() / 4 * 3));
        }
        let json =
            base64::engine::general_purpose::STANDARD.decode(base64).map_err(|_| SecretError::Base64)?;
        let json = Zeroizing::new(json);
        let form = match kind {
            SecretType::DockerConfigJson => Form::DockerConfigJson,
            SecretType::DockerCfg => Form::DockerCfg,
        };
        let entries = parse_auths(&json, form).map_err(|error| SecretError::Malformed(error.to_string()))?;
        let mut usable: BTreeMap<SecretKey, Vec<Entry>> = BTreeMap::new();
        let (mut kept, mut beyond) = (0, 0);
        for (key, entry) in entries {
            let (Some(key), Ok(Some(credential))) = (SecretKey::parse(&key), entry) else { continue };
            let entry = Entry { fingerprint: credential.fingerprint(), key: key.clone(), credential };
            if kept >= MAX_ENTRIES {
                beyond += 1;
                continue;
            }
            let same = usable.entry(key).or_default();
            if same.iter().all(|known| known.fingerprint != entry.fingerprint) {
                same.push(entry);
                kept += 1;
            }
        }
        let entries = usable.into_values().flatten().collect();
        Ok(Self { digest: Sha256::digest(&*json).into(), size: json.len(), entries, beyond })
    }

    /// Returns the keys, each once.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &SecretKey> {
        let groups = self.entries.chunk_by(|one, next| one.key == next.key);
        groups.filter_map(|group| Some(&group.first()?.key))
    }

    /// Returns the entries for exactly this key.
    pub(crate) fn entries_for(&self, key: &SecretKey) -> &[Entry] {
        let from = self.entries.partition_point(|entry| entry.key < *key);
        let rest = self.entries.get(from..).unwrap_or_default();
        &rest[..rest.partition_point(|entry| entry.key == *key)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str, kind: SecretType) -> Result<Payload, SecretError> {
        Payload::parse(&base64::engine::general_purpose::STANDARD.encode(json), kind)
    }

    #[test]
    fn t92_helpers_named_in_a_secret_are_ignored() {
        let json = r#"{"credsStore":"evil","credHelpers":{"reg.example":"evil"},
            "auths":{"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#;
        let payload = parse(json, SecretType::DockerConfigJson).unwrap();
        assert_eq!(payload.entries.len(), 1);
        assert_eq!(payload.entries[0].key.host, "reg.example");
    }

    #[test]
    fn a_legacy_payload_is_a_bare_map() {
        let payload =
            parse(r#"{"reg.example":{"username":"u","password":"p"}}"#, SecretType::DockerCfg).unwrap();
        assert_eq!(payload.entries.len(), 1);
    }

    #[test]
    fn t93_a_malformed_secret_is_an_error_that_does_not_quote_it() {
        for json in ["{", "[]", r#"{"auths":["hunter2"]}"#, "hunter2"] {
            let error = parse(json, SecretType::DockerConfigJson).unwrap_err();
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        assert_eq!(Payload::parse("***", SecretType::DockerCfg).unwrap_err(), SecretError::Base64);
        let large = "A".repeat(2 << 20);
        assert!(matches!(Payload::parse(&large, SecretType::DockerCfg), Err(SecretError::TooLarge(_))));
    }

    #[test]
    fn a_secret_full_of_keys_is_parsed_at_once_and_cut() {
        let auths: String = (0..40_000).map(|at| format!(r#","{at:x}.a":{{"auth":"dTpw"}}"#)).collect();
        let json = format!(r#"{{"auths":{{{}}}}}"#, &auths[1..]);
        assert!(json.len() > 900 << 10, "{}", json.len());
        let begun = std::time::Instant::now();
        let payload = parse(&json, SecretType::DockerConfigJson).unwrap();
        assert_eq!((payload.entries.len(), payload.beyond), (MAX_ENTRIES, 40_000 - MAX_ENTRIES));
        assert!(begun.elapsed() < std::time::Duration::from_secs(10), "it does not stall the sync");
        let key = payload.entries[MAX_ENTRIES - 1].key.clone();
        assert_eq!(payload.entries_for(&key).len(), 1);
        assert_eq!(payload.entries_for(&key)[0].key, key);
        let other = SecretKey { host: "other.example".into(), path: String::new() };
        assert!(payload.entries_for(&other).is_empty());
    }

    #[test]
    fn one_bad_entry_costs_itself_only() {
        let json = r#"{"auths":{"bad.example":{"auth":"dXNlcg=="},"reg.example":{"auth":"dXNlcjpwYXNz"},"e.example":{}}}"#;
        let payload = parse(json, SecretType::DockerConfigJson).unwrap();
        let hosts: Vec<&str> = payload.entries.iter().map(|entry| entry.key.host.as_str()).collect();
        assert_eq!(hosts, ["reg.example"]);
    }
}
