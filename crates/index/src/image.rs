//! The image manifests of an image, as local content has them.

use serde::Deserialize;
use serde_json::{Map, Value};
use soci_oci::manifest::{MAX_MANIFEST_SIZE, ManifestError};
use soci_oci::{Descriptor, Digest, Index, Manifest, Platform, annotation, media_type};
use soci_store::{ContentStore, StoreError};

use crate::tree;

/// The largest image configuration that is read, in bytes.
const MAX_CONFIG_SIZE: u64 = 8 << 20;

/// Which platforms of an image are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Platforms {
    /// The only one of an image that is a single manifest, else this machine's.
    Own,
    /// All that the image has.
    All,
    /// These.
    These(Vec<Platform>),
}

/// An image: a single manifest, or an index of several.
#[derive(Debug, Clone)]
pub struct Image {
    /// What was loaded.
    pub target: Descriptor,
    /// The index as a tree; `None` for a single manifest.
    pub index: Option<Map<String, Value>>,
    /// The image manifests, in the order of the index.
    pub entries: Vec<Entry>,
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its position in the index.
    pub position: usize,
    /// Its descriptor.
    pub descriptor: Descriptor,
    /// The platform it is for, normalised.
    pub platform: Platform,
}

/// An image that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The store failed.
    #[error("reading {what} {digest}")]
    Store {
        /// What it is.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// Why not.
        #[source]
        source: Box<StoreError>,
    },
    /// It is not in local content.
    #[error("{what} {digest}: not found in the content store")]
    Absent {
        /// What it is.
        what: &'static str,
        /// Its digest.
        digest: Digest,
    },
    /// It is no manifest or index.
    #[error("{what} {digest}")]
    Malformed {
        /// What it is.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// It is neither a manifest nor an index.
    #[error("{digest}: media type {media_type:?} is neither an image manifest nor an image index")]
    MediaType {
        /// Its digest.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// There is no image manifest for any platform.
    #[error("image does not support any platforms")]
    NoPlatforms,
    /// There is no image manifest for this platform.
    #[error("image manifest for {platform}: {digest} has none: not found")]
    NoPlatform {
        /// The platform asked for.
        platform: Box<Platform>,
        /// The image.
        digest: Digest,
    },
}

/// The members of an image configuration that say what it is for.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default, rename = "os.version")]
    os_version: Option<String>,
}

/// Returns verified content that must be there.
pub(crate) async fn read(
    what: &'static str,
    digest: &Digest,
    max: u64,
    store: &dyn ContentStore,
) -> Result<bytes::Bytes, ImageError> {
    let found = store.read(digest, max).await;
    let found =
        found.map_err(|source| ImageError::Store { what, digest: *digest, source: Box::new(source) })?;
    found.ok_or(ImageError::Absent { what, digest: *digest })
}

/// Reads and decodes an image manifest.
pub(crate) async fn manifest(
    digest: &Digest,
    store: &dyn ContentStore,
) -> Result<(Manifest, bytes::Bytes), ImageError> {
    let what = "image manifest";
    let bytes = read(what, digest, MAX_MANIFEST_SIZE, store).await?;
    let manifest =
        Manifest::decode(&bytes).map_err(|source| ImageError::Malformed { what, digest: *digest, source })?;
    Ok((manifest, bytes))
}

