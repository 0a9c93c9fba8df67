//! What the daemon does for the snapshotter: mount a layer lazily, unpack one, bring a mount back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use soci_oci::Digest;

use crate::plan::{ImageFacts, LayerRequest, ResolveError};
use crate::records::{Record, Usage};

/// Makes layers appear in snapshot directories. Implemented by the daemon.
///
/// Calls for different directories come concurrently; of those for one directory only `release` may overlap another call.
#[async_trait]
pub trait LayerProvider: Send + Sync + std::fmt::Debug {
    /// Returns what is known about the image and the layer: the first call resolves the image, later ones use no network.
    async fn facts(&self, layer: &LayerRequest) -> Result<ImageFacts, ResolveError>;

    /// Mounts the layer on `at.fs()` and returns all that a later process needs to do so again, already on disk.
    ///
    /// `below` are the layers beneath it, topmost first. After an error nothing is mounted.
    async fn mount_lazy(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<MountRecord, LazyError>;

    /// Unpacks the layer into `at.fs()`. After an error `at.fs()` is as before.
    async fn unpack(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<Usage, UnpackError>;

    /// Another pull has the layer that is mounted at `at`: its bytes may come from that image as well. Uses no network.
    async fn share(&self, layer: &LayerRequest, at: &SnapshotDir);

    /// Mounts a layer of an earlier process again, from local state; only what was lost of that is fetched. A dead mount in
    /// its place is replaced.
    async fn restore(&self, record: &MountRecord, at: &SnapshotDir) -> Result<(), RestoreError>;

    /// Whether [`restore`](Self::restore) would need no network. Quick.
    fn at_hand(&self, record: &MountRecord) -> bool {
        let _ = record;
        true
    }

    /// Returns the directory to use as a lower layer for a lazily mounted snapshot, and whether it serves.
    fn lower(&self, at: &SnapshotDir) -> Lower;

    /// Returns how many bytes on disk the layer mounted at `at` has cached, where that is cheap to say.
    fn cached(&self, at: &SnapshotDir) -> Option<Usage> {
        let _ = at;
        None
    }

    /// Is told that a container is about to start on the layer mounted at `at`: what a start reads can be fetched already.
    /// Returns at once.
    fn starting(&self, at: &SnapshotDir) {
        let _ = at;
    }

    /// Is called once, when each lazy snapshot of an earlier process was given to `restore`, but for those of `later`, which
    /// will be: what none of them needs may be deleted.
    async fn told_all(self: Arc<Self>, later: Vec<Arc<Record>>) {
        let _ = later;
    }

    /// Waits for mounts that can no longer be served though nobody took them away, and returns their snapshots, for
    /// `restore` to bring them back. Who waited in one of them has been told already. Cancel-safe; called by one at a time.
    async fn broken(&self) -> Vec<u64> {
        std::future::pending().await
    }

    /// Ends all work in the background and waits for it. Mounts are not touched.
    async fn shutdown(&self) {}

    /// Takes whatever is mounted at `at.fs()` away; `restore` can bring it back. Succeeds where nothing is mounted.
    async fn unmount(&self, at: &SnapshotDir) -> Result<(), ReleaseError>;

    /// As [`unmount`](Self::unmount), for a snapshot that is gone: what only it needed is deleted.
    async fn release(&self, at: &SnapshotDir) -> Result<(), ReleaseError>;
}

/// How many images a layer remembers having been pulled as.
pub const MAX_REFERENCES: usize = 8;

/// The directory of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SnapshotDir {
    id: u64,
    path: PathBuf,
}

impl SnapshotDir {
    /// Returns the directory of snapshot `id` beneath `snapshots`.
    pub fn new(snapshots: &Path, id: u64) -> Self {
        Self { id, path: snapshots.join(id.to_string()) }
    }

    /// Returns the snapshot's number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the directory itself, which holds the record.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of the snapshot's own content.
    pub fn fs(&self) -> PathBuf {
        self.path.join("fs")
    }

    /// Returns overlay's work directory.
    pub fn work(&self) -> PathBuf {
        self.path.join("work")
    }
}

/// A layer beneath another.
#[derive(Debug, Clone)]
pub struct Ancestor {
    /// Where it is.
    pub dir: SnapshotDir,
    /// What it is.
    pub record: Arc<Record>,
}

/// Where a lazily mounted layer is, and whether it can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lower {
    /// The directory to name in overlay's options.
    pub path: PathBuf,
    /// Whether this process serves it.
    pub served: bool,
}

