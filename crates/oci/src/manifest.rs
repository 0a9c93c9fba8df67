//! Image manifests and image indexes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::descriptor::null_as_default;
use crate::{Descriptor, go_json};

/// The largest manifest or index that is read, in bytes. Registries refuse larger ones.
pub const MAX_MANIFEST_SIZE: u64 = 4 << 20;
/// The largest number of layers of one manifest. containerd's overlay stops far earlier.
pub const MAX_LAYERS: usize = 4096;

/// An image manifest, OCI's or Docker's, or a SOCI index manifest.
///
/// Unknown members are dropped by decoding, so a digest is always taken of the bytes received, never of this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of this manifest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Kind of artifact, where it is not an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The configuration.
    pub config: Descriptor,
    /// Layers from the lowest to the topmost; zTOCs and prefetch artifacts in a SOCI index.
    #[serde(default, deserialize_with = "null_as_default")]
    pub layers: Vec<Descriptor>,
    /// The manifest this one refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

/// An OCI image index or Docker manifest list; also the answer of the referrers API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of this index.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Kind of artifact, where it is not a plain index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The manifests, in order of preference for clients that take the first match.
    #[serde(default, deserialize_with = "null_as_default")]
    pub manifests: Vec<Descriptor>,
    /// The manifest this index refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

/// A manifest or index that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// More bytes than [`MAX_MANIFEST_SIZE`].
    #[error("manifest of {0} bytes is larger than the limit of {MAX_MANIFEST_SIZE}")]
    TooLarge(usize),
    /// More layers than [`MAX_LAYERS`].
    #[error("manifest of {0} layers is over the limit of {MAX_LAYERS}")]
    TooManyLayers(usize),
    /// Not the JSON of such a document.
    #[error("malformed manifest")]
    Malformed(#[source] serde_json::Error),
    /// A schema version other than 2.
    #[error("unsupported manifest schema version {0}")]
    Schema(u32),
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ManifestError> {
    if bytes.len() as u64 > MAX_MANIFEST_SIZE {
        return Err(ManifestError::TooLarge(bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(ManifestError::Malformed)
}

impl Manifest {
    /// Decodes a manifest received from a registry or store.
    ///
    /// # Errors
    /// When it is too large, not JSON of this form, or of another schema version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = decode(bytes)?;
        if manifest.schema_version != 2 {
            return Err(ManifestError::Schema(manifest.schema_version));
        }
        if manifest.layers.len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers(manifest.layers.len()));
        }
        Ok(manifest)
    }

    /// Encodes the manifest as the Go tools would.
    pub fn encode(&self) -> Vec<u8> {
        go_json::to_vec(self).expect("a manifest has string keys only")
    }
}

impl Index {
    /// Decodes an index received from a registry or store.
    ///
    /// # Errors
    /// When it is too large, not JSON of this form, or of another schema version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let index: Self = decode(bytes)?;
        if index.schema_version != 2 {
            return Err(ManifestError::Schema(index.schema_version));
        }
        Ok(index)
    }

    /// Encodes the index as the Go tools would.
    pub fn encode(&self) -> Vec<u8> {
        go_json::to_vec(self).expect("an index has string keys only")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Digest, media_type};

    #[test]
    fn encoding_has_the_order_of_the_reference() {
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.into(),
            artifact_type: None,
            config: Descriptor::of(media_type::SOCI_INDEX_V2, b"{}"),
            layers: vec![Descriptor::new(media_type::ZTOC, Digest::of(b""), 0)],
            subject: None,
            annotations: [("b".into(), "<".into()), ("a".into(), "1".into())].into(),
        };
        let text = String::from_utf8(manifest.encode()).unwrap();
        assert_eq!(
            text,
            "{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"config\":{\"mediaType\":\
             \"application/vnd.amazon.soci.index.v2+json\",\"digest\":\
             \"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a\",\"size\":2},\"layers\":[{\
             \"mediaType\":\"application/octet-stream\",\"digest\":\
             \"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\",\"size\":0}],\
             \"annotations\":{\"a\":\"1\",\"b\":\"\\u003c\"}}"
        );
        assert_eq!(Manifest::decode(text.as_bytes()).unwrap(), manifest);
    }

    #[test]
    fn hostile_documents_are_errors() {
        for bytes in [&b""[..], b"{", b"[]", b"{\"schemaVersion\":1,\"manifests\":[]}"] {
            assert!(Index::decode(bytes).is_err());
        }
        assert!(matches!(Index::decode(&vec![b' '; 5 << 20]), Err(ManifestError::TooLarge(_))));
        let negative = format!(
            "{{\"schemaVersion\":2,\"config\":{{\"digest\":\"{}\",\"size\":-1}},\"layers\":[]}}",
            Digest::of(b"")
        );
        assert!(Manifest::decode(negative.as_bytes()).is_err());
    }

    #[test]
    fn null_lists_are_empty() {
        let index = Index::decode(b"{\"schemaVersion\":2,\"manifests\":null,\"annotations\":null}").unwrap();
        assert!(index.manifests.is_empty());
    }
}
