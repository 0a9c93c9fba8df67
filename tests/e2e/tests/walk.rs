//! A lazily mounted image looks as the same image unpacked by containerd's overlayfs, byte for byte.
//!
//! Each test walks the whole image twice: through the snapshotter, and through containerd's own overlayfs from a
//! registry without any index in play.

use anyhow::{Context as _, Result};
use soci_e2e::publish::Published;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, containerd2, images};
use soci_testkit::image::Dialect;
use soci_testkit::{AuthMode, cri, walk};

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

fn walk_through(road: Road, version: IndexVersion, auth: AuthMode) -> Result<()> {
    let mut options = StageOptions::new(auth)?;
    if matches!(road, Road::Transfer) {
        options.containerd = containerd2::programs()?;
    }
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = match version {
        IndexVersion::V1 => stage.publish_v1(&image, "team/odd", "1")?,
        IndexVersion::V2 => stage.publish_v2(&image, "team/odd", "1")?,
    };
    stage.registry.clear_log();
    let namespace = pull(&stage, road, &published)?;

    let mounted = stage.snapshotter.fuse_mounts()?;
    assert_eq!(mounted.len(), 2, "both large layers are lazy, the small one is unpacked: {mounted:?}");
    let fetched: u64 = blob_bytes(&stage);
    assert!(fetched < published.size / 2, "{fetched} of {} bytes fetched by a lazy pull", published.size);

    let lazy = stage.containerd.mount(namespace, "soci", &image.chain_id(), "lazy")?;
    let lazy_tree = walk::walk(lazy.path()).context("walk the lazy image")?;
    let user = format!("{USER}:{PASSWORD}");
    stage.containerd.pull("plain", "overlayfs", &user, &published.reference)?;
    let plain = stage.containerd.mount("plain", "overlayfs", &image.chain_id(), "plain")?;
    let plain_tree = walk::walk(plain.path()).context("walk the unpacked image")?;
    let differences = walk::differences(&lazy_tree, &plain_tree, &images::odd_timeless());
    assert!(differences.is_empty(), "lazy on the left, unpacked on the right:\n{}", differences.join("\n"));

    let said = stage.containerd.run_container(
        namespace,
        "soci",
        &published.reference,
        "echo",
        &["/probe", "echo", "hello"],
    )?;
    assert_eq!(said, "hello\n");
    Ok(())
}

fn pull(stage: &Stage, road: Road, published: &Published) -> Result<&'static str> {
    match road {
        Road::Cri => {
            let service = stage.containerd.image_service()?;
            let auth = Some(cri::basic(USER, PASSWORD));
            service.pull(&published.reference, auth, "default").context("PullImage")?;
            Ok("k8s.io")
        }
        Road::Transfer => {
            let user = format!("{USER}:{PASSWORD}");
            stage.containerd.pull("default", "soci", &user, &published.reference)?;
            Ok("default")
        }
    }
}

fn blob_bytes(stage: &Stage) -> u64 {
    let log = stage.registry.log();
    log.iter().filter(|seen| seen.request.path.contains("/blobs/")).map(|seen| seen.bytes).sum()
}

#[test]
fn containerd_1_cri_v1_index_basic_auth() -> Result<()> {
    walk_through(Road::Cri, IndexVersion::V1, AuthMode::Basic)
}

#[test]
fn containerd_1_cri_v2_index_bearer_auth() -> Result<()> {
    walk_through(Road::Cri, IndexVersion::V2, AuthMode::Bearer)
}

#[test]
fn containerd_2_transfer_v1_index_bearer_auth() -> Result<()> {
    walk_through(Road::Transfer, IndexVersion::V1, AuthMode::Bearer)
}

#[test]
fn containerd_2_transfer_v2_index_basic_auth() -> Result<()> {
    walk_through(Road::Transfer, IndexVersion::V2, AuthMode::Basic)
}
