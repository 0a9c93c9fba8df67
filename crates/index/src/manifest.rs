//! The SOCI index manifest: what it says, and its exact bytes.

use bytes::Bytes;
use soci_oci::manifest::ManifestError;
use soci_oci::{Descriptor, Digest, Manifest, annotation, media_type};
use soci_store::ContentStore;

/// The content of the configuration that every SOCI index names.
pub const EMPTY_CONFIG: &[u8] = b"{}";

/// Which of the two kinds a SOCI index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IndexVersion {
    /// Has a subject, the image manifest, and is found by asking the registry for its referrers.
    V1,
    /// Has no subject; the image manifest names it by an annotation.
    V2,
}

impl IndexVersion {
    /// Returns the media type of the configuration, which also is the artifact type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::V1 => media_type::SOCI_INDEX_V1,
            Self::V2 => media_type::SOCI_INDEX_V2,
        }
    }

    /// Returns `v1` or `v2`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

/// A SOCI index, with the bytes its digest was taken of.
#[derive(Debug, Clone)]
pub struct SociIndex {
    /// Digest of [`bytes`](Self::bytes).
    pub digest: Digest,
    /// Its kind.
    pub version: IndexVersion,
    /// What it says.
    pub manifest: Manifest,
    /// Its bytes as received or written.
    pub bytes: Bytes,
}

/// Content that is not a usable SOCI index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The bytes are not those the digest names.
    #[error("SOCI index {wanted}: its bytes are those of {found}")]
    Digest {
        /// The digest asked for.
        wanted: Digest,
        /// The digest of the bytes.
        found: String,
    },
    /// Not a manifest.
    #[error("SOCI index {digest}")]
    Manifest {
        /// The digest of the index.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// A manifest of something else.
    #[error("unknown index version: {media_type}")]
    Version {
        /// Media type of its configuration.
        media_type: String,
    },
}

impl SociIndex {
    /// Decodes an index and checks that `bytes` are those of `digest`.
    ///
    /// # Errors
    /// When they are not, or are no SOCI index.
    pub fn decode(digest: &Digest, bytes: Bytes) -> Result<Self, IndexError> {
        let mut hasher = digest.hasher();
        hasher.update(&bytes);
        let found = hasher.finish();
        if found != *digest {
            return Err(IndexError::Digest { wanted: *digest, found: found.to_string() });
        }
        let manifest =
            Manifest::decode(&bytes).map_err(|source| IndexError::Manifest { digest: *digest, source })?;
        let version = match manifest.config.media_type.as_str() {
            media_type::SOCI_INDEX_V1 => IndexVersion::V1,
            media_type::SOCI_INDEX_V2 => IndexVersion::V2,
            other => {
                return Err(IndexError::Version { media_type: other.chars().take(120).collect() });
            }
        };
        Ok(Self { digest: *digest, version, manifest, bytes })
    }

    /// Returns the index of these artifacts: zTOCs, then prefetch artifacts, each in the order of the image's layers.
    ///
    /// It is of version 1 with a `subject`, else of version 2.
    pub fn new(artifacts: Vec<Descriptor>, subject: Option<&Descriptor>) -> Self {
        let version = if subject.is_some() { IndexVersion::V1 } else { IndexVersion::V2 };
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            artifact_type: None, // the Go snapshotter cannot store an index that has it
            config: Descriptor::of(version.media_type(), EMPTY_CONFIG),
            layers: artifacts,
            subject: subject.map(|of| Descriptor::new(of.media_type.clone(), of.digest, of.size)),
            annotations: [(annotation::BUILD_TOOL.to_owned(), annotation::BUILD_TOOL_VALUE.to_owned())]
                .into(),
        };
        let bytes = Bytes::from(manifest.encode());
        Self { digest: Digest::of(&bytes), version, manifest, bytes }
    }

    /// Returns the descriptor of the index manifest: media type, digest and size.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(media_type::OCI_MANIFEST, self.digest, self.bytes.len() as u64)
    }

    /// Returns the zTOC of `layer`. Where the index names several, the last one counts.
    pub fn ztoc(&self, layer: &Digest) -> Option<&Descriptor> {
        self.of_layer(layer, media_type::ZTOC).last()
    }

    /// Returns the prefetch artifact of `layer`. Where the index names several, the first one counts.
    pub fn prefetch(&self, layer: &Digest) -> Option<&Descriptor> {
        self.of_layer(layer, media_type::SOCI_PREFETCH).next()
    }

    fn of_layer(&self, layer: &Digest, media_type: &'static str) -> impl Iterator<Item = &Descriptor> {
        let layer = *layer;
        self.manifest
            .layers
            .iter()
            .filter(move |of| of.media_type == media_type && Self::layer(of) == Some(layer))
    }

    /// Returns the layer that an artifact of an index belongs to.
    pub fn layer(artifact: &Descriptor) -> Option<Digest> {
        artifact.annotation(annotation::LAYER_DIGEST)?.parse().ok()
    }

    /// Whether `ztoc` says that its layer needs no extended attributes. A value that is no boolean says it does.
    pub fn disable_xattrs(ztoc: &Descriptor) -> bool {
        matches!(
            ztoc.annotation(annotation::DISABLE_XATTRS),
            Some("1" | "t" | "T" | "TRUE" | "true" | "True")
        )
    }

    /// Returns the labels by which containerd's garbage collector keeps configuration and artifacts with the index.
    pub fn gc_labels(&self) -> Vec<(String, String)> {
        let prefix = soci_oci::labels::GC_REF_CONTENT;
        let config = (format!("{prefix}.config"), self.manifest.config.digest.to_string());
        let layers = self.manifest.layers.iter().enumerate();
        let layers = layers.map(|(at, layer)| (format!("{prefix}.ztoc.{at}"), layer.digest.to_string()));
        std::iter::once(config).chain(layers).collect()
    }
}

