//! The reads of one mount that wait for bytes, and who may answer them.
//!
//! Each waiting read is answered exactly once: by whoever takes it out of the table, be it the task that has its bytes or
//! the thread that is told the reader got a signal. An interrupt can overtake the request that it is about, since several
//! threads read from the device; it is then kept until the request arrives.

use std::collections::{HashMap, VecDeque};
use std::future::Future;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// Interrupts that are kept for requests to come. One is lost only when as many others overtook in between, far more
/// than there are threads.
const EARLY: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    reads: HashMap<u64, AbortHandle>,
    early: VecDeque<u64>,
    closed: bool,
}

/// What happened to a read that was to wait.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Spawned {
    Waiting,
    /// The reader got a signal already: answer that.
    Interrupted,
    /// The mount is gone: nobody wants an answer.
    Closed,
}

impl Pending {
    /// Runs `task` for request `unique`. The task must call [`Self::take`] before it answers.
    pub(crate) fn spawn(
        &self,
        runtime: &Handle,
        unique: u64,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Spawned {
        let mut table = self.0.lock();
        if table.closed {
            return Spawned::Closed;
        }
        if let Some(at) = table.early.iter().position(|early| *early == unique) {
            table.early.remove(at);
            return Spawned::Interrupted;
        }
        // Under the lock, so that the task cannot take what is not in the table yet.
        let handle = runtime.spawn(task).abort_handle();
        table.reads.insert(unique, handle);
        Spawned::Waiting
    }

    /// Takes a read out; `false` when somebody else did.
    pub(crate) fn take(&self, unique: u64) -> bool {
        self.0.lock().reads.remove(&unique).is_some()
    }

    /// Gives up the read `unique`; `false` when it does not wait here (yet). After `true` the caller answers it.
    pub(crate) fn interrupt(&self, unique: u64) -> bool {
        let mut table = self.0.lock();
        if let Some(task) = table.reads.remove(&unique) {
            task.abort();
            return true;
        }
        if table.early.len() >= EARLY {
            table.early.pop_front();
        }
        table.early.push_back(unique);
        false
    }

    /// Gives up all reads and takes no more.
    pub(crate) fn close(&self) {
        let mut table = self.0.lock();
        table.closed = true;
        for (_, task) in table.reads.drain() {
            task.abort();
        }
    }

    /// Returns how many reads wait.
    pub(crate) fn len(&self) -> usize {
        self.0.lock().reads.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_read_is_answered_once_whoever_comes_first() {
        let pending = Pending::default();
        let handle = Handle::current();
        assert_eq!(pending.spawn(&handle, 7, std::future::pending()), Spawned::Waiting);
        assert_eq!(pending.len(), 1);
        assert!(pending.interrupt(7));
        assert!(!pending.take(7) && pending.len() == 0);
        assert_eq!(pending.spawn(&handle, 8, std::future::pending()), Spawned::Waiting);
        assert!(pending.take(8));
        assert!(!pending.interrupt(8));
    }

    #[tokio::test]
    async fn an_interrupt_that_overtakes_its_request_is_kept() {
        let pending = Pending::default();
        let handle = Handle::current();
        assert!(!pending.interrupt(9));
        assert_eq!(pending.spawn(&handle, 9, std::future::pending()), Spawned::Interrupted);
        assert_eq!(pending.spawn(&handle, 9, std::future::pending()), Spawned::Waiting);
        for unique in 100..1000 {
            pending.interrupt(unique);
        }
        assert!(pending.0.lock().early.len() <= EARLY);
    }

    #[tokio::test]
    async fn closing_gives_up_all_and_takes_no_more() {
        let pending = Pending::default();
        let handle = Handle::current();
        let (gone, dropped) = tokio::sync::oneshot::channel::<()>();
        let task = async move {
            let _held = gone;
            std::future::pending::<()>().await;
        };
        assert_eq!(pending.spawn(&handle, 1, task), Spawned::Waiting);
        pending.close();
        assert!(dropped.await.is_err());
        assert_eq!(pending.spawn(&handle, 2, std::future::pending()), Spawned::Closed);
    }
}
