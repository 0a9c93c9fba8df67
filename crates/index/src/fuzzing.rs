//! Bodies of the fuzz targets, so that they run as ordinary tests too.

use bytes::Bytes;
use soci_oci::Digest;

use crate::manifest::SociIndex;
use crate::prefetch::Prefetch;
use crate::tree::{self, Kind};

/// An index that decodes answers all questions, and keeps its bytes.
pub fn soci_index(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let Ok(index) = SociIndex::decode(&Digest::of(data), bytes) else { return };
    for artifact in &index.manifest.layers {
        SociIndex::disable_xattrs(artifact);
        if let Some(layer) = SociIndex::layer(artifact) {
            let found = [index.ztoc(&layer), index.prefetch(&layer)];
            assert!(found.into_iter().flatten().all(|of| SociIndex::layer(of) == Some(layer)));
        }
    }
    assert_eq!(index.gc_labels().len(), index.manifest.layers.len() + 1);
    assert_eq!(index.bytes, data);
}

/// The spans of a prefetch artifact lie inside the layer, sorted and apart, whatever it says.
pub fn prefetch(data: &[u8]) {
    let Ok(prefetch) = Prefetch::decode(data) else { return };
    for spans in [0, 1, 7, u32::MAX] {
        let Ok(ranges) = prefetch.spans(spans) else { continue };
        assert!(ranges.iter().all(|range| range.start < range.end && range.end <= spans));
        assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
    }
}

/// A platform that an image configuration names is the same however often it is normalised, and can be asked for by its text.
pub fn image_config(data: &[u8]) {
    let Ok(Some(platform)) = crate::image::platform_in(data) else { return };
    assert_eq!(platform.normalized().normalized(), platform.normalized());
    assert!(!platform.to_string().is_empty());
}

/// A tar of an image layout is a layout or an error.
pub fn layout_tar(data: &[u8]) {
    crate::standalone::fuzz_layout_tar(data);
}

/// A document that was encoded once is encoded the same again.
pub fn image_document(data: &[u8]) {
    let Ok(document) = tree::decode(data) else { return };
    for kind in [Kind::Manifest, Kind::Index] {
        let once = tree::encode(kind, &document);
        // What is encoded may be longer than what may be decoded, by its escapes.
        if let Ok(again) = tree::decode(&once) {
            assert_eq!(tree::encode(kind, &again), once);
        }
    }
}