/// Returns all SOCI indexes of `store`, each with when it was stored. Content that cannot be read or is none is left out.
///
/// # Errors
/// When the store cannot be listed.
pub async fn stored_indexes(
    store: &dyn ContentStore,
) -> Result<Vec<(SociIndex, Option<std::time::SystemTime>)>, soci_store::StoreError> {
    let mut indexes = Vec::new();
    for info in store.index_candidates().await? {
        match store.read(&info.digest, soci_oci::manifest::MAX_MANIFEST_SIZE).await {
            Ok(Some(bytes)) => {
                if let Ok(index) = SociIndex::decode(&info.digest, bytes) {
                    indexes.push((index, info.created));
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(digest = %info.digest, %error, "content left out"),
        }
    }
    Ok(indexes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(kind: &str, layer: &Digest, content: &[u8]) -> Descriptor {
        let mut descriptor = Descriptor::of(kind, content);
        descriptor.annotations.insert(annotation::LAYER_DIGEST.into(), layer.to_string());
        descriptor
    }

    #[test]
    fn the_version_follows_the_subject_and_survives_decoding() {
        let subject = Descriptor::of(media_type::OCI_MANIFEST, b"manifest");
        for (subject, version) in [(Some(&subject), IndexVersion::V1), (None, IndexVersion::V2)] {
            let index = SociIndex::new(Vec::new(), subject);
            let decoded = SociIndex::decode(&index.digest, index.bytes.clone()).unwrap();
            assert_eq!((index.version, decoded.version), (version, version));
            assert_eq!(decoded.manifest, index.manifest);
            assert_eq!(decoded.manifest.artifact_type, None);
        }
    }

    #[test]
    fn a_subject_carries_neither_platform_nor_annotations() {
        let mut subject = Descriptor::of(media_type::OCI_MANIFEST, b"manifest");
        subject.platform = Some(soci_oci::Platform::host());
        subject.annotations.insert("a".into(), "b".into());
        let index = SociIndex::new(Vec::new(), Some(&subject));
        assert_eq!(index.manifest.subject, Some(Descriptor::of(media_type::OCI_MANIFEST, b"manifest")));
    }

    #[test]
    fn artifacts_are_matched_by_type_and_layer() {
        let (layer, other) = (Digest::of(b"layer"), Digest::of(b"other"));
        let artifacts = vec![
            artifact(media_type::ZTOC, &layer, b"1"),
            artifact(media_type::ZTOC, &layer, b"2"),
            artifact(media_type::ZTOC, &other, b"3"),
            artifact(media_type::SOCI_PREFETCH, &layer, b"4"),
            artifact(media_type::SOCI_PREFETCH, &layer, b"5"),
            artifact("text/plain", &layer, b"6"),
        ];
        let index = SociIndex::new(artifacts, None);
        assert_eq!(index.ztoc(&layer).unwrap().digest, Digest::of(b"2"));
        assert_eq!(index.prefetch(&layer).unwrap().digest, Digest::of(b"4"));
        assert_eq!(index.prefetch(&other), None);
        assert_eq!(index.ztoc(&Digest::of(b"absent")), None);
    }

    #[test]
    fn only_true_disables_xattrs() {
        let mut ztoc = Descriptor::of(media_type::ZTOC, b"");
        assert!(!SociIndex::disable_xattrs(&ztoc));
        for (value, expected) in [("true", true), ("T", true), ("yes", false), ("", false), ("0", false)] {
            ztoc.annotations.insert(annotation::DISABLE_XATTRS.into(), value.into());
            assert_eq!(SociIndex::disable_xattrs(&ztoc), expected, "{value}");
        }
    }

    #[test]
    fn other_manifests_and_other_bytes_are_errors() {
        let image = Manifest {
            config: Descriptor::of(media_type::OCI_CONFIG, b"{}"),
            ..SociIndex::new(Vec::new(), None).manifest
        };
        let bytes = Bytes::from(image.encode());
        let error = SociIndex::decode(&Digest::of(&bytes), bytes.clone()).unwrap_err();
        assert_eq!(error.to_string(), "unknown index version: application/vnd.oci.image.config.v1+json");
        assert!(matches!(SociIndex::decode(&Digest::of(b""), bytes), Err(IndexError::Digest { .. })));
        let garbage = Bytes::from_static(b"{\"schemaVersion\":2}");
        let error = SociIndex::decode(&Digest::of(&garbage), garbage).unwrap_err();
        assert!(matches!(error, IndexError::Manifest { .. }));
    }

    #[test]
    fn the_collector_keeps_configuration_and_artifacts() {
        let index = SociIndex::new(vec![Descriptor::of(media_type::ZTOC, b"1")], None);
        let labels = index.gc_labels();
        assert_eq!(labels.len(), 2);
        assert_eq!(labels[0].0, "containerd.io/gc.ref.content.config");
        assert_eq!(labels[1], ("containerd.io/gc.ref.content.ztoc.0".into(), Digest::of(b"1").to_string()));
    }
}
