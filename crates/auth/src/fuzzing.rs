//! Bodies of the fuzz targets, so that an ordinary test can replay their corpora.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use crate::keychain::docker_file::{DockerFile, Form, parse_auths};
use crate::keychain::helper::{self, HelperAnswer};
use crate::{Origin, challenge, exchange, policy, redact};

/// Challenges: one header value per line. Nothing panics, caps hold, what is chosen passes the policy or is refused.
pub fn fuzz_challenge(data: &[u8]) {
    let challenges = challenge::parse_values(data.split(|byte| *byte == b'\n'));
    assert!(challenges.len() <= 16 && challenges.iter().all(|challenge| challenge.parameters.len() <= 32));
    if let Ok(challenge::Demand::Bearer(demand)) = challenge::choose(&challenges) {
        let registry = Origin::new(crate::Scheme::Https, "reg.example", None);
        if policy::check_realm(&registry, &demand.realm).is_ok() {
            assert_eq!(demand.realm.scheme(), "https");
            assert!(demand.realm.username().is_empty() && demand.realm.password().is_none());
        }
        let shown = redact::url(&demand.realm);
        assert!(!shown.contains('#'));
    }
    let _ = redact::text(&String::from_utf8_lossy(data));
}

/// Docker config files and pull secrets. Nothing panics, and each key is there once.
pub fn fuzz_docker_file(data: &[u8]) {
    if let Ok(file) = DockerFile::parse(data) {
        let mut keys: Vec<_> = file.auths.iter().map(|(key, _)| key).collect();
        keys.sort_unstable();
        assert!(keys.windows(2).all(|pair| pair[0] != pair[1]));
        let again = parse_auths(data, Form::DockerConfigJson).map(|entries| entries.len());
        assert_eq!(again, Ok(file.auths.len()));
    }
    let _ = parse_auths(data, Form::DockerCfg);
    let _ = DockerFile::parse_environment(data);
}

/// Answers of token servers. A token that is taken fits into a header, and no lifetime is longer than a day.
pub fn fuzz_token_answer(data: &[u8]) {
    if let Ok(grant) = exchange::grant(data) {
        let token = grant.token.expose();
        assert!(!token.is_empty() && http::HeaderValue::from_bytes(token).is_ok());
        assert!(grant.life.is_none_or(|life| life.as_secs() <= 24 * 60 * 60));
    }
    let _ = exchange::is_invalid_grant(data);
}

/// What credential helpers print; the first byte is the exit status. Only one that ends well has a credential, and an
/// empty one counts as none.
pub fn fuzz_helper_output(data: &[u8]) {
    let Some((status, printed)) = data.split_first() else { return };
    let status = ExitStatus::from_raw(i32::from(*status) << 8);
    if let Ok(HelperAnswer::Found(found)) = helper::understand(status, printed) {
        assert!(status.success() && !found.0.is_empty());
    }
}

#[cfg(test)]
#[path = "../../../fuzz/bodies/corpus.rs"]
mod corpus;

#[cfg(test)]
mod tests {
    use super::corpus::replay;

    #[test]
    fn the_challenge_corpus_replays() {
        replay("challenge", super::fuzz_challenge);
    }

    #[test]
    fn the_docker_config_corpus_replays() {
        replay("docker_config", super::fuzz_docker_file);
    }

    #[test]
    fn the_token_answer_corpus_replays() {
        replay("token_answer", super::fuzz_token_answer);
    }

    #[test]
    fn the_helper_output_corpus_replays() {
        replay("helper_output", super::fuzz_helper_output);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_break_the_parsers(data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
            super::fuzz_challenge(&data);
            super::fuzz_docker_file(&data);
        }

        #[test]
        fn no_json_breaks_the_config_parser(key in "[ -~]{0,12}", value in "[ -~]{0,24}", field in "(auth|username|identitytoken|x)") {
            let json = serde_json::json!({"auths": {key.clone(): {field: value}}, "credHelpers": {key: "h"}}).to_string();
            super::fuzz_docker_file(json.as_bytes());
        }
    }
}
