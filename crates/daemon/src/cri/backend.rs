//! The connection to containerd's image service: one HTTP/2 connection, made when first needed and whenever it is gone.
//!
//! The daemon usually starts before containerd, so the backend may be absent for a while, restart, or hang. A call waits
//! for it as long as its caller does, at most [`MAX_WAIT`]; connecting goes on with back-off for as long as somebody
//! waits. Nothing here is shared with snapshot calls.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// A body on its way, whatever it was made from.
pub(super) type RelayBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// The longest a call waits for the backend to appear.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// Waits between attempts to connect.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));
/// What one call may have on its way whose caller does not read.
const STREAM_WINDOW: u32 = 2 << 20;
/// All that HTTP/2 allows, so that it takes a thousand calls whose callers do not read until another one waits for them.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// What is left of a caller's deadline for the call itself after waiting for the backend, where it is that long.
const RESERVE: Duration = Duration::from_secs(1);

/// containerd's image service.
#[derive(Debug)]
pub(crate) struct Backend {
    path: PathBuf,
    connection: Mutex<Option<SendRequest<RelayBody>>>,
}

impl Backend {
    /// Returns a backend at a socket path. Connects when the first call comes.
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), connection: Mutex::new(None) }
    }

    /// Returns where the backend is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a connection that was usable a moment ago, or `None` when there was none within `limit`.
    pub(super) async fn ready(&self, limit: Option<Duration>) -> Option<SendRequest<RelayBody>> {
        let limit = limit.map_or(MAX_WAIT, |limit| (limit - RESERVE.min(limit / 2)).min(MAX_WAIT));
        let deadline = Instant::now() + limit;
        tokio::time::timeout_at(deadline, self.connect_until_it_works()).await.ok()
    }

    async fn connect_until_it_works(&self) -> SendRequest<RelayBody> {
        let mut wait = BACK_OFF.0;
        loop {
            match self.usable().await {
                Ok(connection) => return connection,
                Err(error) => {
                    tracing::debug!(path = %self.path.display(), %error, "image service is not reachable yet");
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(BACK_OFF.1);
        }
    }

    /// Returns the present connection, or a new one in its place. The lock is held while connecting on purpose: those
    /// who wait for it want the same connection, and each of them has a deadline around it.
    async fn usable(&self) -> Result<SendRequest<RelayBody>, Box<dyn std::error::Error + Send + Sync>> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_mut()
            && !connection.is_closed()
            && connection.ready().await.is_ok()
        {
            return Ok(connection.clone());
        }
        *slot = None;
        let stream = UnixStream::connect(&self.path).await?;
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(1 << 20)
            .max_header_list_size(2 << 20)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the image service ended");
            }
        });
        *slot = Some(sender.clone());
        Ok(sender)
    }
}
