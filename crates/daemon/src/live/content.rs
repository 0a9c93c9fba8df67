//! Content that is on this machine already, in the order in which it is asked: the zTOCs of mounted layers, containerd's
//! content, then our own store's.
//!
//! What containerd has is used whatever the registry says, so that an imported image works with the registry away. Nothing
//! is written here: what a mount needs is kept by [`super::ztocs`], with the mount's lifetime.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use soci_oci::{
    BlobSource, BlobStream, Descriptor, Digest, FetchContext, FetchError, FetchErrorKind, Manifest,
};
use soci_store::{ContentInfo, ContentStore, StoreError};

use super::ztocs::Ztocs;

/// How long it is remembered that a blob is not on this machine.
const ABSENT: Duration = Duration::from_secs(300);
/// How long looking may take: the registry has the blob as well.
const LOOK: Duration = Duration::from_secs(2);

/// Several stores as one that is only read.
#[derive(Debug, Clone)]
pub struct LocalContent {
    /// A new tag of an image has most of its layers mounted already.
    ztocs: Arc<Ztocs>,
    stores: Vec<Arc<dyn ContentStore>>,
}

impl LocalContent {
    /// Returns the zTOCs and the content of `stores`, asked in this order.
    pub fn new(ztocs: Arc<Ztocs>, stores: Vec<Arc<dyn ContentStore>>) -> Self {
        Self { ztocs, stores }
    }

    /// Returns a zTOC that is kept for a mount, if it is one and sound.
    async fn ztoc(&self, digest: &Digest, max: u64) -> Option<Bytes> {
        let (ztocs, digest) = (Arc::clone(&self.ztocs), *digest);
        let reading = tokio::task::spawn_blocking(move || ztocs.read(&digest, max));
        match reading.await.ok()? {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(%error, ztoc = %digest, "a stored zTOC is passed over");
                None
            }
        }
    }
}

macro_rules! first {
    ($self:ident, $store:ident => $call:expr) => {{
        for $store in &$self.stores {
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
        if let Some(ztoc) = self.ztoc(digest, max).await {
            return Ok(Some(ztoc));
        }
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

/// Whether every layer of `manifest` and its configuration are in `content`: then the image needs no registry.
pub async fn has_all(content: &dyn ContentStore, manifest: &Manifest) -> bool {
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        match content.info(&blob.digest).await {
            Ok(Some(info)) if info.size == blob.size => {}
            _ => return false,
        }
    }
    true
}

/// A blob that may be on this machine, looked for when it is read: it may come, and containerd may collect it.
#[derive(Debug)]
pub struct LocalBlob {
    content: LocalContent,
    digest: Digest,
    size: u64,
    /// Until when it is taken to be absent.
    absent: Mutex<Option<Instant>>,
}

impl LocalBlob {
    /// Returns the blob `digest` of `content`, of `size` bytes. Nothing is asked yet.
    pub fn new(content: LocalContent, digest: Digest, size: u64) -> Self {
        Self { content, digest, size, absent: Mutex::new(None) }
    }
}

#[async_trait]
impl BlobSource for LocalBlob {
    async fn open(&self, range: Range<u64>, context: &FetchContext) -> Result<BlobStream, FetchError> {
        let missing = || {
            FetchError::new(FetchErrorKind::NotFound, format!("blob {} is not on this machine", self.digest))
        };
        if self.absent.lock().is_some_and(|until| until > Instant::now()) {
            return Err(missing());
        }
        let found = tokio::time::timeout(LOOK, self.content.source(&self.digest)).await;
        match found {
            Ok(Ok(Some((source, size)))) if size == self.size => source.open(range, context).await,
            _ => {
                *self.absent.lock() = Some(Instant::now() + ABSENT);
                Err(missing())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use soci_oci::FetchClass;
    use soci_store::LocalStore;

    use super::*;

    #[tokio::test]
    async fn a_blob_is_read_once_it_is_there_and_missing_before() {
        let root = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::open(root.path()).unwrap());
        let ztocs = Arc::new(Ztocs::open(root.path()).unwrap());
        let content = LocalContent::new(ztocs, vec![store.clone() as Arc<dyn ContentStore>]);
        let bytes = Bytes::from_static(b"0123456789");
        let descriptor = Descriptor::of("application/octet-stream", &bytes);
        let context = FetchContext::new(Instant::now() + Duration::from_secs(20), FetchClass::OnDemand);
        let blob = LocalBlob::new(content.clone(), descriptor.digest, descriptor.size);
        let error = blob.open(2..5, &context).await.err().unwrap();
        assert_eq!(error.kind(), FetchErrorKind::NotFound);
        store.put(&descriptor, bytes, &[]).await.unwrap();
        assert!(blob.open(2..5, &context).await.is_err(), "it is not looked for at each read");
        *blob.absent.lock() = Some(Instant::now());
        let pieces: Vec<Bytes> = blob.open(2..5, &context).await.unwrap().try_collect().await.unwrap();
        assert_eq!(pieces.concat(), b"234");
        let other = LocalBlob::new(content, descriptor.digest, 11);
        assert!(other.open(0..1, &context).await.is_err(), "of another size");
    }
}
