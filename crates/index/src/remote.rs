//! What this crate asks of a registry's repository, to read from it and to write to it.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use soci_oci::{BlobSource, Descriptor, Digest, FetchContext, FetchError};

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

    /// Uploads a manifest under `object`, a tag or its digest; returns whether the registry listed it as a referrer of
    /// its subject.
    ///
    /// # Errors
    /// When it cannot be.
    async fn push_manifest(
        &self,
        object: &str,
        media_type: &str,
        bytes: Bytes,
        context: &FetchContext,
    ) -> Result<bool, FetchError>;

    /// Returns the manifest that `tag` names, or `None` when there is no such tag.
    ///
    /// # Errors
    /// When the registry cannot be asked.
    async fn tagged(
        &self,
        tag: &str,
        context: &FetchContext,
    ) -> Result<Option<(Descriptor, Bytes)>, FetchError>;

    /// Removes the manifest `digest`.
    ///
    /// # Errors
    /// When the registry refuses, as many do.
    async fn delete_manifest(&self, digest: &Digest, context: &FetchContext) -> Result<(), FetchError>;
}
