//! How many bytes may be in flight at once.
//!
//! A span takes its share before its first byte is received and gives it back when it is inflated and stored, so a slow
//! disk or a busy processor holds the network up instead of filling memory. Part of the budget is a reserve for
//! readers who wait; among those who queue the most urgent goes first, and urgency can rise while they queue.
//! A share that is larger than the budget is granted alone, so that no span is too large to be read.

use std::sync::Arc;

use parking_lot::Mutex;
use soci_oci::{FetchClass, Priority};
use tokio::sync::oneshot;

/// The budget. Lock order: its lock is taken last and no other is taken under it.
#[derive(Debug)]
pub(crate) struct Budget {
    state: Mutex<State>,
    total: u64,
    /// What only on-demand work may use.
    reserve: u64,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
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
}

impl Budget {
    /// Returns a budget of `total` bytes of which `reserve` are for on-demand work.
    pub(crate) fn new(total: u64, reserve: u64) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), total, reserve: reserve.min(total) })
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
        let limit = if class == FetchClass::OnDemand { self.total } else { self.total - self.reserve };
        let bytes = state.queue[at].bytes;
        if state.used != 0 && state.used.saturating_add(bytes) > limit {
            return None;
        }
        state.used += bytes;
        let waiter = state.queue.remove(at);
        Some((waiter, Grant { budget: Arc::clone(self), bytes }))
    }

    /// Returns how many bytes are granted.
    pub(crate) fn used(&self) -> u64 {
        self.state.lock().used
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.budget.state.lock().used -= self.bytes;
        self.budget.kick();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn class(class: FetchClass) -> Priority {
        Priority::new(class)
    }

    #[tokio::test]
    async fn the_reserve_is_for_readers_who_wait() {
        let budget = Budget::new(100, 30);
        let background = class(FetchClass::Background);
        let first = budget.acquire(70, background.clone()).await;
        let mut second = Box::pin(budget.acquire(10, background));
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
        let budget = Budget::new(10, 0);
        let all = budget.acquire(10, class(FetchClass::OnDemand)).await;
        let late = class(FetchClass::Background);
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
        let budget = Budget::new(10, 5);
        let small = budget.acquire(1, class(FetchClass::OnDemand)).await;
        let mut huge = Box::pin(budget.acquire(1000, class(FetchClass::Background)));
        assert!(huge.as_mut().now_or_never().is_none());
        drop(small);
        let huge = huge.now_or_never().unwrap();
        assert_eq!(budget.used(), 1000);
        drop(huge);
    }

    #[tokio::test]
    async fn one_who_leaves_the_queue_takes_nothing_along() {
        let budget = Budget::new(10, 0);
        let all = budget.acquire(10, class(FetchClass::OnDemand)).await;
        let mut gone = Box::pin(budget.acquire(10, class(FetchClass::OnDemand)));
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        drop(all);
        assert_eq!(budget.used(), 0);
        assert!(budget.acquire(10, class(FetchClass::Background)).now_or_never().is_some());
    }
}
