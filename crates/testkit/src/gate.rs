//! A gate between containerd and a snapshotter. Every call passes as it is; of those that a pull consists of, one answer can be
//! held: the snapshotter has done what was asked then, and containerd does not know.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::Notify;

/// The calls of a pull. Others containerd makes whenever it likes.
const OF_A_PULL: [&str; 4] = ["Stat", "Prepare", "Mounts", "Commit"];

/// A gate. Dropping it closes it.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    _runtime: Runtime,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    released: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// How many calls are left until one is held.
    left: Option<usize>,
    /// The call whose answer is held.
    held: Option<String>,
}

impl Gate {
    /// Listens at `socket` and passes calls on to the one of the snapshotter.
    ///
    /// # Errors
    /// Where the socket cannot be bound.
    pub fn start(socket: &Path, snapshotter: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = {
            let _entered = runtime.enter();
            UnixListener::bind(socket)?
        };
        let shared = Arc::new(Shared::default());
        runtime.spawn(accept(listener, snapshotter.to_owned(), Arc::clone(&shared)));
        Ok(Self { shared, _runtime: runtime })
    }

    /// Holds the answer to a call of a pull, counted from 1 and from now on.
    pub fn hold(&self, number: usize) {
        *self.shared.state.lock() = State { left: Some(number), held: None };
    }

    /// Returns the name of the call whose answer is held.
    pub fn held(&self) -> Option<String> {
        self.shared.state.lock().held.clone()
    }

    /// Lets everything pass from now on, what is held too.
    pub fn open(&self) {
        *self.shared.state.lock() = State::default();
        self.shared.released.notify_waiters();
    }
}

impl Shared {
    /// Waits with an answer whose turn it is.
    async fn pass(&self, method: &str) {
        let released = {
            let mut state = self.state.lock();
            if !OF_A_PULL.contains(&method) {
                return;
            }
            state.left = state.left.and_then(|left| left.checked_sub(1));
            if state.left != Some(0) {
                return;
            }
            state.held = Some(method.to_owned());
            self.released.notified()
        };
        released.await;
    }
}

async fn accept(listener: UnixListener, snapshotter: PathBuf, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (snapshotter, shared) = (snapshotter.clone(), Arc::clone(&shared));
        tokio::spawn(async move {
            // Whoever goes away, containerd or the snapshotter, the other one sees it.
            if let Ok(onward) = connect(&snapshotter).await {
                let service = service_fn(|request| forward(onward.clone(), request, Arc::clone(&shared)));
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            }
        });
    }
}

async fn connect(snapshotter: &Path) -> io::Result<SendRequest<Incoming>> {
    let stream = TokioIo::new(UnixStream::connect(snapshotter).await?);
    let opened = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await;
    let (onward, connection) = opened.map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(onward)
}

async fn forward(
    mut onward: SendRequest<Incoming>,
    request: Request<Incoming>,
    shared: Arc<Shared>,
) -> Result<Response<Incoming>, hyper::Error> {
    let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
    let answer = onward.send_request(request).await?;
    shared.pass(&method).await;
    Ok(answer)
}