/// All that is needed to mount a layer again without the network. Part of the snapshot's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Where its bytes may be fetched from: the images that it was pulled as, oldest first, at most [`MAX_REFERENCES`].
    pub references: Vec<Reference>,
    /// The layer's digest.
    pub layer: Digest,
    /// The blob's size in bytes.
    pub layer_size: u64,
    /// The SOCI index it was found by.
    pub index: Digest,
    /// The zTOC; its bytes are under the root.
    pub ztoc: Digest,
    /// The zTOC's size in bytes.
    pub ztoc_size: u64,
    /// Whether no file of the layer has extended attributes.
    pub disable_xattrs: bool,
    /// Attributes of the mount's root, so that nobody has to ask the mount.
    pub root: DirOwner,
    /// Directories that the layer implies without having an entry for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub implied: Vec<ImpliedDir>,
    /// Its prefetch artifact, where its index has one that is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<ArtifactRef>,
}

/// An artifact of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactRef {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

impl MountRecord {
    /// Adds an image that has the layer, as the newest; `false` when it is known.
    pub fn share(&mut self, reference: Reference) -> bool {
        if self.references.contains(&reference) {
            return false;
        }
        let over = (self.references.len() + 1).saturating_sub(MAX_REFERENCES);
        self.references.drain(..over);
        self.references.push(reference);
        true
    }
}

/// One image that a layer belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// containerd namespace of the pull.
    pub namespace: String,
    /// The image, as the client named it.
    pub image: String,
    /// Digest of its manifest.
    pub manifest: Digest,
}

impl From<&LayerRequest> for Reference {
    fn from(layer: &LayerRequest) -> Self {
        Self { namespace: layer.namespace.clone(), image: layer.image.to_string(), manifest: layer.manifest }
    }
}

/// Mode and owner of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirOwner {
    /// Permission, set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A directory that a layer implies, with the attributes that the layers below give it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImpliedDir {
    /// Path from the layer's root without a leading slash.
    #[serde(with = "escaped")]
    pub path: Vec<u8>,
    /// Mode and owner.
    #[serde(flatten)]
    pub owner: DirOwner,
    /// Seconds and nanoseconds of the modification time, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtime: Option<(i64, u32)>,
    /// Extended attributes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<Xattr>,
}

/// One extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xattr {
    /// Its name.
    #[serde(with = "escaped")]
    pub name: Vec<u8>,
    /// Its value.
    #[serde(with = "escaped")]
    pub value: Vec<u8>,
}

/// Why a layer could not be mounted lazily.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct LazyError {
    /// What kind of trouble.
    pub kind: SetbackKind,
    /// What was being done and why it failed, down to the cause.
    pub message: String,
}

/// Why a layer could not be unpacked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct UnpackError {
    /// What kind of trouble.
    pub kind: SetbackKind,
    /// What was being done and why it failed, down to the cause.
    pub message: String,
}

/// Kinds of trouble with one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SetbackKind {
    /// The zTOC, the layer or a digest is not what it must be.
    Malformed,
    /// The content is not there.
    NotFound,
    /// The registry refused.
    Denied,
    /// The network or the registry failed, or time ran out.
    Unavailable,
    /// This machine failed: disk, memory, mount.
    Local,
}

/// Why a mount could not be brought back.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct RestoreError {
    /// What was being done and why it failed, down to the cause.
    pub message: String,
}

/// Why a mount could not be taken away.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ReleaseError {
    /// What was being done and why it failed, down to the cause.
    pub message: String,
}

/// Bytes as readable text: printable ASCII as it is, everything else and `%` as `%xx`.
mod escaped {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(bytes.len());
        for &byte in bytes {
            match byte {
                b'%' | 0..=31 | 127.. => text.push_str(&format!("%{byte:02x}")),
                _ => text.push(char::from(byte)),
            }
        }
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((&first, tail)) = rest.split_first() {
            rest = tail;
            if first != b'%' {
                bytes.push(first);
                continue;
            }
            let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
            let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
            bytes.push(byte.ok_or_else(|| serde::de::Error::custom("malformed %-escape"))?);
            rest = &tail[2..];
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_bytes_survive_the_record(name: Vec<u8>, value: Vec<u8>) {
            let xattr = Xattr { name, value };
            let text = serde_json::to_string(&xattr).unwrap();
            assert_eq!(serde_json::from_str::<Xattr>(&text).unwrap(), xattr);
        }
    }

    #[test]
    fn malformed_escapes_are_errors() {
        for text in ["%", "%4", "%zz", "%\u{e9}"] {
            let json = serde_json::json!({ "name": text, "value": "" }).to_string();
            assert!(serde_json::from_str::<Xattr>(&json).is_err(), "{text}");
        }
    }
}
