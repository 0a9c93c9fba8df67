//! Whether anybody waits, so that background work can step aside.

use soci_oci::{FetchClass, Priority};
use tokio::sync::watch;

/// Counts work that is more urgent than completing layers.
#[derive(Debug)]
pub(crate) struct Demand(watch::Sender<usize>);

/// One piece of such work, counted until dropped.
#[derive(Debug)]
pub(crate) struct Demanding<'a>(&'a Demand);

impl Demand {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// Counts one more until the result is dropped. One who joined background work does so before this call, which
    /// makes that work look at its priority again.
    pub(crate) fn enter(&self) -> Demanding<'_> {
        self.0.send_modify(|count| *count += 1);
        Demanding(self)
    }

    /// Returns how much urgent work there is.
    pub(crate) fn count(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until there is none, or until `priority` is no longer that of background work.
    pub(crate) async fn turn_of(&self, priority: &Priority) {
        if priority.class() > FetchClass::Background {
            return;
        }
        let mut counts = self.0.subscribe();
        // The sender lives as long as `self`, so waiting cannot fail.
        let _count = counts.wait_for(|count| *count == 0 || priority.class() > FetchClass::Background).await;
    }
}

impl Demand {
    /// Waits until `priority` is no longer that of background work.
    pub(crate) async fn raised(&self, priority: &Priority) {
        let mut counts = self.0.subscribe();
        let _count = counts.wait_for(|_| priority.class() > FetchClass::Background).await;
    }
}

impl Drop for Demanding<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn background_work_waits_until_nobody_does() {
        let demand = Demand::new();
        let background = Priority::new(FetchClass::Background);
        assert!(demand.turn_of(&background).now_or_never().is_some());
        let reader = demand.enter();
        let mut turn = Box::pin(demand.turn_of(&background));
        assert!(turn.as_mut().now_or_never().is_none());
        drop(reader);
        assert!(turn.now_or_never().is_some());
        assert_eq!(demand.count(), 0);
    }

    #[test]
    fn one_who_joins_background_work_is_not_waited_for_by_it() {
        let demand = Demand::new();
        let priority = Priority::new(FetchClass::Background);
        let _reader = demand.enter();
        let mut turn = Box::pin(demand.turn_of(&priority));
        assert!(turn.as_mut().now_or_never().is_none());
        priority.raise(FetchClass::OnDemand);
        let _joiner = demand.enter();
        assert!(turn.now_or_never().is_some());
    }
}
