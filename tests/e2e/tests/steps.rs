//! containerd between any two steps of a pull, one after another: restarted, or collecting. Nothing is lost and nothing leaks.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::state::{PATIENCE, SHOWN};
use soci_e2e::{Stage, StageOptions, containerd2, images};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::Numbers;
use soci_testkit::process::output;
use soci_testkit::snapshots::{Mount, Snapshots};
use soci_testkit::{AuthMode, cri, mounts, wait};

/// More calls than any of these pulls makes.
const MANY: usize = 60;

fn options() -> Result<StageOptions> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config_head.push_str(SHOWN);
    Ok(options)
}

/// Restarts containerd as it waits for the answer to the first call of a pull, then to that of the second, until a pull makes no
/// more calls. After each the image is pulled again, is what it was, and goes without a trace.
fn restarted_at_each_call(
    lazy: usize,
    publish: impl FnOnce(&Stage, &Image) -> Result<Published>,
) -> Result<()> {
    let mut options = options()?;
    options.gated = true;
    let mut stage = Stage::start(options)?;
    let seed = 60;
    let image = images::small(seed);
    let published = publish(&stage, &image)?;
    let before = stage.files();
    let mut calls = Vec::new();
    loop {
        let number = calls.len() + 1;
        assert!(number < MANY, "a pull without an end: {calls:?}");
        let gate = stage.gate.as_ref().context("the stage has no gate")?;
        gate.hold(number);
        let service = stage.containerd.image_service()?;
        let reference = published.reference.clone();
        let pulling = std::thread::spawn(move || {
            service
                .pull(&reference, Some(cri::basic(USER, PASSWORD)), "default")
                .map_err(|status| status.to_string())
        });
        wait::until(PATIENCE, || (gate.held().is_some() || pulling.is_finished()).then_some(()))
            .context("the pull hangs, and not at the gate")?;
        let Some(call) = gate.held() else {
            let pulled = pulling.join().expect("the pulling thread panicked");
            assert!(pulled.is_ok(), "nothing was held: {pulled:?}");
            break;
        };
        // Told to end or not, it may leave off anywhere.
        let signal = if number.is_multiple_of(2) { Signal::TERM } else { Signal::KILL };
        stage.containerd.restart(signal)?;
        stage.gate.as_ref().context("the stage has no gate")?.open();
        let pulled = pulling.join().expect("the pulling thread panicked");
        assert!(pulled.is_err(), "{call}: the pull ended before containerd did");
        calls.push(call);
        // What the pull left is containerd's to collect soon after its start, unless a lease has it, as after a kill. A pull that
        // meets that loses a parent under its feet, with any snapshotter.
        stage.collect()?;
        again(&mut stage, &image, &published, lazy, seed).with_context(|| format!("after {calls:?}"))?;
        stage.wait_for_files(&before).with_context(|| format!("after {calls:?}"))?;
    }
    assert!(calls.iter().filter(|call| *call == "Prepare").count() >= image.layers.len(), "{calls:?}");
    Ok(())
}

/// Pulls the image, reads it and removes it; all of it goes.
fn again(stage: &mut Stage, image: &Image, published: &Published, lazy: usize, seed: u64) -> Result<()> {
    stage.pull_as_kubelet(published)?;
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    assert!(std::fs::read(mounted.path().join("content"))? == Numbers::new(seed).bytes(1_200_000));
    drop(mounted);
    stage.wait_lazy_layers(lazy)?;
    stage.remove_images(&[&published.reference])?;
    stage.wait_no_snapshots()
}

#[test]
fn a_containerd_restarted_at_any_call_of_a_lazy_pull_pulls_again_and_leaks_nothing() -> Result<()> {
    restarted_at_each_call(1, |stage, image| stage.publish_v1(image, "team/app", "1"))
}

#[test]
fn a_containerd_restarted_at_any_call_of_a_pull_that_it_unpacks_pulls_again_and_leaks_nothing() -> Result<()>
{
    restarted_at_each_call(0, |stage, image| Ok(stage.publish(image, "team/app", "1")))
}

/// A pull whose steps the test takes itself, with containerd's collector after each.
struct Pull<'a> {
    stage: &'a Stage,
    snapshots: Snapshots,
    image: &'a Image,
    published: &'a Published,
}

/// The lease of a pull.
const LEASE: &str = "pull";

impl<'a> Pull<'a> {
    fn begin(stage: &'a Stage, image: &'a Image, published: &'a Published) -> Result<Self> {
        stage.containerd.run(KUBELET, &["leases", "create", "--id", LEASE])?;
        let snapshots = Snapshots::connect(&stage.containerd.socket())?.leased(LEASE);
        Ok(Self { stage, snapshots, image, published })
    }

    /// Runs the collector; what was committed so far is there.
    fn collect(&self, committed: &[String]) -> Result<()> {
        self.stage.collect()?;
        for chain in committed {
            assert!(self.snapshots.is_committed(KUBELET, chain).context("lost")?, "{chain}");
        }
        Ok(())
    }

