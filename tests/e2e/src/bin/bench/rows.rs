//! The work that is measured, in parts that each begin with a fresh stage.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use soci_e2e::Stage;
use soci_e2e::publish::BUILD;
use soci_e2e::stage::{PASSWORD, USER};
use soci_testkit::layer_gen::Numbers;
use soci_testkit::process::output;
use soci_testkit::{cri, wait};

use crate::limits::drop_caches;
use crate::node;
use crate::samples::Samples;
use crate::sides::{Bench, LARGE, Ready, Side};

type Measure = fn(&Bench, &Side, &mut Samples) -> Result<()>;

/// The parts, by the name that `--only` takes.
pub(crate) const PARTS: &[(&str, Measure)] = &[
    ("index", index),
    ("big", big),
    ("read", read),
    ("files10k", files10k),
    ("files100k", files100k),
    ("py", py),
    ("far", far),
    ("background", node::background),
    ("layers127", node::layers127),
    ("restart", node::restart),
    ("idle500", node::idle500),
    ("auth", crate::auth::auth),
];

/// Nothing but what a reader asks for is fetched.
pub(crate) const NO_BACKGROUND: &str = "[background_fetch]\ndisable = true\n";

pub(crate) const NAMESPACE: &str = "k8s.io";

/// Returns millions of bytes.
#[expect(clippy::cast_precision_loss, reason = "bytes of files and of memory are far below 2^52")]
pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

pub(crate) fn megabytes_per_second(bytes: usize, time: Duration) -> f64 {
    megabytes(bytes as u64) / time.as_secs_f64()
}

fn index(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let stage = bench.stage(side, "")?;
    let ready = bench.image("big")?;
    stage.fetch(&ready.published.reference)?;
    drop_caches()?;
    output(Command::new(side.binaries.path("soci")).arg("--version"))?;
    let mut command = stage.soci_command(BUILD, &["create", "--force", &ready.published.reference]);
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("start soci")?;
    let mut peak = 0;
    let status = wait::until(Duration::from_secs(300), || {
        peak = peak.max(high_water(child.id()));
        child.try_wait().ok().flatten()
    });
    let time = start.elapsed();
    if !status.context("soci create did not end")?.success() {
        bail!("soci create failed");
    }
    samples.add("index build of big, s", side.name, time.as_secs_f64());
    samples.add("index build of big, peak RSS, MB", side.name, megabytes(peak));
    Ok(())
}

fn high_water(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
}

