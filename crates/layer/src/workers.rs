//! Threads that hash, inflate and store spans.
//!
//! As many as there are processors, so that one sequential reader uses them all; started when there is work and ended
//! when there was none for a while, so that an idle node has none. The most urgent job runs first, and work nobody
//! waits for leaves one thread free. The queue needs no bound of its own: each job holds a share of the byte budget.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use soci_oci::{FetchClass, Priority};

/// How long a thread waits for work before it ends.
const LINGER: Duration = Duration::from_secs(10);

/// Starts threads and gives them work; dropping it ends them once the queue is empty.
#[derive(Debug)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Signalled when a job arrives, when a background job ends, and at the end.
    wake: Condvar,
    most: usize,
    /// Called by the last thread that ends for want of work.
    idle: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.queue.lock().fmt(f)
    }
}

#[derive(Default)]
struct Queue {
    /// In order of arrival.
    jobs: Vec<Job>,
    threads: usize,
    idle: usize,
    /// Background jobs that run.
    background: usize,
    running: usize,
    closed: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} jobs wait, {} run on {} threads", self.jobs.len(), self.running, self.threads)
    }
}

struct Job {
    priority: Priority,
    work: Box<dyn FnOnce() + Send>,
}

impl Workers {
    /// Returns workers on at most `most` threads, at least one. `idle` is called when there was no work for a while.
    pub(crate) fn new(most: usize, idle: impl Fn() + Send + Sync + 'static) -> Self {
        let idle = Box::new(idle);
        let shared = Shared { queue: Mutex::default(), wake: Condvar::new(), most: most.max(1), idle };
        Self { shared: Arc::new(shared) }
    }

    /// Queues `work`. It runs at the urgency that `priority` has when a thread becomes free. When no thread can be
    /// started and none runs, the caller's thread does the work.
    pub(crate) fn submit(&self, priority: Priority, work: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.queue.lock();
        queue.jobs.push(Job { priority, work: Box::new(work) });
        self.shared.wake.notify_one();
        // Threads that were woken before and have not run yet still count as idle, hence the comparison.
        if queue.idle >= queue.jobs.len() || queue.threads >= self.shared.most {
            return;
        }
        let shared = Arc::clone(&self.shared);
        match std::thread::Builder::new().name("soci-span".into()).spawn(move || shared.run()) {
            Ok(_) => queue.threads += 1,
            Err(error) if queue.threads == 0 => {
                tracing::warn!(%error, "cannot start a thread to inflate spans, working without");
                let job = queue.jobs.pop();
                drop(queue);
                if let Some(job) = job {
                    (job.work)();
                }
            }
            Err(error) => tracing::debug!(%error, "cannot start one more thread to inflate spans"),
        }
    }

    /// Returns how many jobs wait or run.
    pub(crate) fn busy(&self) -> usize {
        let queue = self.shared.queue.lock();
        queue.jobs.len() + queue.running
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        let mut queue = self.queue.lock();
        loop {
            if let Some((job, background)) = queue.next(self.most) {
                queue.running += 1;
                queue.background += usize::from(background);
                drop(queue);
                // A thread outlives what it runs; what the job held is dropped, which wakes those who wait for it.
                if catch_unwind(AssertUnwindSafe(job.work)).is_err() {
                    tracing::error!("a span job panicked; please report this");
                }
                queue = self.queue.lock();
                queue.running -= 1;
                queue.background -= usize::from(background);
                if background && queue.idle > 0 {
                    self.wake.notify_one();
                }
                continue;
            }
            if queue.closed && queue.jobs.is_empty() {
                break;
            }
            queue.idle += 1;
            let timed_out = self.wake.wait_for(&mut queue, LINGER).timed_out();
            queue.idle -= 1;
            if timed_out && queue.jobs.is_empty() {
                break;
            }
        }
        queue.threads -= 1;
        let last = queue.threads == 0;
        drop(queue);
        if last {
            (self.idle)();
        }
    }
}

impl Queue {
    /// Takes the most urgent job, the first of equals; a background job only while another thread stays free.
    fn next(&mut self, most: usize) -> Option<(Job, bool)> {
        let (at, class) = self
            .jobs
            .iter()
            .map(|job| job.priority.class())
            .enumerate()
            .rev()
            .max_by_key(|(_, class)| *class)?;
        let background = class == FetchClass::Background;
        if background && most > 1 && self.background + 1 >= most {
            return None;
        }
        Some((self.jobs.remove(at), background))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn all_threads_work_at_once() {
        let workers = Workers::new(2, || {});
        let barrier = Arc::new(std::sync::Barrier::new(3));
        for _ in 0..2 {
            let barrier = Arc::clone(&barrier);
            workers.submit(Priority::new(FetchClass::ReadAhead), move || {
                barrier.wait();
            });
        }
        barrier.wait();
    }

    #[test]
    fn background_work_leaves_one_thread_and_the_most_urgent_runs_first() {
        let workers = Workers::new(2, || {});
        let (release, held) = mpsc::channel::<()>();
        let (say, said) = mpsc::channel();
        let started = say.clone();
        workers.submit(Priority::new(FetchClass::Background), move || {
            started.send("background started").unwrap();
            held.recv().unwrap();
        });
        assert_eq!(said.recv().unwrap(), "background started");
        let second = say.clone();
        workers.submit(Priority::new(FetchClass::Background), move || second.send("second").unwrap());
        workers.submit(Priority::new(FetchClass::OnDemand), move || say.send("demand").unwrap());
        assert_eq!(said.recv().unwrap(), "demand");
        release.send(()).unwrap();
        assert_eq!(said.recv().unwrap(), "second");
    }

    #[test]
    fn a_panic_costs_its_job_only() {
        let workers = Workers::new(1, || {});
        let (say, said) = mpsc::channel();
        workers.submit(Priority::new(FetchClass::OnDemand), || panic!("expected in this test"));
        workers.submit(Priority::new(FetchClass::OnDemand), move || say.send(1).unwrap());
        assert_eq!(said.recv().unwrap(), 1);
    }
}
