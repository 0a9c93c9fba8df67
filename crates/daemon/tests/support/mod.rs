//! What the tests of the daemon share.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "not every test uses everything, and a test fails by panicking"
)]

pub(crate) mod image;
pub(crate) mod kubelet;
pub(crate) mod stage;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use soci_oci::{Digest, labels};
use soci_snapshotter::provider::{DirOwner, Lower};
use soci_snapshotter::{
    Ancestor, ImageFacts, LayerFacts, LayerProvider, LayerRequest, LazyError, MountRecord, ReleaseError,
    ResolveError, RestoreError, SnapshotDir, UnpackError, Usage,
};
use soci_snapshotter_grpc::proto::snapshots::snapshots_client::SnapshotsClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Waits until `holds`.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) type Client = SnapshotsClient<Channel>;

/// Connects to the daemon at `socket`.
pub(crate) async fn client(socket: &Path) -> Client {
    let socket = PathBuf::from(socket);
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap();
    SnapshotsClient::new(channel)
}

/// The labels of a Prepare that extracts a layer.
pub(crate) fn labels(target: &str) -> HashMap<String, String> {
    [
        (labels::TARGET, target.to_owned()),
        (labels::IMAGE_REF, "reg.example/a:1".to_owned()),
        (labels::MANIFEST_DIGEST, Digest::of(b"manifest").to_string()),
        (labels::LAYER_DIGEST, Digest::of(target.as_bytes()).to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// A provider whose every layer mounts, without mounting anything.
#[derive(Debug, Default)]
pub(crate) struct Script {
    mounted: Mutex<HashSet<u64>>,
}

impl Script {
    pub(crate) fn shared(self) -> Arc<dyn LayerProvider> {
        Arc::new(self)
    }
}

#[async_trait]
impl LayerProvider for Script {
    async fn facts(&self, _: &LayerRequest) -> Result<ImageFacts, ResolveError> {
        let layer = LayerFacts { size: Some(1), has_ztoc: true };
        Ok(ImageFacts { index: Digest::of(b"index"), layers: 1, layer })
    }

    async fn mount_lazy(
        &self,
        layer: &LayerRequest,
        _: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<MountRecord, LazyError> {
        self.mounted.lock().unwrap().insert(at.id());
        Ok(MountRecord {
            references: Vec::new(),
            layer: layer.layer,
            layer_size: 1,
            index: Digest::of(b"index"),
            ztoc: Digest::of(b"ztoc"),
            ztoc_size: 1,
            disable_xattrs: false,
            root: DirOwner { mode: 0o755, uid: 0, gid: 0 },
            implied: Vec::new(),
            prefetch: None,
        })
    }

    async fn unpack(&self, _: &LayerRequest, _: &[Ancestor], _: &SnapshotDir) -> Result<Usage, UnpackError> {
        Ok(Usage::default())
    }

    async fn share(&self, _: &LayerRequest, _: &SnapshotDir) {}

    async fn restore(&self, _: &MountRecord, at: &SnapshotDir) -> Result<(), RestoreError> {
        self.mounted.lock().unwrap().insert(at.id());
        Ok(())
    }

    fn lower(&self, at: &SnapshotDir) -> Lower {
        Lower { path: at.fs(), served: self.mounted.lock().unwrap().contains(&at.id()) }
    }

    async fn unmount(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        self.release(at).await
    }

    async fn release(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        self.mounted.lock().unwrap().remove(&at.id());
        Ok(())
    }
}
