//! Annotation keys of SOCI artifacts.

/// On a zTOC descriptor: media type of the layer it describes.
pub const LAYER_MEDIA_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
/// On zTOC and prefetch descriptors: digest of the layer they describe.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// On a zTOC descriptor: the span size asked for, as decimal text.
pub const SPAN_SIZE: &str = "com.amazon.soci.span-size";
/// On a SOCI index manifest: the tool that built it.
pub const BUILD_TOOL: &str = "com.amazon.soci.build-tool-identifier";
/// On a zTOC descriptor: `"true"` when no entry of the layer needs extended attributes.
pub const DISABLE_XATTRS: &str = "com.amazon.soci.disable-xattrs";
/// On the descriptor of a v2 SOCI index in an OCI index: digest of the image manifest it belongs to.
pub const IMAGE_MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";
/// On an image manifest and its descriptor: digest of the v2 SOCI index of that image.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// On an attestation's descriptor, set by image builders: what kind of artifact it is.
pub const DOCKER_REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// On an attestation's descriptor, set by image builders: digest of the manifest it speaks about.
pub const DOCKER_REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";

/// The value of [`BUILD_TOOL`] that the reference writes; ours is the same, so that equal layers get equal artifacts.
pub const BUILD_TOOL_VALUE: &str = "AWS SOCI CLI v0.2";
