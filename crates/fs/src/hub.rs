//! A few threads that serve all mounts.
//!
//! A node has hundreds of mounts and hardly any of them is busy, so a thread for each would be waste. All devices are in
//! one epoll set, edge triggered: every request wakes one thread, and several requests of one mount are served by several
//! threads at once. A thread stays with a mount until it has no more requests, but not for longer than its share.
//!
//! Lock order: the table of connections is locked for a moment only and never while a request is served.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Mutex, RwLock};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::session::{Connection, Scratch, Served};

/// Requests that a thread serves of one mount before others have their turn.
const SHARE: usize = 64;
/// The event that tells threads to stop.
const STOP: u64 = 0;
/// Serving goes no deeper than a few frames; read buffers are on the heap.
const STACK: usize = 256 << 10;

/// A connection's number in the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(u64);

/// The threads that serve mounts. Clones are the same hub; its threads end with the last one.
#[derive(Debug, Clone)]
pub struct FuseHub {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    runtime: Handle,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    epoll: OwnedFd,
    stop: OwnedFd,
    stopping: AtomicBool,
    next: AtomicU64,
    connections: RwLock<BTreeMap<u64, Arc<Connection>>>,
    /// Told when a session broke.
    broken: Notify,
}

impl FuseHub {
    /// Starts `threads` threads, one at least. Reads that wait are tasks of `runtime`.
    ///
    /// # Errors
    /// When descriptors or threads cannot be had.
    pub fn new(runtime: Handle, threads: usize) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &stop, EventData::new_u64(STOP), EventFlags::IN)?;
        let shared = Arc::new(Shared {
            epoll,
            stop,
            stopping: AtomicBool::new(false),
            next: AtomicU64::new(STOP + 1),
            connections: RwLock::new(BTreeMap::new()),
            broken: Notify::new(),
        });
        let hub = Self { inner: Arc::new(Inner { shared, runtime, threads: Mutex::new(Vec::new()) }) };
        for number in 0..threads.max(1) {
            let shared = Arc::clone(&hub.inner.shared);
            let builder = std::thread::Builder::new().name(format!("fuse-{number}")).stack_size(STACK);
            hub.inner.threads.lock().push(builder.spawn(move || run(&shared))?);
        }
        Ok(hub)
    }

    /// Returns how many threads suit this machine: one for each core, two at least and eight at most.
    pub fn suitable_threads() -> usize {
        std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 8))
    }

    /// Returns how many mounts are served.
    pub fn mounts(&self) -> usize {
        self.inner.shared.connections.read().len()
    }

    /// Returns when a session [broke](crate::Session::is_broken) since it was last asked. For one who asks; cancel-safe.
    pub async fn broken(&self) {
        self.inner.shared.broken.notified().await;
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.inner.runtime
    }

    pub(crate) fn add(&self, connection: &Arc<Connection>) -> Result<Key, Errno> {
        let shared = &self.inner.shared;
        let key = shared.next.fetch_add(1, Ordering::Relaxed);
        // First the table, then the set: an event finds its connection.
        shared.connections.write().insert(key, Arc::clone(connection));
        let added =
            epoll::add(&shared.epoll, connection, EventData::new_u64(key), EventFlags::IN | EventFlags::ET);
        if let Err(errno) = added {
            shared.connections.write().remove(&key);
            return Err(errno);
        }
        Ok(Key(key))
    }

    pub(crate) fn remove(&self, key: Key, connection: &Connection) {
        self.inner.shared.remove(key.0, connection);
    }
}

impl Shared {
    fn remove(&self, key: u64, connection: &Connection) {
        if self.connections.write().remove(&key).is_some()
            && let Err(errno) = epoll::delete(&self.epoll, connection)
        {
            tracing::debug!(%errno, "cannot take a FUSE device out of the set: it leaves when it is closed");
        }
    }

    /// Serves the mount behind an event until it is idle or others have their turn.
    fn serve(&self, key: u64, scratch: &mut Scratch) {
        let Some(connection) = self.connections.read().get(&key).cloned() else { return };
        for _ in 0..SHARE {
            match connection.serve_one(scratch) {
                Served::One => {}
                Served::Idle => return,
                Served::Ended => return self.ended(key, &connection),
            }
        }
        // Requests may be left whose edge is used up: setting the event anew raises it again, behind the others.
        let again =
            epoll::modify(&self.epoll, &connection, EventData::new_u64(key), EventFlags::IN | EventFlags::ET);
        if let Err(errno) = again
            && errno != Errno::NOENT
        {
            connection.end(errno);
            self.ended(key, &connection);
        }
    }

    fn ended(&self, key: u64, connection: &Connection) {
        self.remove(key, connection);
        if connection.is_broken() {
            self.broken.notify_one();
        }
    }
}

fn run(shared: &Shared) {
    let mut scratch = Scratch::new();
    // One event at a time, so that a mount whose turn takes long holds no other back.
    let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(STOP) }];
    while !shared.stopping.load(Ordering::Acquire) {
        match epoll::wait(&shared.epoll, &mut events[..], None) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => match events[0].data.u64() {
                STOP => {}
                key => shared.serve(key, &mut scratch),
            },
            Err(errno) => {
                tracing::error!(%errno, "a FUSE thread cannot wait for requests and ends");
                return;
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(errno) = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes()) {
            // The threads then end with their next request.
            tracing::debug!(%errno, "cannot wake the FUSE threads");
            return;
        }
        for thread in self.threads.lock().drain(..) {
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("bug: a FUSE thread panicked");
            }
        }
    }
}
