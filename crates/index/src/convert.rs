//! Makes an image lazily loadable: builds indexes v2 and binds them to the image's manifests.
//!
//! The result always is an OCI index. Only the manifests that get an index are rewritten; everything else in the image,
//! artifacts of other tools and platforms included, keeps its digest, and members of documents that this program does
//! not know are kept. Converting the result again gives the same result.

use std::collections::HashMap;

use bytes::Bytes;
use serde_json::{Map, Value, json};
use soci_oci::manifest::{MAX_MANIFEST_SIZE, ManifestError};
use soci_oci::{Descriptor, Digest, Platform, annotation, labels, media_type};
use soci_store::StoreError;

use crate::build::{self, BuildError, BuildOptions, Observer, Stores};
use crate::image::{self, Entry, Image, ImageError, Platforms};
use crate::manifest::SociIndex;
use crate::tree::{self, Kind};

/// A converted image.
#[derive(Debug, Clone)]
pub struct Converted {
    /// The new image: an OCI index.
    pub target: Descriptor,
    /// The SOCI index of each platform that has one.
    pub indexes: Vec<(Platform, SociIndex)>,
}

/// A conversion that failed.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The image cannot be read, or lacks a platform.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An index could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The result could not be stored.
    #[error("storing the converted image")]
    Store(#[from] StoreError),
    /// The result is too large to be a manifest.
    #[error("converted {what} of {size} bytes is over the limit of {MAX_MANIFEST_SIZE} bytes")]
    TooLarge {
        /// Manifest or index.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
    },
}

/// Converts the image `target` of `stores.image` and stores the result there; SOCI artifacts go to `stores.artifacts`.
///
/// # Errors
/// When the image is not in the store with the platforms asked for, or no platform gets an index.
pub async fn convert(
    target: &Descriptor,
    platforms: &Platforms,
    stores: &Stores,
    options: &BuildOptions,
    observer: &dyn Observer,
) -> Result<Converted, ConvertError> {
    let image = Image::load(target, &*stores.image).await?;
    let mut index = match &image.index {
        Some(index) => index.clone(),
        None => single(&image),
    };
    let mut indexes = Vec::new();
    let mut soci_entries = Vec::new();
    let mut renamed = HashMap::new();
    for (platform, entry) in image.select(platforms)? {
        let (manifest, bytes) = image::manifest(&entry.descriptor.digest, &*stores.image).await?;
        if *platforms == Platforms::All && !media_type::is_image_config(&manifest.config.media_type) {
            continue;
        }
        let soci = match build::build(&manifest, None, stores, options, observer).await {
            Ok(soci) => soci,
            Err(BuildError::Empty) => continue,
            Err(error) => return Err(error.into()),
        };
        let rewritten = rewrite(entry, &bytes, &soci, stores).await?;
        renamed.insert(entry.descriptor.digest, rewritten.digest);
        change(&mut index, entry.position, |members| bind(members, &rewritten));
        soci_entries.push((entry.descriptor.digest, soci_entry(&soci, &platform, &rewritten.digest)));
        indexes.push((platform, soci));
    }
    if indexes.is_empty() {
        return Err(BuildError::Empty.into());
    }
    finish(&mut index, soci_entries, &renamed);
    let target = store_index(&index, stores).await?;
    Ok(Converted { target, indexes })
}

/// Returns an index that holds the single manifest of `image`.
fn single(image: &Image) -> Map<String, Value> {
    let mut index = Map::new();
    index.insert("schemaVersion".into(), json!(2));
    let entry = image.entries.iter().map(|entry| {
        json!({
            "mediaType": entry.descriptor.media_type,
            "digest": entry.descriptor.digest,
            "size": entry.descriptor.size,
            "platform": entry.platform,
        })
    });
    index.insert("manifests".into(), entry.collect());
    index
}

/// Changes the entry of `index` at `position`, if it is an object.
fn change(index: &mut Map<String, Value>, position: usize, change: impl FnOnce(&mut Map<String, Value>)) {
    let entry = index.get_mut("manifests").and_then(|list| list.get_mut(position));
    if let Some(members) = entry.and_then(Value::as_object_mut) {
        change(members);
    }
}

