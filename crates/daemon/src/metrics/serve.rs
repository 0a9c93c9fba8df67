//! An endpoint that shows one page: `GET /metrics`, or the state for debugging.

use std::convert::Infallible;
use std::net::SocketAddr;
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
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::config::address::{Family, TcpAddress};
use crate::config::checked::Listen;
use crate::serve;

/// Connections at once: a scraper has one.
const CONNECTIONS: usize = 16;
/// How long the start waits for the address to be had; a name may have to be looked up.
const AT_START: Duration = Duration::from_millis(500);
/// The shortest and the longest pause before it is tried again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Connections that wait to be accepted.
const BACKLOG: u32 = 128;
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

/// Serves `page` at `listen` until `stop`. Returns when it listens, or soon after it cannot: at boot an address may come
/// later, and a port may be somebody else's for a while. That is warned about once, naming the line of the configuration,
/// `place`, and tried again for as long as it takes.
pub async fn serve(listen: Listen, page: Page, place: &str, stop: CancellationToken) {
    let first = tokio::time::timeout(AT_START, bind(&listen)).await;
    let first = first.unwrap_or_else(|_| Err(anyhow::anyhow!("its name is not resolved yet")));
    if let Err(error) = &first {
        tracing::warn!(
            address = %listen,
            error = format!("{error:#}"),
            place,
            "{} is not served: cannot listen on {listen} ({place}); it is tried again",
            page.path
        );
    }
    tokio::spawn(async move {
        let served = async {
            let listener = match first {
                Ok(listener) => listener,
                Err(_) => bind_later(&listen, page.path).await,
            };
            accept(listener, page).await;
        };
        tokio::select! {
            () = served => {}
            () = stop.cancelled() => {}
        }
    });
}

async fn bind_later(listen: &Listen, path: &str) -> Listener {
    let (mut pause, longest) = AGAIN;
    loop {
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(longest);
        match bind(listen).await {
            Ok(listener) => {
                tracing::info!(address = %listen, "{path} is served now");
                return listener;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::debug!(address = %listen, error, "{path} is still not served");
            }
        }
    }
}

async fn bind(listen: &Listen) -> anyhow::Result<Listener> {
    Ok(match listen {
        Listen::Tcp(address) => Listener::Tcp(bind_tcp(address).await?),
        Listen::Unix(path) => Listener::Unix(UnixListener::from_std(serve::bind(path)?)?),
    })
}

async fn bind_tcp(address: &TcpAddress) -> anyhow::Result<TcpListener> {
    let TcpAddress { host, port, family } = address;
    let found: Vec<SocketAddr> = match host {
        None => address.everywhere(),
        Some(host) => tokio::net::lookup_host((host.as_str(), *port))
            .await
            .with_context(|| format!("look {host:?} up"))?
            .filter(|found| family.holds(found))
            .collect(),
    };
    let mut failed = anyhow::anyhow!("it has no address of the network that metrics_network names");
    for found in found {
        match listen_on(found, *family) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = anyhow::Error::new(error).context(found),
        }
    }
    Err(failed)
}

fn listen_on(address: SocketAddr, family: Family) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => {
            let socket = TcpSocket::new_v6()?;
            // Whatever the machine's default: all addresses are those of both kinds, unless one is asked for.
            rustix::net::sockopt::set_ipv6_v6only(&socket, family == Family::V6)?;
            socket
        }
    };
    // Connections of an earlier process that are not quite over do not keep its port.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
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