impl Image {
    /// Reads the image that `target` names. Its index, or its only manifest and configuration, must be in `store`.
    ///
    /// Entries that are no images (SOCI indexes, attestations, other artifacts, unknown platforms) are left out.
    ///
    /// # Errors
    /// When it is not there, or is no image.
    pub async fn load(target: &Descriptor, store: &dyn ContentStore) -> Result<Self, ImageError> {
        let digest = target.digest;
        if media_type::is_manifest(&target.media_type) {
            let platform = platform_of(&digest, store).await?;
            let entries =
                platform.map(|platform| Entry { position: 0, descriptor: target.clone(), platform });
            return Ok(Self { target: target.clone(), index: None, entries: entries.into_iter().collect() });
        }
        if !media_type::is_index(&target.media_type) {
            let media_type = target.media_type.chars().take(120).collect();
            return Err(ImageError::MediaType { digest, media_type });
        }
        let what = "image index";
        let bytes = read(what, &digest, MAX_MANIFEST_SIZE, store).await?;
        let malformed = |source| ImageError::Malformed { what, digest, source };
        let index = Index::decode(&bytes).map_err(malformed)?;
        let tree = tree::decode(&bytes).map_err(malformed)?;
        let mut entries = Vec::new();
        for (position, descriptor) in index.manifests.into_iter().enumerate() {
            if !is_image(&descriptor) {
                continue;
            }
            let platform = match &descriptor.platform {
                Some(platform) => Some(platform.normalized()),
                // Only its configuration tells; if that is not here it cannot be chosen by platform.
                None => platform_of(&descriptor.digest, store).await.ok().flatten(),
            };
            if let Some(platform) = platform.filter(|platform| !platform.is_unknown()) {
                entries.push(Entry { position, descriptor, platform });
            }
        }
        Ok(Self { target: target.clone(), index: Some(tree), entries })
    }

    /// Returns the image manifest for `platform`, the first one where there are several.
    pub fn entry(&self, platform: &Platform) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.platform.matches(platform))
    }

    /// Returns the entries for `platforms`, each with the platform asked for, normalised and without repetition.
    ///
    /// # Errors
    /// [`ImageError::NoPlatform`] when one of them is missing, [`ImageError::NoPlatforms`] when the image has none.
    pub fn select(&self, platforms: &Platforms) -> Result<Vec<(Platform, &Entry)>, ImageError> {
        if self.entries.is_empty() {
            return Err(ImageError::NoPlatforms);
        }
        let wanted: Vec<Platform> = match platforms {
            Platforms::Own if self.index.is_none() => {
                self.entries.iter().map(|entry| entry.platform.clone()).collect()
            }
            Platforms::Own => vec![Platform::host()],
            Platforms::All => self.entries.iter().map(|entry| entry.platform.clone()).collect(),
            Platforms::These(these) => these.iter().map(Platform::normalized).collect(),
        };
        let mut selected: Vec<(Platform, &Entry)> = Vec::new();
        for platform in wanted {
            if selected.iter().any(|(seen, _)| *seen == platform) {
                continue;
            }
            let absent = || ImageError::NoPlatform {
                platform: Box::new(platform.clone()),
                digest: self.target.digest,
            };
            let entry = self.entry(&platform).ok_or_else(absent)?;
            selected.push((platform, entry));
        }
        Ok(selected)
    }
}

/// Whether an entry of an index is an image manifest, as far as the entry tells.
fn is_image(entry: &Descriptor) -> bool {
    media_type::is_manifest(&entry.media_type)
        && entry.artifact_type.as_deref().unwrap_or_default().is_empty()
        && entry.annotation(annotation::DOCKER_REFERENCE_TYPE).is_none()
        && !entry.platform.as_ref().is_some_and(Platform::is_unknown)
}

/// Returns the platform that the configuration of an image manifest names; `None` when it is no image's.
async fn platform_of(digest: &Digest, store: &dyn ContentStore) -> Result<Option<Platform>, ImageError> {
    let (manifest, _) = manifest(digest, store).await?;
    if !media_type::is_image_config(&manifest.config.media_type) {
        return Ok(None);
    }
    let what = "image configuration";
    let digest = manifest.config.digest;
    let bytes = read(what, &digest, MAX_CONFIG_SIZE, store).await?;
    platform_in(&bytes).map_err(|source| ImageError::Malformed {
        what,
        digest,
        source: ManifestError::Malformed(source),
    })
}

/// Returns the platform that an image configuration names.
pub(crate) fn platform_in(config: &[u8]) -> Result<Option<Platform>, serde_json::Error> {
    let config: Config = serde_json::from_slice(config)?;
    if config.os.is_empty() || config.architecture.is_empty() {
        return Ok(None);
    }
    let mut platform = Platform::new(&config.os, &config.architecture, config.variant.as_deref());
    platform.os_version = config.os_version.filter(|version| !version.is_empty());
    Ok(Some(platform))
}
