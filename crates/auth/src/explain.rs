//! What each option has for an image: the facts behind `soci auth explain`. Nothing here is a secret.

use crate::{CandidateId, Credential, CredentialScope, KeychainChain, Rejected};

/// What the options have for one image at one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The host that would be asked: `https://host[:port]`.
    pub host: String,
    /// The registry's identity, by which credentials are matched.
    pub registry: String,
    /// The repository.
    pub repository: String,
    /// All options, in the order in which they are asked.
    pub options: Vec<OptionFacts>,
}

/// What one option has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionFacts {
    /// The option.
    pub name: &'static str,
    /// What came of asking it.
    pub found: Found,
    /// What it looked at.
    pub findings: Vec<String>,
}

/// What came of asking an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Candidates, best first.
    Candidates(Vec<CandidateFacts>),
    /// It has none: the next option counts.
    Nothing,
    /// It could not tell: the next option counts.
    Failed(String),
}

/// A candidate without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CandidateFacts {
    /// The entry it comes from, and its fingerprint.
    pub id: CandidateId,
    /// What kind of credential it is.
    pub kind: &'static str,
    /// Its user name, at most 32 characters of it, where there is one.
    pub username: Option<String>,
    /// Why it cannot be presented, if so.
    pub flaw: Option<&'static str>,
}

impl Explanation {
    /// Returns the option whose credential would be used: the first one that has candidates.
    pub fn chosen(&self) -> Option<&OptionFacts> {
        self.options.iter().find(|option| matches!(option.found, Found::Candidates(_)))
    }
}

/// Asks *all* options, also those after the one that would be used. May run credential helpers, opens no connection to
/// the registry.
pub async fn explain(chain: &KeychainChain, scope: &CredentialScope) -> Explanation {
    let mut options = Vec::new();
    for option in chain.options() {
        let (found, findings) = match option.lookup(scope, &Rejected::default()).await {
            Ok(lookup) => {
                let findings = lookup.findings.into_iter().map(|finding| finding.0).collect();
                let usable = lookup.candidates.iter().filter(|candidate| !candidate.credential.is_empty());
                let candidates: Vec<_> = usable
                    .map(|candidate| CandidateFacts {
                        id: candidate.id.clone(),
                        kind: candidate.credential.kind(),
                        username: username(&candidate.credential),
                        flaw: candidate.credential.flaw(),
                    })
                    .collect();
                match candidates.is_empty() {
                    true => (Found::Nothing, findings),
                    false => (Found::Candidates(candidates), findings),
                }
            }
            Err(error) => (Found::Failed(error.to_string()), Vec::new()),
        };
        options.push(OptionFacts { name: option.name(), found, findings });
    }
    Explanation {
        host: scope.origin.to_string(),
        registry: scope.identity(),
        repository: scope.image.repository().to_owned(),
        options,
    }
}

fn username(credential: &Credential) -> Option<String> {
    match credential {
        Credential::Basic { username, .. } => {
            Some(username.chars().filter(|c| !c.is_control()).take(32).collect())
        }
        Credential::IdentityToken(_) | Credential::RegistryToken(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ScriptedKeychain;
    use crate::{Origin, Scheme};

    #[tokio::test]
    async fn every_option_is_shown_and_the_first_with_candidates_is_chosen() {
        let image: soci_oci::ImageRef = "reg.example/team/app:1".parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        let chain = KeychainChain::new(vec![
            ScriptedKeychain::failing("docker-config", "config.json: not JSON at line 1, column 1"),
            ScriptedKeychain::new("cri", vec![Credential::basic("AWS", "hunter2")]),
            ScriptedKeychain::new("kubernetes-secrets", vec![]),
        ]);
        let facts = explain(&chain, &scope).await;
        assert_eq!((facts.host.as_str(), facts.registry.as_str()), ("https://reg.example", "reg.example"));
        assert_eq!(facts.chosen().map(|option| option.name), Some("cri"));
        assert!(matches!(&facts.options[0].found, Found::Failed(why) if why.starts_with("config.json")));
        assert_eq!(
            (&facts.options[2].found, facts.options[2].findings.as_slice()),
            (&Found::Nothing, &["0 entries".to_owned()][..])
        );
        assert!(!format!("{facts:?}").contains("hunter2"));
    }
}
