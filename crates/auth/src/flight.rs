//! One piece of work per key at a time, shared by all who want it.
//!
//! The work runs in a task of its own: a caller that gives up neither cancels nor repeats it. The set owns its tasks and
//! aborts them when it is dropped. The result is *not* kept: who joins late starts anew, so the work itself looks first
//! whether it is still to be done.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Work under way, by key.
#[derive(Debug)]
pub(crate) struct Flights<K, V> {
    /// Receivers of the results to come. A key leaves when its work ends, however it ends.
    under_way: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
    /// Owns the tasks. Locked after `under_way`, never across an await.
    tasks: Mutex<JoinSet<()>>,
}

/// A result to come.
#[derive(Debug)]
pub(crate) struct Flight<V>(watch::Receiver<Option<V>>);

/// The work ended without a result: it panicked or was aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abandoned;

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self { under_way: Arc::default(), tasks: Mutex::default() }
    }
}

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the work for `key`, which `work` starts if it is not under way.
    pub(crate) fn join<F>(&self, key: K, work: impl FnOnce() -> F) -> Flight<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut under_way = self.under_way.lock();
        if let Some(receiver) = under_way.get(&key) {
            return Flight(receiver.clone());
        }
        let (sender, receiver) = watch::channel(None);
        under_way.insert(key.clone(), receiver.clone());
        let landing = Landing { under_way: Arc::clone(&self.under_way), key };
        let work = work();
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let value = work.await;
            drop(landing);
            sender.send_replace(Some(value));
        });
        Flight(receiver)
    }
}

impl<V: Clone> Flight<V> {
    /// Waits for the result.
    pub(crate) async fn wait(mut self) -> Result<V, Abandoned> {
        let value = self.0.wait_for(Option::is_some).await.map_err(|_| Abandoned)?;
        value.clone().ok_or(Abandoned)
    }
}

/// Removes the key when the work ends, also by panic or abort.
struct Landing<K: Eq + Hash, V> {
    under_way: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        self.under_way.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn many_tasks_share_one_run() {
        let flights = Arc::new(Flights::<u8, usize>::default());
        let runs = Arc::new(AtomicUsize::new(0));
        let gate = watch::Sender::new(false);
        let mut joined = Vec::new();
        for _ in 0..200 {
            let (runs, mut gate) = (Arc::clone(&runs), gate.subscribe());
            joined.push(flights.join(1, || async move {
                let run = runs.fetch_add(1, Ordering::SeqCst);
                let _ = gate.wait_for(|open| *open).await;
                run
            }));
        }
        gate.send_replace(true);
        for flight in joined {
            assert_eq!(flight.wait().await, Ok(0));
        }
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert!(flights.under_way.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_gives_up_does_not_cancel_the_work() {
        let flights = Flights::<u8, u8>::default();
        let work = || async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            7
        };
        assert!(tokio::time::timeout(Duration::from_secs(1), flights.join(1, work).wait()).await.is_err());
        let joined = flights.join(1, || async { 8 });
        assert_eq!(joined.wait().await, Ok(7));
    }

    #[tokio::test]
    async fn work_that_panics_frees_its_key() {
        let flights = Flights::<u8, u8>::default();
        let doomed = flights.join(1, || async { panic!("planned") });
        assert_eq!(doomed.wait().await, Err(Abandoned));
        assert_eq!(flights.join(1, || async { 2 }).wait().await, Ok(2));
    }

    #[tokio::test]
    async fn dropping_the_set_ends_the_work() {
        let flights = Flights::<u8, u8>::default();
        let endless = flights.join(1, std::future::pending);
        drop(flights);
        assert_eq!(endless.wait().await, Err(Abandoned));
    }
}
