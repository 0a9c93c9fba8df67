//! The control socket: what the command line asks a running daemon.
//!
//! `control.sock` beside the daemon's own socket, mode 0600, for root and the daemon's user. HTTP/1.1, one JSON document
//! each way, one request per connection; requests are small and everything has a deadline, so a client that hangs, floods or
//! goes away costs a place of [`CONNECTIONS`] for a while and nothing else. There is no way to get a secret out of it.
//!
//! | request | answer |
//! | --- | --- |
//! | `POST /v1/auth/explain` with [`ExplainRequest`] | [`Report`] |

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use soci_auth::explain::{ExplainRequest, Report};
use soci_oci::{FetchClass, FetchContext, ImageRef};
use soci_registry::Registry;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::keychains::{self, Off};
use crate::peers;
use crate::serve::{ListenError, bind};

/// The socket's name.
pub const NAME: &str = "control.sock";
/// Connections at once.
const CONNECTIONS: usize = 16;
/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer may take: longer than a helper, than a registry that has to be asked twice.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a registry may take in it.
const CHECK: Duration = Duration::from_secs(30);
/// The largest request, in bytes.
const MAX_REQUEST: usize = 16 << 10;

/// What questions are answered from.
#[derive(Debug)]
pub struct Knowledge {
    /// The client of all registries, with the options in it.
    pub registry: Registry,
    /// Options that the configuration has off.
    pub off: Vec<Off>,
}

/// An answer that is no success.
#[derive(Debug, Serialize)]
struct Failure {
    error: String,
    #[serde(skip)]
    status: StatusCode,
}

/// Returns where the control socket of a daemon is that is reached at `socket`.
pub fn beside(socket: &Path) -> PathBuf {
    socket.with_file_name(NAME)
}

/// Answers at `path` until `stop`. Returns when it listens.
///
/// # Errors
/// [`ListenError`] when the socket cannot be had.
pub fn serve(path: &Path, knowledge: Knowledge, stop: CancellationToken) -> Result<(), ListenError> {
    let io = |source| ListenError::Io { path: path.to_owned(), source };
    let listener = UnixListener::from_std(bind(path)?).map_err(io)?;
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, Arc::new(knowledge)) => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(())
}

async fn accept(listener: UnixListener, knowledge: Arc<Knowledge>) {
    let turns = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let knowledge = Arc::clone(&knowledge);
                tokio::spawn(async move {
                    talk(stream, knowledge).await;
                    drop(turn);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the control socket");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn talk(stream: UnixStream, knowledge: Arc<Knowledge>) {
    let trusted = peers::is_trusted(stream.peer_cred().ok().map(|peer| peer.uid()));
    let service = service_fn(move |request: Request<Incoming>| {
        let knowledge = Arc::clone(&knowledge);
        async move {
            let answer = match trusted {
                true => timeout(LIMIT, answer(request, &knowledge)).await.unwrap_or_else(|_| {
                    let error = format!("no answer within {} s", LIMIT.as_secs());
                    Err(Failure { error, status: StatusCode::GATEWAY_TIMEOUT })
                }),
                false => Err(Failure { error: peers::REFUSAL.to_owned(), status: StatusCode::FORBIDDEN }),
            };
            Ok::<_, Infallible>(match answer {
                Ok(report) => respond(StatusCode::OK, &report),
                Err(failure) => respond(failure.status, &failure),
            })
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = timeout(LIMIT + 2 * PATIENCE, connection).await.unwrap_or(Ok(())) {
        tracing::debug!(%error, "a connection to the control socket ended early");
    }
}

async fn answer(request: Request<Incoming>, knowledge: &Knowledge) -> Result<Report, Failure> {
    let failure = |status, error: String| Failure { error, status };
    match (request.method(), request.uri().path()) {
        (&Method::POST, "/v1/auth/explain") => {}
        (_, "/v1/auth/explain") => {
            return Err(failure(StatusCode::METHOD_NOT_ALLOWED, "only POST".to_owned()));
        }
        (_, path) => return Err(failure(StatusCode::NOT_FOUND, format!("no such request: {path}"))),
    }
    let body = timeout(PATIENCE, Limited::new(request.into_body(), MAX_REQUEST).collect()).await;
    let body = body
        .map_err(|_| failure(StatusCode::REQUEST_TIMEOUT, "the request did not arrive in time".to_owned()))?
        .map_err(|_| {
            let error = format!("the request is cut off or larger than {MAX_REQUEST} bytes");
            failure(StatusCode::BAD_REQUEST, error)
        })?;
    let asked: ExplainRequest = serde_json::from_slice(&body.to_bytes()).map_err(|error| {
        failure(StatusCode::BAD_REQUEST, format!("the request is not understood: {error}"))
    })?;
    let image: ImageRef = asked
        .image
        .parse()
        .map_err(|error| failure(StatusCode::BAD_REQUEST, format!("image {:?}: {error}", asked.image)))?;
    let repository = knowledge.registry.repository(&image);
    let check = match asked.check {
        true => {
            let deadline = Instant::now() + CHECK;
            Some(repository.probe(&FetchContext::new(deadline, FetchClass::OnDemand)).await)
        }
        false => None,
    };
    let hosts = repository.explain().await;
    let mut hosts = hosts.map_err(|error| failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    hosts.iter_mut().for_each(|host| keychains::show_off(host, &knowledge.off));
    Ok(Report { image: image.to_string(), hosts, check })
}

fn respond(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let (status, body) = match serde_json::to_vec(body) {
        Ok(body) => (status, body),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, b"{}".to_vec()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests;