/// Pull, first output, cold random reads.
fn big(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let mut stage = bench.stage(side, NO_BACKGROUND)?;
    let ready = bench.image("big")?;
    samples.add("daemon RSS idle, MB", side.name, megabytes(stage.snapshotter.daemon().memory("VmRSS")));
    warm_programs(&stage)?;
    let (pull, echo) = pull_and_echo(&stage, ready, 2)?;
    samples.add("lazy pull of big, s", side.name, pull);
    samples.add("first echo after it, s", side.name, echo);

    let again = echo_once(&stage, ready)?;
    samples.add("second echo, s", side.name, again);

    let mounted = stage.containerd.mount(NAMESPACE, "soci", &ready.image.chain_id(), "random")?;
    let file = File::open(mounted.path().join("data/large"))?;
    let span = 4 << 20;
    let mut spans: Vec<u64> = (1..LARGE as u64 / span).collect();
    shuffle(&mut spans);
    let mut times = Vec::new();
    let mut buffer = vec![0; 4096];
    for number in &spans[..40] {
        let start = Instant::now();
        file.read_exact_at(&mut buffer, number * span + span / 2)?;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    prove_ranges(bench)?;
    let [median, ..] = crate::samples::summary(&times).context("no reads")?;
    samples.add("cold 4 KiB random read, p50, ms", side.name, median);
    Ok(())
}

/// Cold sequential read, its processor time, memory after it, and the same from the span cache.
fn read(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let mut stage = bench.stage(side, NO_BACKGROUND)?;
    let ready = bench.image("big")?;
    pull_lazily(&stage, ready, 2)?;
    let mounted = stage.containerd.mount(NAMESPACE, "soci", &ready.image.chain_id(), "read")?;
    let path = mounted.path().join("data/large");
    drop_caches()?;
    let before = stage.snapshotter.cpu_time();
    let cold = read_all(&path)?;
    let cpu = stage.snapshotter.cpu_time().saturating_sub(before);
    prove_ranges(bench)?;
    samples.add("cold sequential read of 629 MB, MB/s", side.name, megabytes_per_second(LARGE, cold));
    samples.add("daemon CPU of it, s", side.name, cpu.as_secs_f64());
    let after = stage.snapshotter.daemon().memory("VmRSS");
    samples.add("daemon RSS after reading big, MB", side.name, megabytes(after));
    drop_caches()?;
    let again = read_all(&path)?;
    samples.add("re-read, spans cached, MB/s", side.name, megabytes_per_second(LARGE, again));
    Ok(())
}

/// One layer has no zTOC and is unpacked; containerd's overlayfs beside it.
fn files10k(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let stage = bench.stage(side, NO_BACKGROUND)?;
    let ready = bench.image("files10k")?;
    warm_programs(&stage)?;
    let pull = pull_lazily(&stage, ready, 1)?;
    samples.add("pull of files10k, s", side.name, pull.as_secs_f64());
    let start = Instant::now();
    let login = format!("{USER}:{PASSWORD}");
    // The upper layer's blob was fetched by the first pull at most; the base is fetched and unpacked here.
    stage.containerd.pull("plain", "overlayfs", &login, &ready.published.reference)?;
    samples.add("pull of files10k, s", "overlayfs", start.elapsed().as_secs_f64());
    Ok(())
}

fn files100k(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let stage = bench.stage(side, NO_BACKGROUND)?;
    let ready = bench.image("files100k")?;
    warm_programs(&stage)?;
    let (pull, echo) = pull_and_echo(&stage, ready, 2)?;
    samples.add("lazy pull of files100k, s", side.name, pull);
    samples.add("first echo after files100k, s", side.name, echo);
    let mounted = stage.containerd.mount(NAMESPACE, "soci", &ready.image.chain_id(), "find")?;
    drop_caches()?;
    output(Command::new("find").arg("--version"))?;
    let start = Instant::now();
    let listed = output(Command::new("find").arg(mounted.path().join("many")).args(["-printf", "%s\n"]))?;
    samples.add("find -printf %s over 100 k files, s", side.name, start.elapsed().as_secs_f64());
    let lines = listed.lines().count();
    if lines != 100_000 + 1_000 + 1 {
        bail!("find saw {lines} names of 101001");
    }
    Ok(())
}

/// Until a program of many files is ready, with the defaults of each side.
fn py(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let (pulled, ready) = pull_to_ready(bench, side)?;
    samples.add("lazy pull of py, s", side.name, pulled.as_secs_f64());
    samples.add("pull to ready of py, s", side.name, ready.as_secs_f64());
    Ok(())
}

/// The same from a registry that is a road away: each answer takes 20 ms, and all share 100 MB/s.
fn far(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let _road = bench.road(Duration::from_millis(20), Some(100_000_000));
    let (_, ready) = pull_to_ready(bench, side)?;
    samples.add("pull to ready of py, 20 ms and 100 MB/s, s", side.name, ready.as_secs_f64());
    Ok(())
}

/// Returns how long the pull took, and how long until the program said that it is ready.
fn pull_to_ready(bench: &Bench, side: &Side) -> Result<(Duration, Duration)> {
    let stage = bench.stage(side, "")?;
    let ready = bench.image("py")?;
    warm_programs(&stage)?;
    drop_caches()?;
    warm_programs(&stage)?;
    let start = Instant::now();
    pull_lazily(&stage, ready, 2)?;
    let pulled = start.elapsed();
    let program = "import pandas, sklearn, matplotlib; print('ready')";
    let words = ["python3", "-c", program];
    let said = stage.containerd.run_container(NAMESPACE, "soci", &ready.published.reference, "py", &words)?;
    let time = start.elapsed();
    if said != "ready\n" {
        bail!("the program said {said:?}");
    }
    Ok((pulled, time))
}

fn pull_and_echo(stage: &Stage, ready: &Ready, lazy_layers: usize) -> Result<(f64, f64)> {
    let pull = pull_lazily(stage, ready, lazy_layers)?;
    Ok((pull.as_secs_f64(), echo_once(stage, ready)?))
}

/// Runs a container that prints a word, and returns the seconds it took.
fn echo_once(stage: &Stage, ready: &Ready) -> Result<f64> {
    let start = Instant::now();
    let words = ["echo", "hello"];
    let said =
        stage.containerd.run_container(NAMESPACE, "soci", &ready.published.reference, "echo", &words)?;
    let echo = start.elapsed();
    if said != "hello\n" {
        bail!("the container said {said:?}");
    }
    Ok(echo.as_secs_f64())
}

/// Pulls an image, and returns how long it took.
pub(crate) fn pull(stage: &Stage, ready: &Ready) -> Result<Duration> {
    let service = stage.containerd.image_service()?;
    let login = Some(cri::basic(USER, PASSWORD));
    let start = Instant::now();
    service.pull(&ready.published.reference, login, "default").context("PullImage")?;
    Ok(start.elapsed())
}

/// Pulls an image, of which that many layers must be lazy then.
pub(crate) fn pull_lazily(stage: &Stage, ready: &Ready, lazy_layers: usize) -> Result<Duration> {
    let time = pull(stage, ready)?;
    let mounted = stage.snapshotter.fuse_mounts()?.len();
    if mounted != lazy_layers {
        bail!("{mounted} layers are FUSE mounts, not {lazy_layers}: no lazy pull was measured");
    }
    Ok(time)
}

/// Programs that a container's start runs are in the page cache, as on a node that has run one.
fn warm_programs(stage: &Stage) -> Result<()> {
    for program in ["runc", "containerd-shim-runc-v2"] {
        let found = Command::new(program).arg("--version").stdin(Stdio::null()).output();
        found.with_context(|| format!("run {program}"))?;
    }
    stage.containerd.run("default", &["version"])?;
    Ok(())
}

pub(crate) fn prove_ranges(bench: &Bench) -> Result<()> {
    let ranged = bench.backstage.registry.log().iter().filter(|seen| seen.status == 206).count();
    if ranged < 2 {
        bail!("the registry saw {ranged} ranged requests: nothing was read lazily");
    }
    Ok(())
}

pub(crate) fn read_all(path: &Path) -> Result<Duration> {
    let file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    let start = Instant::now();
    loop {
        let read = file.read_at(&mut buffer, at)?;
        if read == 0 {
            break;
        }
        at += read as u64;
    }
    let time = start.elapsed();
    if at != LARGE as u64 {
        bail!("{} has {at} bytes, not {LARGE}", path.display());
    }
    Ok(time)
}

fn shuffle(values: &mut [u64]) {
    let mut numbers = Numbers::new(11);
    for last in (1..values.len()).rev() {
        let other = numbers.next_u64() % (last as u64 + 1);
        values.swap(last, usize::try_from(other).unwrap_or(last));
    }
}
