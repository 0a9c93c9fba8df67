//! Which layers get a zTOC.

use soci_oci::media_type::{self, LayerCompression};
use soci_oci::{Descriptor, Digest};
use soci_ztoc::Compression;

/// What is to be done about a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selection {
    /// Build a zTOC.
    Build(Compression),
    /// Nothing, and say this.
    Skip(String),
    /// Nothing at all.
    Ignore,
}

/// Returns what is to be done about `layer`, by its media type and size alone.
pub(super) fn select(layer: &Descriptor, min_layer_size: u64) -> Selection {
    let Descriptor { media_type, digest, size, .. } = layer;
    if media_type == media_type::SOCI_PREFETCH {
        return Selection::Ignore;
    }
    let Some(compression) = media_type::layer_compression(media_type) else {
        return Selection::Skip(skipped(digest, media_type, "not a layer mediaType"));
    };
    if *size < min_layer_size {
        let reason = format!("size {size} is less than min-layer-size {min_layer_size}");
        return Selection::Skip(skipped(digest, media_type, &reason));
    }
    match compression {
        LayerCompression::Gzip => Selection::Build(Compression::Gzip),
        LayerCompression::Uncompressed | LayerCompression::Unknown => {
            Selection::Build(Compression::Uncompressed)
        }
        LayerCompression::Unsupported(name) => {
            let reason = format!(
                "is compressed in an unsupported format. expect: [tar, gzip, unknown] but got {name:?}"
            );
            Selection::Skip(skipped(digest, media_type, &reason))
        }
    }
}

/// Returns the line that says that a layer gets no zTOC.
pub(super) fn skipped(digest: &Digest, media_type: &str, reason: &str) -> String {
    format!("ztoc skipped - layer {digest} ({media_type}) {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_selected_by_type_and_size() {
        let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
        let select = |media_type: &str, size| match super::select(
            &Descriptor::new(media_type, Digest::of(b""), size),
            100,
        ) {
            Selection::Skip(line) => line.split_once(") ").unwrap().1.to_owned(),
            other => format!("{other:?}"),
        };
        assert_eq!(select(gzip, 100), "Build(Gzip)");
        assert_eq!(select(gzip, 99), "size 99 is less than min-layer-size 100");
        assert_eq!(select("application/vnd.oci.image.layer.v1.tar", 100), "Build(Uncompressed)");
        assert_eq!(select("application/vnd.docker.image.rootfs.diff.tar", 100), "Build(Uncompressed)");
        assert_eq!(
            select("application/vnd.oci.image.layer.v1.tar+zstd", 100),
            "is compressed in an unsupported format. expect: [tar, gzip, unknown] but got \"zstd\""
        );
        assert_eq!(select("application/vnd.in-toto+json", 1000), "not a layer mediaType");
        assert_eq!(select(media_type::SOCI_PREFETCH, 1000), "Ignore");
    }
}
