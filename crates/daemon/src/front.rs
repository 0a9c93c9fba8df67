//! The thread that serves the daemon's socket.
//!
//! One thread reads and writes every connection of the socket, and the relay's connection to containerd. An image call that
//! passes through is five short tasks; between threads each of them would cost a wake-up, which on a small node is longer
//! than the work. Snapshot calls mount, write and wait for the disk: they run where the rest of the daemon runs
//! ([`Behind`]), so that none of them holds this thread up.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

/// A server on a thread of its own.
#[derive(Debug)]
pub(crate) struct Front<T> {
    ended: oneshot::Receiver<T>,
    cut: CancellationToken,
}

impl<T: Send + 'static> Front<T> {
    /// Runs what `serve` returns on a new thread, with a runtime that is this thread's alone.
    ///
    /// # Errors
    /// Where the system gives no thread, or no event queue.
    pub(crate) fn start<F>(serve: impl FnOnce() -> F + Send + 'static) -> io::Result<Self>
    where
        F: Future<Output = T>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (end, ended) = oneshot::channel();
        let cut = CancellationToken::new();
        let stopped = cut.clone();
        std::thread::Builder::new().name("soci-front".into()).spawn(move || {
            let served = runtime.block_on(async { stopped.run_until_cancelled(serve()).await });
            if let Some(served) = served {
                // Nobody waits for it when the daemon is gone.
                let _ = end.send(served);
            }
            runtime.shutdown_background();
        })?;
        Ok(Self { ended, cut })
    }

    /// Waits for the end of the server. `None` when it was cut, or its thread died.
    pub(crate) async fn ended(&mut self) -> Option<T> {
        (&mut self.ended).await.ok()
    }

    /// Ends the server now, with every call that is under way.
    pub(crate) fn cut(&self) {
        self.cut.cancel();
    }
}

/// A service whose calls run on another runtime than the one that reads and writes its connections. A caller that goes away
/// cancels its call.
#[derive(Debug, Clone)]
pub(crate) struct Behind<S> {
    service: S,
    runtime: Handle,
}

impl<S> Behind<S> {
    /// Returns `service`, to run on the runtime that this is called on.
    pub(crate) fn here(service: S) -> Self {
        Self { service, runtime: Handle::current() }
    }
}

impl<S: NamedService> NamedService for Behind<S> {
    const NAME: &'static str = S::NAME;
}

/// The answer of a call, on its way.
pub(crate) type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl<S> Service<Request<Body>> for Behind<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        let call = AbortOnDropHandle::new(self.runtime.spawn(self.service.call(request)));
        Box::pin(async move {
            match call.await {
                Ok(answer) => answer,
                Err(error) if error.is_panic() => {
                    Ok(Status::internal("the call failed; see the log").into_http())
                }
                Err(_) => Ok(Status::unavailable("the daemon is stopping").into_http()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_front_says_how_its_server_ended() {
        let mut front = Front::start(|| async { 7 }).unwrap();
        assert_eq!(front.ended().await, Some(7));
    }

    #[tokio::test]
    async fn a_front_that_is_cut_ends_though_its_server_does_not() {
        let mut front = Front::start(std::future::pending::<()>).unwrap();
        front.cut();
        assert_eq!(front.ended().await, None);
    }

    #[tokio::test]
    async fn a_call_runs_on_the_runtime_behind_and_ends_with_its_caller() {
        let (started, mut starts) = tokio::sync::mpsc::unbounded_channel();
        let service = tower::service_fn(move |_: Request<Body>| {
            let started = started.clone();
            async move {
                started.send(std::thread::current().id()).unwrap();
                std::future::pending::<()>().await;
                Ok(Response::new(Body::empty()))
            }
        });
        let mut behind = Behind::here(service);
        let own = std::thread::current().id();
        let mut front = Front::start(move || async move {
            let call = behind.call(Request::new(Body::empty()));
            // The caller goes away once the call is under way; the service goes with it.
            let thread = tokio::select! {
                _ = call => panic!("it does not end"),
                thread = starts.recv() => thread.unwrap(),
            };
            drop(behind);
            (thread, starts.recv().await)
        })
        .unwrap();
        let (thread, later) = front.ended().await.unwrap();
        assert_eq!(thread, own, "this test's runtime has one thread");
        assert_eq!(later, None, "the call was dropped");
    }

    #[tokio::test]
    async fn a_call_that_panics_is_an_internal_error_for_its_caller_alone() {
        let service = tower::service_fn(|_: Request<Body>| async { panic!("planted") });
        let mut behind = Behind::here(service);
        let answer = behind.call(Request::new(Body::empty())).await.unwrap();
        assert_eq!(answer.headers()["grpc-status"], "13");
    }
}
