//! An endpoint that shows one page: `GET /metrics`, or the state for debugging.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::config::checked::Listen;
use crate::serve::bind;

/// Connections at once: a scraper has one.
const CONNECTIONS: usize = 16;
/// How long a connection may take for a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an endpoint shows.
#[derive(Clone)]
pub struct Page {
    /// Where, e.g. `/metrics`.
    pub path: &'static str,
    /// Its content type.
    pub kind: &'static str,
    /// Makes its text. Called on a thread that may block.
    pub render: Arc<dyn Fn() -> String + Send + Sync>,
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Page").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The content type of metrics.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Serves `page` at `listen` until `stop`. Returns when it listens.
///
/// # Errors
/// When the address cannot be had.
pub async fn serve(listen: &Listen, page: Page, stop: CancellationToken) -> anyhow::Result<()> {
    let listener = match listen {
        Listen::Tcp(address) => Listener::Tcp(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("listen on {address:?} for {}", page.path))?,
        ),
        Listen::Unix(path) => Listener::Unix(UnixListener::from_std(bind(path)?)?),
    };
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, page) => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(())
}

async fn accept(listener: Listener, page: Page) {
    let turns = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Stream::Tcp(stream)),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        };
        let page = page.clone();
        match accepted {
            Ok(stream) => tokio::spawn(async move {
                match stream {
                    Stream::Tcp(stream) => talk(stream, page).await,
                    Stream::Unix(stream) => talk(stream, page).await,
                }
                drop(turn);
            }),
            Err(error) => {
                tracing::warn!(%error, path = page.path, "cannot accept a connection to an endpoint");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, page: Page) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let page = page.clone();
        async move {
            // A page may take a moment: it looks at every mount.
            let answered = tokio::task::spawn_blocking(move || answer(&request, &page)).await;
            Ok::<_, Infallible>(answered.unwrap_or_else(|_| {
                let mut response = Response::new(Full::new(Bytes::from_static(b"the page cannot be made\n")));
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                response
            }))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = tokio::time::timeout(2 * PATIENCE, connection).await.unwrap_or(Ok(())) {
        tracing::debug!(%error, "a connection to an endpoint ended early");
    }
}

fn answer<B>(request: &Request<B>, page: &Page) -> Response<Full<Bytes>> {
    let (status, kind, body) = if request.uri().path() != page.path {
        (StatusCode::NOT_FOUND, TEXT, format!("see {}\n", page.path))
    } else if request.method() != Method::GET {
        (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".to_owned())
    } else {
        (StatusCode::OK, page.kind, (page.render)())
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
