//! Brings the artifacts of an index here: local content first, else the registry, all at once.
//!
//! Each artifact is delivered as soon as it is here and stored, so that a layer need not wait for its neighbours'. What is
//! wrong with one of them costs its layer only.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{Stream, StreamExt as _};
use soci_oci::{Descriptor, Digest, FetchContext, FetchError, media_type};
use soci_store::{ContentStore, StoreError, rfc3339};
use tokio::sync::Semaphore;

use crate::manifest::{EMPTY_CONFIG, SociIndex};
use crate::remote::Remote;

/// Artifacts fetched at a time: enough to hide the round trips of an image of many layers, and fewer than a host gets at once.
const PARALLEL: usize = 24;
/// Bytes of artifacts fetched at a time, as far as their sizes are known; a larger one is fetched alone.
const AT_ONCE: u32 = 64 << 20;
/// The largest zTOC that is read, in bytes: what decoding accepts.
pub const MAX_ZTOC_SIZE: u64 = 512 << 20;
/// The largest prefetch artifact that is read, in bytes.
pub const MAX_PREFETCH_SIZE: u64 = 4 << 20;

/// What an artifact of an index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ArtifactKind {
    /// A zTOC.
    Ztoc,
    /// A prefetch artifact.
    Prefetch,
}

/// One artifact of an index, or why it could not be had.
#[derive(Debug)]
pub struct Resolved {
    /// The layer it belongs to.
    pub layer: Digest,
    /// What it is.
    pub kind: ArtifactKind,
    /// Its descriptor in the index.
    pub descriptor: Descriptor,
    /// Its verified bytes.
    pub bytes: Result<Bytes, FetchError>,
    /// Whether it was here already.
    pub local: bool,
    /// Why it could not be stored, if it could not; the bytes are good nevertheless.
    pub unstored: Option<StoreError>,
}

/// Fetches and stores all artifacts of `index`, and the index itself; yields each artifact when it is there.
///
/// Artifacts that belong to no layer, or are of another kind, are passed over; of several zTOCs or prefetch artifacts of
/// one layer the one that counts is fetched. Nothing happens until the stream is polled; dropping it ends the fetches.
pub fn resolve(
    index: Arc<SociIndex>,
    remote: Arc<dyn Remote>,
    local: Arc<dyn ContentStore>,
    context: FetchContext,
) -> impl Stream<Item = Resolved> + Send {
    let artifacts = artifacts(&index);
    let room = Arc::new(Semaphore::new(AT_ONCE as usize));
    let storing = {
        let (index, local) = (Arc::clone(&index), Arc::clone(&local));
        async move {
            if let Err(error) = store_index(&index, &*local).await {
                tracing::warn!(index = %index.digest, %error, "SOCI index is not stored");
            }
        }
    };
    // The index first: its labels keep the artifacts from containerd's collector from the moment they are stored.
    futures::stream::once(storing).flat_map(move |()| {
        let (remote, local, context) = (Arc::clone(&remote), Arc::clone(&local), context.clone());
        let room = Arc::clone(&room);
        futures::stream::iter(artifacts.clone())
            .map(move |(layer, kind, descriptor)| {
                let (remote, local, context) = (Arc::clone(&remote), Arc::clone(&local), context.clone());
                let room = Arc::clone(&room);
                async move {
                    let bytes = u32::try_from(descriptor.size).unwrap_or(AT_ONCE).min(AT_ONCE);
                    // It is never closed.
                    let _taken = room.acquire_many(bytes).await;
                    fetch_artifact(layer, kind, descriptor, &*remote, &*local, &context).await
                }
            })
            .buffer_unordered(PARALLEL)
    })
}

/// Stores an index as it was received, with its empty configuration, as a root of containerd's collector.
///
/// # Errors
/// When the store cannot be written.
pub async fn store_index(index: &SociIndex, store: &dyn ContentStore) -> Result<(), StoreError> {
    let mut labels = index.gc_labels();
    labels.push((soci_oci::labels::GC_ROOT.to_owned(), rfc3339(std::time::SystemTime::now())));
    store.put(&index.descriptor(), index.bytes.clone(), &labels).await?;
    let config = &index.manifest.config;
    if *config == Descriptor::of(index.version.media_type(), EMPTY_CONFIG) {
        store.put(config, Bytes::from_static(EMPTY_CONFIG), &[]).await?;
    }
    Ok(())
}

fn artifacts(index: &SociIndex) -> Vec<(Digest, ArtifactKind, Descriptor)> {
    let mut wanted = Vec::new();
    for descriptor in &index.manifest.layers {
        let Some(layer) = SociIndex::layer(descriptor) else { continue };
        let (kind, counts) = match descriptor.media_type.as_str() {
            media_type::ZTOC => (ArtifactKind::Ztoc, index.ztoc(&layer)),
            media_type::SOCI_PREFETCH => (ArtifactKind::Prefetch, index.prefetch(&layer)),
            _ => continue,
        };
        if counts.is_some_and(|counts| std::ptr::eq(counts, descriptor)) {
            wanted.push((layer, kind, descriptor.clone()));
        }
    }
    wanted
}

/// Fetches and stores one artifact of an index, unless it is here.
pub async fn fetch_artifact(
    layer: Digest,
    kind: ArtifactKind,
    descriptor: Descriptor,
    remote: &dyn Remote,
    local: &dyn ContentStore,
    context: &FetchContext,
) -> Resolved {
    let max = match kind {
        ArtifactKind::Ztoc => MAX_ZTOC_SIZE,
        ArtifactKind::Prefetch => MAX_PREFETCH_SIZE,
    };
    match local.read(&descriptor.digest, max).await {
        Ok(Some(bytes)) => {
            return Resolved { layer, kind, descriptor, bytes: Ok(bytes), local: true, unstored: None };
        }
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(digest = %descriptor.digest, %error, "local content is fetched anew");
            if matches!(error, StoreError::Corrupt { .. })
                && let Err(error) = local.delete(&descriptor.digest).await
            {
                tracing::warn!(digest = %descriptor.digest, %error, "damaged content cannot be removed");
            }
        }
    }
    let bytes = remote.blob(&descriptor, max, context).await;
    let unstored = match &bytes {
        Ok(bytes) => local.put(&descriptor, bytes.clone(), &[]).await.err(),
        Err(_) => None,
    };
    Resolved { layer, kind, descriptor, bytes, local: false, unstored }
}

#[cfg(test)]
mod tests;
