//! The zTOC of a mounted layer, had again when what is stored of it is lost or damaged.
//!
//! It comes from where a Prepare has it from: this machine's content first, then the registry, as each of the images that
//! the layer was pulled as, with the credentials of that image.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use bytes::Bytes;
use soci_auth::board::Pin;
use soci_index::{ArtifactKind, fetch_artifact};
use soci_layer::ZtocFile;
use soci_oci::{Descriptor, Digest, FetchContext, FetchError, FetchErrorKind, media_type};
use soci_snapshotter::provider::Reference;

use super::Live;
use super::mounting::parse;

/// An image that a mounted layer was pulled as; keeps the credentials of its pulls.
#[derive(Debug)]
pub(super) struct PulledAs {
    pub(super) reference: Reference,
    pub(super) _pin: Pin,
}

/// A stored zTOC that mounts need.
#[derive(Debug)]
pub(super) struct KeptZtoc {
    live: Weak<Live>,
    layer: Digest,
    digest: Digest,
    size: u64,
    path: PathBuf,
}

#[async_trait]
impl ZtocFile for KeptZtoc {
    fn path(&self) -> &Path {
        &self.path
    }

    async fn fetch_again(&self, context: &FetchContext) -> Result<(), FetchError> {
        let stopped = || FetchError::new(FetchErrorKind::Unavailable, "the daemon stops");
        let live = self.live.upgrade().ok_or_else(stopped)?;
        let references = live.pulled_as(&self.digest);
        live.have_again(self.layer, &self.digest, self.size, &references, context).await.map(drop)
    }
}

impl Live {
    /// Returns the stored zTOC `digest` of `layer`, of `size` bytes.
    pub(super) fn kept(&self, layer: Digest, digest: &Digest, size: u64) -> Arc<KeptZtoc> {
        let (live, path) = (Weak::clone(&self.this), self.ztocs.path(digest));
        Arc::new(KeptZtoc { live, layer, digest: *digest, size, path })
    }

    /// Returns the images of all mounts with the zTOC `digest`.
    fn pulled_as(&self, digest: &Digest) -> Vec<Reference> {
        let snapshots = self.claims.snapshots(digest);
        let pulls = self.pulls.lock();
        let of_each = snapshots.iter().filter_map(|snapshot| pulls.get(snapshot)).flatten();
        of_each.map(|pull| pull.reference.clone()).collect()
    }

    /// Returns the zTOC `digest` of `layer`, of `size` bytes: what is stored where that is whole, else from the first of
    /// `references` that has it, and stores it.
    ///
    /// # Errors
    /// Why the last of them has not got it, or why it cannot be stored.
    pub(super) async fn have_again(
        &self,
        layer: Digest,
        digest: &Digest,
        size: u64,
        references: &[Reference],
        context: &FetchContext,
    ) -> Result<Bytes, FetchError> {
        // Nobody deletes it between its being stored and its being read.
        let _hold = self.claims.hold(vec![*digest]);
        let (ztocs, stored) = (Arc::clone(&self.ztocs), *digest);
        if let Ok(Ok(Some(whole))) = tokio::task::spawn_blocking(move || ztocs.read(&stored, size)).await {
            return Ok(whole);
        }
        let mut failure = FetchError::new(FetchErrorKind::NotFound, "no image is known to have it");
        for reference in references {
            match self.have_from(reference, layer, digest, size, context).await {
                Ok(bytes) => {
                    let (ztocs, digest, content) = (Arc::clone(&self.ztocs), *digest, bytes.clone());
                    let stored = tokio::task::spawn_blocking(move || ztocs.replace(&digest, &content)).await;
                    let local = |error| {
                        FetchError::because(FetchErrorKind::Local, format!("store zTOC {digest}"), error)
                    };
                    stored.map_err(std::io::Error::other).and_then(|stored| stored).map_err(local)?;
                    return Ok(bytes);
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn have_from(
        &self,
        reference: &Reference,
        layer: Digest,
        digest: &Digest,
        size: u64,
        context: &FetchContext,
    ) -> Result<Bytes, FetchError> {
        let image = parse(reference).map_err(|message| FetchError::new(FetchErrorKind::Local, message))?;
        let descriptor = Descriptor::new(media_type::ZTOC, *digest, size);
        let (remote, local) = (self.registry.repository(&image), self.local(&reference.namespace));
        fetch_artifact(layer, ArtifactKind::Ztoc, descriptor, &remote, &local, context).await.bytes
    }
}
