//! The program with a real registry, a Docker config file, FUSE and overlay: pull, read, restart, remove.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use soci_oci::{Digest, labels};
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_testkit::Listener;
use support::image::{Published, publish, publish_ztocs};
use support::stage::{CONFIG, Stage, chains, layers, registry};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_private_image_is_pulled_read_and_read_again_without_the_registry() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::new(&registry, CONFIG).await;
    let top = stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 2, "two lazy layers");
    assert_eq!(stage.label(&top, labels::REMOTE).await, "remote snapshot");
    let verdict = stage.wait_for("because of no-ztoc").await;
    assert_eq!(
        (verdict["verdict"].as_str(), verdict["level"].as_str()),
        (Some("lazy"), Some("info")),
        "{verdict}"
    );
    let answer = stage.prepare("container", &top, Default::default()).await.unwrap();
    let merged = stage.mount(&answer);
    let read = move |merged: PathBuf| {
        let text = |path: &str| std::fs::read_to_string(merged.join(path)).unwrap();
        assert_eq!(text("etc/keep") + &text("etc/added") + &text("etc/top"), "kept\nadded\ntop\n");
        assert!(!merged.join("etc/gone").exists());
        let etc = std::fs::metadata(merged.join("etc")).unwrap();
        assert_eq!((etc.mode() & 0o7777, etc.uid(), etc.gid()), (0o700, 5, 6), "as the layer below has it");
        assert!(std::fs::read(merged.join("big")).unwrap() == big, "the large file differs");
    };
    let read = Arc::new(read);
    let reader = Arc::clone(&read);
    tokio::task::spawn_blocking(move || reader(merged)).await.unwrap();
    stage.unmount();
    let metrics = stage.metrics().await;
    let layer = &published.image.layers[0].digest;
    for part in [
        format!("soci_fs_layer_size_bytes{{digest=\"{layer}\",mountpoint=\""),
        format!("soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"synchronous_read_count\"}}"),
        format!(
            "soci_fs_operation_duration_milliseconds_count{{layer=\"{layer}\",operation_type=\"mount\"}} 1"
        ),
        "soci_pull_verdicts_total{verdict=\"lazy\",reason=\"no-ztoc\"} 1".to_owned(),
        "soci_auth_lookups_total{option=\"docker-config\",outcome=\"found\"}".to_owned(),
        "soci_mounted_layers 2".to_owned(),
    ] {
        assert!(metrics.contains(&part), "{part} in\n{metrics}");
    }
    for line in stage.log.lock().unwrap().iter() {
        assert!(!line.to_string().contains("pass-word-1"), "{line}");
    }

    // Killed; the registry is gone; everything that was read is read again.
    stage.end(Signal::KILL);
    registry.shutdown().await;
    let started = Instant::now();
    stage.start_again().await;
    let mounts = wire::MountsRequest { key: "container".into(), ..Default::default() };
    let answer = stage.client.mounts(mounts).await.unwrap().into_inner().mounts;
    let elapsed = started.elapsed();
    let merged = stage.mount(&answer);
    tokio::task::spawn_blocking(move || read(merged)).await.unwrap();
    stage.unmount();
    println!("ready and mounted {} ms after the start", elapsed.as_millis());
    assert_eq!(stage.wait_for("mounted again").await["degraded"], "0");
    assert_eq!(stage.fuse_mounts(), 2, "dead mounts were replaced");

    // SIGINT takes the mounts away and keeps the layers for the next start.
    stage.end(Signal::INT);
    assert_eq!(stage.fuse_mounts(), 0);
    stage.start_again().await;
    let mounts = wire::MountsRequest { key: "container".into(), ..Default::default() };
    assert_eq!(stage.client.mounts(mounts).await.unwrap().into_inner().mounts, answer);

    // Removed: no mounts, no directories, no zTOCs, no spans.
    for name in ["container".to_owned(), top]
        .iter()
        .chain(&chains(&published)[..2].iter().rev().cloned().collect::<Vec<_>>())
    {
        let remove = wire::RemoveSnapshotRequest { key: name.clone(), ..Default::default() };
        stage.client.remove(remove).await.unwrap();
    }
    stage.client.cleanup(wire::CleanupRequest::default()).await.unwrap();
    assert_eq!(stage.fuse_mounts(), 0);
    for gone in ["snapshotter/snapshots", "ztocs/sha256", "soci/spans/sha256"] {
        let left: Vec<_> = std::fs::read_dir(stage.state().join(gone)).unwrap().collect();
        assert!(left.is_empty(), "{gone}: {left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn at_info_an_image_has_one_line_and_at_debug_tools_find_those_they_know() {
    let registry = registry().await;
    let published = publish(&registry, "team/app", layers().0, |number| number != 1);
    let mut stage = Stage::new(&registry, CONFIG).await;
    let top = stage.pull(&published).await;
    stage.run("container", &top).await;
    stage.unmount();
    stage.wait_for("image ").await;
    let log = stage.log.lock().unwrap().clone();
    let started = log.iter().position(|line| line["msg"].as_str().unwrap().contains("successfully started"));
    let log_of_pull = log[started.unwrap() + 1..].iter();
    // That a registry was logged in to is said once per registry.
    let info: Vec<_> =
        log_of_pull.filter(|line| line["level"] == "info" && !line["image"].is_null()).collect();
    assert_eq!(info.len(), 1, "{info:#?}");
    assert_eq!(info[0]["verdict"], "lazy", "{info:#?}");
    let keyed = |key: &str| log.iter().filter(|line| line[key] == "true").count();
    assert_eq!((keyed("remote-snapshot-prepared"), keyed("local-snapshot-prepared")), (2, 1));
    for (message, times) in [
        ("checking for soci v2 index annotation", 1),
        ("using soci v2 index annotation", 1),
        ("fetching SOCI artifacts using index descriptor", 1),
        ("skipping mounting layer as FUSE mount: no ztoc for layer", 1),
        ("preparing filesystem mount at mountpoint=", 2),
        ("preparing local filesystem at mountpoint=", 1),
    ] {
        assert_eq!(stage.messages(message).len(), times, "{message}");
    }
    for message in ["checking mount point", "layer is normal snapshot(overlayfs)"] {
        assert!(!stage.messages(message).is_empty(), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn later_layers_need_no_network() {
    let registry = registry().await;
    let (layers, _) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let mut stage = Stage::new(&registry, CONFIG).await;
    assert_eq!(stage.pull_layer(&published, 0).await.0, Some(Code::AlreadyExists));
    let arrived = || stage.state().join("ztocs/sha256").read_dir().unwrap().count();
    let deadline = Instant::now() + Duration::from_secs(20);
    while arrived() < published.ztocs.len() {
        assert!(Instant::now() < deadline, "the other zTOCs do not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    registry.clear_log();
    for number in 1..3 {
        assert_eq!(stage.pull_layer(&published, number).await.0, Some(Code::AlreadyExists));
    }
    let asked: Vec<_> = registry.log().iter().map(|seen| seen.request.path.clone()).collect();
    assert_eq!(asked, Vec::<String>::new());
    assert_eq!(stage.fuse_mounts(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_ztoc_costs_its_layer_only() {
    let registry = registry().await;
    let (layers, _) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    registry.delete_blob("team/app", &published.ztocs[1].to_string());
    let mut stage = Stage::new(&registry, CONFIG).await;
    let top = stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 2);
    assert_eq!(
        stage.label(&chains(&published)[1], "containerd.io/snapshot/soci.verdict").await,
        "unpacked: mount-failed"
    );
    assert_eq!(stage.label(&top, "containerd.io/snapshot/soci.verdict").await, "lazy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_that_cannot_be_decoded_costs_its_layer_only_and_goes_with_the_image() {
    let registry = registry().await;
    let (layers, _) = layers();
    let cut = |number, ztoc: Vec<u8>| Some(if number == 1 { ztoc[..ztoc.len() / 2].to_vec() } else { ztoc });
    let published = publish_ztocs(&registry, "team/app", layers, cut);
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 2);
    let said = stage.wait_for("a zTOC cannot be used").await;
    assert!(said["error"].as_str().unwrap().contains("decode zTOC"), "{said}");
    let chains = chains(&published);
    let verdict = stage.label(&chains[1], "containerd.io/snapshot/soci.verdict").await;
    assert_eq!(verdict, "unpacked: mount-failed");
    for key in chains.iter().rev() {
        let remove = wire::RemoveSnapshotRequest { key: key.clone(), ..Default::default() };
        stage.client.remove(remove).await.unwrap();
    }
    stage.client.cleanup(wire::CleanupRequest::default()).await.unwrap();
    let left: Vec<_> = std::fs::read_dir(stage.state().join("ztocs/sha256")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_index_or_login_is_left_to_containerd() {
    let registry = registry().await;
    let (layers, _) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let plain = Published {
        manifest: published.image.digest.parse::<Digest>().unwrap(),
        image: published.image.clone(),
        reference: published.reference.clone(),
        ztocs: Vec::new(),
        index: published.index,
        prefetch: None,
    };
    registry.put_manifest("team/app", "plain", &plain.image.media_type, plain.image.manifest.clone());
    let mut stage = Stage::new(&registry, CONFIG).await;
    let (code, _) = stage.pull_layer(&plain, 0).await;
    assert_eq!(code, None, "mounts for containerd to unpack to");
    assert_eq!(
        stage.label("extract-0", "containerd.io/snapshot/soci.verdict").await,
        "left to containerd: no-index"
    );
    let line = stage.wait_for("image ").await;
    assert_eq!(line["reasons"], "no-index", "{line}");
    assert_eq!(stage.fuse_mounts(), 0);

    registry.rotate_password("reader", "another");
    let mut refused = Stage::new(&registry, CONFIG).await;
    let (code, _) = refused.pull_layer(&published, 0).await;
    assert_eq!(code, None);
    let verdict = refused.label("extract-0", "containerd.io/snapshot/soci.verdict").await;
    assert_eq!(verdict, "left to containerd: index-denied");
    let line = refused.wait_for("deferring to container runtime").await;
    for part in [registry.host().as_str(), "team/app", "docker-config"] {
        assert!(line["error"].as_str().unwrap().contains(part), "{part} in {line}");
    }
    assert!(registry.log_of(Listener::Token).len() < 20, "no storm of attempts");
}
