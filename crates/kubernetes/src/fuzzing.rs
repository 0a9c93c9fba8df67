//! Bodies of the fuzz targets, so that ordinary tests replay their corpora.

use std::collections::HashSet;

use base64::Engine as _;

use crate::kubeconfig;
use crate::secret::{Payload, SecretType};

/// Payloads of pull secrets, as the API server gives them and as their JSON. Each login is there once for a key.
pub fn fuzz_pull_secret(data: &[u8]) {
    let json = base64::engine::general_purpose::STANDARD.encode(data);
    for base64 in [&*String::from_utf8_lossy(data), &json] {
        for kind in [SecretType::DockerConfigJson, SecretType::DockerCfg] {
            let Ok(payload) = Payload::parse(base64, kind) else { continue };
            assert!(payload.entries.is_sorted_by_key(|entry| &entry.key));
            for key in payload.keys() {
                let logins: HashSet<_> =
                    payload.entries_for(key).iter().map(|entry| entry.fingerprint).collect();
                assert_eq!(logins.len(), payload.entries_for(key).len());
                assert!(!logins.is_empty());
            }
        }
    }
}

/// Kubeconfig files: one that loads names the files it depends on, itself first.
pub fn fuzz_kubeconfig(data: &[u8]) {
    let path = std::env::temp_dir().join(format!("soci-fuzz-kubeconfig-{}", std::process::id()));
    std::fs::write(&path, data).expect("a temporary file can be written");
    let loaded = kubeconfig::load(std::slice::from_ref(&path));
    std::fs::remove_file(&path).expect("it was there a moment ago");
    if let Ok(current) = loaded {
        assert_eq!(current.files.first(), Some(&path));
    }
}

#[cfg(test)]
#[path = "../../../fuzz/bodies/corpus.rs"]
mod corpus;

#[cfg(test)]
mod tests {
    use super::corpus::replay;

    #[test]
    fn the_pull_secret_corpus_replays() {
        replay("pull_secret", super::fuzz_pull_secret);
    }

    #[test]
    fn the_kubeconfig_corpus_replays() {
        replay("kubeconfig", super::fuzz_kubeconfig);
    }
}
