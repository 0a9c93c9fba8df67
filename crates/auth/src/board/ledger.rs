//! What each option answered last for a repository: the memory behind `soci auth explain` and failure reports.

use std::collections::HashMap;

use tokio::time::Instant;

use crate::{CandidateId, Outcome};

const MAX_REPOSITORIES: usize = 1024;

/// What an option answered. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It has nothing for this repository.
    Empty,
    /// It offered this candidate.
    Offered(CandidateId),
    /// The registry judged this candidate.
    Judged(CandidateId, Outcome),
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

#[derive(Debug, Default)]
pub(super) struct Ledger(HashMap<(String, String), Vec<LedgerEntry>>);

impl Ledger {
    pub(super) fn note(&mut self, registry: &str, repository: &str, option: &'static str, answer: Answer) {
        let key = (registry.to_owned(), repository.to_owned());
        if self.0.len() >= MAX_REPOSITORIES && !self.0.contains_key(&key) {
            let age = |entries: &Vec<LedgerEntry>| entries.iter().map(|entry| entry.at).max();
            let oldest = self.0.iter().min_by_key(|(_, entries)| age(entries)).map(|(key, _)| key.clone());
            oldest.map(|key| self.0.remove(&key));
        }
        let entry = LedgerEntry { option, at: Instant::now(), answer };
        let entries = self.0.entry(key).or_default();
        match entries.iter_mut().find(|old| old.option == option) {
            Some(old) => *old = entry,
            None => entries.push(entry),
        }
    }

    pub(super) fn read(&self, registry: &str, repository: &str) -> Vec<LedgerEntry> {
        self.0.get(&(registry.to_owned(), repository.to_owned())).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
