//! What each option has for an image, what the registry said of it last, and which one would be used: the report behind
//! `soci auth explain`. Nothing here is a secret.
//!
//! The types are what the daemon's control socket answers and what `--json` prints: names stay, fields may be added.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::board::Judgement;
use crate::{AuthBoard, Authenticator, Candidate, Credential, CredentialScope, Keychain, Rejected};

/// What is asked of a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainRequest {
    /// The image.
    pub image: String,
    /// Whether the registry is asked, too.
    #[serde(default)]
    pub check: bool,
}

/// What the options have for one image, at each host that would be asked for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The image, written in full.
    pub image: String,
    /// The hosts in the order in which they are asked: mirrors, then the registry itself.
    pub hosts: Vec<HostReport>,
    /// What the registry answered, where it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
}

/// What the options have for an image at one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// `https://host[:port]`.
    pub host: String,
    /// The identity by which credentials are matched.
    pub registry: String,
    /// The repository.
    pub repository: String,
    /// Whether it is a mirror.
    pub mirror: bool,
    /// The namespace of the pod that the image was pulled for, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The option whose credential would be used; nothing when requests go without.
    pub uses: Option<String>,
    /// All options, in the order in which they are asked.
    pub options: Vec<OptionReport>,
}

/// What one option has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OptionReport {
    /// The option.
    pub name: String,
    /// What became of it.
    pub standing: Standing,
    /// Why, in words.
    pub why: String,
    /// What it looked at.
    pub findings: Vec<String>,
    /// Its credentials for this image, best first.
    pub candidates: Vec<CandidateReport>,
}

/// What became of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It is the first that has a credential.
    Used,
    /// It has a credential, but one before it has, too.
    Outranked,
    /// It has none.
    Empty,
    /// It could not tell.
    Failed,
    /// The configuration has it off, or the command line does not give it.
    Off,
}

/// A credential without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CandidateReport {
    /// The entry it comes from: key of a file, helper, pull, or secret.
    pub entry: String,
    /// Six hexadecimal digits that tell it from others and change when it is rotated; of this process only.
    pub fingerprint: String,
    /// What kind of credential it is.
    pub kind: String,
    /// Its user name, at most 32 characters of it, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// For how long the entry has been there, in seconds, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<u64>,
    /// Why it cannot be presented, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flaw: Option<String>,
    /// When the registry accepted it last for this repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<Judged>,
    /// When the registry refused it last for this repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejected: Option<Judged>,
    /// For how many seconds more it is not presented, since it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rests_seconds: Option<u64>,
}

/// What the registry said of a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// How long ago.
    pub seconds_ago: u64,
    /// The status of that answer, the registry's or its token server's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
}

/// What the registry answered when it was asked for the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Whether the image was served.
    pub served: bool,
    /// What it is, or why not.
    pub answer: String,
}

impl HostReport {
    /// Puts an option that is off into its `place` in the order.
    pub fn insert_off(&mut self, place: usize, name: &str, why: &str) {
        let option = OptionReport {
            name: name.to_owned(),
            standing: Standing::Off,
            why: why.to_owned(),
            findings: Vec::new(),
            candidates: Vec::new(),
        };
        self.options.insert(place.min(self.options.len()), option);
    }

    /// Adds what an option has that is not asked, for this reason, because another one is given.
    pub fn push_unasked(&mut self, mut option: OptionReport, why: &str) {
        if option.standing == Standing::Used {
            (option.standing, option.why) = (Standing::Outranked, why.to_owned());
        }
        self.options.push(option);
    }

    /// Returns the option whose credential would be used.
    pub fn used(&self) -> Option<&OptionReport> {
        self.options.iter().find(|option| option.standing == Standing::Used)
    }
}

/// Asks *all* options for `scope`, also those after the one that would be used. May run credential helpers, opens no
/// connection to the registry.
pub async fn explain(auth: &Authenticator, scope: &CredentialScope) -> HostReport {
    let board = auth.board();
    let mut scope = scope.clone();
    scope.namespace = scope.namespace.or_else(|| board.pull_namespace(&scope.image.key()));
    let mut options: Vec<OptionReport> = Vec::new();
    let mut uses: Option<&'static str> = None;
    for option in auth.chain().options() {
        let report = ask(&**option, &scope, board, uses).await;
        if report.standing == Standing::Used {
            uses = Some(option.name());
        }
        options.push(report);
    }
    HostReport {
        host: scope.origin.to_string(),
        registry: scope.identity(),
        repository: scope.image.repository().to_owned(),
        mirror: scope.mirror,
        namespace: scope.namespace.clone(),
        uses: uses.map(str::to_owned),
        options,
    }
}

async fn ask(
    option: &dyn Keychain,
    scope: &CredentialScope,
    board: &AuthBoard,
    before: Option<&'static str>,
) -> OptionReport {
    let (mut findings, mut candidates) = (Vec::new(), Vec::new());
    let (standing, why) = match option.lookup(scope, &Rejected::default()).await {
        Ok(lookup) => {
            findings.extend(lookup.findings.into_iter().map(|finding| finding.0));
            let usable = lookup.candidates.iter().filter(|candidate| !candidate.credential.is_empty());
            candidates.extend(usable.map(|candidate| describe(candidate, scope, board)));
            match (candidates.is_empty(), before) {
                (true, _) => (Standing::Empty, "it has no credential for this image".to_owned()),
                (false, None) => (Standing::Used, "it is the first option that has a credential".to_owned()),
                (false, Some(before)) => (
                    Standing::Outranked,
                    format!(
                        "{before} comes first and has a credential; it ends the search even when it is refused"
                    ),
                ),
            }
        }
        Err(error) => (Standing::Failed, error.to_string()),
    };
    OptionReport { name: option.name().to_owned(), standing, why, findings, candidates }
}

