//! Questions to a running daemon, by its control socket: one JSON document each way over HTTP/1.1.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// How long the daemon may take: longer than its own limit.
const LIMIT: Duration = Duration::from_secs(90);
/// The largest answer, in bytes.
const MAX_ANSWER: usize = 4 << 20;

/// Asks the daemon at `socket`.
///
/// # Errors
/// When nobody answers there, when we may not ask, and what the daemon says instead of an answer.
pub(crate) async fn ask<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    question: &impl Serialize,
) -> anyhow::Result<T> {
    let exchange = tokio::time::timeout(LIMIT, exchange(socket, path, serde_json::to_vec(question)?)).await;
    let (status, body) = exchange
        .map_err(|_| anyhow!("no answer within {} s", LIMIT.as_secs()))
        .flatten()
        .with_context(|| format!("asking the daemon at {}", socket.display()))?;
    if status == StatusCode::OK {
        return serde_json::from_slice(&body)
            .context("the daemon's answer is not understood; is it another version?");
    }
    #[derive(serde::Deserialize)]
    struct Failure {
        error: String,
    }
    match serde_json::from_slice::<Failure>(&body) {
        Ok(failure) => bail!("the daemon says: {}", failure.error),
        Err(_) => bail!("the daemon at {} answers with status {status}", socket.display()),
    }
}

async fn exchange(socket: &Path, path: &str, question: Vec<u8>) -> anyhow::Result<(StatusCode, Bytes)> {
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            anyhow!("nobody listens there: start soci-snapshotter-grpc, or name its socket with --control")
        }
        io::ErrorKind::PermissionDenied => anyhow!("permission denied: run this command as root"),
        _ => error.into(),
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::post(path).body(Full::new(Bytes::from(question)))?;
    request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let answer = async {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow!("the answer is cut off or too large: {error}"))?;
        anyhow::Ok((status, body.to_bytes()))
    };
    // The connection is driven here, so that nothing is left behind when the question is given up.
    let drive = async {
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = answer => answer,
        () = drive => bail!("the connection ended"),
    }
}
