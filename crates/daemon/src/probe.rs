//! Asks a daemon something that only a working one can answer.
//!
//! Each probe makes a connection of its own and a call that every containerd makes: it is answered only where the socket is
//! accepted on, the threads run, and the snapshots are not locked. It touches neither disk nor network.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::Endpoint;
use tonic::{Code, Request};

use crate::proto::snapshots::StatSnapshotRequest;
use crate::proto::snapshots::snapshots_client::SnapshotsClient;

/// A name that no snapshot has: containerd's begin with a namespace.
const NOBODY: &str = "soci-snapshotter-grpc probe";

/// A daemon that did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No connection.
    #[error("connect to {socket:?}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: tonic::transport::Error,
    },
    /// No answer in time.
    #[error("{socket:?} does not answer within {} ms", limit.as_millis())]
    Silent {
        /// The socket.
        socket: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// Somebody answers, but not as a snapshotter does.
    #[error("{socket:?} is not a snapshotter's: it answers {code}")]
    Stranger {
        /// The socket.
        socket: PathBuf,
        /// What it answers.
        code: Code,
    },
}

/// Returns once the snapshotter at `socket` has answered; takes at most `limit`.
///
/// # Errors
/// [`ProbeError`], naming the socket.
pub async fn probe(socket: &Path, limit: Duration) -> Result<(), ProbeError> {
    match tokio::time::timeout(limit, ask(socket)).await {
        Ok(answered) => answered,
        Err(_) => Err(ProbeError::Silent { socket: socket.to_owned(), limit }),
    }
}

async fn ask(socket: &Path) -> Result<(), ProbeError> {
    let path = socket.to_owned();
    let connect = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI only satisfies HTTP/2; the connector decides where the bytes go.
    let channel = Endpoint::from_static("http://soci").connect_with_connector(connect).await;
    let channel = channel.map_err(|source| ProbeError::Connect { socket: socket.to_owned(), source })?;
    let request = StatSnapshotRequest { snapshotter: String::new(), key: NOBODY.to_owned() };
    match SnapshotsClient::new(channel).stat(Request::new(request)).await {
        Err(status) if status.code() == Code::NotFound => Ok(()),
        Err(status) => Err(ProbeError::Stranger { socket: socket.to_owned(), code: status.code() }),
        Ok(_) => Err(ProbeError::Stranger { socket: socket.to_owned(), code: Code::Ok }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_and_a_silent_socket_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let limit = Duration::from_millis(300);
        assert!(matches!(probe(&path, Duration::from_secs(10)).await, Err(ProbeError::Connect { .. })));
        // A process that hangs still has its connections queued by the kernel.
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(probe(&path, limit).await, Err(ProbeError::Silent { .. })));
    }
}
