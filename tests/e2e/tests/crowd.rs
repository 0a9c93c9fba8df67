//! Many pulls at once through a real containerd, given up half way and removed under each other's feet; and an image of as many
//! layers as there may be. No span is fetched twice, nobody waits for ever, and nothing is left behind.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::state::{PATIENCE, SHOWN};
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::Numbers;
use soci_testkit::{AuthMode, cri};

/// Pulls at once.
const CROWD: u64 = 100;

fn stage() -> Result<Stage> {
    let mut options = StageOptions::new(AuthMode::Bearer)?;
    options.config_head.push_str(SHOWN);
    Stage::start(options)
}

/// Pulls as one of many kubelets; every other one gives a first call up after some milliseconds.
fn pull(stage: &Stage, published: &Published, numbers: &mut Numbers) -> Result<()> {
    let service = stage.containerd.image_service()?;
    let login = || Some(cri::basic(USER, PASSWORD));
    if numbers.next_u64().is_multiple_of(2) {
        let patience = Duration::from_millis(numbers.next_u64() % 500);
        let _given_up = service.pull_within(patience, &published.reference, login(), "default");
    }
    service.pull(&published.reference, login(), "default").context("PullImage")?;
    Ok(())
}

/// Returns the file `name` of a lazy layer, wherever that is mounted.
fn find(stage: &Stage, name: &str) -> Result<PathBuf> {
    let mounts = stage.snapshotter.fuse_mounts()?;
    let found = mounts.iter().map(|mount| mount.at.join(name)).find(|path| path.exists());
    found.with_context(|| format!("no lazy layer has {name}"))
}

/// Runs `work` for each number of the crowd in a thread of its own.
fn all_at_once(work: impl Fn(u64) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CROWD)
            .map(|number| {
                let work = &work;
                scope.spawn(move || work(number))
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread of the crowd panicked"))
    })
}

/// Fails where the registry sent a byte of the blob twice.
fn fetched_once(stage: &Stage, blob: &str) -> Result<()> {
    let mut ranges = Vec::new();
    for seen in stage.registry.log().iter().filter(|seen| seen.request.path.ends_with(blob)) {
        match (seen.status, seen.request.range) {
            (206, Some((first, Some(last)))) => ranges.push((first, last + 1)),
            (200, None) => bail!("{blob} was fetched as a whole"),
            _ => {}
        }
    }
    ranges.sort_unstable();
    assert!(!ranges.is_empty(), "nothing of {blob} was fetched: the test proves nothing");
    // Neighbouring spans share the byte that the border between them is in.
    let twice = ranges.windows(2).find(|pair| pair[1].0 + 1 < pair[0].1);
    assert_eq!(twice, None, "{blob}: {ranges:?}");
    Ok(())
}

#[test]
fn a_hundred_pulls_of_one_image_some_given_up_fetch_each_span_once() -> Result<()> {
    let mut stage = stage()?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v2(&image, "crowd/one", "1")?;
    stage.registry.clear_log();
    let before = stage.files();
    all_at_once(|number| {
        pull(&stage, &published, &mut Numbers::new(number))?;
        for (name, size) in [("large", images::LARGE), ("random", 5 * 1024 * 1024 + 17)] {
            let read = std::fs::read(find(&stage, name)?).with_context(|| format!("read {name}"))?;
            assert_eq!(read.len(), size, "{name}");
        }
        Ok(())
    })?;
    assert_eq!(stage.lazy_layers()?, 2);
    for layer in &image.layers[..2] {
        fetched_once(&stage, &layer.digest)?;
    }
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    stage.remove_images(&[&published.reference])?;
    stage.wait_for_files(&before)
}

#[test]
fn a_hundred_pulls_of_twenty_images_some_given_up_or_removed_leave_nothing_behind() -> Result<()> {
    let mut stage = stage()?;
    let publish = |seed: u64| -> Result<(Image, Published)> {
        let image = images::small(seed);
        let published = stage.publish_v2(&image, &format!("crowd/image-{seed}"), "1")?;
        Ok((image, published))
    };
    let images = (0..20).map(publish).collect::<Result<Vec<_>>>()?;
    let before = stage.files();
    all_at_once(|number| {
        let mut numbers = Numbers::new(1000 + number);
        let (_, published) = &images[usize::try_from(number)? % images.len()];
        let pulled = pull(&stage, published, &mut numbers);
        let outcome = if numbers.next_u64().is_multiple_of(3) {
            stage.containerd.image_service()?.remove(&published.reference).context("RemoveImage")
        } else {
            pulled
        };
        match outcome {
            // Somebody else removed the image as it came or went: to a pull and to a removal containerd says so.
            Err(error) if format!("{error:#}").to_lowercase().contains("not found") => Ok(()),
            outcome => outcome,
        }
    })?;
    // Whatever of it is there now: each image comes, and is what it was.
    for (seed, (image, published)) in (0..).zip(&images) {
        stage.pull_as_kubelet(published)?;
        let chain = image.chain_id();
        let mounted = stage.containerd.mount(KUBELET, "soci", &chain, &format!("image-{seed}"))?;
        let read = std::fs::read(mounted.path().join("content"))?;
        assert!(read == Numbers::new(seed).bytes(1_200_000), "{}: other bytes", published.reference);
    }
    let references: Vec<&str> = images.iter().map(|(_, published)| published.reference.as_str()).collect();
    stage.remove_images(&references)?;
    stage.wait_for_files(&before)
}

#[test]
fn an_image_of_127_layers_is_lazy_in_each_of_them_and_runs() -> Result<()> {
    let mut stage = stage()?;
    let image = images::tall();
    let published = stage.publish_v2_from("0", &image, "team/tall", "1")?;
    let before = stage.files();
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, image.layers.len());
    let verdict = stage.wait_log("\"verdict\":", PATIENCE)?;
    assert!(verdict.contains("lazy (127 lazy)"), "{verdict}");
    // From the lowest layer and from the topmost.
    let printed = stage.probe(KUBELET, &published, "c", &["sum", "/0", "/126"])?;
    assert!(printed.contains("/0 1 ") && printed.contains("/126 3 "), "{printed}");
    stage.snapshotter.daemon().kill();
    stage.start_snapshotter_again()?;
    stage.wait_lazy_layers(image.layers.len())?;
    assert_eq!(stage.probe(KUBELET, &published, "again", &["sum", "/0", "/126"])?, printed);
    stage.remove_images(&[&published.reference])?;
    stage.wait_for_files(&before)
}
