//! Media types, and what a layer's media type says about its compression.

/// An OCI image manifest (and a SOCI index manifest).
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// A Docker image manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// A Docker manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// A Docker image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// A zTOC.
pub const ZTOC: &str = "application/octet-stream";
/// Config media type (and artifact type) of a SOCI index manifest v1.
pub const SOCI_INDEX_V1: &str = "application/vnd.amazon.soci.index.v1+json";
/// Config media type (and artifact type) of a SOCI index manifest v2.
pub const SOCI_INDEX_V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// A prefetch artifact.
pub const SOCI_PREFETCH: &str = "application/vnd.amazon.soci.prefetch.v1+json";

/// Whether `media_type` names an image manifest, OCI's or Docker's.
pub fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// Whether `media_type` names an image index, OCI's or Docker's.
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_INDEX)
}

/// Whether `media_type` names an image configuration, OCI's or Docker's.
pub fn is_image_config(media_type: &str) -> bool {
    matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
}

/// What a layer's media type says about how its tar is compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerCompression {
    /// One or more gzip members.
    Gzip,
    /// A plain tar.
    Uncompressed,
    /// Docker's `rootfs.diff.tar`: the type does not tell; treated as a plain tar, as the reference does.
    Unknown,
    /// A layer in a form no zTOC can describe; the text is the name to show (`zstd`, `encrypted`, …).
    Unsupported(String),
}

/// Returns the compression of a layer by its media type, or `None` when the type is not a layer's at all.
///
/// Source: `docs/ztoc-format.md`, "Which layers".
pub fn layer_compression(media_type: &str) -> Option<LayerCompression> {
    use LayerCompression::{Gzip, Uncompressed, Unknown, Unsupported};
    let oci =
        ["application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar"];
    let docker = [
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    for (position, base) in oci.iter().enumerate() {
        if let Some(suffix) = media_type.strip_prefix(base) {
            return Some(match suffix {
                "" if position == 0 => Uncompressed,
                "" => Unsupported(String::new()),
                "+gzip" => Gzip,
                "+zstd" => Unsupported("zstd".into()),
                other if other.ends_with("+encrypted") => Unsupported("encrypted".into()),
                other => Unsupported(other.trim_start_matches('+').to_owned()),
            });
        }
    }
    for base in docker {
        if let Some(suffix) = media_type.strip_prefix(base) {
            return Some(match suffix {
                "" => Unknown,
                ".gzip" => Gzip,
                ".zstd" => Unsupported("zstd".into()),
                other => Unsupported(other.trim_start_matches(['.', '+']).to_owned()),
            });
        }
    }
    media_type.starts_with("application/vnd.oci.image.layer.").then(|| Unsupported(media_type.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::LayerCompression::{Gzip, Uncompressed, Unknown, Unsupported};
    use super::*;

    #[test]
    fn compression_follows_the_media_type() {
        let table = [
            ("application/vnd.oci.image.layer.v1.tar", Some(Uncompressed)),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Some(Gzip)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Some(Unsupported("zstd".into()))),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", Some(Unsupported("encrypted".into()))),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Some(Gzip)),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar", Some(Unsupported(String::new()))),
            ("application/vnd.docker.image.rootfs.diff.tar", Some(Unknown)),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Some(Gzip)),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Some(Gzip)),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", Some(Unsupported("zstd".into()))),
            ("application/octet-stream", None),
        ];
        for (media_type, expected) in table {
            assert_eq!(layer_compression(media_type), expected, "{media_type}");
        }
    }
}