/// Stores the image manifest with the annotation that binds it to `soci`; returns its descriptor, annotations included.
async fn rewrite(
    entry: &Entry,
    bytes: &[u8],
    soci: &SociIndex,
    stores: &Stores,
) -> Result<Descriptor, ConvertError> {
    let malformed = |source: ManifestError| ImageError::Malformed {
        what: "image manifest",
        digest: entry.descriptor.digest,
        source,
    };
    let mut manifest = tree::decode(bytes).map_err(malformed)?;
    manifest.insert("mediaType".into(), media_type::OCI_MANIFEST.into());
    tree::edit(&mut manifest, "config", |config| {
        config.insert("mediaType".into(), media_type::OCI_CONFIG.into());
    });
    tree::edit(&mut manifest, "annotations", |annotations| {
        annotations.insert(annotation::INDEX_DIGEST.into(), soci.digest.to_string().into());
    });
    let bytes = Bytes::from(tree::encode(Kind::Manifest, &manifest));
    if bytes.len() as u64 > MAX_MANIFEST_SIZE {
        return Err(ConvertError::TooLarge { what: "image manifest", size: bytes.len() });
    }
    let decoded = soci_oci::Manifest::decode(&bytes).map_err(malformed)?;
    let prefix = labels::GC_REF_CONTENT;
    let config = (format!("{prefix}.config"), decoded.config.digest.to_string());
    let layers = decoded.layers.iter().enumerate();
    let layers = layers.map(|(at, layer)| (format!("{prefix}.l.{at}"), layer.digest.to_string()));
    let labels: Vec<(String, String)> = std::iter::once(config).chain(layers).collect();
    let mut descriptor = Descriptor::of(media_type::OCI_MANIFEST, &bytes);
    stores.image.put(&descriptor, bytes, &labels).await?;
    descriptor.annotations = decoded.annotations;
    Ok(descriptor)
}

/// Makes an entry of the index describe the rewritten manifest. Annotations it had stay, unless the manifest has others.
fn bind(entry: &mut Map<String, Value>, rewritten: &Descriptor) {
    entry.insert("mediaType".into(), rewritten.media_type.clone().into());
    entry.insert("digest".into(), rewritten.digest.to_string().into());
    entry.insert("size".into(), rewritten.size.into());
    tree::edit(entry, "annotations", |annotations| {
        for (key, value) in &rewritten.annotations {
            annotations.insert(key.clone(), value.clone().into());
        }
    });
}

fn soci_entry(soci: &SociIndex, platform: &Platform, manifest: &Digest) -> Value {
    json!({
        "mediaType": media_type::OCI_MANIFEST,
        "digest": soci.digest,
        "size": soci.bytes.len(),
        "annotations": { annotation::IMAGE_MANIFEST_DIGEST: manifest },
        "platform": platform,
        "artifactType": soci.version.media_type(),
    })
}

/// Puts the entries of SOCI indexes into `index`, each with the manifest that it was built for, as it was named before,
/// and lets what refers to a rewritten manifest refer to its new digest.
fn finish(
    index: &mut Map<String, Value>,
    soci_entries: Vec<(Digest, Value)>,
    renamed: &HashMap<Digest, Digest>,
) {
    index.insert("mediaType".into(), media_type::OCI_INDEX.into());
    let Some(Value::Array(entries)) = index.get_mut("manifests") else { return };
    for entry in entries.iter_mut() {
        let reference = entry.pointer_mut(&format!("/annotations/{}", annotation::DOCKER_REFERENCE_DIGEST));
        if let Some(reference) = reference
            && let Some(new) = reference
                .as_str()
                .and_then(|text| text.parse().ok())
                .and_then(|old: Digest| renamed.get(&old))
        {
            *reference = new.to_string().into();
        }
    }
    for (manifest, new) in soci_entries {
        match entries.iter_mut().find(|entry| is_index_of(entry, &manifest, &new)) {
            Some(entry) => *entry = new,
            None => entries.push(new),
        }
    }
}

/// Whether an entry is the SOCI index that `new`, built for `manifest`, takes the place of.
fn is_index_of(entry: &Value, manifest: &Digest, new: &Value) -> bool {
    let Ok(entry) = serde_json::from_value::<Descriptor>(entry.clone()) else { return false };
    let Ok(new) = serde_json::from_value::<Descriptor>(new.clone()) else { return false };
    entry.artifact_type == new.artifact_type
        && (entry.annotation(annotation::IMAGE_MANIFEST_DIGEST) == Some(&manifest.to_string())
            || matches!((&entry.platform, &new.platform), (Some(old), Some(new)) if old.matches(new)))
}

async fn store_index(index: &Map<String, Value>, stores: &Stores) -> Result<Descriptor, ConvertError> {
    let bytes = Bytes::from(tree::encode(Kind::Index, index));
    if bytes.len() as u64 > MAX_MANIFEST_SIZE {
        return Err(ConvertError::TooLarge { what: "image index", size: bytes.len() });
    }
    let entries = index.get("manifests").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let digests = entries.iter().filter_map(|entry| entry.get("digest").and_then(Value::as_str));
    let prefix = labels::GC_REF_CONTENT;
    let labels: Vec<(String, String)> =
        digests.enumerate().map(|(at, digest)| (format!("{prefix}.m.{at}"), digest.to_owned())).collect();
    let descriptor = Descriptor::of(media_type::OCI_INDEX, &bytes);
    stores.image.put(&descriptor, bytes, &labels).await?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests;
