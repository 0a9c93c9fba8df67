//! Which image of a layout is meant.

use serde_json::Value;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{Descriptor, Index, media_type, with_causes};
use soci_store::ContentStore;

use super::StandaloneError;
use super::input::{Input, WorkStore};
use crate::image;
use crate::tree::{self, Kind};

/// Returns the image of the layout: its only manifest, its only index, or all its manifests as one index.
///
/// Manifests that the layout lists but does not hold are left out of an index, as a layout of some platforms only has
/// them; a single image manifest that remains is the image.
pub(super) async fn find(input: &Input, store: &WorkStore) -> Result<Descriptor, StandaloneError> {
    let malformed = |error: &dyn std::fmt::Display| StandaloneError::IndexJson {
        path: input.path().to_owned(),
        reason: error.to_string(),
    };
    let list = Index::decode(input.index()).map_err(|error| malformed(&with_causes(&error)))?;
    let (bytes, listed) = match list.manifests.as_slice() {
        [] => return Err(StandaloneError::NoManifests),
        [only] if media_type::is_index(&only.media_type) => {
            let read = image::read("image index", &only.digest, MAX_MANIFEST_SIZE, store).await;
            (read.map_err(StandaloneError::List)?, Some(only))
        }
        [only] => return Ok(without_names(only)),
        _ => (input.index().clone(), None),
    };
    let mut tree = tree::decode(&bytes).map_err(|error| malformed(&with_causes(&error)))?;
    let Some(Value::Array(entries)) = tree.get_mut("manifests") else {
        return Err(StandaloneError::NothingAvailable);
    };
    let before = entries.len();
    let mut available = Vec::new();
    for entry in std::mem::take(entries) {
        if let Ok(descriptor) = serde_json::from_value::<Descriptor>(entry.clone())
            && store.info(&descriptor.digest).await?.is_some()
        {
            available.push((entry, descriptor));
        }
    }
    let images: Vec<&Descriptor> = available
        .iter()
        .map(|(_, descriptor)| descriptor)
        .filter(|entry| media_type::is_manifest(&entry.media_type) && entry.artifact_type.is_none())
        .collect();
    match (available.as_slice(), images.as_slice(), listed) {
        ([], _, _) => Err(StandaloneError::NothingAvailable),
        ([_], [only], _) => Ok(without_names(only)),
        (_, _, Some(index)) if available.len() == before => Ok(without_names(index)),
        _ => {
            entries.extend(available.into_iter().map(|(entry, _)| entry));
            tree.insert("mediaType".into(), media_type::OCI_INDEX.into());
            let bytes = tree::encode(Kind::Index, &tree);
            let descriptor = Descriptor::of(media_type::OCI_INDEX, &bytes);
            store.put(&descriptor, bytes.into(), &[]).await?;
            Ok(descriptor)
        }
    }
}

/// The annotations of an entry of `index.json` name it in that layout; they are no part of the image.
fn without_names(descriptor: &Descriptor) -> Descriptor {
    Descriptor::new(descriptor.media_type.clone(), descriptor.digest, descriptor.size)
}
