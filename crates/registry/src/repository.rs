//! One repository of one registry: what other crates call.

use std::sync::Arc;

use soci_oci::{BlobSource, Descriptor, Digest, ImageRef};

use crate::blob::RemoteBlob;
use crate::stack::Session;

/// A repository. Holds names only: hosts and credentials are looked up per request, so it may be kept as long as the image
/// is mounted.
///
/// Methods are spread over the modules `manifest`, `referrers`, `blob` and `push`.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) session: Session,
}

impl Repository {
    pub(crate) fn new(session: Session) -> Self {
        Self { session }
    }

    /// Returns the image on whose behalf requests are made.
    pub fn image(&self) -> &ImageRef {
        &self.session.image
    }

    /// Returns a blob of `size` bytes for ranged reads. Nothing is fetched yet.
    pub fn blob(&self, digest: &Digest, size: u64) -> Arc<dyn BlobSource> {
        Arc::new(RemoteBlob::new(self.session.clone(), *digest, size, Vec::new()))
    }

    /// Returns the blob of a descriptor; where the registry does not have it, the descriptor's own addresses are tried,
    /// without any credential.
    pub fn blob_of(&self, descriptor: &Descriptor) -> Arc<dyn BlobSource> {
        let urls = descriptor.urls.clone();
        Arc::new(RemoteBlob::new(self.session.clone(), descriptor.digest, descriptor.size, urls))
    }
}
