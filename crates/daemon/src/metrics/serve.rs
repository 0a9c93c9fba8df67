//! The endpoint: `GET /metrics` and nothing else.

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

/// Makes the text of a scrape.
pub type Render = Arc<dyn Fn() -> String + Send + Sync>;

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Serves `render` at `listen` until `stop`. Returns when it listens.
///
/// # Errors
/// When the address cannot be had.
pub async fn serve(listen: &Listen, render: Render, stop: CancellationToken) -> anyhow::Result<()> {
    let listener = match listen {
        Listen::Tcp(address) => Listener::Tcp(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("listen on metrics_address {address:?}"))?,
        ),
        Listen::Unix(path) => Listener::Unix(UnixListener::from_std(bind(path)?)?),
    };
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, render) => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(())
}

async fn accept(listener: Listener, render: Render) {
    let turns = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Stream::Tcp(stream)),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        };
        let render = Arc::clone(&render);
        match accepted {
            Ok(stream) => tokio::spawn(async move {
                match stream {
                    Stream::Tcp(stream) => talk(stream, render).await,
                    Stream::Unix(stream) => talk(stream, render).await,
                }
                drop(turn);
            }),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the metrics endpoint");
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

async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, render: Render) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let render = Arc::clone(&render);
        async move { Ok::<_, Infallible>(answer(&request, &render)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = tokio::time::timeout(2 * PATIENCE, connection).await.unwrap_or(Ok(())) {
        tracing::debug!(%error, "a connection to the metrics endpoint ended early");
    }
}

fn answer<B>(request: &Request<B>, render: &Render) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, render()),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "see /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let kind = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind);
    response
}
