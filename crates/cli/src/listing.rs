//! What the listings are derived from: the indexes of the content store, and the images of containerd that they belong to.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use soci_index::{Image, SociIndex};
use soci_oci::{Descriptor, Digest, Platform, annotation, media_type};
use soci_store::{ContentInfo, ContentStore};

use crate::app::App;

/// An index of the content store.
pub(crate) struct Index {
    pub(crate) index: SociIndex,
    pub(crate) created: Option<SystemTime>,
}

/// Returns all indexes, newest first.
pub(crate) async fn indexes(store: &dyn ContentStore) -> anyhow::Result<Vec<Index>> {
    let found = soci_index::manifest::stored_indexes(store).await?;
    let mut all: Vec<Index> = found.into_iter().map(|(index, created)| Index { index, created }).collect();
    all.sort_by(|one, other| {
        other.created.cmp(&one.created).then_with(|| one.index.digest.cmp(&other.index.digest))
    });
    Ok(all)
}

/// An image of containerd and what of it SOCI indexes can belong to.
#[derive(Debug, Clone)]
pub(crate) struct ImageFacts {
    pub(crate) name: String,
    /// Platform by image manifest.
    pub(crate) manifests: BTreeMap<Digest, Platform>,
    /// Platform by SOCI index v2 that the image holds.
    pub(crate) indexes: BTreeMap<Digest, Option<Platform>>,
}

impl ImageFacts {
    pub(crate) fn new(name: &str, image: &Image) -> Self {
        let manifests =
            image.entries.iter().map(|entry| (entry.descriptor.digest, entry.platform.clone())).collect();
        let entries = image.index.as_ref().and_then(|index| index.get("manifests"));
        let entries: Vec<Descriptor> =
            entries.and_then(|entries| serde_json::from_value(entries.clone()).ok()).unwrap_or_default();
        let indexes = entries
            .into_iter()
            .filter(|entry| entry.artifact_type.as_deref() == Some(media_type::SOCI_INDEX_V2))
            .map(|entry| (entry.digest, entry.platform.map(|platform| platform.normalized())))
            .collect();
        Self { name: name.to_owned(), manifests, indexes }
    }

    /// Whether `index` belongs to the image, and to which of its platforms.
    pub(crate) fn holds(&self, index: &SociIndex) -> Option<Option<Platform>> {
        match &index.manifest.subject {
            Some(subject) => self.manifests.get(&subject.digest).map(|platform| Some(platform.clone())),
            None => self.indexes.get(&index.digest).cloned(),
        }
    }
}

/// Returns what is known of all images. Images that cannot be read, because they were pulled in part, are left out.
pub(crate) async fn images(app: &App) -> anyhow::Result<Vec<ImageFacts>> {
    let mut all = Vec::new();
    for image in app.containerd().images().list().await? {
        match app.load(&image).await {
            Ok(loaded) => all.push(ImageFacts::new(&image.name, &loaded)),
            Err(error) => tracing::debug!(image = image.name, %error, "image is left out"),
        }
    }
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(all)
}

/// A zTOC or prefetch artifact of the content store.
#[derive(Debug, Clone)]
pub(crate) struct Artifact {
    pub(crate) info: ContentInfo,
    pub(crate) layer: Digest,
}

/// Returns the artifacts of `kind` that are in the store, by digest: those that an index names, and zTOCs that were built
/// here though no index names them any more.
pub(crate) async fn artifacts(store: &dyn ContentStore, kind: &str) -> anyhow::Result<Vec<Artifact>> {
    let mut present: HashMap<Digest, ContentInfo> =
        store.walk().await?.into_iter().map(|info| (info.digest, info)).collect();
    let mut all = BTreeMap::new();
    for Index { index, .. } in indexes(store).await? {
        for descriptor in index.manifest.layers.iter().filter(|descriptor| descriptor.media_type == kind) {
            if let Some(layer) = SociIndex::layer(descriptor)
                && let Some(info) = present.remove(&descriptor.digest)
            {
                all.insert(descriptor.digest, Artifact { info, layer });
            }
        }
    }
    if kind == media_type::ZTOC {
        for (digest, info) in present {
            let layer = info.labels.get(annotation::LAYER_DIGEST).and_then(|text| text.parse().ok());
            if let Some(layer) = layer {
                all.insert(digest, Artifact { info, layer });
            }
        }
    }
    Ok(all.into_values().collect())
}
