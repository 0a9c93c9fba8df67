//! Unpacking one layer, from what is on this machine or from its registry, in one stream.
//!
//! The tree is made beside the snapshot's directory and renamed into place when the digest of what was unpacked is the one
//! that the image's configuration says: before that nothing of it is seen, and after a failure nothing of it is left.
//!
//! Order of writes: files, the whole file system synced, rename, record. A record that says the layer is there is on disk
//! after the layer is.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;
use soci_layer::ReadErrorKind;
use soci_layer::unpack::{self as apply, ApplyOptions, Below, LayerBytes, OpaqueXattr};
use soci_oci::{
    BlobSource, BlobStream, Descriptor, Digest, FetchClass, FetchContext, FetchErrorKind, with_causes,
};
use soci_snapshotter::provider::SetbackKind;
use soci_snapshotter::{SnapshotDir, UnpackError, Usage};

use super::session::Image;

/// Bytes of one request: each has a deadline of its own, so that a large layer over a slow line is not cut.
const STEP: u64 = 64 << 20;
/// How long one such request may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the small documents may take.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest image configuration that is read, in bytes.
const MAX_CONFIG: u64 = 8 << 20;

/// Unpacks `layer` of `image` into `at.fs()`.
///
/// # Errors
/// [`UnpackError`]; `at.fs()` is as before then.
pub async fn unpack(
    image: &Image,
    layer: &Digest,
    below: Arc<dyn Below>,
    opaque: OpaqueXattr,
    at: &SnapshotDir,
) -> Result<Usage, UnpackError> {
    let place = image.manifest.layers.iter().position(|descriptor| descriptor.digest == *layer);
    let Some((place, descriptor)) = place.and_then(|place| Some((place, image.manifest.layers.get(place)?)))
    else {
        let message = format!("layer {layer} is not in the image's manifest");
        return Err(UnpackError { kind: SetbackKind::Malformed, message });
    };
    let diff_id = diff_id(image, place).await?;
    let (stream, local) = blob(image, descriptor).await?;
    tracing::debug!(%layer, local, "unpacking a layer");
    let tar = LayerBytes::Whole { stream, codec: None, digest: Some(*layer) }.tar();
    let beside = Beside::new(at).map_err(|error| local_error("make a directory", &error))?;
    let options = ApplyOptions { diff_id: Some(diff_id), opaque };
    let written =
        apply::apply(tar, &beside.0, below, options).await.map_err(|error| unpack_error(layer, &error))?;
    let place = at.clone();
    let placed = tokio::task::spawn_blocking(move || beside.place(&place)).await;
    let placed = placed.unwrap_or_else(|error| Err(io::Error::other(error)));
    placed.map_err(|error| local_error("put the unpacked layer into place", &error))?;
    Ok(Usage { size: written.bytes, inodes: written.inodes })
}

/// Returns the digest that the unpacked layer must have.
async fn diff_id(image: &Image, place: usize) -> Result<Digest, UnpackError> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Vec<Digest>,
    }
    let config = &image.manifest.config;
    let context = FetchContext::new(Instant::now() + DOCUMENT_TIMEOUT, FetchClass::OnDemand);
    let bytes = match image.content.read(&config.digest, MAX_CONFIG).await {
        Ok(Some(bytes)) => bytes,
        _ => {
            image.repository.blob_bytes(config, MAX_CONFIG, &context).await.map_err(|error| UnpackError {
                kind: fetch_kind(error.kind()),
                message: format!("fetch image configuration {}: {}", config.digest, with_causes(&error)),
            })?
        }
    };
    let malformed = |what: String| UnpackError {
        kind: SetbackKind::Malformed,
        message: format!("image configuration {}: {what}", config.digest),
    };
    let parsed: Config = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    if parsed.rootfs.diff_ids.len() != image.manifest.layers.len() {
        let (ids, layers) = (parsed.rootfs.diff_ids.len(), image.manifest.layers.len());
        return Err(malformed(format!("it has {ids} layers, the manifest {layers}")));
    }
    parsed.rootfs.diff_ids.get(place).copied().ok_or_else(|| malformed("it has no such layer".to_owned()))
}

