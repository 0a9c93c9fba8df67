//! A layer's prefetch list: what is fetched before anything else that is done in the background for it, by this process and
//! by later ones.
//!
//! The artifact is not waited for by the mount. The record of the snapshot names it, and when it is here its bytes are kept
//! beside the record, unsynced: they are compared with the digest when they are read. What is not there, because a process
//! ended before it came or the disk lost it, is fetched again for as long as the layer is mounted and its registry may have it.
//! What of the list is cached is known from the cache, so a restart goes on where the last process was.

use std::io;
use std::path::PathBuf;
use std::sync::Weak;
use std::time::{Duration, Instant};

use bytes::Bytes;
use soci_index::{ArtifactKind, fetch_artifact};
use soci_oci::{Descriptor, Digest, FetchClass, FetchContext, FetchErrorKind, media_type, with_causes};
use soci_registry::Repository;
use soci_snapshotter::SnapshotDir;
use soci_snapshotter::provider::ArtifactRef;
use tokio::sync::watch;

use super::artifacts::Coming;
use super::content::LocalContent;
use super::mounted::Mounted;

/// Name of the artifact in the directory of its snapshot.
const FILE: &str = "prefetch";
/// How long background work waits for an artifact that is on its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one attempt to fetch it may take.
const ATTEMPT: Duration = Duration::from_secs(30);
/// The rest after the first attempt that failed; each is twice as long as the one before.
const FIRST_REST: Duration = Duration::from_secs(1);
/// The longest rest.
const LONGEST_REST: Duration = Duration::from_secs(300);

/// The list of one mounted layer.
#[derive(Debug)]
pub(super) struct List {
    artifact: ArtifactRef,
    layer: Digest,
    /// Where a pull that is under way has it come out.
    coming: Option<watch::Receiver<Option<Bytes>>>,
    repository: Repository,
    content: LocalContent,
    file: PathBuf,
}

impl List {
    /// Returns the list of a layer that is being pulled.
    pub(super) fn coming(
        coming: Coming,
        layer: Digest,
        repository: Repository,
        content: LocalContent,
        at: &SnapshotDir,
    ) -> Self {
        let list = Self::recorded(coming.artifact, layer, repository, content, at);
        Self { coming: Some(coming.bytes), ..list }
    }

    /// Returns the list of a layer that an earlier process mounted.
    pub(super) fn recorded(
        artifact: ArtifactRef,
        layer: Digest,
        repository: Repository,
        content: LocalContent,
        at: &SnapshotDir,
    ) -> Self {
        Self { artifact, layer, coming: None, repository, content, file: at.path().join(FILE) }
    }

    /// Has the layer `mounted` fetched: first what the list names and then, with `background`, the rest, which does not wait
    /// for long. Cancel-safe.
    pub(super) async fn fetch(self, mounted: Weak<Mounted>, background: bool) {
        let mut bytes = std::pin::pin!(self.bytes());
        let early = tokio::time::timeout(PATIENCE, &mut bytes).await;
        let begin = |list: Option<&Bytes>, background: bool| {
            let Some(mounted) = mounted.upgrade() else { return };
            if let Some(list) = list {
                mounted.prefetch(list);
            }
            if background {
                mounted.complete();
            }
        };
        match early {
            Ok(list) => begin(list.as_ref(), background),
            Err(_) => {
                begin(None, background);
                begin(bytes.await.as_ref(), false);
            }
        }
    }

    /// Returns the artifact as soon as it is here; `None` when it cannot be had.
    async fn bytes(&self) -> Option<Bytes> {
        if let Some(kept) = self.kept().await {
            return Some(kept);
        }
        let came = match self.coming.clone() {
            Some(mut coming) => {
                coming.wait_for(Option::is_some).await.ok().and_then(|bytes| bytes.as_ref().cloned())
            }
            None => None,
        };
        let bytes = match came {
            Some(came) => came,
            None => self.fetch_again().await?,
        };
        self.keep(bytes.clone()).await;
        Some(bytes)
    }

    /// Fetches the artifact, until it is here or nobody has it.
    async fn fetch_again(&self) -> Option<Bytes> {
        let descriptor = Descriptor::new(media_type::SOCI_PREFETCH, self.artifact.digest, self.artifact.size);
        let mut rest = FIRST_REST;
        loop {
            let context = FetchContext::new(Instant::now() + ATTEMPT, FetchClass::Prefetch);
            let kind = ArtifactKind::Prefetch;
            let (remote, local) = (&self.repository, &self.content);
            let fetched = fetch_artifact(self.layer, kind, descriptor.clone(), remote, local, &context).await;
            let error = match fetched.bytes {
                Ok(bytes) => return Some(bytes),
                Err(error) => error,
            };
            let (layer, message) = (&self.layer, with_causes(&error));
            match error.kind() {
                FetchErrorKind::Unavailable | FetchErrorKind::Denied | FetchErrorKind::Local => {
                    tracing::debug!(%layer, error = message, "a prefetch artifact will be asked for again");
                }
                FetchErrorKind::NotFound | FetchErrorKind::Protocol | FetchErrorKind::Integrity => {
                    tracing::warn!(%layer, error = message, "prefetch artifact is not used");
                    return None;
                }
            }
            tokio::time::sleep(rest).await;
            rest = (rest * 2).min(LONGEST_REST);
        }
    }

    /// Returns the bytes that are kept, where they are those of the artifact.
    async fn kept(&self) -> Option<Bytes> {
        let (file, artifact) = (self.file.clone(), self.artifact);
        let read = tokio::task::spawn_blocking(move || -> io::Result<Vec<u8>> {
            use std::io::Read as _;
            let mut bytes = Vec::new();
            std::fs::File::open(file)?.take(artifact.size).read_to_end(&mut bytes)?;
            Ok(bytes)
        });
        let bytes = read.await.ok()?.ok()?;
        artifact.digest.verifies(&bytes).then(|| bytes.into())
    }

    /// Keeps the artifact for a later process, as far as the disk has room.
    async fn keep(&self, bytes: Bytes) {
        let file = self.file.clone();
        let written = tokio::task::spawn_blocking(move || std::fs::write(file, bytes));
        if let Ok(Err(error)) = written.await {
            let file = self.file.display();
            tracing::debug!(%error, %file, "a prefetch artifact is not kept: after a restart it is fetched again");
        }
    }
}
