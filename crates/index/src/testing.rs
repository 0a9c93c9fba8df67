//! A repository in memory, for the tests of this crate.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt as _;
use soci_oci::{BlobSource, Descriptor, Digest, FetchClass, FetchContext, FetchError, FetchErrorKind};

use crate::remote::{PushRemote, Remote};

/// Bytes of a blob that are pushed at a time.
const PIECE: usize = 2;

#[derive(Debug, Default)]
pub(crate) struct MemoryRemote {
    pub(crate) content: Mutex<BTreeMap<Digest, Bytes>>,
    pub(crate) referrers: Mutex<Vec<Descriptor>>,
    pub(crate) broken: Mutex<Vec<Digest>>,
    pub(crate) asked: Mutex<Vec<String>>,
}

impl MemoryRemote {
    pub(crate) fn put(&self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.content.lock().unwrap().insert(digest, bytes);
        digest
    }

    pub(crate) fn break_(&self, digest: Digest) {
        self.broken.lock().unwrap().push(digest);
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn get(&self, verb: &str, digest: &Digest) -> Result<Bytes, FetchError> {
        self.asked.lock().unwrap().push(format!("{verb} {digest}"));
        if self.broken.lock().unwrap().contains(digest) {
            return Err(FetchError::new(FetchErrorKind::Unavailable, "503"));
        }
        let content = self.content.lock().unwrap();
        content.get(digest).cloned().ok_or_else(|| FetchError::new(FetchErrorKind::NotFound, "404"))
    }
}

#[async_trait]
impl Remote for MemoryRemote {
    async fn manifest(&self, digest: &Digest, _: &FetchContext) -> Result<Bytes, FetchError> {
        self.get("manifest", digest)
    }

    async fn referrers(
        &self,
        subject: &Digest,
        _: &str,
        _: &FetchContext,
    ) -> Result<Vec<Descriptor>, FetchError> {
        self.asked.lock().unwrap().push(format!("referrers {subject}"));
        if self.broken.lock().unwrap().contains(subject) {
            return Err(FetchError::new(FetchErrorKind::Denied, "401"));
        }
        Ok(self.referrers.lock().unwrap().clone())
    }

    async fn blob(&self, descriptor: &Descriptor, max: u64, _: &FetchContext) -> Result<Bytes, FetchError> {
        assert!(descriptor.size <= max);
        self.get("blob", &descriptor.digest)
    }
}

pub(crate) fn context() -> FetchContext {
    FetchContext::new(Instant::now() + Duration::from_secs(60), FetchClass::OnDemand)
}

#[async_trait]
impl PushRemote for MemoryRemote {
    async fn has_manifest(&self, digest: &Digest, _: &FetchContext) -> Result<bool, FetchError> {
        Ok(self.content.lock().unwrap().contains_key(digest))
    }

    async fn push_blob(
        &self,
        descriptor: &Descriptor,
        source: &dyn BlobSource,
        _: &BTreeMap<String, String>,
        context: &FetchContext,
    ) -> Result<bool, FetchError> {
        if self.has_manifest(&descriptor.digest, context).await? {
            return Ok(false);
        }
        if self.broken.lock().unwrap().contains(&descriptor.digest) {
            return Err(FetchError::new(FetchErrorKind::Unavailable, "503"));
        }
        let mut bytes = Vec::new();
        for start in (0..descriptor.size).step_by(PIECE) {
            let stream = source.open(start..descriptor.size.min(start + PIECE as u64), context).await?;
            let pieces: Vec<Bytes> = stream.try_collect().await?;
            bytes.extend(pieces.concat());
        }
        assert_eq!(self.put(bytes), descriptor.digest);
        Ok(true)
    }

    async fn push_manifest(
        &self,
        object: &str,
        _: &str,
        bytes: Bytes,
        _: &FetchContext,
    ) -> Result<(), FetchError> {
        assert_eq!(self.put(bytes).to_string(), object);
        Ok(())
    }
}
