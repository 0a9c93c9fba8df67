//! Where the bytes of one layer may come from.
//!
//! Several images may hold the same layer, each with its own reference and so its own credentials. The one that served
//! last is asked first; one that was opened is taken to serve, one that only joins is asked last. A source goes with the
//! snapshot that brought it.
//!
//! When a reader has waited for better credentials in vain, the next ones do not wait for a moment: the kernel asks a second
//! time for each page that it could not read ahead, and all who read that page do, one after another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use soci_oci::BlobSource;

/// How long nobody waits for better credentials after that was in vain.
const WEARY: Duration = Duration::from_millis(500);

/// Identifies a source within its set.
pub(crate) type SourceId = u64;

/// A set of sources.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The one to ask first is last.
    list: Vec<(SourceId, Arc<dyn BlobSource>)>,
    /// Counts changes: a failure remembered for one generation says nothing about the next.
    generation: u64,
    /// When a reader waited for better credentials in vain last.
    in_vain: Option<Instant>,
}

impl Sources {
    /// Adds a source, to be asked first. Returns its name in this set.
    pub(crate) fn add(&self, source: Arc<dyn BlobSource>) -> SourceId {
        let id = self.join(source);
        self.prefer(id);
        id
    }

    /// Adds a source, to be asked last. Returns its name in this set.
    pub(crate) fn join(&self, source: Arc<dyn BlobSource>) -> SourceId {
        let mut state = self.state.lock();
        state.generation += 1;
        let id = state.generation;
        state.list.insert(0, (id, source));
        state.in_vain = None;
        id
    }

    /// Has a source asked first from now on.
    pub(crate) fn prefer(&self, id: SourceId) {
        let mut state = self.state.lock();
        if let Some(at) = state.list.iter().position(|(held, _)| *held == id) {
            state.list[at..].rotate_left(1);
        }
    }

    /// Removes a source. Requests it serves at present go on.
    pub(crate) fn remove(&self, id: SourceId) {
        let mut state = self.state.lock();
        state.generation += 1;
        state.list.retain(|(held, _)| *held != id);
    }

    /// Returns the sources in the order to ask them; `avoid`, which gave wrong bytes, comes last.
    pub(crate) fn in_order(&self, avoid: Option<SourceId>) -> Vec<(SourceId, Arc<dyn BlobSource>)> {
        let mut list: Vec<_> = self.state.lock().list.iter().rev().cloned().collect();
        list.sort_by_key(|(id, _)| Some(*id) == avoid);
        list
    }

    /// Remembers that a reader waited for better credentials in vain.
    pub(crate) fn waited_in_vain(&self) {
        self.state.lock().in_vain = Some(Instant::now());
    }

    /// Whether waiting for better credentials was in vain a moment ago.
    pub(crate) fn weary(&self) -> bool {
        self.state.lock().in_vain.is_some_and(|at| at.elapsed() < WEARY)
    }

    /// Returns a number that changes whenever the set does.
    pub(crate) fn generation(&self) -> u64 {
        self.state.lock().generation
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use soci_oci::{BlobStream, FetchContext, FetchError};

    use super::*;

    #[derive(Debug)]
    struct Empty;

    #[async_trait::async_trait]
    impl BlobSource for Empty {
        async fn open(&self, _: Range<u64>, _: &FetchContext) -> Result<BlobStream, FetchError> {
            Ok(Box::pin(futures::stream::empty()))
        }
    }

    #[test]
    fn the_newest_source_is_asked_first_and_the_suspect_last() {
        let sources = Sources::default();
        let ids = [(); 3].map(|()| sources.add(Arc::new(Empty)));
        let order = |avoid| sources.in_order(avoid).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(order(None), [ids[2], ids[1], ids[0]]);
        assert_eq!(order(Some(ids[2])), [ids[1], ids[0], ids[2]]);
        let before = sources.generation();
        sources.remove(ids[1]);
        assert_eq!(order(None), [ids[2], ids[0]]);
        assert_ne!(sources.generation(), before);
    }

    #[test]
    fn a_source_that_joins_is_asked_last_until_it_serves() {
        let sources = Sources::default();
        let [first, second] = [(); 2].map(|()| sources.add(Arc::new(Empty)));
        let joined = sources.join(Arc::new(Empty));
        let order = || sources.in_order(None).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(order(), [second, first, joined]);
        sources.prefer(joined);
        assert_eq!(order(), [joined, second, first]);
        sources.prefer(99);
        assert_eq!(order(), [joined, second, first]);
    }

    #[test]
    fn a_new_source_may_bring_new_credentials_so_waiting_is_worth_while_again() {
        let sources = Sources::default();
        assert!(!sources.weary());
        sources.waited_in_vain();
        assert!(sources.weary());
        sources.join(Arc::new(Empty));
        assert!(!sources.weary());
    }
}
