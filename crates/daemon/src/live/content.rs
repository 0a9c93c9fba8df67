//! Content that is on this machine already, in the order in which it is asked: containerd's, then our own store's.
//!
//! What containerd has is used whatever the registry says, so that an imported image works with the registry away. Nothing
//! is written here: what a mount needs is kept by [`super::ztocs`], with the mount's lifetime.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use soci_oci::{BlobSource, BlobStream, Descriptor, Digest};
use soci_store::{ContentInfo, ContentStore, StoreError};

/// Several stores as one that is only read.
#[derive(Debug, Clone)]
pub struct LocalContent(Vec<Arc<dyn ContentStore>>);

impl LocalContent {
    /// Returns the content of `stores`, asked in this order.
    pub fn new(stores: Vec<Arc<dyn ContentStore>>) -> Self {
        Self(stores)
    }
}

macro_rules! first {
    ($self:ident, $store:ident => $call:expr) => {{
        for $store in &$self.0 {
            match $call.await {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) => {}
                // containerd may be down or restarting; the next store, and the registry after it, may know better.
                Err(error) => tracing::debug!(%error, "local content is passed over"),
            }
        }
        Ok(None)
    }};
}

#[async_trait]
impl ContentStore for LocalContent {
    async fn info(&self, digest: &Digest) -> Result<Option<ContentInfo>, StoreError> {
        first!(self, store => store.info(digest))
    }

    async fn read(&self, digest: &Digest, max: u64) -> Result<Option<Bytes>, StoreError> {
        first!(self, store => store.read(digest, max))
    }

    async fn source(&self, digest: &Digest) -> Result<Option<(Arc<dyn BlobSource>, u64)>, StoreError> {
        first!(self, store => store.source(digest))
    }

    async fn put(&self, _: &Descriptor, _: Bytes, _: &[(String, String)]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn put_stream(
        &self,
        _: &Descriptor,
        _: BlobStream,
        _: &[(String, String)],
    ) -> Result<(), StoreError> {
        Ok(())
    }

    async fn label(&self, _: &Digest, _: &[(String, String)]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn delete(&self, _: &Digest) -> Result<bool, StoreError> {
        Ok(false)
    }

    async fn walk(&self) -> Result<Vec<ContentInfo>, StoreError> {
        Ok(Vec::new())
    }

    async fn find(&self, _: &str, _: &str) -> Result<Vec<ContentInfo>, StoreError> {
        Ok(Vec::new())
    }
}
