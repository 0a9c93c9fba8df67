//! One mount while it is served.
//!
//! Threads of the hub read its requests. What can be answered from memory or the local disk is answered there; a read
//! that has to wait becomes a task of the runtime, so no thread of the hub ever waits for the network, and a mount whose
//! registry hangs slows no other. Waiting reads are bounded per mount: those beyond the bound wait for their turn, on the
//! same clock.
//!
//! Dropping the session stops serving, and gives up waiting reads. It does not unmount.

use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use soci_layer::ReadChunks;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::adapter::{self, Answer, CacheTimes, Request};
use crate::errno::FsError;
use crate::fs::{LayerFs, ReadFuture};
use crate::hub::{FuseHub, Key};
use crate::init::{self, InitError, InitReply};
use crate::meter::Operation;
use crate::mount::FuseDevice;
use crate::pending::{Pending, Spawned};
use crate::wire;

/// How a mount is served.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// How long the kernel may keep what it is told.
    pub times: CacheTimes,
    /// Waiting reads that are worked on at once, of this mount; each holds up to 1 MiB.
    pub max_waiting: usize,
    /// How far the kernel reads ahead of a sequential reader, in KiB; `None` leaves the kernel's 128.
    pub read_ahead_kb: Option<u32>,
}

/// Measured (`examples/measure.rs`): reads that go over a task cost 0.90 CPU-s per GiB with the kernel's 128 KiB, and 0.62
/// from 512 KiB on; more gains nothing. A page fault in a mapped file reads as much around it, and the more that is, the
/// more often it needs a span that nobody asked for.
const READ_AHEAD_KB: u32 = 512;

impl Default for ServeOptions {
    fn default() -> Self {
        Self { times: CacheTimes::default(), max_waiting: 64, read_ahead_kb: Some(READ_AHEAD_KB) }
    }
}

/// A mount that is being served.
#[derive(Debug)]
pub struct Session {
    connection: Arc<Connection>,
    key: Key,
    hub: FuseHub,
    init: InitReply,
    at: PathBuf,
}

impl Session {
    /// Serves `fs` on `device` with the threads of `hub`.
    ///
    /// A new mount is greeted first. With `init`, the result of a greeting that an earlier process did, serving goes on
    /// where that one stopped: requests that it took and did not answer are sent again by kernels that can (Linux 6.9).
    ///
    /// # Errors
    /// [`InitError`]. The mount stays in place then: unmount it.
    pub fn serve(
        device: FuseDevice,
        init: Option<InitReply>,
        fs: Arc<LayerFs>,
        options: &ServeOptions,
        hub: &FuseHub,
    ) -> Result<Self, InitError> {
        let fresh = init.is_none();
        let init = match init {
            Some(init) => init,
            None => init::handshake(&device)?,
        };
        if let (true, Some(kb)) = (fresh, options.read_ahead_kb) {
            set_read_ahead(&device, kb);
        }
        let at = device.at().to_owned();
        let (ending, _) = watch::channel(Ending::No);
        let connection = Arc::new(Connection {
            device,
            fs,
            times: options.times,
            pending: Pending::default(),
            turns: Arc::new(Semaphore::new(options.max_waiting.max(1))),
            runtime: hub.runtime().clone(),
            ending,
        });
        let key = hub.add(&connection)?;
        if !fresh {
            init::ask_again(&connection.device, &init)?;
        }
        Ok(Self { connection, key, hub: hub.clone(), init, at })
    }

    /// Returns what was agreed with the kernel: keep it beside the descriptor for a process to come.
    pub fn init(&self) -> &InitReply {
        &self.init
    }

    /// Returns where it is mounted.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// Returns the file system that is served.
    pub fn fs(&self) -> &Arc<LayerFs> {
        &self.connection.fs
    }

    /// Returns how many reads wait for bytes.
    pub fn waiting(&self) -> usize {
        self.connection.pending.len()
    }

    /// Whether it is served no more.
    pub fn has_ended(&self) -> bool {
        *self.connection.ending.borrow() != Ending::No
    }

    /// Whether it is served no more though its mount is in place: whoever comes to that fails or waits. Those who wait get
    /// their error when this session is dropped.
    pub fn is_broken(&self) -> bool {
        self.connection.is_broken()
    }

    /// Returns when it is served no more: unmounted and used by nobody any more, aborted, or broken.
    pub async fn ended(&self) {
        let mut ending = self.connection.ending.subscribe();
        // The sender lives as long as `self`.
        let _ = ending.wait_for(|ending| *ending != Ending::No).await;
    }
}

impl AsFd for Session {
    /// The descriptor that another process could go on with.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.device.as_fd()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hub.remove(self.key, &self.connection);
        self.connection.pending.close();
    }
}

/// Lets the kernel read further ahead than its default. Sequential readers are then fewer and larger requests; without
/// it they are correct all the same, so trouble is only noted.
fn set_read_ahead(device: &FuseDevice, kb: u32) {
    let result = device
        .number()
        .map_err(std::io::Error::from)
        .and_then(|number| std::fs::write(format!("/sys/class/bdi/{number}/read_ahead_kb"), kb.to_string()));
    if let Err(error) = result {
        tracing::debug!(at = %device.at().display(), %error, "cannot set how far the kernel reads ahead");
    }
}

/// What the threads of the hub and the tasks of waiting reads share of one mount.
#[derive(Debug)]
pub(crate) struct Connection {
    device: FuseDevice,
    fs: Arc<LayerFs>,
    times: CacheTimes,
    pending: Pending,
    /// Turns to wait for bytes.
    turns: Arc<Semaphore>,
    runtime: Handle,
    ending: watch::Sender<Ending>,
}

