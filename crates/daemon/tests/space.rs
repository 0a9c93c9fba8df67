//! Disk and memory are given back, limits hold, and what is shown of it is true.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_testkit::TestRegistry;
use support::image::{Published, publish, publish_with_prefetch};
use support::stage::{CONFIG, Stage, chains, layers, registry};
use support::until;

/// No containerd; layers are completed in the background.
const BACKGROUND: &str =
    "[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n[blob]\nfetching_timeout_sec = 30\n";

async fn read(path: PathBuf) -> Vec<u8> {
    tokio::task::spawn_blocking(move || std::fs::read(path).unwrap()).await.unwrap()
}

/// Snapshots of an image, the topmost first, as they are removed.
fn downwards(published: &Published) -> Vec<String> {
    chains(published).into_iter().rev().collect()
}

fn blob_requests(registry: &TestRegistry, repository: &str) -> usize {
    let of = format!("/v2/{repository}/blobs/");
    registry.log().iter().filter(|seen| seen.request.path.starts_with(&of)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_image_ends_its_fetches_and_leaves_the_disk_as_it_was() {
    let registry = registry().await;
    let published = publish(&registry, "team/app", layers().0, |_| true);
    let mut fewer = layers().0;
    fewer.truncate(2);
    let other = publish(&registry, "team/other", fewer, |_| true);
    let mut stage = Stage::new(&registry, BACKGROUND).await;
    let before = stage.files();
    // Slow enough that the large layer is on its way when the image goes.
    registry.shape(Duration::ZERO, Some(100_000));
    stage.pull(&published).await;
    until("a fetch is under way", async || stage.inspect().await["spans_in_flight"].as_u64().unwrap() > 0)
        .await;
    assert_ne!(stage.files(), before);
    stage.remove(&downwards(&published)).await;
    // The layer is closed when the answer to the removal is out; what was under way sees it at once.
    let state = stage.inspect().await;
    assert_eq!(state["layers"].as_array().unwrap().len(), 0, "{state}");
    until("nothing is in flight", async || stage.inspect().await["bytes_in_flight"] == 0).await;
    let requests = blob_requests(&registry, "team/app");
    stage.wait_for_files(&before).await;
    registry.shape(Duration::ZERO, None);
    stage.pull(&other).await;
    until("another image is complete", async || complete(&stage).await).await;
    assert_eq!(blob_requests(&registry, "team/app"), requests, "fetches go on for an image that is gone");
    let metrics = stage.metrics().await;
    assert!(!metrics.contains(&published.manifest.to_string()), "{metrics}");
}

async fn complete(stage: &Stage) -> bool {
    let state = stage.inspect().await;
    let layers = state["layers"].as_array().unwrap();
    !layers.is_empty() && layers.iter().all(|layer| layer["fetched"] == layer["size"])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_pull_was_given_up_leaves_nothing_either() {
    let registry = registry().await;
    let published = publish(&registry, "team/app", layers().0, |_| true);
    let mut stage = Stage::new(&registry, CONFIG).await;
    let before = stage.files();
    stage.pull_layer(&published, 0).await;
    // The zTOCs of all layers came with the first one.
    until("all zTOCs are here", async || {
        stage.files().iter().filter(|(path, _)| path.starts_with("ztocs")).count() == published.ztocs.len()
    })
    .await;
    stage.remove(&chains(&published)[..1]).await;
    stage.wait_for_files(&before).await;
    // A new pull starts from nothing.
    stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_two_images_share_stays_until_both_are_gone() {
    let registry = registry().await;
    let one = publish(&registry, "team/one", layers().0, |_| true);
    let mut rest = layers().0;
    rest.truncate(1);
    let two = publish(&registry, "team/two", rest, |_| true);
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.pull(&one).await;
    // The other image has the same lowest snapshot, so containerd has it already.
    stage.pull(&two).await;
    stage.remove(&downwards(&one)[..2]).await;
    let merged = stage.run("container", &chains(&two)[0]).await;
    assert_eq!(read(merged.join("etc/keep")).await, b"kept\n");
    stage.unmount();
    let stored = |stage: &Stage| stage.files().iter().filter(|(path, _)| path.starts_with("ztocs")).count();
    until("only the shared zTOC stays", async || stored(&stage) == 1).await;
    stage.remove(&["container".to_owned(), chains(&two)[0].clone()]).await;
    until("it goes with the last image", async || stored(&stage) == 0).await;
}

/// One layer on two others is two snapshots, and is on the disk once.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_in_two_snapshots_is_stored_once_and_counted_once() {
    let registry = registry().await;
    let all = layers().0;
    let one = publish(&registry, "team/one", vec![all[0].clone(), all[2].clone()], |_| true);
    let two = publish(&registry, "team/two", vec![all[1].clone(), all[2].clone()], |_| true);
    assert_eq!(one.ztocs[1], two.ztocs[1]);
    let mut stage = Stage::new(&registry, CONFIG).await;
    let mut sizes = Vec::new();
    for image in [&one, &two] {
        let top = stage.pull(image).await;
        let merged = stage.run(&format!("container on {top}"), &top).await;
        assert_eq!(read(merged.join("etc/top")).await, b"top\n");
        stage.unmount();
        until("nothing is in flight", async || stage.inspect().await["jobs"] == 0).await;
        let request = wire::UsageRequest { snapshotter: "soci".into(), key: top };
        sizes.push(stage.client.usage(request).await.unwrap().into_inner().size);
    }
    assert_eq!(stage.fuse_mounts(), 4);
    let stored = |what: PathBuf| stage.files().iter().filter(|(path, _)| path.starts_with(&what)).count();
    assert_eq!(stored("ztocs".into()), 3);
    let on_disk: u64 = stage
        .files()
        .iter()
        .filter(|(path, _)| path.starts_with(spans_of(&one, 1)) || path.ends_with(one.ztocs[1].hex()))
        .map(|(_, size)| size)
        .sum();
    assert!(sizes[0] > 0 && sizes[1] == 0, "{sizes:?}");
    assert_eq!(u64::try_from(sizes[0]).unwrap(), on_disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_on_mounted_layers_fetches_no_ztoc_that_is_here() {
    let registry = registry().await;
    let all = layers().0;
    let one = publish(&registry, "team/one", all[..2].to_vec(), |_| true);
    let two = publish(&registry, "team/two", all, |_| true);
    assert_eq!(one.ztocs[..], two.ztocs[..2]);
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.pull(&one).await;
    stage.pull(&two).await;
    let fetched = |image: &str, ztoc: &soci_oci::Digest| {
        let path = format!("/v2/team/{image}/blobs/{ztoc}");
        registry.log().iter().filter(|seen| seen.request.path == path).count()
    };
    // Each answers a challenge first, or not: once at least, and none at all.
    assert!(one.ztocs.iter().all(|ztoc| fetched("one", ztoc) > 0));
    assert!(fetched("two", &two.ztocs[2]) > 0);
    assert_eq!([fetched("two", &two.ztocs[0]), fetched("two", &two.ztocs[1])], [0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_keeps_its_limit_and_readers_get_all_the_same() {
    const LIMIT: u64 = 3 << 20;
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let mut stage = Stage::new(&registry, &format!("{CONFIG}[span_cache]\nmax_bytes = {LIMIT}\n")).await;
    let top = stage.pull(&published).await;
    let merged = stage.run("container", &top).await;
    assert!(read(merged.join("big")).await == big);
    until("nothing is in flight", async || stage.inspect().await["jobs"] == 0).await;
    let state = stage.inspect().await;
    let used = state["cache_bytes"].as_u64().unwrap();
    assert!(used > LIMIT / 2 && used <= LIMIT, "{used} bytes of {LIMIT}");
    assert_eq!(state["cache_limit"], LIMIT);
    let on_disk: u64 =
        stage.files().iter().filter(|(path, _)| path.starts_with("soci/spans")).map(|(_, size)| size).sum();
    assert_eq!(on_disk, used, "what is shown is what is there");
    stage.unmount();
    drop_caches();
    let answer = mounts(&mut stage, "container").await;
    let merged = stage.mount(&answer);
    assert!(read(merged.join("big")).await == big, "evicted spans are fetched again");
    stage.unmount();
}

async fn mounts(stage: &mut Stage, key: &str) -> Vec<soci_snapshotter_grpc::proto::types::Mount> {
    let request = wire::MountsRequest { key: key.to_owned(), ..Default::default() };
    stage.client.mounts(request).await.unwrap().into_inner().mounts
}

fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_what_the_layer_takes_on_disk() {
    let registry = registry().await;
    let (layers, _) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::new(&registry, CONFIG).await;
    let top = stage.pull(&published).await;
    let names = chains(&published);
    let merged = stage.run("container", &top).await;
    read(merged.join("big")).await;
    stage.unmount();
    until("all is stored", async || stage.inspect().await["jobs"] == 0).await;
    let usage = async |stage: &mut Stage, key: &str| {
        let request = wire::UsageRequest { key: key.to_owned(), ..Default::default() };
        let usage = stage.client.usage(request).await.unwrap().into_inner();
        (usage.size, usage.inodes)
    };
    let spans: Vec<u64> = stage
        .files()
        .iter()
        .filter(|(path, _)| {
            path.starts_with(spans_of(&published, 0)) || path.ends_with(published.ztocs[0].hex())
        })
        .map(|(_, size)| *size)
        .collect();
    let (size, inodes) = usage(&mut stage, &names[0]).await;
    assert!(size > 5 << 20, "{size}");
    assert_eq!((size, inodes), (spans.iter().sum::<u64>() as i64, spans.len() as i64));
    let (size, inodes) = usage(&mut stage, &names[1]).await;
    assert!(size >= 4096 && inodes >= 3, "an unpacked layer: {size} bytes in {inodes} inodes");
}

fn spans_of(published: &Published, layer: usize) -> PathBuf {
    Path::new("soci/spans/sha256").join(published.ztocs[layer].hex())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_prefetch_artifact_names_is_fetched_first() {
    let registry = registry().await;
    let published = publish_with_prefetch(&registry, "team/app", layers().0, &[(3, 3)]);
    let mut stage = Stage::new(&registry, &format!("{BACKGROUND}[prefetch]\nenable = true\n")).await;
    let layer = &published.image.layers[0].digest;
    assert_eq!(stage.pull_layer(&published, 0).await.0, Some(tonic::Code::AlreadyExists));
    until("the layer is complete", async || complete(&stage).await).await;
    let of_layer = |path: &str| path.ends_with(layer.as_str());
    let log = registry.log();
    let ranges: Vec<_> = log
        .iter()
        .filter(|seen| of_layer(&seen.request.path))
        .filter_map(|seen| seen.request.range)
        .collect();
    // The layer does not compress and its spans are a megabyte: the fourth starts near the third megabyte.
    let first = ranges.first().unwrap().0;
    assert!((2_900_000..3_500_000).contains(&first), "{ranges:?}");
    let metrics = stage.metrics().await;
    let prefetched = format!("soci_layer_fetched_bytes_total{{layer=\"{layer}\",class=\"prefetch\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&prefetched)).unwrap();
    assert!(line.parse::<u64>().unwrap() > 900_000, "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bandwidth_limit_is_kept_in_the_background_and_not_felt_by_readers() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let config = format!("{BACKGROUND}[background_fetch]\nmax_bytes_per_second = 1\n");
    let mut stage = Stage::new(&registry, &config).await;
    let top = stage.pull(&published).await;
    let queue =
        "soci_fs_image_operation_count_key{image=\"\",operation_type=\"background_fetch_work_queue_size\"}";
    assert!(stage.metric(queue).await.unwrap() > 0);
    let merged = stage.run("container", &top).await;
    assert!(read(merged.join("big")).await == big, "at a byte a second it would take months");
    stage.unmount();
    let layer = &published.image.layers[1].digest;
    let fetched = format!(
        "soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"background_span_fetch_count\"}}"
    );
    assert_eq!(stage.metric(&fetched).await, Some(0), "the limit is not kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn completion_goes_on_after_a_restart_without_fetching_twice() {
    let registry = registry().await;
    let published = publish(&registry, "team/app", layers().0, |_| true);
    let size = published.image.layers[0].blob.len() as u64;
    let mut stage = Stage::new(&registry, BACKGROUND).await;
    registry.shape(Duration::ZERO, Some(1_500_000));
    stage.pull(&published).await;
    until("some of it is cached", async || stage.inspect().await["cache_bytes"].as_u64().unwrap() > 1 << 20)
        .await;
    stage.end(rustix::process::Signal::KILL);
    registry.shape(Duration::ZERO, None);
    registry.clear_log();
    stage.start_again().await;
    until("all is complete", async || complete(&stage).await).await;
    let layer = published.image.layers[0].digest.as_str();
    let again: u64 =
        registry.log().iter().filter(|seen| seen.request.path.ends_with(layer)).map(|seen| seen.bytes).sum();
    assert!(again + (900 << 10) < size, "{again} of {size} bytes were fetched after the restart");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_the_names_that_dashboards_know() {
    let registry = registry().await;
    registry.set_storage(Some(Duration::from_secs(300)));
    let published = publish(&registry, "team/app", layers().0, |_| true);
    let mut stage = Stage::new(&registry, BACKGROUND).await;
    let top = stage.pull(&published).await;
    let merged = stage.run("container", &top).await;
    read(merged.join("big")).await;
    tokio::task::spawn_blocking(move || {
        std::fs::read_dir(merged.join("etc")).unwrap().count();
        assert!(std::fs::symlink_metadata(merged.join("etc/gone")).is_err());
    })
    .await
    .unwrap();
    stage.unmount();
    until("all is complete", async || complete(&stage).await).await;
    let metrics = stage.metrics().await;
    let (layer, index) = (&published.image.layers[0].digest, published.index);
    for operation in [
        "synchronous_read_count",
        "synchronous_read_remote_registry_fetch_count",
        "background_span_fetch_count",
        "fuse_node_getattr_failure_count",
        "fuse_file_getattr_failure_count",
        "fuse_whiteout_getattr_failure_count",
        "fuse_node_lookup_failure_count",
        "fuse_node_open_failure_count",
        "fuse_node_readdir_failure_count",
        "fuse_file_read_failure_count",
        "fuse_node_listxattr_failure_count",
        "fuse_unknown_operation_failure_count",
    ] {
        let series = format!("soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"{operation}\"}}");
        assert!(metrics.contains(&series), "{series} in\n{metrics}");
    }
    for operation in
        ["background_fetch_work_queue_evicted", "local_mount_failure_count", "fuse_mount_failure_count"]
    {
        let series = format!("soci_fs_operation_count{{layer=\"\",operation_type=\"{operation}\"}}");
        assert!(metrics.contains(&series), "{series} in\n{metrics}");
    }
    for (of, operation) in [
        (layer.as_str(), "mount"),
        (layer.as_str(), "fuse_mount"),
        (layer.as_str(), "ztoc_fetch"),
        (layer.as_str(), "ztoc_unmarshal"),
        (layer.as_str(), "init_metadata_store"),
        (index.to_string().as_str(), "soci_index_fetch"),
        (layer.as_str(), "remote_registry_get"),
        (layer.as_str(), "blob_redirect"),
        ("", "remote_registry_get"),
        ("", "blob_redirect"),
    ] {
        let series = format!(
            "soci_fs_operation_duration_milliseconds_count{{layer=\"{of}\",operation_type=\"{operation}\"}}"
        );
        assert!(metrics.contains(&series), "{series} in\n{metrics}");
    }
    for operation in ["synchronous_read", "node_readdir"] {
        let series = format!(
            "soci_fs_operation_duration_microseconds_count{{layer=\"{layer}\",operation_type=\"{operation}\"}}"
        );
        assert!(metrics.contains(&series), "{series} in\n{metrics}");
    }
    let image = published.manifest;
    for operation in [
        "node.Getattr",
        "node.Getxattr",
        "node.Listxattr",
        "node.Lookup",
        "node.Open",
        "node.Readdir",
        "node.Readlink",
        "file.Read",
        "file.Getattr",
        "whiteout.Getattr",
    ] {
        let series =
            format!("soci_fs_image_operation_count_key{{image=\"{image}\",operation_type=\"{operation}\"}}");
        assert!(metrics.contains(&series), "{series} in\n{metrics}");
    }
    let value = |series: String| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(&series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{series} in\n{metrics}")).parse::<u64>().unwrap()
    };
    let total: u64 = published.image.layers.iter().map(|layer| layer.blob.len() as u64).sum();
    let needed = value(format!("soci_image_needed_bytes{{image=\"{image}\"}}"));
    assert!(needed > 4 << 20 && needed <= total, "{needed} of {total}");
    assert_eq!(value(format!("soci_image_fetched_bytes{{image=\"{image}\"}}")), total);
    let resolved = |layer: usize, what: &str| {
        let layer = &published.image.layers[layer].digest;
        value(format!("soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"resolve_cache_{what}\"}}"))
    };
    assert_eq!(resolved(0, "miss"), 1, "its first layer resolves the image");
    assert_eq!((resolved(1, "hit"), resolved(2, "hit")), (1, 1), "its other layers find it resolved");

    // Series go with what they are about.
    let names = downwards(&published);
    stage.remove(&[vec!["container".to_owned()], names].concat()).await;
    until("the series are gone", async || {
        let metrics = stage.metrics().await;
        !metrics.contains(layer.as_str())
            && !metrics.contains(&image.to_string())
            && !metrics.contains(&index.to_string())
    })
    .await;
}
