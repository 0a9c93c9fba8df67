//! The trait through which all others see local content.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{BlobSource, BlobStream, Descriptor, Digest};

use crate::StoreError;

/// What a store knows about some content without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentInfo {
    /// Digest of the content.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// When it was stored, where the store knows.
    pub created: Option<SystemTime>,
    /// Labels. The soci store keeps none of those that are for containerd's garbage collector.
    pub labels: BTreeMap<String, String>,
}

/// Content-addressed storage on this machine.
///
/// Every call ends within a bounded time. None of them blocks the thread.
#[async_trait]
pub trait ContentStore: Send + Sync + Debug {
    /// Returns what is known about `digest`, or `None` when it is not there.
    ///
    /// # Errors
    /// When the store cannot say.
    async fn info(&self, digest: &Digest) -> Result<Option<ContentInfo>, StoreError>;

    /// Returns the whole content of `digest`, verified, or `None` when it is not there.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] over `max` bytes, [`StoreError::Corrupt`] when the bytes are not what the digest names,
    /// or when the store cannot be read.
    async fn read(&self, digest: &Digest, max: u64) -> Result<Option<Bytes>, StoreError>;

    /// Returns the content of `digest` for reading ranges, with its size in bytes, or `None` when it is not there.
    ///
    /// The bytes it yields are not verified.
    ///
    /// # Errors
    /// When the store cannot say whether it is there.
    async fn source(&self, digest: &Digest) -> Result<Option<(Arc<dyn BlobSource>, u64)>, StoreError>;

    /// Stores `bytes` under the digest of `descriptor`. Content that exists is left as it is; `labels` are merged.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] when digest or size is not that of `bytes`, or when the store cannot be written.
    async fn put(
        &self,
        descriptor: &Descriptor,
        bytes: Bytes,
        labels: &[(String, String)],
    ) -> Result<(), StoreError>;

    /// As [`put`](Self::put), for content that should not be held in memory. The stream is read to its end.
    ///
    /// # Errors
    /// As [`put`](Self::put), and [`StoreError::Source`] when the stream fails.
    async fn put_stream(
        &self,
        descriptor: &Descriptor,
        stream: BlobStream,
        labels: &[(String, String)],
    ) -> Result<(), StoreError>;

    /// Whether the content of `descriptor` is there; if so, it is kept from containerd's collector as long as the lease
    /// lives that this store writes under. What is found otherwise may be collected before it is referred to.
    ///
    /// # Errors
    /// When the store cannot say.
    async fn pin(&self, descriptor: &Descriptor) -> Result<bool, StoreError> {
        Ok(self.info(&descriptor.digest).await?.is_some())
    }

    /// Merges `labels` into those of `digest`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when it is not there, or when the store cannot be written.
    async fn label(&self, digest: &Digest, labels: &[(String, String)]) -> Result<(), StoreError>;

    /// Removes `digest`; returns whether it was there.
    ///
    /// # Errors
    /// When the store cannot be written.
    async fn delete(&self, digest: &Digest) -> Result<bool, StoreError>;

    /// Returns all content, in no particular order.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn walk(&self) -> Result<Vec<ContentInfo>, StoreError>;

    /// Returns the content that has `label` with exactly `value`.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn find(&self, label: &str, value: &str) -> Result<Vec<ContentInfo>, StoreError>;

    /// Returns the content that may be a SOCI index manifest: a superset, to be read and decoded.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn index_candidates(&self) -> Result<Vec<ContentInfo>, StoreError> {
        let mut all = self.walk().await?;
        all.retain(|info| info.size <= MAX_MANIFEST_SIZE);
        Ok(all)
    }
}

/// Returns `at` as RFC 3339 text in UTC, as label values that hold a time have it.
pub fn rfc3339(at: SystemTime) -> String {
    let format = time::format_description::well_known::Rfc3339;
    let at = time::OffsetDateTime::from(at);
    at.replace_nanosecond(0)
        .unwrap_or(at)
        .format(&format)
        .unwrap_or_else(|_| "1970-01-01T00:00:00Z".to_owned())
}
