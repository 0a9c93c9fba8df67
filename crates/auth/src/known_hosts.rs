//! What each host asked for last, so that a request need not be refused first.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::attempt::Access;
use crate::chain::ChosenOption;
use crate::challenge::Demand;
use crate::{Candidate, CredentialScope, Origin};

const MAX_HOSTS: usize = 4096;
/// For how long an accepted candidate is presented again without asking the options. Short, so that a removed or
/// replaced entry takes effect; long enough that a burst of reads asks once.
const TRUST: Duration = Duration::from_secs(1);

/// What is known, by host, repository and access; and which option was told to log in at each host.
#[derive(Debug, Default)]
pub(crate) struct KnownHosts {
    known: Mutex<HashMap<Key, Known>>,
    /// When candidates that are not trusted any more were last dropped.
    swept: Mutex<Option<Instant>>,
    told: Mutex<HashMap<Origin, &'static str>>,
}

type Key = (Origin, String, Access);

#[derive(Debug)]
struct Known {
    demand: Demand,
    used: Instant,
    accepted: Option<Accepted>,
}

#[derive(Debug, Clone)]
struct Accepted {
    option: ChosenOption,
    candidate: Candidate,
    generation: u64,
    at: Instant,
}

fn key(scope: &CredentialScope, access: &Access) -> Key {
    (scope.origin.clone(), scope.image.name(), access.clone())
}

impl KnownHosts {
    /// Whether another option than the last time logs in at `origin`: worth a line of the log.
    pub(crate) fn is_news(&self, origin: &Origin, option: &'static str) -> bool {
        let mut told = self.told.lock();
        if told.len() >= MAX_HOSTS && !told.contains_key(origin) {
            told.clear();
        }
        told.insert(origin.clone(), option) != Some(option)
    }

    /// Drops accepted candidates that are not trusted any more: a login that was removed is not to stay in memory here. For
    /// every request that begins; looks at most once in the time of trust.
    pub(crate) fn sweep(&self) {
        let mut swept = self.swept.lock();
        if swept.is_some_and(|last| last.elapsed() < TRUST) {
            return;
        }
        *swept = Some(Instant::now());
        drop(swept);
        for known in self.known.lock().values_mut() {
            known.accepted.take_if(|accepted| accepted.at.elapsed() >= TRUST);
        }
    }

    /// Returns what the host asked for last.
    pub(crate) fn demand(&self, scope: &CredentialScope, access: &Access) -> Option<Demand> {
        let mut hosts = self.known.lock();
        let known = hosts.get_mut(&key(scope, access))?;
        known.used = Instant::now();
        Some(known.demand.clone())
    }

    /// Remembers what the host asks for.
    pub(crate) fn note(&self, scope: &CredentialScope, access: &Access, demand: &Demand) {
        let mut hosts = self.known.lock();
        let (key, now) = (key(scope, access), Instant::now());
        if hosts.len() >= MAX_HOSTS && !hosts.contains_key(&key) {
            let oldest = hosts.iter().min_by_key(|(_, known)| known.used).map(|(key, _)| key.clone());
            oldest.map(|key| hosts.remove(&key));
        }
        hosts.insert(key, Known { demand: demand.clone(), used: now, accepted: None });
    }

    /// Remembers the candidate that the host accepted, in the registry's `generation`.
    pub(crate) fn accepted(
        &self,
        scope: &CredentialScope,
        access: &Access,
        option: ChosenOption,
        candidate: &Candidate,
        generation: u64,
    ) {
        if let Some(known) = self.known.lock().get_mut(&key(scope, access)) {
            if known
                .accepted
                .as_ref()
                .is_some_and(|old| old.candidate.id == candidate.id && fresh(old, generation))
            {
                return;
            }
            known.accepted =
                Some(Accepted { option, candidate: candidate.clone(), generation, at: Instant::now() });
        }
    }

    /// Returns the candidate that was accepted a moment ago, unless there is news of the registry.
    pub(crate) fn trusted(
        &self,
        scope: &CredentialScope,
        access: &Access,
        generation: u64,
    ) -> Option<(ChosenOption, Candidate)> {
        let hosts = self.known.lock();
        let accepted = hosts.get(&key(scope, access))?.accepted.as_ref()?;
        fresh(accepted, generation).then(|| (accepted.option, accepted.candidate.clone()))
    }
}

fn fresh(accepted: &Accepted, generation: u64) -> bool {
    accepted.generation == generation && accepted.at.elapsed() < TRUST
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Credential, Scheme};

    #[tokio::test(start_paused = true)]
    async fn an_accepted_candidate_is_dropped_when_it_is_not_trusted_any_more() {
        let hosts = KnownHosts::default();
        let image: soci_oci::ImageRef = "reg.example/a:1".parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        let option = ChosenOption { name: "cri", max_candidates: 4 };
        hosts.note(&scope, &Access::Pull, &Demand::Basic);
        let held = || hosts.known.lock().values().filter(|known| known.accepted.is_some()).count();
        hosts.accepted(&scope, &Access::Pull, option, &Candidate::new("e", Credential::basic("u", "p")), 0);
        hosts.sweep();
        assert!(hosts.trusted(&scope, &Access::Pull, 0).is_some());
        tokio::time::advance(TRUST / 2).await;
        hosts.sweep();
        assert_eq!(held(), 1);
        tokio::time::advance(TRUST / 2).await;
        hosts.sweep();
        assert_eq!(held(), 0, "whatever host the request is for that begins");
        assert!(hosts.demand(&scope, &Access::Pull).is_some(), "what the host asks for is still known");
    }
}
