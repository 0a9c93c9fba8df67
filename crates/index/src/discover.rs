//! Which SOCI index an image has.
//!
//! An index that the caller names is used whatever the modes are. Else, with v2 on, the one that the image manifest names;
//! else, with v1 on, one that refers to the image manifest. A registry may list several of those: the newest by its
//! creation annotation is taken, then the smallest digest, so that every node takes the same one; one that does not
//! in truth refer to the manifest is passed over.
//!
//! "There is none" and "could not look" are different errors: the first is final, after the second a later attempt
//! may find one.

use bytes::Bytes;
use soci_oci::manifest::{MAX_MANIFEST_SIZE, ManifestError};
use soci_oci::{
    Descriptor, Digest, DigestError, FetchContext, FetchError, ImageRef, Manifest, annotation, media_type,
};
use soci_store::ContentStore;

use crate::manifest::{IndexError, SociIndex};
use crate::remote::Remote;

/// Referrers that are looked into before giving up: a repository may hold many indexes, none of them usable.
const MAX_REFERRERS: usize = 8;
/// When an artifact was made, as its builder says.
const CREATED: &str = "org.opencontainers.image.created";

/// What to look for.
#[derive(Debug, Clone)]
pub struct DiscoverRequest {
    /// The image, for messages.
    pub image: ImageRef,
    /// The platform's image manifest.
    pub manifest: Digest,
    /// The index to use, if the caller names one.
    pub explicit: Option<Digest>,
    /// Whether an index v1 may be used without being named.
    pub v1: bool,
    /// Whether an index v2 may be used without being named.
    pub v2: bool,
}

/// Why an index is the one to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// The caller named it.
    Explicit,
    /// The image manifest names it.
    Annotation,
    /// It refers to the image manifest.
    Referrer,
}

/// An image's index.
#[derive(Debug, Clone)]
pub struct Discovered {
    /// The index.
    pub index: SociIndex,
    /// The image manifest.
    pub image_manifest: Manifest,
    /// The image manifest's bytes as received.
    pub image_manifest_bytes: Bytes,
    /// Why it is this one.
    pub source: Source,
    /// Whether the index was in local content already.
    pub local: bool,
}

