//! Work that several callers want done once.
//!
//! The first caller for a key starts a task; the others wait for it. The task belongs to nobody: a caller who goes away
//! neither stops it nor leaves it half done, so a cancelled Prepare never ends between mounting and recording. A task
//! that panics is reported to those who wait, and the key is free again.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::sync::{Mutex, spawn};

/// Tasks under way, by key.
pub struct Jobs<K, V> {
    running: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
    tracker: TaskTracker,
}

/// The task panicked, or the runtime stopped it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the task ended without a result; this is a defect, please report it with the log")]
pub struct Lost;

impl<K, V> Jobs<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Returns an empty set whose tasks are counted by `tracker`.
    pub fn new(tracker: TaskTracker) -> Self {
        Self { running: Arc::default(), tracker }
    }

    /// Returns the result of the task for `key`, starting it from `make` when none is under way.
    ///
    /// Cancel-safe: dropping the future leaves the task alone.
    ///
    /// # Errors
    /// [`Lost`] when the task panicked.
    pub async fn run<F>(&self, key: K, make: impl FnOnce() -> F) -> Result<V, Lost>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut result = {
            let mut running = self.running.lock();
            match running.get(&key) {
                Some(result) => result.clone(),
                None => {
                    let (done, result) = watch::channel(None);
                    running.insert(key.clone(), result.clone());
                    let ends = Ends { running: Arc::clone(&self.running), key };
                    let work = make();
                    let task = async move {
                        let value = work.await;
                        // The key is freed before the result is out, so that whoever has it may start anew.
                        drop(ends);
                        let _ = done.send(Some(value));
                    };
                    // Within the span of whoever caused it.
                    drop(spawn(self.tracker.track_future(task.in_current_span())));
                    result
                }
            }
        };
        let value = result.wait_for(Option::is_some).await.map_err(|_| Lost)?;
        value.clone().ok_or(Lost)
    }

    /// Returns how many tasks are under way.
    pub fn len(&self) -> usize {
        self.running.lock().len()
    }

    /// Whether no task is under way.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K, V> fmt::Debug for Jobs<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

struct Ends<K: Eq + Hash, V> {
    running: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Ends<K, V> {
    fn drop(&mut self) {
        self.running.lock().remove(&self.key);
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn a_burst_runs_once_and_a_cancelled_caller_stops_nothing() {
        let jobs = Arc::new(Jobs::<&str, usize>::new(TaskTracker::new()));
        let gate = Arc::new(Semaphore::new(0));
        let runs = Arc::new(AtomicUsize::new(0));
        let call = |jobs: &Arc<Jobs<_, _>>| {
            let (jobs, gate, runs) = (Arc::clone(jobs), Arc::clone(&gate), Arc::clone(&runs));
            tokio::spawn(async move {
                let work = || async move {
                    let _ = gate.acquire().await;
                    runs.fetch_add(1, Ordering::Relaxed) + 1
                };
                jobs.run("key", work).await
            })
        };
        let first = call(&jobs);
        while jobs.is_empty() {
            tokio::task::yield_now().await;
        }
        let rest: Vec<_> = (0..99).map(|_| call(&jobs)).collect();
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        tokio::task::yield_now().await;
        gate.close();
        for caller in rest {
            assert_eq!(caller.await.unwrap(), Ok(1));
        }
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        assert!(jobs.is_empty());
        assert_eq!(jobs.run("key", || async { 7 }).await, Ok(7), "a finished job is not remembered");
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_frees_the_key() {
        let jobs = Jobs::<u8, u8>::new(TaskTracker::new());
        assert_eq!(jobs.run(1, || async { panic!("scripted") }).await, Err(Lost));
        assert_eq!(jobs.run(1, || async { 2 }).await, Ok(2));
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod races {
    use futures::FutureExt;
    use shuttle::future::{block_on, yield_now};
    use shuttle::sync::atomic::{AtomicUsize, Ordering};
    use shuttle::thread;

    use super::*;

    /// Callers come at any time, and one leaves: never do two tasks for a key run at once, every caller who stays gets the
    /// result of a task that ran while it waited, and the key is free in the end.
    #[test]
    fn one_task_at_a_time_serves_all_who_wait_for_it() {
        shuttle::check_random(
            || {
                let jobs = Arc::new(Jobs::<u8, usize>::new(TaskTracker::new()));
                let (running, ran) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
                let callers: Vec<_> = (0..4)
                    .map(|caller| {
                        let (jobs, running, ran) =
                            (Arc::clone(&jobs), Arc::clone(&running), Arc::clone(&ran));
                        thread::spawn(move || {
                            let before = ran.load(Ordering::SeqCst);
                            let work = {
                                let (running, ran) = (Arc::clone(&running), Arc::clone(&ran));
                                move || async move {
                                    assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "two at once");
                                    yield_now().await;
                                    running.fetch_sub(1, Ordering::SeqCst);
                                    ran.fetch_add(1, Ordering::SeqCst) + 1
                                }
                            };
                            let mut result = Box::pin(jobs.run(7, work));
                            if caller == 0 {
                                let _left_early = result.as_mut().now_or_never();
                                return;
                            }
                            let number = block_on(result).unwrap();
                            assert!(number >= before, "task {number} was over before {before} were");
                        })
                    })
                    .collect();
                callers.into_iter().for_each(|caller| caller.join().unwrap());
                while !jobs.is_empty() {
                    thread::yield_now();
                }
                assert!((1..=4).contains(&ran.load(Ordering::SeqCst)));
            },
            3000,
        );
    }
}
