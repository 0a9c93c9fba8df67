//! A lazily mounted image looks as the same image unpacked by containerd's overlayfs, byte for byte.
//!
//! Each test walks the whole image twice: through the snapshotter, and through containerd's own overlayfs.

use anyhow::Result;
use soci_e2e::pull::KUBELET;
use soci_e2e::{Stage, StageOptions, containerd2, images};
use soci_testkit::AuthMode;
use soci_testkit::image::Dialect;

/// How the image is pulled lazily.
#[derive(Clone, Copy)]
enum Road {
    /// The kubelet's: `PullImage` on containerd's socket.
    Cri,
    /// The transfer service of containerd 2.x, by `ctr`.
    Transfer,
}

#[derive(Clone, Copy)]
enum IndexVersion {
    V1,
    V2,
}

fn walk_through(road: Road, version: IndexVersion, auth: AuthMode, dialect: Dialect) -> Result<()> {
    let mut options = StageOptions::new(auth)?;
    if matches!(road, Road::Transfer) {
        options.containerd = containerd2::programs()?;
    }
    let stage = Stage::start(options)?;
    let image = images::odd(dialect);
    let published = match version {
        IndexVersion::V1 => stage.publish_v1(&image, "team/odd", "1")?,
        IndexVersion::V2 => stage.publish_v2(&image, "team/odd", "1")?,
    };
    stage.registry.clear_log();
    let namespace = match road {
        Road::Cri => {
            stage.pull_as_kubelet(&published)?;
            KUBELET
        }
        Road::Transfer => {
            stage.pull_by_ctr("default", "soci", &published)?;
            "default"
        }
    };
    assert_eq!(stage.lazy_layers()?, 2, "both large layers are lazy, the small one is unpacked");
    let fetched = stage.blob_bytes();
    assert!(fetched < published.size / 2, "{fetched} of {} bytes fetched by a lazy pull", published.size);
    let differences = stage.differences(namespace, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "lazy on the left, unpacked on the right:\n{}", differences.join("\n"));
    assert_eq!(stage.probe(namespace, &published, "echo", &["echo", "hello"])?, "hello\n");
    Ok(())
}

#[test]
fn containerd_1_cri_v1_index_basic_auth() -> Result<()> {
    walk_through(Road::Cri, IndexVersion::V1, AuthMode::Basic, Dialect::Oci)
}

#[test]
fn containerd_1_cri_v1_index_of_docker_media_types() -> Result<()> {
    walk_through(Road::Cri, IndexVersion::V1, AuthMode::Basic, Dialect::Docker)
}

#[test]
fn containerd_1_cri_v2_index_bearer_auth() -> Result<()> {
    walk_through(Road::Cri, IndexVersion::V2, AuthMode::Bearer, Dialect::Oci)
}

#[test]
fn containerd_2_transfer_v1_index_bearer_auth() -> Result<()> {
    walk_through(Road::Transfer, IndexVersion::V1, AuthMode::Bearer, Dialect::Oci)
}

#[test]
fn containerd_2_transfer_v2_index_basic_auth() -> Result<()> {
    walk_through(Road::Transfer, IndexVersion::V2, AuthMode::Basic, Dialect::Oci)
}
