//! How many bytes may be in flight at once.
//!
//! A span takes its share before its first byte is received and gives it back when it is inflated and stored, so a slow
//! disk or a busy processor holds the network up instead of filling memory. Part of the budget is a reserve for
//! readers who wait; among those who queue the most urgent goes first, and urgency can rise while they queue.
//! A share that is larger than the budget is granted alone, so that no span is too large to be read.
//!
//! A share whose bytes do not come is lent to others until they do ([`Grant::lend`]): what such spans have in memory is the
//! little that came, and their number is bounded by the requests that a host gets at a time.
//!
//! Background work has a budget of its own. It keeps its shares while it is aside for a reader, who would else find less
//! room than without it, or none until the background work that waits for him went on.

use std::sync::Arc;

use parking_lot::Mutex;
use soci_oci::{FetchClass, Priority};
use tokio::sync::oneshot;

/// The budget. Lock order: its lock is taken last, and under it only priorities are looked at.
#[derive(Debug)]
pub(crate) struct Budget {
    state: Mutex<State>,
    limits: Limits,
}

/// How many bytes may be granted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// To all who are more urgent than background work.
    pub(crate) total: u64,
    /// The part of `total` that only readers who wait may use.
    pub(crate) reserve: u64,
    /// To background work, besides.
    pub(crate) background: u64,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    used_in_background: u64,
    /// In order of arrival.
    queue: Vec<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    priority: Priority,
    grant: oneshot::Sender<Grant>,
}

/// A share of the budget, given back when dropped.
#[derive(Debug)]
pub(crate) struct Grant {
    budget: Arc<Budget>,
    bytes: u64,
    /// Whether it was taken from what background work has.
    background: bool,
    /// Whether others have it at present.
    lent: bool,
}

impl State {
    fn used(&mut self, background: bool) -> &mut u64 {
        if background { &mut self.used_in_background } else { &mut self.used }
    }
}

impl Budget {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), limits })
    }

    /// Waits for a share of `bytes`. Dropping the future leaves the queue.
    pub(crate) async fn acquire(self: &Arc<Self>, bytes: u64, priority: Priority) -> Grant {
        loop {
            let (sender, receiver) = oneshot::channel();
            self.state.lock().queue.push(Waiter { bytes, priority: priority.clone(), grant: sender });
            self.kick();
            // The sender is only dropped unused when this future is, so the loop is not entered twice.
            if let Ok(grant) = receiver.await {
                return grant;
            }
        }
    }

    /// Grants what can be granted: to be called when the priority of one who may be queueing rose.
    pub(crate) fn kick(self: &Arc<Self>) {
        loop {
            let Some((waiter, grant)) = self.next() else { return };
            // A waiter that left gives its share back at once, outside the lock.
            drop(waiter.grant.send(grant));
        }
    }

    fn next(self: &Arc<Self>) -> Option<(Waiter, Grant)> {
        let mut state = self.state.lock();
        state.queue.retain(|waiter| !waiter.grant.is_closed());
        // `rev` because the last of equal maxima is chosen, and the first to come is meant.
        let (at, class) = state
            .queue
            .iter()
            .map(|waiter| waiter.priority.class())
            .enumerate()
            .rev()
            .max_by_key(|(_, class)| *class)?;
        let Limits { total, reserve, background } = self.limits;
        let limit = match class {
            FetchClass::OnDemand => total,
            FetchClass::ReadAhead | FetchClass::Prefetch => total.saturating_sub(reserve),
            FetchClass::Background => background,
        };
        let background = class == FetchClass::Background;
        let bytes = state.queue[at].bytes;
        let used = state.used(background);
        if *used != 0 && used.saturating_add(bytes) > limit {
            return None;
        }
        *used += bytes;
        let waiter = state.queue.remove(at);
        Some((waiter, Grant { budget: Arc::clone(self), bytes, background, lent: false }))
    }

    /// Returns how many bytes are granted.
    pub(crate) fn used(&self) -> u64 {
        let state = self.state.lock();
        state.used + state.used_in_background
    }
}

impl Grant {
    /// Lets others have the share, but for one of background work, which waits for nobody but readers.
    pub(crate) fn lend(&mut self) {
        if !self.background && !std::mem::replace(&mut self.lent, true) {
            *self.budget.state.lock().used(self.background) -= self.bytes;
            self.budget.kick();
        }
    }