/// No index, or no answer.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// Neither version may be used and none is named.
    #[error("all lazy pull modes are disabled")]
    Disabled,
    /// The image has no index of a version that may be used.
    #[error("no SOCI index found for {image} ({looked})")]
    NoIndex {
        /// The image.
        image: ImageRef,
        /// Where was looked.
        looked: String,
    },
    /// The image manifest could not be fetched.
    #[error("fetching image manifest {digest}")]
    FetchManifest {
        /// The image manifest.
        digest: Digest,
        /// Why not.
        #[source]
        source: FetchError,
    },
    /// The image manifest cannot be read.
    #[error("image manifest {digest}")]
    BadManifest {
        /// The image manifest.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// The annotation of the image manifest is no digest.
    #[error("image manifest {digest}: annotation {}", annotation::INDEX_DIGEST)]
    BadAnnotation {
        /// The image manifest.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// The registry could not be asked for referrers.
    #[error("asking for referrers of {digest}")]
    Referrers {
        /// The image manifest.
        digest: Digest,
        /// Why not.
        #[source]
        source: FetchError,
    },
    /// The index to use could not be fetched.
    #[error("fetching SOCI index {digest}")]
    FetchIndex {
        /// The index.
        digest: Digest,
        /// Why not.
        #[source]
        source: FetchError,
    },
    /// The index to use cannot be read.
    #[error("reading SOCI index {digest}")]
    BadIndex {
        /// The index.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
}

impl DiscoverError {
    /// Whether the image has no index to use, as against not having been able to look.
    pub fn is_no_index(&self) -> bool {
        matches!(self, Self::Disabled | Self::NoIndex { .. })
    }

    /// Returns the fetch that failed, if one did.
    pub fn fetch(&self) -> Option<&FetchError> {
        match self {
            Self::FetchManifest { source, .. }
            | Self::Referrers { source, .. }
            | Self::FetchIndex { source, .. } => Some(source),
            Self::Disabled
            | Self::NoIndex { .. }
            | Self::BadManifest { .. }
            | Self::BadAnnotation { .. }
            | Self::BadIndex { .. } => None,
        }
    }
}

/// Finds the SOCI index of an image, and returns it with the image manifest.
///
/// `local` is asked first for both; it is not written to.
///
/// # Errors
/// [`DiscoverError::is_no_index`] tells whether there is none, or whether it could not be looked for.
pub async fn discover(
    request: &DiscoverRequest,
    remote: &dyn Remote,
    local: Option<&dyn ContentStore>,
    context: &FetchContext,
) -> Result<Discovered, DiscoverError> {
    let finder = Finder { request, remote, local, context };
    match request.explicit {
        Some(digest) => {
            // Neither depends on the other.
            let (image, index) = futures::join!(finder.image(), finder.index(&digest));
            Ok(Found { source: Source::Explicit, index: index? }.with(image?))
        }
        None if !request.v1 && !request.v2 => Err(DiscoverError::Disabled),
        None => {
            let image = finder.image().await?;
            let found = finder.find(&image.0).await?;
            Ok(found.with(image))
        }
    }
}

type Image = (Manifest, Bytes);
type Index = (SociIndex, bool);

struct Found {
    source: Source,
    index: Index,
}

impl Found {
    fn with(self, (image_manifest, image_manifest_bytes): Image) -> Discovered {
        let (index, local) = self.index;
        Discovered { index, image_manifest, image_manifest_bytes, source: self.source, local }
    }
}

struct Finder<'a> {
    request: &'a DiscoverRequest,
    remote: &'a dyn Remote,
    local: Option<&'a dyn ContentStore>,
    context: &'a FetchContext,
}

impl Finder<'_> {
    async fn image(&self) -> Result<Image, DiscoverError> {
        let digest = self.request.manifest;
        let (bytes, _) =
            self.manifest(&digest).await.map_err(|source| DiscoverError::FetchManifest { digest, source })?;
        let manifest =
            Manifest::decode(&bytes).map_err(|source| DiscoverError::BadManifest { digest, source })?;
        Ok((manifest, bytes))
    }

    async fn index(&self, digest: &Digest) -> Result<Index, DiscoverError> {
        let digest = *digest;
        let (bytes, local) =
            self.manifest(&digest).await.map_err(|source| DiscoverError::FetchIndex { digest, source })?;
        let index =
            SociIndex::decode(&digest, bytes).map_err(|source| DiscoverError::BadIndex { digest, source })?;
        Ok((index, local))
    }

    /// Returns verified bytes of a manifest, and whether they were here already.
    async fn manifest(&self, digest: &Digest) -> Result<(Bytes, bool), FetchError> {
        if let Some(store) = self.local {
            match store.read(digest, MAX_MANIFEST_SIZE).await {
                Ok(Some(bytes)) => return Ok((bytes, true)),
                Ok(None) => {}
                // The registry has it as well; a store that is down or damaged costs a request.
                Err(error) => tracing::debug!(%digest, %error, "local content is passed over"),
            }
        }
        Ok((self.remote.manifest(digest, self.context).await?, false))
    }

    async fn find(&self, image: &Manifest) -> Result<Found, DiscoverError> {
        let request = self.request;
        if request.v2
            && let Some(text) = image.annotations.get(annotation::INDEX_DIGEST)
        {
            let digest = text
                .parse()
                .map_err(|source| DiscoverError::BadAnnotation { digest: request.manifest, source })?;
            return Ok(Found { source: Source::Annotation, index: self.index(&digest).await? });
        }
        if request.v1
            && let Some(index) = self.referrer().await?
        {
            return Ok(Found { source: Source::Referrer, index });
        }
        let looked = match (request.v2, request.v1) {
            (true, true) => "its manifest names none and nothing refers to it",
            (true, false) => "its manifest names none",
            (false, _) => "nothing refers to its manifest",
        };
        Err(DiscoverError::NoIndex { image: request.image.clone(), looked: looked.to_owned() })
    }

    async fn referrer(&self) -> Result<Option<Index>, DiscoverError> {
        let subject = self.request.manifest;
        let mut referrers = self
            .remote
            .referrers(&subject, media_type::SOCI_INDEX_V1, self.context)
            .await
            .map_err(|source| DiscoverError::Referrers { digest: subject, source })?;
        order(&mut referrers);
        let mut failed = None;
        for referrer in referrers.iter().take(MAX_REFERRERS) {
            match self.index(&referrer.digest).await {
                Ok((index, local)) => {
                    if index.manifest.subject.as_ref().is_some_and(|of| of.digest == subject) {
                        return Ok(Some((index, local)));
                    }
                    tracing::warn!(index = %referrer.digest, %subject, "listed as a referrer, but refers to other content");
                }
                Err(error) => {
                    tracing::debug!(index = %referrer.digest, %error, "referrer is passed over");
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }
}

/// Newest first; without a date last; then by digest.
fn order(referrers: &mut [Descriptor]) {
    // RFC 3339 in UTC sorts as text; a builder that writes another zone is off by hours at most.
    referrers.sort_by(|one, other| {
        other.annotation(CREATED).cmp(&one.annotation(CREATED)).then_with(|| one.digest.cmp(&other.digest))
    });
}

#[cfg(test)]
mod tests;
