//! Images made of layers: configuration and manifest as registries store them.

use bytes::Bytes;
use serde_json::json;

use crate::layer_gen::{Layer, digest};

/// An image: everything a registry must hold for it.
#[derive(Debug, Clone)]
pub struct Image {
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
    /// The configuration's bytes.
    pub config: Bytes,
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// The manifest's media type.
    pub media_type: String,
    /// `sha256:…` of the manifest.
    pub digest: String,
}

/// Which family of media types an image speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `application/vnd.oci.image.*`.
    Oci,
    /// `application/vnd.docker.*`, schema 2.
    Docker,
}

impl Image {
    /// Makes an image for this machine's architecture that runs `command` by default.
    pub fn new(layers: Vec<Layer>, dialect: Dialect, command: &[&str]) -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let history: Vec<_> = layers.iter().map(|_| json!({"created_by": "soci-testkit"})).collect();
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        });
        let config = Bytes::from(config.to_string());
        let (media_type, config_type, layer_type) = match dialect {
            Dialect::Oci => (
                "application/vnd.oci.image.manifest.v1+json",
                "application/vnd.oci.image.config.v1+json",
                None,
            ),
            Dialect::Docker => (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.container.image.v1+json",
                Some("application/vnd.docker.image.rootfs.diff.tar.gzip"),
            ),
        };
        let descriptors: Vec<_> = layers
            .iter()
            .map(|layer| {
                let media_type = layer_type.unwrap_or(&layer.media_type);
                json!({"mediaType": media_type, "digest": layer.digest, "size": layer.blob.len()})
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {"mediaType": config_type, "digest": digest(&config), "size": config.len()},
            "layers": descriptors,
        });
        let manifest = Bytes::from(manifest.to_string());
        Self { layers, config, digest: digest(&manifest), manifest, media_type: media_type.to_owned() }
    }

    /// Returns the chain id of all layers: how a snapshotter names what they make together.
    pub fn chain_id(&self) -> String {
        self.chain_ids().pop().unwrap_or_default()
    }

    /// Returns the chain id of each layer with those below it, the lowest first.
    pub fn chain_ids(&self) -> Vec<String> {
        let mut chains: Vec<String> = Vec::new();
        for id in self.layers.iter().map(|layer| layer.diff_id.as_str()) {
            chains.push(match chains.last() {
                Some(below) => digest(format!("{below} {id}").as_bytes()),
                None => id.to_owned(),
            });
        }
        chains
    }

    /// Returns the bytes of all layers as stored.
    pub fn compressed_size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob.len() as u64).sum()
    }
}