    /// Counts the share again. Where others have it by now, more than the limit is granted until one of them ends.
    pub(crate) fn take_back(&mut self) {
        if std::mem::take(&mut self.lent) {
            *self.budget.state.lock().used(self.background) += self.bytes;
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !self.lent {
            *self.budget.state.lock().used(self.background) -= self.bytes;
            self.budget.kick();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn budget(total: u64, reserve: u64) -> Arc<Budget> {
        Budget::new(Limits { total, reserve, background: 10 })
    }

    fn class(class: FetchClass) -> Priority {
        Priority::new(class)
    }

    #[tokio::test]
    async fn the_reserve_is_for_readers_who_wait() {
        let budget = budget(100, 30);
        let ahead = class(FetchClass::ReadAhead);
        let first = budget.acquire(70, ahead.clone()).await;
        let mut second = Box::pin(budget.acquire(10, ahead));
        assert!(second.as_mut().now_or_never().is_none());
        let demand = budget.acquire(30, class(FetchClass::OnDemand)).now_or_never();
        assert!(demand.is_some());
        assert_eq!(budget.used(), 100);
        drop(demand);
        drop(first);
        assert!(second.now_or_never().is_some());
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn the_most_urgent_goes_first_and_urgency_can_rise() {
        let budget = budget(10, 0);
        let all = budget.acquire(10, class(FetchClass::OnDemand)).await;
        let late = class(FetchClass::Prefetch);
        let mut ahead = Box::pin(budget.acquire(10, class(FetchClass::ReadAhead)));
        let mut raised = Box::pin(budget.acquire(10, late.clone()));
        assert!(ahead.as_mut().now_or_never().is_none());
        assert!(raised.as_mut().now_or_never().is_none());
        late.raise(FetchClass::OnDemand);
        drop(all);
        let grant = raised.now_or_never().unwrap();
        assert!(ahead.as_mut().now_or_never().is_none());
        drop(grant);
        assert!(ahead.now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_share_beyond_the_budget_is_granted_alone() {
        let budget = budget(10, 5);
        let small = budget.acquire(1, class(FetchClass::OnDemand)).await;
        let mut huge = Box::pin(budget.acquire(1000, class(FetchClass::ReadAhead)));
        assert!(huge.as_mut().now_or_never().is_none());
        drop(small);
        let huge = huge.now_or_never().unwrap();
        assert_eq!(budget.used(), 1000);
        drop(huge);
    }

    #[tokio::test]
    async fn background_work_takes_nothing_from_readers_nor_they_from_it() {
        let budget = budget(10, 0);
        let background = class(FetchClass::Background);
        let aside = budget.acquire(10, background.clone()).await;
        let demand = budget.acquire(10, class(FetchClass::OnDemand)).now_or_never().unwrap();
        assert_eq!(budget.used(), 20);
        let mut second = Box::pin(budget.acquire(1, background.clone()));
        drop(demand);
        assert!(second.as_mut().now_or_never().is_none(), "its own budget is full");
        background.raise(FetchClass::OnDemand);
        budget.kick();
        let raised = second.now_or_never().unwrap();
        drop(aside);
        assert_eq!(budget.used(), 1);
        drop(raised);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_share_that_is_lent_is_free_for_others_and_counts_again_when_it_is_taken_back() {
        let budget = budget(10, 0);
        let demand = class(FetchClass::OnDemand);
        let mut stuck = budget.acquire(8, demand.clone()).await;
        let mut waits = Box::pin(budget.acquire(8, demand.clone()));
        assert!(waits.as_mut().now_or_never().is_none());
        stuck.lend();
        stuck.lend();
        let other = waits.now_or_never().unwrap();
        assert_eq!(budget.used(), 8);
        stuck.take_back();
        stuck.take_back();
        assert_eq!(budget.used(), 16);
        drop(other);
        let mut next = Box::pin(budget.acquire(8, demand));
        assert!(next.as_mut().now_or_never().is_none(), "it counts again");
        stuck.lend();
        drop(stuck);
        drop(next.now_or_never().unwrap());
        let mut background = budget.acquire(10, class(FetchClass::Background)).await;
        background.lend();
        assert_eq!(budget.used(), 10);
        drop(background);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn one_who_leaves_the_queue_takes_nothing_along() {
        let budget = budget(10, 0);
        let all = budget.acquire(10, class(FetchClass::OnDemand)).await;
        let mut gone = Box::pin(budget.acquire(10, class(FetchClass::OnDemand)));
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        drop(all);
        assert_eq!(budget.used(), 0);
        assert!(budget.acquire(10, class(FetchClass::Background)).now_or_never().is_some());
    }
}
