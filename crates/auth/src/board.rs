//! The news about registries: what changed, what was refused, what each option answered last.
//!
//! Keychains *bump* a registry when something about its credentials changed (a file, a pull, a secret). A request whose
//! candidates were all refused waits for the next bump, so that fresh credentials heal reads that are pending. Refusals
//! are remembered with a growing pause, so that thousands of page faults do not lock an account; a bump ends the pause.
//!
//! One mutex, never held across an await; every table is bounded.

mod ledger;
mod pulls;
mod refusals;

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::Fingerprint;
pub use ledger::{Answer, Judgement, LedgerEntry};
pub use pulls::Pin;
pub use refusals::Admission;

/// How many registries have a generation of their own. Those beyond share the common one.
const MAX_REGISTRIES: usize = 4096;
/// How long an option that keeps failing is not warned about again.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(60);

/// The state that keychains and requests share. See the [module](self).
#[derive(Debug)]
pub struct AuthBoard {
    generations: Mutex<Generations>,
    /// Wakes those who wait in [`AuthBoard::changed`].
    news: watch::Sender<()>,
    refusals: Mutex<refusals::Refusals>,
    ledger: Mutex<ledger::Ledger>,
    pulls: pulls::Pulls,
    /// When each option was last complained about; as many entries as there are options.
    complaints: Mutex<HashMap<&'static str, Instant>>,
}

#[derive(Debug, Default)]
struct Generations {
    /// Last number given out; numbers are never given out twice.
    last: u64,
    /// When everything changed last.
    all: u64,
    by_registry: HashMap<String, u64>,
}

impl AuthBoard {
    /// Returns an empty board.
    #[expect(clippy::new_without_default, reason = "there is one board per process, and it is passed on")]
    pub fn new() -> Self {
        Self {
            generations: Mutex::default(),
            news: watch::Sender::new(()),
            refusals: Mutex::default(),
            ledger: Mutex::default(),
            pulls: pulls::Pulls::default(),
            complaints: Mutex::default(),
        }
    }

    /// Says that credentials of the registry with this [identity](crate::CredentialScope::identity) may have changed.
    pub fn bump(&self, registry: &str) {
        {
            let mut generations = self.generations.lock();
            generations.last += 1;
            let number = generations.last;
            let full = generations.by_registry.len() >= MAX_REGISTRIES;
            match generations.by_registry.get_mut(registry) {
                Some(generation) => *generation = number,
                None if full => generations.all = number,
                None => {
                    generations.by_registry.insert(registry.to_owned(), number);
                }
            }
        }
        self.refusals.lock().end_rests(registry, Instant::now());
        self.news.send_replace(());
    }

    /// Says that credentials of any registry may have changed.
    pub fn bump_all(&self) {
        {
            let mut generations = self.generations.lock();
            generations.last += 1;
            generations.all = generations.last;
            generations.by_registry.clear();
        }
        self.refusals.lock().end_all_rests(Instant::now());
        self.news.send_replace(());
    }

    /// Returns the generation of a registry, which only grows.
    pub fn generation(&self, registry: &str) -> u64 {
        let generations = self.generations.lock();
        generations.by_registry.get(registry).copied().unwrap_or(0).max(generations.all)
    }

    /// Returns the newest generation of all registries.
    pub fn latest(&self) -> u64 {
        self.generations.lock().last
    }

    /// Waits until a registry has a generation newer than `since`. Give it a deadline.
    ///
    /// Which registry is not told: a request may wait for those of several hosts.
    pub async fn changed(&self, since: u64) {
        let mut news = self.news.subscribe();
        // The sender is ours, so it is there as long as we are.
        while self.latest() <= since && news.changed().await.is_ok() {}
    }

    /// Returns whether a credential may be presented for a repository now, or since when it may be again.
    ///
    /// After a pause one request is let through to try; the others wait for what it learns.
    pub fn admit(&self, registry: &str, repository: &str, credential: Fingerprint) -> Admission {
        self.refusals.lock().admit(registry, repository, credential, Instant::now())
    }

    /// Remembers that a credential was refused: 2 s at first, doubling to 60 s.
    pub fn refuse(&self, registry: &str, repository: &str, credential: Fingerprint) {
        self.refusals.lock().refuse(registry, repository, credential, Instant::now());
    }

