//! The negative cache: credentials that a repository refused, how long they rest, and for a minute that they were refused
//! at all: news end the rest, but what was not refused lately is tried first.

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
    /// When it was refused last.
    at: Instant,
    /// Zero when news ended the rest.
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
                refusal.at = now;
                // Requests that were under way together count as one refusal.
                if refusal.trying || refusal.until <= now {
                    refusal.pause = (refusal.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                    refusal.until = now + refusal.pause;
                    refusal.trying = false;
                }
            })
            .or_insert(Refusal { at: now, pause: FIRST_PAUSE, until: now + FIRST_PAUSE, trying: false });
    }

    /// Whether it was refused within the last minute and not accepted since, be it resting or not.
    pub(super) fn is_recent(&self, registry: &str, repository: &str, who: Fingerprint, now: Instant) -> bool {
        !self.0.is_empty()
            && self.0.get(&Key::new(registry, repository, who)).is_some_and(|refusal| refusal.is_recent(now))
    }

    /// Returns whether somebody may wait for the end of the rest.
    pub(super) fn accept(&mut self, registry: &str, repository: &str, who: Fingerprint) -> bool {
        !self.0.is_empty()
            && self
                .0
                .remove(&Key::new(registry, repository, who))
                .is_some_and(|refusal| !refusal.pause.is_zero())
    }

    /// Ends the rest of what one registry refused.
    pub(super) fn end_rests(&mut self, registry: &str, now: Instant) {
        self.0.retain(|key, refusal| key.registry != registry || refusal.end_rest(now));
    }

    /// Ends every rest.
    pub(super) fn end_all_rests(&mut self, now: Instant) {
        self.0.retain(|_, refusal| refusal.end_rest(now));
    }

    fn make_room(&mut self, now: Instant) {
        self.0.retain(|_, refusal| refusal.until > now);
        if self.0.len() >= MAX_ENTRIES {
            let first = self.0.iter().min_by_key(|(_, refusal)| refusal.until).map(|(key, _)| key.clone());
            first.map(|key| self.0.remove(&key));
        }
    }
}

impl Refusal {
    fn is_recent(&self, now: Instant) -> bool {
        now < self.at + LONGEST_PAUSE
    }

    /// Returns whether it is still worth remembering.
    fn end_rest(&mut self, now: Instant) -> bool {
        (self.pause, self.until, self.trying) = (Duration::ZERO, now, false);
        self.is_recent(now)
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
    async fn news_end_the_rest_but_a_refusal_is_known_for_a_minute_or_until_it_is_accepted() {
        let mut refusals = Refusals::default();
        let who = Credential::basic("u", "p").fingerprint();
        let now = Instant::now();
        refusals.refuse("r", "x", who, now);
        refusals.end_rests("other", now);
        assert_eq!(refusals.rests_until("r", "x", who, now), Some(now + seconds(2)));
        refusals.end_rests("r", now);
        assert_eq!(refusals.rests_until("r", "x", who, now), None);
        for _concurrent in 0..3 {
            assert_eq!(refusals.admit("r", "x", who, now), Admission::Go);
        }
        assert!(refusals.is_recent("r", "x", who, now + seconds(59)));
        assert!(!refusals.is_recent("r", "x", who, now + seconds(60)));
        assert!(!refusals.is_recent("r", "y", who, now));
        refusals.refuse("r", "x", who, now + seconds(1));
        assert_eq!(refusals.rests_until("r", "x", who, now + seconds(1)), Some(now + seconds(3)), "anew");
        refusals.end_all_rests(now + seconds(2));
        assert!(!refusals.accept("r", "x", who), "nobody waits for the end of its rest");
        assert!(!refusals.is_recent("r", "x", who, now + seconds(2)));
        refusals.refuse("r", "x", who, now);
        refusals.end_all_rests(now + seconds(60));
        assert!(refusals.0.is_empty());
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
