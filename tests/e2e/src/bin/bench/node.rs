//! What a node sees in its life: background work, many layers, restarts, idleness. Absolute figures, of our side alone.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use soci_e2e::Stage;
use soci_testkit::snapshots::answering::Answering;
use soci_testkit::wait;

use crate::limits::drop_caches;
use crate::rows::{
    NAMESPACE, NO_BACKGROUND, megabytes, megabytes_per_second, prove_ranges, pull, pull_lazily, read_all,
};
use crate::samples::Samples;
use crate::sides::{Bench, LARGE, LAYERS, Ready, Side};

/// How much later the registry's answers come, where it is far.
const LATE: Duration = Duration::from_millis(50);

/// The images of [`LAYERS`] layers each.
const MANY: [&str; 4] = ["layers-a", "layers-b", "layers-c", "layers-d"];

fn is_ours(side: &Side) -> bool {
    side.name == "ours"
}

/// How fast an idle machine completes an image, and what a reader loses while another image is completed.
pub(crate) fn background(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    if !is_ours(side) {
        return Ok(());
    }
    let big = bench.image("big")?;
    {
        let stage = bench.stage(side, "")?;
        pull_lazily(&stage, big, 2)?;
        let start = Instant::now();
        let complete = wait::until(Duration::from_secs(300), || stage.is_complete().then_some(()));
        complete.context("the image is not completed")?;
        let rate = megabytes_per_second(content(big), start.elapsed());
        samples.add("background completion of big, MB/s of content", side.name, rate);
    }
    let alone = read_cold(bench, side, NO_BACKGROUND, None)?;
    samples.add("cold sequential read, nothing beside, MB/s", side.name, alone);
    let beside = read_cold(bench, side, "", Some(bench.image("py")?))?;
    samples.add("cold sequential read, completion of py beside, MB/s", side.name, beside);
    Ok(())
}

/// Reads the large file of `big` once, right after pulling `beside` and it.
fn read_cold(bench: &Bench, side: &Side, config: &str, beside: Option<&Ready>) -> Result<f64> {
    let stage = bench.stage(side, config)?;
    let big = bench.image("big")?;
    drop_caches()?;
    if let Some(beside) = beside {
        pull_lazily(&stage, beside, 2)?;
    }
    // Both have the Debian layer in common, which is one snapshot.
    pull_lazily(&stage, big, if beside.is_some() { 3 } else { 2 })?;
    let mounted = stage.containerd.mount(NAMESPACE, "soci", &big.image.chain_id(), "read")?;
    let time = read_all(&mounted.path().join("data/large"))?;
    prove_ranges(bench)?;
    Ok(megabytes_per_second(LARGE, time))
}

/// Returns the bytes of an image's layers when inflated: gzip states them at its end.
fn content(ready: &Ready) -> usize {
    let size = |blob: &[u8]| blob.last_chunk().map_or(0, |size| u32::from_le_bytes(*size) as usize);
    ready.image.layers.iter().map(|layer| size(&layer.blob)).sum()
}

/// Many layers from a slow registry: what is asked one after another costs a delay each.
pub(crate) fn layers127(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    if !is_ours(side) {
        return Ok(());
    }
    let row = "lazy pull of 127 layers, each answer 50 ms late, s";
    let ready = bench.image("layers-a")?;
    {
        let stage = bench.stage(side, NO_BACKGROUND)?;
        let _road = bench.road(LATE, None);
        samples.add(row, side.name, pull_lazily(&stage, ready, LAYERS)?.as_secs_f64());
    }
    // containerd's own part, with one that knows the layers and only waits for the answers that no snapshotter can do
    // without: the challenge, the list of indexes, the index and a zTOC.
    let mut stage = bench.stage(side, NO_BACKGROUND)?;
    let _road = bench.road(LATE, None);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let _within = runtime.enter();
    let (socket, other) = (stage.snapshotter.socket(), stage.path().join("answering.sock"));
    let _answering = Answering::start(&other, LATE * 4)?;
    // It takes the daemon's place before the daemon goes: containerd connects again at once, and then not for a second.
    std::fs::rename(&other, &socket).with_context(|| format!("replace {}", socket.display()))?;
    stage.snapshotter.daemon().kill();
    let pull = pull(&stage, ready)?;
    samples.add(row, "answering", pull.as_secs_f64());
    Ok(())
}

