//! Layers that are not lazy are counted, by the reference's names and by our own, and the container runs all the same.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use soci_e2e::pull::KUBELET;
use soci_e2e::scrape::scrape;
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::{Action, AuthMode, Fault, Matcher, wait};

const METRICS: &str = "metrics_network = \"unix\"\nmetrics_address = \"{stage}/m.sock\"\n";

/// A stage whose daemon shows its metrics on a Unix socket.
fn stage(config: &str) -> Result<Stage> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config_head.push_str(METRICS);
    options.config.push_str(config);
    Stage::start(options)
}

/// Waits until a series has the value 1: a verdict is given when the whole image was asked for.
fn counted(stage: &Stage, series: &str) -> Result<()> {
    let (socket, line) = (stage.path().join("m.sock"), format!("{series} 1"));
    let found = || scrape(&socket).ok().filter(|text| text.lines().any(|found| found == line));
    if wait::until(Duration::from_secs(60), found).is_none() {
        bail!("{line} is missing in\n{}", scrape(&socket)?);
    }
    Ok(())
}

/// Returns what containerd shows as the verdict on an image's topmost snapshot.
fn verdict(stage: &Stage, image: &Image) -> Result<String> {
    let words = ["snapshots", "--snapshotter", "soci", "info", &image.chain_id()];
    let shown: Value = serde_json::from_str(&stage.containerd.run(KUBELET, &words)?)?;
    let verdict = shown["Labels"]["containerd.io/snapshot/soci.verdict"].as_str();
    Ok(verdict.with_context(|| format!("no verdict in {shown}"))?.to_owned())
}

#[test]
fn layers_below_the_minimum_size_are_unpacked() -> Result<()> {
    let image = images::odd(Dialect::Oci);
    let sizes: Vec<usize> = image.layers.iter().map(|layer| layer.blob.len()).collect();
    let largest = sizes.iter().max().copied().unwrap_or_default();
    // The largest is not smaller than itself: it alone stays lazy.
    let stage = stage(&format!("[snapshotter]\nmin_layer_size = {largest}\n"))?;
    let published = stage.publish_v2(&image, "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 1, "{sizes:?}");
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

#[test]
fn pulls_that_fall_back_are_counted_with_the_reason() -> Result<()> {
    let stage = stage("")?;
    let plain = stage.publish(&images::single(51), "team/plain", "1");
    stage.pull_as_kubelet(&plain)?;
    assert_eq!(verdict(&stage, &images::single(51))?, "left to containerd: no-index");
    counted(&stage, "soci_pull_verdicts_total{verdict=\"left to containerd\",reason=\"no-index\"}")?;

    // An index whose zTOCs cannot be had: each layer is unpacked by the daemon.
    let image = images::single(52);
    let published = stage.publish_v2(&image, "team/broken", "1")?;
    stage.registry.clear_log();
    let layer = format!("/blobs/{}", image.layers[0].digest);
    let config = format!("/blobs/{}", soci_testkit::layer_gen::digest(&image.config));
    let others = Matcher::new(move |request| {
        let path = &request.path;
        path.contains("/blobs/") && !path.ends_with(&layer) && !path.ends_with(&config)
    });
    stage.registry.fault(Fault::new(others, Action::status(404)));
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 0);
    assert_eq!(stage.probe(KUBELET, &published, "echo", &["echo", "hello"])?, "hello\n");
    assert_eq!(verdict(&stage, &image)?, "unpacked: mount-failed");
    counted(&stage, "soci_fs_operation_count{layer=\"\",operation_type=\"fuse_mount_failure_count\"}")?;
    counted(&stage, "soci_pull_verdicts_total{verdict=\"unpacked\",reason=\"mount-failed\"}")
}

/// Reads, a read that failed, and what the background fetched or could not: an operator sees each.
#[test]
fn reads_failures_and_background_fetches_are_counted_by_layer() -> Result<()> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config_head.push_str(METRICS);
    options.config = "[blob]\nfetching_timeout_sec = 2\nmax_retries = 1\n".to_owned();
    let stage = Stage::start(options)?;
    let socket = stage.path().join("m.sock");
    let value = |layer: &str, operation: &str| -> Result<u64> {
        let series = format!("soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"{operation}\"}} ");
        let shown = scrape(&socket)?;
        let line = shown.lines().find_map(|line| line.strip_prefix(&series));
        Ok(line.with_context(|| format!("{series} in\n{shown}"))?.parse()?)
    };
    let some = |layer: &str, operation: &str| {
        let found = || value(layer, operation).is_ok_and(|value| value > 0).then_some(());
        wait::until(Duration::from_secs(60), found).with_context(|| format!("{operation} stays 0"))
    };
    let whole = images::single(53);
    stage.pull_as_kubelet(&stage.publish_v2(&whole, "team/whole", "1")?)?;
    some(&whole.layers[0].digest, "background_span_fetch_count")?;
    let mounted = stage.containerd.mount(KUBELET, "soci", &whole.chain_id(), "whole")?;
    assert_eq!(std::fs::read(mounted.path().join("content"))?.len(), 4 << 20);
    assert!(value(&whole.layers[0].digest, "synchronous_read_count")? > 0);
    assert_eq!(value(&whole.layers[0].digest, "fuse_file_read_failure_count")?, 0);

    // Its index comes, its layer does not: nobody can have fetched it before.
    let broken = images::single(54);
    let published = stage.publish_v2(&broken, "team/broken", "1")?;
    let layer = broken.layers[0].digest.clone();
    let blob = Matcher::new(move |request| request.path.ends_with(&layer));
    stage.registry.fault(Fault::new(blob, Action::Hangup));
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    let mounted = stage.containerd.mount(KUBELET, "soci", &broken.chain_id(), "broken")?;
    assert!(std::fs::read(mounted.path().join("content")).is_err(), "it was read without the registry");
    assert!(value(&broken.layers[0].digest, "fuse_file_read_failure_count")? > 0);
    some(&broken.layers[0].digest, "background_span_fetch_failure_count")
}
