//! What this crate asks of a registry's repository, to read from it and to write to it.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use soci_oci::{BlobSource, Descriptor, Digest, FetchContext, FetchError};
use soci_registry::{Pushed, Repository};

/// A repository to read from. What it returns was verified against the digest asked for.
#[async_trait]
pub trait Remote: Send + Sync + Debug {
    /// Returns the manifest or index `digest`.
    ///
    /// # Errors
    /// When it cannot be had.
    async fn manifest(&self, digest: &Digest, context: &FetchContext) -> Result<Bytes, FetchError>;

    /// Returns the manifests of `artifact_type` that refer to `subject`; none where the registry knows no referrers.
    ///
    /// # Errors
    /// When the registry cannot be asked.
    async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
        context: &FetchContext,
    ) -> Result<Vec<Descriptor>, FetchError>;

    /// Returns the whole blob of `descriptor`, of at most `max` bytes.
    ///
    /// # Errors
    /// When it cannot be had, or is larger.
    async fn blob(
        &self,
        descriptor: &Descriptor,
        max: u64,
        context: &FetchContext,
    ) -> Result<Bytes, FetchError>;
}

/// A repository to write to.
#[async_trait]
pub trait PushRemote: Remote {
    /// Whether the manifest `digest` is there.
    ///
    /// # Errors
    /// When the registry cannot be asked.
    async fn has_manifest(&self, digest: &Digest, context: &FetchContext) -> Result<bool, FetchError>;

    /// Uploads a blob unless it is there; returns whether it was uploaded.
    ///
    /// # Errors
    /// When it cannot be.
    async fn push_blob(
        &self,
        descriptor: &Descriptor,
        source: Arc<dyn BlobSource>,
        context: &FetchContext,
    ) -> Result<bool, FetchError>;

    /// Uploads a manifest under `object`, a tag or its digest. If it has a subject it is listed as its referrer
    /// afterwards, by the registry itself or under the subject's tag.
    ///
    /// # Errors
    /// When it cannot be.
    async fn push_manifest(
        &self,
        object: &str,
        media_type: &str,
        bytes: Bytes,
        context: &FetchContext,
    ) -> Result<(), FetchError>;
}

#[async_trait]
impl Remote for Repository {
    async fn manifest(&self, digest: &Digest, context: &FetchContext) -> Result<Bytes, FetchError> {
        self.manifest(digest, context).await
    }

    async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
        context: &FetchContext,
    ) -> Result<Vec<Descriptor>, FetchError> {
        self.referrers(subject, artifact_type, context).await
    }

    async fn blob(
        &self,
        descriptor: &Descriptor,
        max: u64,
        context: &FetchContext,
    ) -> Result<Bytes, FetchError> {
        self.blob_bytes(descriptor, max, context).await
    }
}

#[async_trait]
impl PushRemote for Repository {
    async fn has_manifest(&self, digest: &Digest, context: &FetchContext) -> Result<bool, FetchError> {
        self.has_manifest(digest, context).await
    }

    async fn push_blob(
        &self,
        descriptor: &Descriptor,
        source: Arc<dyn BlobSource>,
        context: &FetchContext,
    ) -> Result<bool, FetchError> {
        Ok(self.push_blob(descriptor, &*source, None, context).await? != Pushed::Existed)
    }

    async fn push_manifest(
        &self,
        object: &str,
        media_type: &str,
        bytes: Bytes,
        context: &FetchContext,
    ) -> Result<(), FetchError> {
        self.push_manifest(object, media_type, bytes, context).await.map(|_| ())
    }
}
