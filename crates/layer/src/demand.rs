//! Whether anybody waits, so that background work can step aside.
//!
//! A reader has pauses: it asks for the next bytes only when it has these. Background work that used each of them would
//! be in its way at the next moment, on the network and on the processors. So it keeps aside until there was nothing to
//! do for readers for [`QUIET`]. Who waits for a pull makes no such pauses: after it, work goes on at once.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use soci_oci::{FetchClass, Priority};
use tokio::sync::watch;
use tokio::time::Instant;

/// How long there must have been nothing to do for readers. Longer than a reader's pause between two spans, and short
/// beside what a request takes.
const QUIET: Duration = Duration::from_millis(25);

/// How long one who waits and gets nothing is stepped aside for. Longer than a registry takes to answer, with a token
/// fetched before. Who waits for one that does not answer would else keep every other image from being completed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// Does `work`, and calls `over` once it takes longer than [`PATIENCE`].
pub(crate) async fn patiently<T>(work: impl Future<Output = T>, over: impl FnOnce()) -> T {
    let mut work = std::pin::pin!(work);
    match tokio::time::timeout(PATIENCE, work.as_mut()).await {
        Ok(done) => done,
        Err(_) => {
            over();
            work.await
        }
    }
}

/// Counts work that is more urgent than completing layers.
#[derive(Debug)]
pub(crate) struct Demand {
    count: watch::Sender<Count>,
    /// When the last such work ended for a reader.
    ended: Mutex<Option<Instant>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    readers: usize,
    pulls: usize,
}

impl Count {
    fn all(self) -> usize {
        self.readers + self.pulls
    }

    fn of(&mut self, reader: bool) -> &mut usize {
        if reader { &mut self.readers } else { &mut self.pulls }
    }
}

/// One piece of such work, counted until dropped.
#[derive(Debug)]
pub(crate) struct Demanding {
    demand: Arc<Demand>,
    /// Whether more may come in a moment.
    reader: bool,
}

impl Demand {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { count: watch::Sender::default(), ended: Mutex::default() })
    }

    /// Counts one more for a reader until the result is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Demanding {
        self.count_one(true)
    }

    fn count_one(self: &Arc<Self>, reader: bool) -> Demanding {
        self.count.send_modify(|count| *count.of(reader) += 1);
        Demanding { demand: Arc::clone(self), reader }
    }

    /// Counts `work` for a reader as long as it takes, but no longer than [`PATIENCE`].
    pub(crate) async fn during<T>(self: &Arc<Self>, work: impl Future<Output = T>) -> T {
        let entered = self.enter();
        patiently(work, || drop(entered)).await
    }

    /// Counts `work` for a pull as long as it takes, but no longer than [`PATIENCE`].
    pub(crate) async fn during_pull<T>(self: &Arc<Self>, work: impl Future<Output = T>) -> T {
        let entered = self.count_one(false);
        patiently(work, || drop(entered)).await
    }

    /// Returns how much urgent work there is.
    pub(crate) fn count(&self) -> usize {
        self.count.borrow().all()
    }

    /// Whether a reader waits, or did a moment ago, and no pull.
    pub(crate) fn is_a_readers(&self) -> bool {
        let Count { readers, pulls } = *self.count.borrow();
        pulls == 0 && (readers > 0 || self.paused().is_some())
    }

    /// Returns when a reader's pause will have lasted for [`QUIET`], unless it has.
    fn paused(&self) -> Option<Instant> {
        let ended = *self.ended.lock();
        ended.map(|at| at + QUIET).filter(|quiet| *quiet > Instant::now())
    }

    /// Returns when a reader had what he wanted last.
    pub(crate) fn last_reader(&self) -> Option<Instant> {
        *self.ended.lock()
    }

    /// Waits until there was none for a moment, or until `priority` is no longer that of background work.
    pub(crate) async fn turn_of(&self, priority: &Priority) {
        tokio::select! {
            biased;
            () = priority.reaches(FetchClass::Prefetch) => {}
            () = self.quiet() => {}
        }
    }

    /// Waits until there was none for a moment.
    pub(crate) async fn quiet(&self) {
        let mut counts = self.count.subscribe();
        loop {
            // The sender lives as long as `self`, so waiting cannot fail.
            let _count = counts.wait_for(|count| count.all() == 0).await.map(|count| *count);
            let Some(quiet) = self.paused() else { return };
            // Either way it is looked at anew: there may have been a reader in between.
            let _changed = tokio::time::timeout_at(quiet, counts.changed()).await;
        }
    }
}

impl Drop for Demanding {
    fn drop(&mut self) {
        if self.reader {
            *self.demand.ended.lock() = Some(Instant::now());
        }
        self.demand.count.send_modify(|count| *count.of(self.reader) -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn background_work_waits_until_nobody_does_and_a_moment_longer() {
        let demand = Demand::new();
        let background = Priority::new(FetchClass::Background);
        assert!(demand.turn_of(&background).now_or_never().is_some(), "nobody was there ever");
        let reader = demand.enter();
        let mut turn = Box::pin(demand.turn_of(&background));
        assert!(turn.as_mut().now_or_never().is_none());
        drop(reader);
        assert!(turn.as_mut().now_or_never().is_none(), "the next read may come at once");
        let next = demand.enter();
        assert!(turn.as_mut().now_or_never().is_none());
        drop(next);
        turn.await;
        assert_eq!(demand.count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_is_waited_for_and_leaves_no_pause() {
        let demand = Demand::new();
        let background = Priority::new(FetchClass::Background);
        let (pulled, pull) = tokio::sync::oneshot::channel::<()>();
        let mut pull = Box::pin(demand.during_pull(pull));
        assert!(pull.as_mut().now_or_never().is_none());
        assert!(demand.turn_of(&background).now_or_never().is_none());
        pulled.send(()).unwrap();
        pull.await.unwrap();
        assert!(demand.turn_of(&background).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn one_who_gets_nothing_is_not_waited_for_without_end() {
        let demand = Demand::new();
        let background = Priority::new(FetchClass::Background);
        let stuck = demand.during(std::future::pending::<()>());
        tokio::select! {
            biased;
            () = stuck => {}
            () = async {
                tokio::task::yield_now().await;
                assert_eq!(demand.count(), 1);
                demand.turn_of(&background).await;
                assert_eq!(demand.count(), 0);
            } => {}
        }
    }

    #[tokio::test]
    async fn one_who_joins_background_work_is_not_waited_for_by_it() {
        let demand = Demand::new();
        let priority = Priority::new(FetchClass::Background);
        let _reader = demand.enter();
        let mut turn = Box::pin(demand.turn_of(&priority));
        assert!(turn.as_mut().now_or_never().is_none());
        priority.raise(FetchClass::OnDemand);
        assert!(turn.now_or_never().is_some());
    }
}