/// A daemon that was killed comes back without a registry.
pub(crate) fn restart(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    if !is_ours(side) {
        return Ok(());
    }
    let mut stage = bench.stage(side, NO_BACKGROUND)?;
    pull_lazily(&stage, bench.image("layers-a")?, LAYERS)?;
    stage.snapshotter.daemon().kill();
    let _down = bench.registry_down();
    let start = Instant::now();
    stage.snapshotter.start_again()?;
    let ready = start.elapsed();
    stage.wait_log("layers of an earlier process are mounted again", Duration::from_secs(60))?;
    let mounted = start.elapsed();
    let mounts = stage.snapshotter.fuse_mounts()?;
    if mounts.len() != LAYERS {
        bail!("{} layers are mounted, not {LAYERS}", mounts.len());
    }
    for mount in mounts {
        let names = mount.at.read_dir().with_context(|| format!("list {}", mount.at.display()))?.count();
        if names != 1 {
            bail!("{} has {names} names", mount.at.display());
        }
    }
    let row = "restart with 127 lazy layers, registry down, to ready, s";
    samples.add(row, side.name, ready.as_secs_f64());
    let row = "restart with 127 lazy layers, registry down, to all mounted, s";
    samples.add(row, side.name, mounted.as_secs_f64());
    Ok(())
}

/// What 508 layers cost while nobody uses them, and what stays when they go.
pub(crate) fn idle500(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    if !is_ours(side) {
        return Ok(());
    }
    let mut stage = bench.stage(side, "")?;
    let anonymous = |stage: &mut Stage| megabytes(stage.snapshotter.daemon().memory("RssAnon"));
    samples.add("anonymous memory of a daemon that did nothing yet, MB", side.name, anonymous(&mut stage));
    // The first image brings what any daemon has that ever pulled: certificates, clients, threads. It is no layer's.
    mount(bench, &stage, &MANY[..1])?;
    unmount(bench, &stage, &MANY[..1])?;
    let before = anonymous(&mut stage);
    samples.add("after 127 layers came and went, MB", side.name, before);
    mount(bench, &stage, &MANY)?;
    let theirs = anonymous(&mut stage) - before;
    let each = theirs * 1000.0 / f64::from(u32::try_from(LAYERS * MANY.len())?);
    samples.add("anonymous memory per idle layer of 508, kB", side.name, each);
    bench.backstage.registry.clear_log();
    // containerd's CRI plugin asks for the usage of every snapshot each ten seconds. That is its idleness, not ours, and
    // is measured apart.
    let containerd = stage.containerd.daemon();
    containerd.signal(Signal::STOP);
    let share = processor_share(&stage, Duration::from_secs(60));
    containerd.signal(Signal::CONT);
    samples.add("processor in an idle minute with 508 layers, % of a core", side.name, share);
    let requests = u32::try_from(bench.backstage.registry.log().len())?;
    samples.add("requests in that minute", side.name, f64::from(requests));
    let share = processor_share(&stage, Duration::from_secs(30));
    samples.add("the same with containerd's statistics of 508 snapshots", side.name, share);
    unmount(bench, &stage, &MANY)?;
    let once = anonymous(&mut stage);
    samples.add("after unmounting them, MB", side.name, once);
    samples.add("what they took and did not give back, %", side.name, (once - before) / theirs * 100.0);
    // What an allocator keeps for the next wave is no leak: the next wave shows it.
    mount(bench, &stage, &MANY)?;
    unmount(bench, &stage, &MANY)?;
    let growth = (anonymous(&mut stage) / once - 1.0) * 100.0;
    samples.add("growth of that by mounting and unmounting 508 more, %", side.name, growth);
    Ok(())
}

/// Pulls `images` of many layers where none is mounted, and waits until the daemon rests.
fn mount(bench: &Bench, stage: &Stage, images: &[&str]) -> Result<()> {
    for (name, layers) in images.iter().zip((LAYERS..).step_by(LAYERS)) {
        pull_lazily(stage, bench.image(name)?, layers)?;
    }
    settle(stage)
}

/// Removes them, and waits until nothing is mounted and the daemon rests.
fn unmount(bench: &Bench, stage: &Stage, images: &[&str]) -> Result<()> {
    let service = stage.containerd.image_service()?;
    for name in images {
        service.remove(&bench.image(name)?.published.reference).context("RemoveImage")?;
    }
    let gone = || stage.snapshotter.fuse_mounts().is_ok_and(|left| left.is_empty()).then_some(());
    wait::until(Duration::from_secs(60), gone).context("layers of removed images stay mounted")?;
    settle(stage)
}

/// Returns the processor time that the daemon takes in the next `time`, in percent of a core.
fn processor_share(stage: &Stage, time: Duration) -> f64 {
    let before = stage.snapshotter.cpu_time();
    let start = Instant::now();
    pause(time);
    let worked = stage.snapshotter.cpu_time().saturating_sub(before);
    worked.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0
}

/// Waits until the daemon does nothing any more and has given back what it keeps for a while.
fn settle(stage: &Stage) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(240);
    loop {
        let worked = stage.snapshotter.cpu_time();
        // Longer than what is kept for speed is kept: connections for 50 s, freed memory for 60 s after the last change.
        pause(Duration::from_secs(70));
        // What is left is answering containerd's statistics.
        if stage.snapshotter.cpu_time().saturating_sub(worked) < Duration::from_millis(800) {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("the daemon does not come to rest");
        }
    }
}

/// Lets time pass in which nothing is to happen.
pub(crate) fn pause(time: Duration) {
    let _nothing = wait::until(time, || None::<()>);
}
