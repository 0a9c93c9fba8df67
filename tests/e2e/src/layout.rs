//! OCI layouts on disk: written for the command line to convert, read back to publish.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use soci_testkit::TestRegistry;
use soci_testkit::image::Image;

/// Writes an image as an OCI layout with one manifest.
///
/// # Errors
/// Where a file cannot be written.
pub fn write(image: &Image, directory: &Path) -> Result<()> {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    let put = |digest: &str, bytes: &[u8]| -> Result<()> {
        let name = digest.strip_prefix("sha256:").context("a digest is not sha256")?;
        std::fs::write(blobs.join(name), bytes).with_context(|| format!("write blob {digest}"))
    };
    for layer in &image.layers {
        put(&layer.digest, &layer.blob)?;
    }
    put(&soci_testkit::layer_gen::digest(&image.config), &image.config)?;
    put(&image.digest, &image.manifest)?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{"mediaType": image.media_type, "digest": image.digest, "size": image.manifest.len()}],
    });
    std::fs::write(directory.join("index.json"), index.to_string())?;
    std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

/// Puts everything of a layout into a repository of a registry, its single top document under `tag`.
///
/// # Errors
/// Where the layout is not one.
pub fn publish(directory: &Path, registry: &TestRegistry, repository: &str, tag: &str) -> Result<()> {
    let index: Value = read(&directory.join("index.json"))?;
    let top = index["manifests"].get(0).context("the layout's index is empty")?;
    let digest = top["digest"].as_str().context("the layout's manifest has no digest")?;
    let media_type = top["mediaType"].as_str().context("the layout's manifest has no media type")?;
    manifest(directory, registry, repository, tag, media_type, digest)
}

fn manifest(
    directory: &Path,
    registry: &TestRegistry,
    repository: &str,
    reference: &str,
    media_type: &str,
    digest: &str,
) -> Result<()> {
    let path = blob(directory, digest);
    let bytes = std::fs::read(&path).with_context(|| format!("read manifest {digest}"))?;
    let document: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("parse manifest {digest}"))?;
    for child in document["manifests"].as_array().into_iter().flatten() {
        let digest = child["digest"].as_str().unwrap_or_default();
        let media_type = child["mediaType"].as_str().unwrap_or_default();
        manifest(directory, registry, repository, digest, media_type, digest)?;
    }
    let layers = document["layers"].as_array().into_iter().flatten();
    for descriptor in layers.chain(document.get("config")) {
        let digest = descriptor["digest"].as_str().unwrap_or_default();
        let bytes = std::fs::read(blob(directory, digest)).with_context(|| format!("read blob {digest}"))?;
        registry.put_blob(repository, bytes);
    }
    registry.put_manifest(repository, reference, media_type, bytes);
    Ok(())
}

fn blob(directory: &Path, digest: &str) -> std::path::PathBuf {
    directory.join("blobs").join(digest.replacen(':', "/", 1))
}

fn read(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("parse {}", path.display()))
}