/// Whether, and how, serving a mount ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    No,
    /// The mount is gone.
    Gone,
    /// The mount is in place.
    Broken,
}

/// What one look at the device gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// A request was taken.
    One,
    /// There is none.
    Idle,
    /// There will be none.
    Ended,
}

/// Buffers of one thread.
#[derive(Debug)]
pub(crate) struct Scratch {
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { input: vec![0; wire::READ_BUFFER], output: Vec::with_capacity(wire::READ_BUFFER) }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl Connection {
    /// Takes one request off the device and answers it, or sees to it that it is answered.
    pub(crate) fn serve_one(self: &Arc<Self>, scratch: &mut Scratch) -> Served {
        let len = match rustix::io::read(&self.device, &mut scratch.input[..]) {
            Ok(len) => len,
            Err(Errno::AGAIN) => return Served::Idle,
            // NOENT: the request was taken back while it was read.
            Err(Errno::INTR | Errno::NOENT) => return Served::One,
            Err(errno) => return self.end(errno),
        };
        let Some(request) = Request::parse(scratch.input.get(..len).unwrap_or_default()) else {
            return self.end(Errno::PROTO);
        };
        scratch.output.clear();
        let unique = request.header.unique;
        let output = &mut scratch.output;
        // A bug must cost one request and not the mount: without an answer its reader would hang for ever.
        let answer =
            catch_unwind(AssertUnwindSafe(|| adapter::handle(&self.fs, &self.times, &request, output)));
        match answer {
            Ok(answer) => self.answer(unique, answer, output),
            Err(_) => {
                tracing::error!(
                    layer = self.fs.layer(),
                    operation = request.header.opcode,
                    "bug: a request panicked"
                );
                self.log(wire::reply_error(&self.device, unique, Errno::IO));
            }
        }
        Served::One
    }

    fn answer(self: &Arc<Self>, unique: u64, answer: Answer, body: &[u8]) {
        match answer {
            Answer::None => {}
            Answer::Error(errno) => self.log(wire::reply_error(&self.device, unique, errno)),
            Answer::Body => self.log(wire::reply(&self.device, unique, &[body])),
            Answer::Chunks(chunks) => self.reply_read(unique, chunks),
            Answer::Wait(read, begun) => self.wait(unique, read, begun),
            Answer::Interrupt(target) => {
                if self.pending.interrupt(target) {
                    self.log(wire::reply_error(&self.device, target, FsError::Interrupted.errno()));
                }
            }
        }
    }

    fn reply_read(&self, unique: u64, chunks: ReadChunks) {
        self.log(wire::reply_chunks(&self.device, unique, chunks));
    }

    fn wait(self: &Arc<Self>, unique: u64, read: ReadFuture, begun: Instant) {
        let mut reply = Reply { connection: Arc::clone(self), unique };
        let turns = Arc::clone(&self.turns);
        let deadline = begun + self.fs.read_timeout();
        let task = async move {
            // Without a turn in time the read finds its own time over as well, and says so.
            let _turn = tokio::time::timeout_at(deadline.into(), turns.acquire()).await;
            let result = read.await;
            reply.send(result, begun);
        };
        match self.pending.spawn(&self.runtime, unique, task) {
            Spawned::Waiting | Spawned::Closed => {}
            Spawned::Interrupted => {
                self.log(wire::reply_error(&self.device, unique, FsError::Interrupted.errno()));
            }
        }
    }

    /// Ends serving because of `errno`, which is NODEV when the mount is gone or was aborted.
    pub(crate) fn end(&self, errno: Errno) -> Served {
        self.pending.close();
        let ending =
            if errno != Errno::NODEV || self.device.in_place() { Ending::Broken } else { Ending::Gone };
        // Several threads may come here.
        let first = self.ending.send_if_modified(|now| {
            let first = *now == Ending::No;
            if first {
                *now = ending;
            }
            first
        });
        if first && ending == Ending::Broken {
            tracing::error!(layer = self.fs.layer(), %errno, "cannot read requests: the layer is no longer served");
        }
        Served::Ended
    }

    /// Whether serving ended though the mount is in place.
    pub(crate) fn is_broken(&self) -> bool {
        *self.ending.borrow() == Ending::Broken
    }

    fn log(&self, written: Result<(), Errno>) {
        if let Err(errno) = written {
            tracing::warn!(layer = self.fs.layer(), %errno, "the kernel refused a reply");
        }
    }
}

/// The duty to answer a waiting read. Dropped without an answer, because the runtime stops or the task panicked, it
/// answers with an I/O error.
struct Reply {
    connection: Arc<Connection>,
    unique: u64,
}

impl Reply {
    fn send(&mut self, result: Result<ReadChunks, FsError>, begun: Instant) {
        let connection = &self.connection;
        let bytes = result.as_ref().map_or(0, |chunks| chunks.len() as u64);
        connection.fs.meter(Operation::Read, begun, bytes, result.is_err());
        if !connection.pending.take(self.unique) {
            return;
        }
        match result {
            Ok(chunks) => connection.reply_read(self.unique, chunks),
            Err(error) => connection.log(wire::reply_error(&connection.device, self.unique, error.errno())),
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.connection.pending.take(self.unique) {
            let connection = &self.connection;
            connection.log(wire::reply_error(&connection.device, self.unique, Errno::IO));
        }
    }
}