fn describe(candidate: &Candidate, scope: &CredentialScope, board: &AuthBoard) -> CandidateReport {
    let (registry, repository, print) =
        (scope.identity(), scope.image.repository(), candidate.id.fingerprint);
    let Judgement { accepted, rejected } = board.judgement(&registry, repository, print);
    let ago = |(at, status): (Instant, Option<u16>)| Judged { seconds_ago: at.elapsed().as_secs(), status };
    let rests = board.rests_until(&registry, repository, print);
    CandidateReport {
        entry: candidate.id.entry.clone(),
        fingerprint: print.to_string(),
        kind: candidate.credential.kind().to_owned(),
        username: username(&candidate.credential),
        age_seconds: candidate.age.map(|age| age.as_secs()),
        flaw: candidate.credential.flaw().map(str::to_owned),
        accepted: accepted.map(ago),
        rejected: rejected.map(ago),
        rests_seconds: rests.map(|until| seconds_up(until.saturating_duration_since(Instant::now()))),
    }
}

/// Returns whole seconds, a started one counted.
fn seconds_up(left: Duration) -> u64 {
    left.as_secs() + u64::from(left.subsec_nanos() > 0)
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
    use std::sync::Arc;

    use super::*;
    use crate::board::Answer;
    use crate::testing::ScriptedKeychain;
    use crate::{KeychainChain, Origin, Outcome, Scheme, Settings};

    fn scope() -> CredentialScope {
        let image: soci_oci::ImageRef = "reg.example/team/app:1".parse().unwrap();
        CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image)
    }

    fn authenticator(options: Vec<Arc<dyn Keychain>>) -> Arc<Authenticator> {
        Authenticator::new(KeychainChain::new(options), Arc::new(AuthBoard::new()), Settings::default())
    }

    #[tokio::test(start_paused = true)]
    async fn every_option_is_shown_in_order_with_why_it_is_used_or_not() {
        let auth = authenticator(vec![
            ScriptedKeychain::failing("docker-config", "config.json: not JSON at line 1, column 1"),
            ScriptedKeychain::new("cri", vec![Credential::basic("AWS", "hunter2")]),
            ScriptedKeychain::new("kubernetes-secrets", vec![Credential::basic("other", "hunter3")]),
            ScriptedKeychain::new("fourth", vec![]),
        ]);
        let mut report = explain(&auth, &scope()).await;
        assert_eq!((report.host.as_str(), report.registry.as_str()), ("https://reg.example", "reg.example"));
        assert_eq!(report.uses.as_deref(), Some("cri"));
        assert_eq!(report.used().map(|option| option.name.as_str()), Some("cri"));
        let standings: Vec<_> = report.options.iter().map(|option| option.standing).collect();
        assert_eq!(standings, [Standing::Failed, Standing::Used, Standing::Outranked, Standing::Empty]);
        assert!(report.options[0].why.starts_with("config.json"));
        assert!(report.options[2].why.starts_with("cri comes first"));
        assert_eq!(report.options[3].findings, ["0 entries"]);
        report.insert_off(1, "off", "not enabled");
        assert_eq!((report.options[1].standing, report.options.len()), (Standing::Off, 5));
        for at in [0, 2] {
            report.push_unasked(report.options[at].clone(), "--user is given");
        }
        let added: Vec<_> =
            report.options[5..].iter().map(|option| (option.standing, option.why.as_str())).collect();
        assert_eq!(added[0], (Standing::Failed, "config.json: not JSON at line 1, column 1"));
        assert_eq!(added[1], (Standing::Outranked, "--user is given"));
        let json = serde_json::to_string(&report).unwrap();
        assert!(!json.contains("hunter") && json.contains("\"standing\":\"outranked\""), "{json}");
        assert_eq!(serde_json::from_str::<HostReport>(&json).unwrap(), report);
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_registry_said_last_is_shown_with_status_and_time() {
        let credential = Credential::basic("u", "p");
        let id = Candidate::new("entry 0", credential.clone()).id;
        let auth = authenticator(vec![ScriptedKeychain::new("cri", vec![credential])]);
        let (board, second) = (auth.board(), Duration::from_secs(1));
        let judge = |outcome, status| {
            board.note("reg.example", "team/app", "cri", Answer::Judged(id.clone(), outcome, Some(status)));
        };
        judge(Outcome::Accepted, 206);
        tokio::time::advance(10 * second).await;
        judge(Outcome::Rejected, 403);
        board.refuse("reg.example", "team/app", id.fingerprint);
        tokio::time::advance(second / 2).await;
        let report = explain(&auth, &scope()).await;
        let shown = &report.options[0].candidates[0];
        assert_eq!(shown.accepted, Some(Judged { seconds_ago: 10, status: Some(206) }));
        assert_eq!(shown.rejected, Some(Judged { seconds_ago: 0, status: Some(403) }));
        assert_eq!(shown.rests_seconds, Some(2));
        assert_eq!(report.uses.as_deref(), Some("cri"), "a refused credential still holds the request (R6)");
    }
}