    /// Whether a credential was refused within the last minute and not accepted since. Unlike its rest this is not ended by
    /// a bump: of several candidates those that were not refused lately come first.
    pub fn was_refused(&self, registry: &str, repository: &str, credential: Fingerprint) -> bool {
        self.refusals.lock().is_recent(registry, repository, credential, Instant::now())
    }

    /// Forgets a refusal, since the credential was accepted; those who wait look again.
    pub fn accept(&self, registry: &str, repository: &str, credential: Fingerprint) {
        if self.refusals.lock().accept(registry, repository, credential) {
            self.bump(registry);
        }
    }

    /// Whether a warning about this option is due: at most one a minute.
    pub(crate) fn may_complain(&self, option: &'static str) -> bool {
        let (mut complaints, now) = (self.complaints.lock(), Instant::now());
        let due = complaints.get(option).is_none_or(|last| now >= *last + COMPLAINT_PAUSE);
        if due {
            complaints.insert(option, now);
        }
        due
    }

    /// Notes what an option answered, for `explain`.
    pub fn note(&self, registry: &str, repository: &str, option: &'static str, answer: Answer) {
        self.ledger.lock().note(registry, repository, option, answer);
    }

    /// Returns what each option answered last for a repository, in no particular order.
    pub fn ledger(&self, registry: &str, repository: &str) -> Vec<LedgerEntry> {
        self.ledger.lock().read(registry, repository)
    }

    /// Returns what the registry said last of a credential in a repository.
    pub fn judgement(&self, registry: &str, repository: &str, credential: Fingerprint) -> Judgement {
        self.ledger.lock().judgement(registry, repository, credential)
    }

    /// Returns until when a refused credential rests, if it does. Unlike [`AuthBoard::admit`] it lets nobody try.
    pub fn rests_until(&self, registry: &str, repository: &str, credential: Fingerprint) -> Option<Instant> {
        self.refusals.lock().rests_until(registry, repository, credential, Instant::now())
    }

    /// Remembers the pod namespace of a pull, by [`ImageRef::key`](soci_oci::ImageRef::key).
    pub fn note_pull(&self, image_key: &str, namespace: &str) {
        self.pulls.note(image_key, namespace);
    }

    /// Returns the pod namespace of the last pull of an image, where known.
    pub fn pull_namespace(&self, image_key: &str) -> Option<String> {
        self.pulls.namespace(image_key)
    }

    /// Marks an image as in use by a lazy mount until the pin is dropped: its credentials are not evicted.
    pub fn pin(&self, image_key: &str) -> Pin {
        self.pulls.pin(image_key)
    }

    /// Whether a lazy mount uses the image.
    pub fn is_pinned(&self, image_key: &str) -> bool {
        self.pulls.is_pinned(image_key)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Credential;

    #[tokio::test(start_paused = true)]
    async fn r37_a_bump_wakes_those_who_wait_and_is_news_of_that_registry_only() {
        let board = Arc::new(AuthBoard::new());
        let since = board.latest();
        let waiter = tokio::spawn({
            let board = Arc::clone(&board);
            async move { board.changed(since).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!waiter.is_finished());
        board.bump("reg.example");
        waiter.await.unwrap();
        assert!(board.generation("reg.example") > since);
        assert_eq!(board.generation("other.example"), 0);
    }

    #[tokio::test]
    async fn a_bump_before_the_wait_is_not_missed() {
        let board = AuthBoard::new();
        for bump in [AuthBoard::bump_all, |board: &AuthBoard| board.bump("reg.example")] {
            let since = board.latest();
            bump(&board);
            tokio::time::timeout(Duration::from_secs(1), board.changed(since)).await.unwrap();
        }
    }

    #[test]
    fn registries_beyond_the_bound_share_a_generation() {
        let board = AuthBoard::new();
        (0..MAX_REGISTRIES).for_each(|n| board.bump(&format!("r{n}")));
        let before = board.generation("late");
        board.bump("late");
        assert!(board.generation("late") > before);
        assert_eq!(board.generations.lock().by_registry.len(), MAX_REGISTRIES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_bump_ends_the_rests_of_its_registry() {
        let board = AuthBoard::new();
        let who = Credential::basic("u", "p").fingerprint();
        board.refuse("a.example", "x", who);
        board.refuse("b.example", "x", who);
        board.bump("a.example");
        assert_eq!(board.admit("a.example", "x", who), Admission::Go);
        assert!(matches!(board.admit("b.example", "x", who), Admission::NotBefore(_)));
    }
}
