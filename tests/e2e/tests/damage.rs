//! The disk loses a part of a snapshot's record while the daemon is down: the image that it belongs to is had again by what the
//! log says, removing and pulling it, and nothing else notices.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::state::PATIENCE;
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_testkit::{AuthMode, wait};

/// An image of two layers that no other image has.
fn image() -> Image {
    let layer = |seed: u64, name: &str| {
        LayerBuilder::new()
            .file("probe", &Attr::mode(0o755), images::PROBE)
            .file(name, &Attr::default(), &Numbers::new(seed).bytes(1_200_000))
            .gzip()
    };
    Image::new(vec![layer(91, "lower"), layer(92, "upper")], Dialect::Oci, &["/probe"])
}

/// Returns the record of the snapshot that has so many of the image's layers.
fn record(stage: &Stage, image: &Image, layers: usize) -> Result<PathBuf> {
    let name = Image { layers: image.layers[..layers].to_vec(), ..image.clone() }.chain_id();
    let named = |path: &PathBuf| {
        fs::read(path)
            .is_ok_and(|text| String::from_utf8_lossy(&text).contains(&format!("\"name\":\"{name}\"")))
    };
    let snapshots = stage.snapshotter.root().join("snapshotter/snapshots");
    let mut records = fs::read_dir(snapshots)?.flatten().map(|entry| entry.path().join("record"));
    records.find(named).with_context(|| format!("no record names {name}"))
}

/// What is seen of the image in a container: both its files.
fn seen(stage: &Stage, published: &Published) -> Result<String> {
    stage.probe(KUBELET, published, "c", &["sum", "/lower", "/upper"])
}

#[test]
fn an_image_whose_record_is_damaged_is_had_again_and_others_notice_nothing() -> Result<()> {
    let mut stage = Stage::start(StageOptions::new(AuthMode::Basic)?)?;
    let (image, other) = (image(), images::odd(Dialect::Oci));
    let published = stage.publish_v2_from("1", &image, "team/app", "1")?;
    let other_published = stage.publish_v2(&other, "team/other", "1")?;
    stage.pull_as_kubelet(&other_published)?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 4);
    let before = seen(&stage, &published)?;
    let other_before = stage.probe(KUBELET, &other_published, "other", &["sum", "/large"])?;

    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, usize, Damage); 5] = [
        ("emptied, the upper layer's", 2, |bytes| bytes.clear()),
        ("cut in its first line, the lower layer's", 1, |bytes| bytes.truncate(9)),
        ("cut in the middle, the upper layer's", 2, |bytes| bytes.truncate(bytes.len() / 2)),
        ("cut by one byte, the lower layer's", 1, |bytes| bytes.truncate(bytes.len() - 1)),
        ("with one bit flipped, the upper layer's", 2, |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
        }),
    ];
    for (what, layers, damage) in damages {
        stage.snapshotter.daemon().kill();
        let file = record(&stage, &image, layers)?;
        let mut bytes = fs::read(&file)?;
        damage(&mut bytes);
        fs::write(&file, &bytes)?;
        let told = stage.snapshotter.log_text().len();
        stage.start_snapshotter_again()?;
        stage.wait_lazy_layers(3).context(what)?;
        if !bytes.is_empty() {
            let log = stage.snapshotter.log_text();
            let line = log[told..].lines().find(|line| line.contains("a damaged snapshot is left out"));
            let line: Value = serde_json::from_str(line.with_context(|| format!("{what}: {log}"))?)?;
            assert_eq!(line["level"], "warning", "{what}");
            let advice = line["advice"].as_str().unwrap_or_default();
            assert!(advice.contains("crictl rmi") && advice.contains("pull"), "{what}: {advice}");
        }
        let again = stage.probe(KUBELET, &other_published, "other", &["sum", "/large"])?;
        assert_eq!(again, other_before, "{what}: the other image");

        stage.containerd.image_service()?.remove(&published.reference)?;
        stage.collect()?;
        stage.wait_lazy_layers(2).context(what)?;
        stage.pull_as_kubelet(&published).context(what)?;
        assert_eq!(stage.lazy_layers()?, 4, "{what}: {}", stage.log_tail());
        assert_eq!(seen(&stage, &published).context(what)?, before, "{what}");
        let gone = || (!file.parent()?.exists()).then_some(());
        assert!(wait::until(PATIENCE, gone).is_some(), "{what}: {} stays", file.display());
    }
    let differences = stage.differences(KUBELET, &other_published, &other, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}
