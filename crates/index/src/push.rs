//! Pushes an index v1 with what it names, so that the registry lists it as a referrer of the image.
//!
//! Blobs go first, the index last: a registry refuses a manifest whose parts it lacks, and a reader never finds an index
//! whose zTOCs are not there.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, TryStreamExt as _};
use soci_oci::{BlobSource, BlobStream, Descriptor, Digest, FetchContext, FetchError, media_type};
use soci_store::{ContentStore, StoreError};

use crate::build::{Observer, Stores, Work};
use crate::image::{self, ImageError};
use crate::manifest::SociIndex;
use crate::remote::PushRemote;

/// What to do when the registry has an index of the image already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExistingIndex {
    /// Say so and push.
    Warn,
    /// Say so and do not push.
    Skip,
    /// Do not look.
    Allow,
}

/// How to push.
#[derive(Debug, Clone, Copy)]
pub struct PushOptions {
    /// What to do when the registry has an index of the image already.
    pub existing: ExistingIndex,
    /// Uploads at a time.
    pub parallel: NonZeroUsize,
    /// Whether to print the digest of the index only.
    pub quiet: bool,
}

/// A push that failed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// Only an index v1 can be pushed on its own.
    #[error("SOCI index {0} has no subject: push the whole image instead")]
    NoSubject(Digest),
    /// The registry could not be asked for the indexes it has.
    #[error("failed to fetch list of referrers")]
    Referrers(#[source] FetchError),
    /// An upload failed.
    #[error("error pushing graph to remote: {digest}")]
    Upload {
        /// What was being uploaded.
        digest: Digest,
        /// Why it failed.
        #[source]
        source: FetchError,
    },
    /// A part of the graph is not in local content.
    #[error("error pushing graph to remote: {digest}: not found in the content store")]
    Absent {
        /// What is missing.
        digest: Digest,
    },
    /// Local content could not be read.
    #[error("error pushing graph to remote: {digest}")]
    Store {
        /// What was being read.
        digest: Digest,
        /// Why it failed.
        #[source]
        source: Box<StoreError>,
    },
    /// The registry lacks the image, and so does local content.
    #[error(
        "error pushing graph to remote: the registry does not have image manifest {digest}; push the image first"
    )]
    NoImage {
        /// The image manifest.
        digest: Digest,
        /// Why it cannot be pushed from here.
        #[source]
        source: Box<ImageError>,
    },
}

/// Pushes `index` and everything it names; returns whether it was pushed, as against skipped.
///
/// The image itself must be in the registry; where it is not, and `stores.image` has it, it is pushed as well, by digest.
///
/// # Errors
/// When the registry refuses, or something is missing here.
pub async fn push(
    index: &SociIndex,
    stores: &Stores,
    remote: &dyn PushRemote,
    options: &PushOptions,
    context: &FetchContext,
    observer: &dyn Observer,
) -> Result<bool, PushError> {
    let subject = index.manifest.subject.clone().ok_or(PushError::NoSubject(index.digest))?;
    let pusher = Pusher { stores, remote, options, context, observer };
    if options.existing != ExistingIndex::Allow && pusher.exists(&subject.digest).await? {
        return Ok(false);
    }
    match options.quiet {
        true => observer.line(&index.digest.to_string()),
        false => observer.line(&format!("pushing soci index with digest: {}", index.digest)),
    }
    if pusher.has(&index.digest).await? {
        pusher.say("skipped artifact with digest", &index.digest);
        return Ok(true);
    }
    let config = std::iter::once(&index.manifest.config);
    pusher.blobs(config.chain(&index.manifest.layers).cloned().collect(), &*stores.artifacts).await?;
    pusher.subject(&subject).await?;
    pusher.manifest(&index.digest, media_type::OCI_MANIFEST, index.bytes.clone()).await?;
    Ok(true)
}

struct Pusher<'a> {
    stores: &'a Stores,
    remote: &'a dyn PushRemote,
    options: &'a PushOptions,
    context: &'a FetchContext,
    observer: &'a dyn Observer,
}

