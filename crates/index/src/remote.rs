//! What this crate asks of a registry's repository in order to read from it.

use std::fmt::Debug;

use async_trait::async_trait;
use bytes::Bytes;
use soci_oci::{Descriptor, Digest, FetchContext, FetchError};

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
