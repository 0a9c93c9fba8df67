//! What each option answered last for a repository, and what the registry said of each credential: the memory behind
//! `soci auth explain` and failure reports.

use std::collections::HashMap;

use tokio::time::Instant;

use crate::{CandidateId, Fingerprint, Outcome};

const MAX_REPOSITORIES: usize = 1024;
/// More than one option may present of its candidates, several times over.
const MAX_JUDGED: usize = 16;

/// What an option answered. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It has nothing for this repository.
    Empty,
    /// It offered this candidate.
    Offered(CandidateId),
    /// The registry judged this candidate, by this status where it was the one to answer.
    Judged(CandidateId, Outcome, Option<u16>),
    /// It could not tell, for this reason.
    Failed(String),
}

/// The last answer of one option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerEntry {
    /// The option.
    pub option: &'static str,
    /// When it answered.
    pub at: Instant,
    /// What it answered.
    pub answer: Answer,
}

/// What the registry said of one credential, and when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Judgement {
    /// When a request that carried it was served last, and the status.
    pub accepted: Option<(Instant, Option<u16>)>,
    /// When it was refused last, and the status.
    pub rejected: Option<(Instant, Option<u16>)>,
}

#[derive(Debug, Default)]
pub(super) struct Ledger(HashMap<(String, String), Page>);

#[derive(Debug, Default)]
struct Page {
    entries: Vec<LedgerEntry>,
    /// The latest last.
    judged: Vec<(Fingerprint, Judgement)>,
}

impl Ledger {
    pub(super) fn note(&mut self, registry: &str, repository: &str, option: &'static str, answer: Answer) {
        let key = (registry.to_owned(), repository.to_owned());
        if self.0.len() >= MAX_REPOSITORIES && !self.0.contains_key(&key) {
            let age = |page: &Page| page.entries.iter().map(|entry| entry.at).max();
            let oldest = self.0.iter().min_by_key(|(_, page)| age(page)).map(|(key, _)| key.clone());
            oldest.map(|key| self.0.remove(&key));
        }
        let at = Instant::now();
        let page = self.0.entry(key).or_default();
        if let Answer::Judged(candidate, outcome, status) = &answer {
            page.judge(candidate.fingerprint, *outcome, (at, *status));
        }
        let entry = LedgerEntry { option, at, answer };
        match page.entries.iter_mut().find(|old| old.option == option) {
            Some(old) => *old = entry,
            None => page.entries.push(entry),
        }
    }

    pub(super) fn read(&self, registry: &str, repository: &str) -> Vec<LedgerEntry> {
        self.page(registry, repository).map(|page| page.entries.clone()).unwrap_or_default()
    }

    pub(super) fn judgement(&self, registry: &str, repository: &str, who: Fingerprint) -> Judgement {
        let judged = self.page(registry, repository).into_iter().flat_map(|page| &page.judged);
        judged.filter(|(known, _)| *known == who).map(|(_, judgement)| *judgement).next().unwrap_or_default()
    }

    fn page(&self, registry: &str, repository: &str) -> Option<&Page> {
        self.0.get(&(registry.to_owned(), repository.to_owned()))
    }
}

impl Page {
    fn judge(&mut self, who: Fingerprint, outcome: Outcome, what: (Instant, Option<u16>)) {
        let known = self.judged.iter().position(|(known, _)| *known == who);
        let mut judgement = known.map(|at| self.judged.remove(at).1).unwrap_or_default();
        match outcome {
            Outcome::Accepted => judgement.accepted = Some(what),
            Outcome::Rejected => judgement.rejected = Some(what),
        }
        if self.judged.len() >= MAX_JUDGED {
            self.judged.remove(0);
        }
        self.judged.push((who, judgement));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Candidate, Credential};

    #[test]
    fn the_last_answer_of_each_option_is_kept_and_the_table_is_bounded() {
        let mut ledger = Ledger::default();
        ledger.note("r", "x", "cri", Answer::Empty);
        ledger.note("r", "x", "cri", Answer::Failed("boom".into()));
        ledger.note("r", "x", "docker-config", Answer::Empty);
        let answers: Vec<_> =
            ledger.read("r", "x").into_iter().map(|entry| (entry.option, entry.answer)).collect();
        assert_eq!(answers, [("cri", Answer::Failed("boom".into())), ("docker-config", Answer::Empty)]);
        for n in 0..MAX_REPOSITORIES {
            ledger.note("r", &n.to_string(), "cri", Answer::Empty);
        }
        assert_eq!(ledger.0.len(), MAX_REPOSITORIES);
        assert_eq!(ledger.read("r", "x"), []);
    }

    #[test]
    fn what_the_registry_said_of_a_credential_stays_when_the_option_answers_again() {
        let mut ledger = Ledger::default();
        let candidate = |user: &str| Candidate::new("e", Credential::basic(user, "p")).id;
        let judge = |ledger: &mut Ledger, user: &str, outcome, status| {
            ledger.note("r", "x", "cri", Answer::Judged(candidate(user), outcome, Some(status)));
        };
        judge(&mut ledger, "a", Outcome::Accepted, 200);
        judge(&mut ledger, "a", Outcome::Rejected, 401);
        ledger.note("r", "x", "cri", Answer::Offered(candidate("a")));
        let known = ledger.judgement("r", "x", candidate("a").fingerprint);
        assert_eq!(known.accepted.map(|(_, status)| status), Some(Some(200)));
        assert_eq!(known.rejected.map(|(_, status)| status), Some(Some(401)));
        assert_eq!(ledger.judgement("r", "y", candidate("a").fingerprint), Judgement::default());
        for user in 0..MAX_JUDGED {
            judge(&mut ledger, &user.to_string(), Outcome::Accepted, 200);
        }
        assert_eq!(ledger.judgement("r", "x", candidate("a").fingerprint), Judgement::default(), "bounded");
    }
}