impl Pusher<'_> {
    fn say(&self, what: &str, digest: &Digest) {
        if !self.options.quiet {
            self.observer.line(&format!("{what}: {digest}"));
        }
    }

    /// Reports the indexes the registry has already; returns whether that means not to push.
    async fn exists(&self, subject: &Digest) -> Result<bool, PushError> {
        if !self.options.quiet {
            self.observer.line("checking if a soci index already exists in remote repository...");
        }
        let found = self.remote.referrers(subject, media_type::SOCI_INDEX_V1, self.context).await;
        let found = found.map_err(PushError::Referrers)?;
        let message = match found.as_slice() {
            [] => return Ok(false),
            [one] => format!("soci index found in remote repository with digest: {}", one.digest),
            _ => "multiple soci indices found in remote repository".to_owned(),
        };
        if self.options.existing == ExistingIndex::Skip {
            if !self.options.quiet {
                let line = format!("{message}: skipping pushing artifacts for image manifest: {subject}");
                self.observer.line(&line);
            }
            return Ok(true);
        }
        self.observer.line(&format!("[WARN] {message}: pushing index anyway"));
        Ok(false)
    }

    async fn has(&self, digest: &Digest) -> Result<bool, PushError> {
        let has = self.remote.has_manifest(digest, self.context).await;
        has.map_err(|source| PushError::Upload { digest: *digest, source })
    }

    async fn blobs(&self, mut blobs: Vec<Descriptor>, store: &dyn ContentStore) -> Result<(), PushError> {
        let mut seen = std::collections::HashSet::new();
        blobs.retain(|blob| seen.insert(blob.digest));
        stream::iter(blobs.into_iter().map(Ok))
            .try_for_each_concurrent(self.options.parallel.get(), |blob| self.blob(blob, store))
            .await
    }

    async fn blob(&self, blob: Descriptor, store: &dyn ContentStore) -> Result<(), PushError> {
        let digest = blob.digest;
        let failed = |source| PushError::Store { digest, source: Box::new(source) };
        let (source, _) = store.source(&digest).await.map_err(failed)?.ok_or(PushError::Absent { digest })?;
        let labels = store.info(&digest).await.map_err(failed)?.map(|info| info.labels).unwrap_or_default();
        self.say("pushing artifact with digest", &digest);
        let watched =
            Watched { blob: &blob, source: &*source, observer: self.observer, sent: AtomicU64::new(0) };
        if !self.options.quiet {
            self.observer.begins(Work::Upload, &blob);
        }
        let uploaded = self.remote.push_blob(&blob, &watched, &labels, self.context).await;
        self.observer.ends(&digest);
        match uploaded.map_err(|source| PushError::Upload { digest, source })? {
            true => self.say("successfully pushed artifact with digest", &digest),
            false => self.say("skipped artifact with digest", &digest),
        }
        Ok(())
    }

    async fn manifest(&self, digest: &Digest, media_type: &str, bytes: Bytes) -> Result<(), PushError> {
        self.say("pushing artifact with digest", digest);
        let pushed = self.remote.push_manifest(&digest.to_string(), media_type, bytes, self.context).await;
        pushed.map_err(|source| PushError::Upload { digest: *digest, source })?;
        self.say("successfully pushed artifact with digest", digest);
        Ok(())
    }

    /// Makes sure that the registry has the image manifest.
    async fn subject(&self, subject: &Descriptor) -> Result<(), PushError> {
        let digest = subject.digest;
        if self.has(&digest).await? {
            self.say("skipped artifact with digest", &digest);
            return Ok(());
        }
        let store = &*self.stores.image;
        let local = image::manifest(&digest, store).await;
        let (manifest, bytes) =
            local.map_err(|source| PushError::NoImage { digest, source: Box::new(source) })?;
        let parts = std::iter::once(manifest.config).chain(manifest.layers);
        self.blobs(parts.collect(), store).await?;
        self.manifest(&digest, &subject.media_type, bytes).await
    }
}

/// The content of a blob that is being sent: who reads on from a position has sent what is before.
struct Watched<'a> {
    blob: &'a Descriptor,
    source: &'a dyn BlobSource,
    observer: &'a dyn Observer,
    /// What the observer was told. An upload that is begun anew reads again from the start.
    sent: AtomicU64,
}

impl fmt::Debug for Watched<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("source", &self.source).field("sent", &self.sent).finish()
    }
}

#[async_trait]
impl BlobSource for Watched<'_> {
    async fn open(&self, range: Range<u64>, context: &FetchContext) -> Result<BlobStream, FetchError> {
        let before = self.sent.fetch_max(range.start, Ordering::Relaxed);
        self.observer.advances(&self.blob.digest, range.start.saturating_sub(before));
        self.source.open(range, context).await
    }
}

/// Returns the newest index v1 of the image manifest `subject`, and whether the index v2 `bound` that the manifest names
/// is here, which is not what can be pushed alone.
///
/// # Errors
/// When the store cannot be read.
pub async fn newest(
    subject: &Digest,
    bound: Option<&Digest>,
    store: &Arc<dyn ContentStore>,
) -> Result<(Option<SociIndex>, bool), StoreError> {
    let mut own = Vec::new();
    let mut v2 = false;
    for (index, created) in crate::manifest::stored_indexes(&**store).await? {
        match &index.manifest.subject {
            Some(of) if of.digest == *subject => own.push((created, index)),
            Some(_) => {}
            None => v2 |= bound == Some(&index.digest),
        }
    }
    // Of those stored at the same moment the choice is at least the same each time.
    own.sort_by(|(one, a), (other, b)| one.cmp(other).then_with(|| a.digest.cmp(&b.digest)));
    Ok((own.pop().map(|(_, index)| index), v2))
}

#[cfg(test)]
mod tests;
