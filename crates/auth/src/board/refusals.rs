//! The negative cache: credentials that a repository refused, and how long they rest.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::Fingerprint;

const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
const MAX_ENTRIES: usize = 4096;

/// Whether a credential may be presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Go,
    /// It was refused; not before this moment.
    NotBefore(Instant),
}

#[derive(Debug, Default)]
pub(super) struct Refusals(HashMap<Key, Refusal>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    registry: String,
    repository: String,
    credential: Fingerprint,
}

#[derive(Debug)]
struct Refusal {
    pause: Duration,
    until: Instant,
    /// Whether one request was let through after the pause and has not reported yet.
    trying: bool,
}

impl Key {
    fn new(registry: &str, repository: &str, credential: Fingerprint) -> Self {
        Self { registry: registry.to_owned(), repository: repository.to_owned(), credential }
    }
}

impl Refusals {
    pub(super) fn admit(
        &mut self,
        registry: &str,
        repository: &str,
        who: Fingerprint,
        now: Instant,
    ) -> Admission {
        match self.0.get_mut(&Key::new(registry, repository, who)) {
            Some(refusal) if now < refusal.until => Admission::NotBefore(refusal.until),
            Some(refusal) => {
                // The one that is let through tries for all.
                refusal.until = now + refusal.pause;
                refusal.trying = true;
                Admission::Go
            }
            None => Admission::Go,
        }
    }

    pub(super) fn rests_until(
        &self,
        registry: &str,
        repository: &str,
        who: Fingerprint,
        now: Instant,
    ) -> Option<Instant> {
        let refusal = self.0.get(&Key::new(registry, repository, who))?;
        (now < refusal.until).then_some(refusal.until)
    }

    pub(super) fn refuse(&mut self, registry: &str, repository: &str, who: Fingerprint, now: Instant) {
        if self.0.len() >= MAX_ENTRIES {
            self.make_room(now);
        }
        self.0
            .entry(Key::new(registry, repository, who))
            .and_modify(|refusal| {
                // Requests that were under way together count as one refusal.
                if refusal.trying || refusal.until <= now {
                    refusal.pause = (refusal.pause * 2).min(LONGEST_PAUSE);
                    refusal.until = now + refusal.pause;
                    refusal.trying = false;
                }
            })
            .or_insert(Refusal { pause: FIRST_PAUSE, until: now + FIRST_PAUSE, trying: false });
    }

    /// Returns whether there was something to forget.
    pub(super) fn accept(&mut self, registry: &str, repository: &str, who: Fingerprint) -> bool {
        !self.0.is_empty() && self.0.remove(&Key::new(registry, repository, who)).is_some()
    }

    pub(super) fn forget(&mut self, registry: &str) {
        self.0.retain(|key, _| key.registry != registry);
    }

    pub(super) fn forget_all(&mut self) {
        self.0.clear();
    }

    fn make_room(&mut self, now: Instant) {
        self.0.retain(|_, refusal| refusal.until > now);
        if self.0.len() >= MAX_ENTRIES {
            let first = self.0.iter().min_by_key(|(_, refusal)| refusal.until).map(|(key, _)| key.clone());
            first.map(|key| self.0.remove(&key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Credential;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_double_to_a_minute_and_one_request_tries_after_each() {
        let mut refusals = Refusals::default();
        let who = Credential::basic("u", "p").fingerprint();
        let mut now = Instant::now();
        for pause in [2, 4, 8, 16, 32, 60, 60] {
            for _concurrent in 0..3 {
                refusals.refuse("r", "x", who, now);
            }
            assert_eq!(refusals.admit("r", "x", who, now), Admission::NotBefore(now + seconds(pause)));
            now += seconds(pause);
            assert_eq!(refusals.admit("r", "x", who, now), Admission::Go);
            assert!(matches!(refusals.admit("r", "x", who, now), Admission::NotBefore(_)), "only one tries");
        }
        assert!(refusals.accept("r", "x", who));
        assert_eq!(refusals.admit("r", "x", who, now), Admission::Go);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded_and_keyed_by_repository_and_credential() {
        let mut refusals = Refusals::default();
        let who = Credential::basic("u", "p").fingerprint();
        let now = Instant::now();
        for n in 0..MAX_ENTRIES + 10 {
            refusals.refuse("r", &n.to_string(), who, now);
        }
        assert_eq!(refusals.0.len(), MAX_ENTRIES);
        assert_eq!(refusals.admit("r", "other", who, now), Admission::Go);
        let newest = (MAX_ENTRIES + 9).to_string();
        assert!(matches!(refusals.admit("r", &newest, who, now), Admission::NotBefore(_)));
        assert_eq!(
            refusals.admit("r", &newest, Credential::basic("u", "q").fingerprint(), now),
            Admission::Go
        );
    }
}
