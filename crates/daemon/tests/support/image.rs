//! Images with a SOCI index, in the test registry.

use soci_index::SociIndex;
use soci_index::prefetch::{Prefetch, SpanRange};
use soci_oci::{Descriptor, Digest, Manifest, annotation, media_type};
use soci_testkit::TestRegistry;
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::Layer;
use soci_ztoc::{BuildOptions, Compression, ZtocBuilder};

/// An image in a registry.
pub(crate) struct Published {
    pub(crate) image: Image,
    /// Digest of the manifest that names the index.
    pub(crate) manifest: Digest,
    pub(crate) reference: String,
    pub(crate) ztocs: Vec<Digest>,
    /// The SOCI index.
    pub(crate) index: Digest,
    /// The prefetch artifact of the first layer.
    pub(crate) prefetch: Option<Digest>,
}

/// Stores an image of `layers` with a zTOC for each and, for the first, a prefetch artifact that names `spans`.
pub(crate) fn publish_with_prefetch(
    registry: &TestRegistry,
    repository: &str,
    layers: Vec<Layer>,
    spans: &[(i32, i32)],
) -> Published {
    let ranges = spans.iter().map(|(start, end)| SpanRange::new(*start, *end)).collect();
    put(registry, repository, layers, |_, ztoc| Some(ztoc), Some(Prefetch::of(ranges).unwrap()))
}

/// Stores an image whose manifest names an index that is no index.
pub(crate) fn publish_with_garbage(
    registry: &TestRegistry,
    repository: &str,
    layers: Vec<Layer>,
) -> Published {
    let published = publish(registry, repository, layers, |_| true);
    let garbage = br#"{"schemaVersion":2}"#;
    let index = Digest::of(garbage);
    registry.put_manifest(repository, &index.to_string(), media_type::OCI_MANIFEST, &garbage[..]);
    let manifest = name_index(registry, repository, &published.image, &index);
    Published { manifest, index, ..published }
}

/// Stores an image of `layers`, with an index v2 that has zTOCs for those of which `indexed` says so.
pub(crate) fn publish(
    registry: &TestRegistry,
    repository: &str,
    layers: Vec<Layer>,
    indexed: impl Fn(usize) -> bool,
) -> Published {
    publish_ztocs(registry, repository, layers, |number, ztoc| indexed(number).then_some(ztoc))
}

/// As [`publish`]; `written` makes of each layer's zTOC what is published as that.
pub(crate) fn publish_ztocs(
    registry: &TestRegistry,
    repository: &str,
    layers: Vec<Layer>,
    written: impl Fn(usize, Vec<u8>) -> Option<Vec<u8>>,
) -> Published {
    put(registry, repository, layers, written, None)
}

fn put(
    registry: &TestRegistry,
    repository: &str,
    layers: Vec<Layer>,
    written: impl Fn(usize, Vec<u8>) -> Option<Vec<u8>>,
    prefetch: Option<Prefetch>,
) -> Published {
    let image = Image::new(layers, Dialect::Oci, &["/bin/true"]);
    registry.put_blob(repository, image.config.clone());
    let mut artifacts = Vec::new();
    let mut ztocs = Vec::new();
    for (number, layer) in image.layers.iter().enumerate() {
        registry.put_blob(repository, layer.blob.clone());
        let (bytes, xattrs_needed) = ztoc(&layer.blob);
        let Some(bytes) = written(number, bytes) else { continue };
        registry.put_blob(repository, bytes.clone());
        let mut descriptor = Descriptor::of(media_type::ZTOC, &bytes);
        ztocs.push(descriptor.digest);
        let mut annotate =
            |key: &str, value: &str| descriptor.annotations.insert(key.to_owned(), value.to_owned());
        annotate(annotation::LAYER_DIGEST, &layer.digest);
        annotate(annotation::LAYER_MEDIA_TYPE, &layer.media_type);
        if !xattrs_needed {
            annotate(annotation::DISABLE_XATTRS, "true");
        }
        artifacts.push(descriptor);
    }
    let prefetch = prefetch.map(|prefetch| {
        let bytes = prefetch.encode();
        registry.put_blob(repository, bytes.clone());
        artifacts.push(Prefetch::descriptor(&bytes, &image.layers[0].digest.parse().unwrap()));
        Digest::of(&bytes)
    });
    let index = SociIndex::new(artifacts, None);
    registry.put_blob(repository, &b"{}"[..]);
    let digest = index.digest.to_string();
    registry.put_manifest(repository, &digest, media_type::OCI_MANIFEST, index.bytes.clone());
    let manifest = name_index(registry, repository, &image, &index.digest);
    let (index, reference) = (index.digest, registry.image(repository));
    Published { image, manifest, reference, ztocs, index, prefetch }
}

/// Stores the image's manifest with the annotation that names an index, and returns its digest.
fn name_index(registry: &TestRegistry, repository: &str, image: &Image, index: &Digest) -> Digest {
    let mut manifest = Manifest::decode(&image.manifest).unwrap();
    manifest.annotations.insert(annotation::INDEX_DIGEST.to_owned(), index.to_string());
    let bytes = manifest.encode();
    let manifest = Digest::of(&bytes);
    registry.put_manifest(repository, &manifest.to_string(), &image.media_type, bytes.clone());
    registry.put_manifest(repository, "latest", &image.media_type, bytes);
    manifest
}

fn ztoc(blob: &[u8]) -> (Vec<u8>, bool) {
    let options = BuildOptions { span_size: 1 << 20, build_tool: annotation::BUILD_TOOL_VALUE.to_owned() };
    let mut builder = ZtocBuilder::new(Compression::Gzip, options).unwrap();
    builder.push(blob).unwrap();
    let built = builder.finish().unwrap();
    (built.bytes, built.xattrs_needed)
}
