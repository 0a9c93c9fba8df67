//! The options in order, and the rule that one is never left while it has a candidate.
//!
//! A resolution asks the options from the first one on and stops at the first that has any candidate, *refused ones
//! included*: a wrong or expired credential is not a reason to try the next option (R6), only its absence is (R5). An
//! option that cannot tell is no credential (R6b): the next one is asked, and the error is remembered for the message.
//! Every resolution starts at the first option again (R6a), so a removed entry takes effect at once.

use std::sync::Arc;

use crate::board::Answer;
use crate::{
    AuthBoard, Candidate, CandidateId, Credential, CredentialScope, Keychain, Meters, Outcome, Rejected,
};

/// The options in the order in which they are asked.
#[derive(Debug, Clone)]
pub struct KeychainChain(Vec<Arc<dyn Keychain>>);

/// What a resolution found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Resolution {
    /// The option that has candidates.
    pub(crate) option: Option<ChosenOption>,
    /// Its candidates that were not refused in this request, best first.
    pub(crate) candidates: Vec<Candidate>,
    /// Options before it that could not tell: name and reason.
    pub(crate) errors: Vec<(&'static str, String)>,
    /// What the options said that have nothing.
    pub(crate) findings: Vec<String>,
}

/// The option a resolution stopped at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChosenOption {
    pub(crate) name: &'static str,
    pub(crate) max_candidates: usize,
}

impl KeychainChain {
    /// Returns a chain that asks in the order given.
    pub fn new(options: Vec<Arc<dyn Keychain>>) -> Self {
        Self(options)
    }

    /// Returns the names of the options in order.
    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|option| option.name()).collect()
    }

    /// Returns what a person does so that there is a credential. Not by way of the first option where there are others:
    /// what is given to that one outranks them for good.
    pub(crate) fn remedy(&self) -> String {
        let but_first = if self.0.len() > 1 { &self.0[1..] } else { &self.0[..] };
        but_first.iter().map(|option| option.remedy()).collect::<Vec<_>>().join("; or ")
    }

    pub(crate) fn options(&self) -> &[Arc<dyn Keychain>] {
        &self.0
    }

    /// Asks the options for `scope`.
    ///
    /// `held` is the option whose candidate was refused in this request: should it be unable to tell at present, it
    /// still counts as having a candidate, so that a crashing helper does not open the way to the next option.
    pub(crate) async fn resolve(
        &self,
        scope: &CredentialScope,
        rejected: &Rejected,
        held: Option<&'static str>,
        board: &AuthBoard,
        meters: &dyn Meters,
    ) -> Resolution {
        let (registry, repository) = (scope.identity(), scope.image.repository());
        let mut found = Resolution::default();
        for option in &self.0 {
            let name = option.name();
            let chosen = ChosenOption { name, max_candidates: option.max_candidates() };
            match option.lookup(scope, rejected).await {
                Ok(lookup) => {
                    let mut candidates = lookup.candidates;
                    candidates.retain(|candidate| !candidate.credential.is_empty());
                    meters.resolved(name, !candidates.is_empty());
                    let Some(first) = candidates.first() else {
                        board.note(&registry, repository, name, Answer::Empty);
                        found
                            .findings
                            .extend(lookup.findings.iter().map(|finding| format!("{name}: {finding}")));
                        continue;
                    };
                    let offered = candidates.iter().find(|candidate| !rejected.contains(&candidate.id));
                    board.note(
                        &registry,
                        repository,
                        name,
                        Answer::Offered(offered.unwrap_or(first).id.clone()),
                    );
                    candidates.retain(|candidate| !rejected.contains(&candidate.id));
                    found.option = Some(chosen);
                    found.candidates = candidates;
                    return found;
                }
                Err(error) => {
                    meters.option_failed(name);
                    if board.may_complain(name) {
                        tracing::warn!(option = name, registry, %error, "credentials cannot be looked up");
                    }
                    board.note(&registry, repository, name, Answer::Failed(error.to_string()));
                    found.errors.push((name, error.to_string()));
                    if held == Some(name) {
                        found.option = Some(chosen);
                        return found;
                    }
                }
            }
        }
        found
    }

    /// Returns the registry token that would be used, where this can be told without waiting.
    pub(crate) async fn registry_token(&self, scope: &CredentialScope) -> Option<(ChosenOption, Candidate)> {
        for option in &self.0 {
            let mut candidates = option.peek(scope).await?.candidates;
            candidates.retain(|candidate| !candidate.credential.is_empty());
            if let Some(first) = candidates.into_iter().next() {
                let chosen = ChosenOption { name: option.name(), max_candidates: option.max_candidates() };
                return matches!(first.credential, Credential::RegistryToken(_)).then_some((chosen, first));
            }
        }
        None
    }

    /// Passes on what the registry said about a candidate of `option`.
    pub(crate) fn verdict(
        &self,
        option: &'static str,
        scope: &CredentialScope,
        candidate: &CandidateId,
        outcome: Outcome,
    ) {
        self.0
            .iter()
            .filter(|keychain| keychain.name() == option)
            .for_each(|keychain| keychain.verdict(scope, candidate, outcome));
    }
}
