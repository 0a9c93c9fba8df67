//! containerd's content, image and lease services over its socket.
//!
//! A [`Containerd`] costs nothing until the first call: it connects then, and again after containerd was restarted.
//! Every call carries the namespace, and the lease if there is one, and ends within a deadline.

mod content;
mod images;
mod leases;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use self::content::Content;
pub use self::images::{Image, Images};
pub use self::leases::Lease;
use crate::{ContentStore, StoreError};

/// How long a call may take, unless [`Containerd::with_timeout`] says otherwise. Streams may take this long per message.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Flow-control window of a stream: a layer is read at the speed of memory, not of round trips.
const WINDOW: u32 = 4 << 20;
/// The largest message accepted; containerd sends content in pieces of 1 MiB at most, and limits messages to this.
const MAX_MESSAGE: usize = 16 << 20;

/// A containerd, seen through one namespace.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    address: Arc<Path>,
    namespace: Arc<str>,
    lease: Option<Arc<str>>,
    timeout: Duration,
}

impl Containerd {
    /// Returns the containerd whose socket is `address`, without connecting yet. Call it inside a Tokio runtime.
    ///
    /// A `unix://` in front of the path is ignored.
    pub fn connect(address: &Path, namespace: &str) -> Self {
        let path = address.to_str().and_then(|text| text.strip_prefix("unix://")).map_or(address, Path::new);
        let path: Arc<Path> = path.into();
        let socket = path.to_path_buf();
        // The URI only satisfies HTTP/2; the connector decides where the bytes go.
        let channel = Endpoint::from_static("http://containerd")
            .connect_timeout(CONNECT_TIMEOUT)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(2 * WINDOW)
            // Each "not found" names another digest: as entries of a table they would be kept for nothing.
            .http2_header_table_size(0)
            .connect_with_connector_lazy(tower::service_fn(move |_| connect(socket.clone())));
        Self { channel, address: path, namespace: namespace.into(), lease: None, timeout: CALL_TIMEOUT }
    }

    /// Returns the same containerd seen through `namespace`, on the same connection.
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self { namespace: namespace.into(), lease: None, ..self.clone() }
    }

    /// Returns the same containerd; what is written through it is kept by `lease` as long as that lives.
    pub fn with_lease(&self, lease: &Lease) -> Self {
        Self { lease: Some(lease.id().into()), ..self.clone() }
    }

    /// Returns the same containerd with another limit for each call, and for each message of a stream.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    /// Returns the namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns its content service.
    pub fn content(&self) -> Arc<dyn ContentStore> {
        Arc::new(Content::new(self.clone()))
    }

    /// Returns its image service.
    pub fn images(&self) -> Images {
        Images::new(self.clone())
    }

    /// Takes a lease: what is written under it (see [`with_lease`](Self::with_lease)) is safe from the garbage collector
    /// until the lease ends, by [`Lease::end`] or by being dropped.
    ///
    /// # Errors
    /// When containerd does not grant it.
    pub async fn lease(&self) -> Result<Lease, StoreError> {
        leases::create(self).await
    }

    /// Makes a request of `message` with namespace and lease in its headers.
    fn request<T>(&self, message: T) -> Result<tonic::Request<T>, StoreError> {
        let mut request = tonic::Request::new(message);
        let namespace = MetadataValue::try_from(&*self.namespace)
            .map_err(|_| StoreError::Namespace(self.namespace.chars().take(80).collect()))?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        if let Some(Ok(lease)) = self.lease.as_deref().map(MetadataValue::try_from) {
            request.metadata_mut().insert("containerd-lease", lease);
        }
        Ok(request)
    }

    /// Waits for `call` within the deadline of a call and makes its failure readable.
    async fn within<T>(
        &self,
        action: &'static str,
        what: &str,
        call: impl Future<Output = Result<T, tonic::Status>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(status)) => Err(self.failed(action, what, &status)),
            Err(_) => Err(StoreError::Deadline { action, what: what.to_owned(), limit: self.timeout }),
        }
    }

    fn failed(&self, action: &'static str, what: &str, status: &tonic::Status) -> StoreError {
        let mut reason = None;
        let mut source = std::error::Error::source(status);
        while let Some(error) = source {
            if let Some(error) = error.downcast_ref::<std::io::Error>() {
                reason = Some(error.to_string());
            }
            source = error.source();
        }
        match (reason, status.code()) {
            (Some(reason), _) => StoreError::Unreachable { address: self.address.to_path_buf(), reason },
            (None, tonic::Code::NotFound) => StoreError::NotFound(what.to_owned()),
            (None, tonic::Code::AlreadyExists) => StoreError::Exists(what.to_owned()),
            (None, code) => StoreError::Containerd {
                action,
                what: what.to_owned(),
                code,
                message: status.message().chars().take(400).collect(),
            },
        }
    }
}

async fn connect(path: PathBuf) -> std::io::Result<TokioIo<tokio::net::UnixStream>> {
    tokio::net::UnixStream::connect(path).await.map(TokioIo::new)
}

/// Converts a protobuf time; one before 1970 or otherwise senseless is `None`.
fn system_time(at: Option<prost_types::Timestamp>) -> Option<std::time::SystemTime> {
    let at = at?;
    let since = Duration::new(u64::try_from(at.seconds).ok()?, u32::try_from(at.nanos).ok()?);
    std::time::SystemTime::UNIX_EPOCH.checked_add(since)
}

/// Returns the field mask that changes `labels` and nothing else; containerd merges them one by one.
fn label_mask(labels: &[(String, String)]) -> prost_types::FieldMask {
    prost_types::FieldMask { paths: labels.iter().map(|(key, _)| format!("labels.{key}")).collect() }
}

#[cfg(test)]
mod tests;
