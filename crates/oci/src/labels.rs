//! Labels that containerd, its clients and the snapshotter put on snapshots.

use std::collections::HashMap;

use crate::{Digest, DigestError, ImageRef, RefError};

/// Marks an extraction Prepare; the value is the name to commit under (the chain id).
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// The image reference being pulled.
pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// Digest of the platform's image manifest.
pub const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Digest of the layer being prepared.
pub const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// Digests of this layer and those above, cut at 4,096 bytes: never used to decide anything.
pub const IMAGE_LAYERS: &str = "containerd.io/snapshot/cri.image-layers";
/// Size of the layer's blob in bytes; nerdctl only.
pub const LAYER_SIZE: &str = "containerd.io/snapshot/remote/soci.size";
/// Digest of the SOCI index to use, whatever discovery would find; nerdctl only, may be empty.
pub const INDEX_DIGEST: &str = "containerd.io/snapshot/remote/soci.index.digest";
/// Set by the snapshotter on lazily mounted layers, with the value [`REMOTE_VALUE`].
pub const REMOTE: &str = "containerd.io/snapshot/remote";
/// The value of [`REMOTE`].
pub const REMOTE_VALUE: &str = "remote snapshot";
/// Set by the snapshotter on each target: the namespace of the Prepare.
pub const NAMESPACE: &str = "containerd.io/snapshot/remote/namespace";
/// Set by the snapshotter on layers of an image with a SOCI index.
pub const HAS_INDEX: &str = "containerd.io/snapshot/remote/has.soci.index.digest";
/// User id mappings of the container, `container:host:length[,…]`.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Group id mappings of the container.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// containerd's garbage collector keeps what this label of a root names; a suffix makes several.
pub const GC_REF_CONTENT: &str = "containerd.io/gc.ref.content";
/// Marks content as a root of the garbage collector.
pub const GC_ROOT: &str = "containerd.io/gc.root";

/// What the labels of an extraction Prepare say, parsed once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotLabels {
    /// Name to commit under.
    pub target: String,
    /// The image being pulled.
    pub image: ImageRef,
    /// The platform's image manifest.
    pub manifest: Digest,
    /// The layer.
    pub layer: Digest,
    /// Size of the layer's blob, where the client says it.
    pub layer_size: Option<u64>,
    /// Explicit SOCI index.
    pub explicit_index: Option<Digest>,
}

/// Labels that do not describe a layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// A label that is needed is absent: containerd was not told to pass it.
    #[error(
        "unable to get {what} from labels: {label} is missing; set disable_snapshot_annotations = false in \
         containerd's configuration, or enable_remote_snapshot_annotations for the transfer service"
    )]
    Missing {
        /// What is missing, in words.
        what: &'static str,
        /// The label.
        label: &'static str,
    },
    /// The image reference does not parse.
    #[error("label {IMAGE_REF}")]
    Image(#[source] RefError),
    /// A digest does not parse.
    #[error("label {label}")]
    Digest {
        /// The label.
        label: &'static str,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
}

impl SnapshotLabels {
    /// Parses the labels of a Prepare.
    ///
    /// Returns `None` when it is not an extraction (no [`TARGET`]); an unreadable size is as an absent one.
    ///
    /// # Errors
    /// [`LabelError`] when it is an extraction, but the labels do not name image, manifest and layer.
    pub fn parse(labels: &HashMap<String, String>) -> Option<Result<Self, LabelError>> {
        let target = labels.get(TARGET).filter(|target| !target.is_empty())?.clone();
        Some(Self::parse_target(target, labels))
    }

    fn parse_target(target: String, labels: &HashMap<String, String>) -> Result<Self, LabelError> {
        let get = |label: &'static str, what| {
            let value = labels.get(label).filter(|value| !value.is_empty());
            value.ok_or(LabelError::Missing { what, label })
        };
        let digest = |label: &'static str, what| {
            get(label, what)?.parse().map_err(|source| LabelError::Digest { label, source })
        };
        Ok(Self {
            image: get(IMAGE_REF, "image ref")?.parse().map_err(LabelError::Image)?,
            manifest: digest(MANIFEST_DIGEST, "manifest digest")?,
            layer: digest(LAYER_DIGEST, "layer digest")?,
            layer_size: labels.get(LAYER_SIZE).and_then(|size| size.parse().ok()),
            explicit_index: match labels.get(INDEX_DIGEST).map(String::as_str) {
                None | Some("") => None,
                Some(text) => {
                    Some(text.parse().map_err(|source| LabelError::Digest { label: INDEX_DIGEST, source })?)
                }
            },
            target,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> HashMap<String, String> {
        let digest = Digest::of(b"").to_string();
        [
            (TARGET, "chain"),
            (IMAGE_REF, "reg.example/a:1"),
            (MANIFEST_DIGEST, &digest),
            (LAYER_DIGEST, &digest),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    #[test]
    fn a_prepare_without_target_is_no_extraction() {
        let mut labels = labels();
        labels.remove(TARGET);
        assert_eq!(SnapshotLabels::parse(&labels), None);
    }

    #[test]
    fn an_empty_explicit_index_is_none() {
        let mut labels = labels();
        labels.insert(INDEX_DIGEST.into(), String::new());
        assert_eq!(SnapshotLabels::parse(&labels).unwrap().unwrap().explicit_index, None);
        labels.insert(INDEX_DIGEST.into(), "nonsense".into());
        assert!(matches!(
            SnapshotLabels::parse(&labels).unwrap(),
            Err(LabelError::Digest { label: INDEX_DIGEST, .. })
        ));
    }

    #[test]
    fn a_missing_label_names_the_setting_to_change() {
        let mut labels = labels();
        labels.remove(IMAGE_REF);
        let error = SnapshotLabels::parse(&labels).unwrap().unwrap_err().to_string();
        assert!(error.contains("unable to get image ref from labels"), "{error}");
        assert!(error.contains("disable_snapshot_annotations"), "{error}");
    }
}