/// Returns the blob's bytes in order, and whether they are on this machine.
async fn blob(image: &Image, descriptor: &Descriptor) -> Result<(BlobStream, bool), UnpackError> {
    let digest = descriptor.digest;
    let local = image.content.source(&digest).await.ok().flatten();
    let (source, local) = match local {
        Some((source, size)) if size == descriptor.size => (source, true),
        _ => (image.repository.blob_of(descriptor), false),
    };
    let mut ranges = steps(descriptor.size);
    // The first one here, so that a layer that cannot be had is an error of its own kind.
    let first = open(&source, ranges.next().unwrap_or(0..0)).await.map_err(|error| UnpackError {
        kind: fetch_kind(error.kind()),
        message: format!("fetch layer {digest}: {}", with_causes(&error)),
    })?;
    let rest = futures::stream::iter(ranges).then(move |range| {
        let source = Arc::clone(&source);
        async move { open(&source, range).await }
    });
    Ok((Box::pin(first.chain(rest.try_flatten())), local))
}

async fn open(source: &Arc<dyn BlobSource>, range: Range<u64>) -> Result<BlobStream, soci_oci::FetchError> {
    let context = FetchContext::new(Instant::now() + STEP_TIMEOUT, FetchClass::OnDemand);
    source.open(range, &context).await
}

fn steps(size: u64) -> impl Iterator<Item = Range<u64>> + Send {
    (0..size.div_ceil(STEP)).map(move |step| step * STEP..((step + 1) * STEP).min(size))
}

fn fetch_kind(kind: FetchErrorKind) -> SetbackKind {
    match kind {
        FetchErrorKind::NotFound => SetbackKind::NotFound,
        FetchErrorKind::Denied => SetbackKind::Denied,
        FetchErrorKind::Unavailable => SetbackKind::Unavailable,
        FetchErrorKind::Protocol | FetchErrorKind::Integrity => SetbackKind::Malformed,
        FetchErrorKind::Local => SetbackKind::Local,
    }
}

fn unpack_error(layer: &Digest, error: &apply::UnpackError) -> UnpackError {
    let kind = match error {
        apply::UnpackError::Read(error) => match error.kind() {
            ReadErrorKind::TimedOut | ReadErrorKind::Unavailable | ReadErrorKind::Closed => {
                SetbackKind::Unavailable
            }
            ReadErrorKind::Denied => SetbackKind::Denied,
            ReadErrorKind::NotFound => SetbackKind::NotFound,
            ReadErrorKind::Integrity | ReadErrorKind::OutOfBounds => SetbackKind::Malformed,
            ReadErrorKind::Local => SetbackKind::Local,
        },
        apply::UnpackError::Tar(_) | apply::UnpackError::Name { .. } | apply::UnpackError::DiffId { .. } => {
            SetbackKind::Malformed
        }
        _ => SetbackKind::Local,
    };
    UnpackError { kind, message: format!("unpack layer {layer}: {}", with_causes(error)) }
}

fn local_error(what: &str, error: &io::Error) -> UnpackError {
    UnpackError { kind: SetbackKind::Local, message: format!("{what}: {error}") }
}

/// A directory beside the snapshot's, gone when dropped.
struct Beside(PathBuf);

impl Beside {
    /// Makes it with the mode and owner of the snapshot's directory, whose place it takes.
    fn new(at: &SnapshotDir) -> io::Result<Self> {
        let path = at.path().join("unpack");
        remove(&path)?;
        let like = fs::symlink_metadata(at.fs())?;
        fs::create_dir(&path)?;
        let this = Self(path);
        lchown(&this.0, Some(like.uid()), Some(like.gid()))?;
        fs::set_permissions(&this.0, fs::Permissions::from_mode(like.mode() & 0o7777))?;
        Ok(this)
    }

    /// Makes what is in it durable, then puts it into its place. Blocks.
    fn place(self, at: &SnapshotDir) -> io::Result<()> {
        // Once for all of its files: a layer has many, and a sync of each would wait for the journal each time.
        rustix::fs::syncfs(fs::File::open(&self.0)?)?;
        // An empty directory is replaced by the rename itself.
        fs::rename(&self.0, at.fs())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            tracing::warn!(%error, dir = %self.0.display(), "a partly unpacked layer cannot be deleted");
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_cover_a_blob_once() {
        for size in [0, 1, STEP - 1, STEP, STEP + 1, 5 * STEP] {
            let steps: Vec<_> = steps(size).collect();
            assert_eq!(steps.iter().map(|step| step.end - step.start).sum::<u64>(), size);
            assert!(steps.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