    /// Takes the steps of one layer; returns whether the daemon took it.
    fn layer(&self, number: usize, chains: &[String]) -> Result<bool> {
        let (below, layer) = (&chains[..number], &self.image.layers[number]);
        let parent = below.last().map_or("", String::as_str);
        let labels = [
            ("containerd.io/snapshot.ref", chains[number].as_str()),
            ("containerd.io/snapshot/cri.image-ref", self.published.reference.as_str()),
            ("containerd.io/snapshot/cri.manifest-digest", self.image.digest.as_str()),
            ("containerd.io/snapshot/cri.layer-digest", layer.digest.as_str()),
        ];
        let key = format!("extract-{number}");
        let prepared = self.snapshots.prepare(KUBELET, &key, parent, &labels);
        self.collect(below)?;
        if let Err(status) = prepared {
            if status.code() != soci_testkit::snapshots::Code::AlreadyExists {
                bail!("layer {number}: {status}");
            }
            self.collect(&chains[..=number])?;
            return Ok(true);
        }
        let mounts = self.snapshots.mounts(KUBELET, &key)?;
        self.collect(below)?;
        self.mounted(&mounts, |at| Ok(std::fs::write(at.join(number.to_string()), number.to_string())?))?;
        self.collect(below)?;
        self.snapshots.commit(KUBELET, &chains[number], &key)?;
        self.collect(&chains[..=number])?;
        Ok(false)
    }

    /// Mounts as containerd does, for the time of `work`.
    fn mounted(&self, mounts: &[Mount], work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let [mount] = mounts else { bail!("{mounts:?}") };
        let at = self.stage.path().join("mounted");
        std::fs::create_dir_all(&at)?;
        let mut command = Command::new("mount");
        command.args(["-t", &mount.r#type, "-o", &mount.options.join(","), &mount.source]);
        output(command.arg(&at))?;
        let worked = work(&at);
        mounts::detach(&at);
        worked
    }

    /// Makes a container of the image, looks at it, and removes it.
    fn container(&self, chains: &[String], look: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let top = chains.last().context("an image without layers")?;
        self.snapshots.prepare(KUBELET, "container", top, &[])?;
        self.collect(chains)?;
        let mounts = self.snapshots.mounts(KUBELET, "container")?;
        self.collect(chains)?;
        self.mounted(&mounts, look)?;
        self.snapshots.remove(KUBELET, "container")?;
        self.collect(chains)
    }

    /// Removes the layers, the topmost first.
    fn remove(&self, chains: &[String]) -> Result<()> {
        for (number, chain) in chains.iter().enumerate().rev() {
            self.snapshots.remove(KUBELET, chain)?;
            self.collect(&chains[..number])?;
        }
        Ok(())
    }
}

/// Pulls with the collector after each step, twice: one time the layers are removed one by one, the other time the collector
/// takes all of them.
fn collected_after_each_step(
    image: &Image,
    publish: impl FnOnce(&Stage, &Image) -> Result<Published>,
    taken: &[bool],
    lazy: usize,
    look: fn(&Path) -> Result<()>,
) -> Result<()> {
    let mut options = options()?;
    // Debian's containerd 1.6 does not tell a snapshotter the namespace of calls that come over its socket.
    options.containerd = containerd2::programs()?;
    let stage = Stage::start(options)?;
    let published = publish(&stage, image)?;
    let (before, chains) = (stage.files(), image.chain_ids());
    for one_by_one in [true, false] {
        let pull = Pull::begin(&stage, image, &published)?;
        let layers: Result<Vec<bool>> = (0..chains.len()).map(|number| pull.layer(number, &chains)).collect();
        assert_eq!(layers?, taken, "{}", stage.log_tail());
        assert_eq!(stage.lazy_layers()?, lazy);
        pull.container(&chains, look)?;
        if one_by_one {
            pull.remove(&chains)?;
        }
        stage.containerd.run(KUBELET, &["leases", "delete", LEASE])?;
        stage.collect()?;
        stage.wait_lazy_layers(0)?;
        stage.wait_no_snapshots()?;
        stage.wait_for_files(&before)?;
    }
    Ok(())
}

#[test]
fn containerds_collector_after_each_step_of_a_lazy_pull_takes_nothing_that_is_needed() -> Result<()> {
    let publish = |stage: &Stage, image: &Image| stage.publish_v1(image, "team/app", "1");
    collected_after_each_step(&images::odd(Dialect::Oci), publish, &[true; 3], 2, |at| {
        assert_eq!(std::fs::read(at.join("large"))?.len(), images::LARGE);
        assert_eq!(std::fs::read(at.join("random"))?.len(), 5 * 1024 * 1024 + 17);
        assert_eq!(std::fs::read(at.join("top/small"))?, b"a layer too small to index");
        Ok(())
    })
}

#[test]
fn containerds_collector_after_each_step_of_a_pull_that_it_unpacks_takes_nothing_that_is_needed() -> Result<()>
{
    let publish = |stage: &Stage, image: &Image| Ok(stage.publish(image, "team/app", "1"));
    collected_after_each_step(&images::odd(Dialect::Oci), publish, &[false; 3], 0, |at| {
        for name in ["0", "1", "2"] {
            assert_eq!(std::fs::read_to_string(at.join(name))?, name);
        }
        Ok(())
    })
}
