//! Killed at every step on disk of a start, a pull, a read and a removal, one after another: what was answered is there, and what
//! was not leaves nothing behind. See `support/killer.c` for what a step is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_testkit::TestRegistry;
use soci_testkit::layer_gen::{Attr, EntryType, Layer, LayerBuilder, Numbers};
use support::image::{Published, publish};
use support::stage::{CONFIG, Stage, chains, pull_layer, registry};
use tonic::Code;

/// More steps than any of these works has.
const MANY: usize = 500;

/// Where a daemon is to die: at a step counted from [`Victim::arm`] on, or at the first one on a path that matches a pattern.
enum Aim<'a> {
    Step(usize),
    Path(&'a str),
}

/// A daemon that dies at a step, and what it is asked for.
struct Victim {
    stage: Stage,
    _registry: TestRegistry,
    published: Published,
    big: Vec<u8>,
    /// The files of a daemon without images.
    before: Vec<(PathBuf, u64)>,
}

impl Victim {
    async fn new() -> Self {
        let registry = registry().await;
        let big = Numbers::new(5).bytes(2_500_000);
        let lazy = LayerBuilder::new().file("big", &Attr::default(), &big).gzip();
        let unpacked = unpacked();
        let published = publish(&registry, "team/app", vec![lazy, unpacked], |number| number == 0);
        let mut stage = Stage::new(&registry, CONFIG).await;
        let killer = stage.dir.path().join("killer.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/killer.c");
        // Cargo links with it, so it is there.
        let mut compiler = Command::new("cc");
        let compiled = compiler.args(["-shared", "-fPIC", "-o"]).arg(&killer).args([source, "-ldl"]).status();
        assert!(compiled.unwrap().success(), "{source} does not compile");
        stage.end(Signal::TERM);
        let before = stage.files();
        Self { stage, _registry: registry, published, big, before }
    }

    fn log(&self) -> PathBuf {
        self.stage.dir.path().join("step")
    }

    /// Has the next daemon die there.
    fn aim(&mut self, aim: &Aim<'_>) {
        let variable = |name: &str, value: String| (name.to_owned(), value);
        let text = |path: PathBuf| path.display().to_string();
        self.stage.environment = vec![
            variable("LD_PRELOAD", text(self.stage.dir.path().join("killer.so"))),
            variable("SOCI_KILL_ROOT", text(self.stage.state())),
            variable("SOCI_KILL_LOG", text(self.log())),
            match aim {
                Aim::Step(number) => variable("SOCI_KILL_AT", number.to_string()),
                Aim::Path(pattern) => variable("SOCI_KILL_WHERE", (*pattern).to_owned()),
            },
        ];
    }

    fn arm(&self) {
        fs::write(self.log(), b"").unwrap();
    }

    /// Waits until the daemon is dead, and returns the step; nothing when it lives, and then it goes on living.
    fn died(&mut self) -> Option<String> {
        self.stage.environment.clear();
        if fs::remove_file(self.log()).is_ok() {
            return None;
        }
        self.stage.child.wait().unwrap();
        let taken = self.log().with_extension("taken");
        let step = fs::read_to_string(&taken).unwrap();
        fs::remove_file(taken).unwrap();
        Some(step.trim_end().to_owned())
    }

    /// Pulls as far as the daemon lives; returns how many layers it answered for.
    async fn pull(&mut self) -> usize {
        let layers = self.published.image.layers.len();
        for number in 0..layers {
            match pull_layer(&mut self.stage.client, &self.published, number).await.0 {
                Err(status) if status.code() == Code::AlreadyExists => {}
                _ => return number,
            }
        }
        layers
    }

    /// Mounts the image, reads the large file and looks at the others; nothing when the daemon dies meanwhile.
    async fn read(&mut self) -> Option<Vec<u8>> {
        let top = chains(&self.published).pop().unwrap();
        let answer = self.stage.prepare("container", &top, Default::default()).await.ok()?;
        let merged = self.stage.mount(&answer);
        let look = move || Some((fs::read(merged.join("big")).ok()?, shown(&merged.join("d")).ok()?));
        let read = tokio::task::spawn_blocking(look).await.unwrap();
        self.stage.unmount();
        let container = wire::RemoveSnapshotRequest { key: "container".to_owned(), ..Default::default() };
        self.stage.client.remove(container).await.ok()?;
        let (big, shown) = read?;
        assert_eq!(shown, SHOWN);
        Some(big)
    }

    /// Removes the image as far as the daemon lives; returns whether all of it went.
    async fn remove(&mut self) -> bool {
        for key in chains(&self.published).into_iter().rev() {
            let remove = wire::RemoveSnapshotRequest { key, ..Default::default() };
            if self.stage.client.remove(remove).await.is_err() {
                return false;
            }
        }
        self.stage.client.cleanup(wire::CleanupRequest::default()).await.is_ok()
    }

    async fn names(&mut self) -> BTreeSet<String> {
        let mut answers =
            self.stage.client.list(wire::ListSnapshotsRequest::default()).await.unwrap().into_inner();
        let mut names = BTreeSet::new();
        while let Some(answer) = answers.message().await.unwrap() {
            names.extend(answer.info.into_iter().map(|info| info.name));
        }
        names
    }

    /// Looks at what the next daemon makes of it: the image can be pulled, is right, and goes without a trace.
    async fn recovers(&mut self, step: &str) {
        let layers = self.published.image.layers.len();
        if self.names().await.contains("container") {
            self.stage.remove(&["container".to_owned()]).await;
        }
        assert_eq!(self.pull().await, layers, "killed {step}: {:#?}", self.stage.log.lock().unwrap());
        let read = self.read().await;
        assert!(read.as_ref() == Some(&self.big), "killed {step}: the large file differs");
        assert!(self.remove().await, "killed {step}");
        self.stage.wait_for_files(&self.before.clone()).await;
        assert_eq!(self.stage.fuse_mounts(), 0, "killed {step}");
        self.stage.end(Signal::KILL);
    }
}

/// A layer that the daemon unpacks, with something of each kind.
fn unpacked() -> Layer {
    let linked = Attr::mode(0o4755).owned(5, 6).xattr("user.key", b"value");
    LayerBuilder::new()
        .dir("d", &Attr::mode(0o750).owned(3, 4))
        .file("d/file", &linked, b"small\n")
        .hard_link("d/hard", "d/file", &linked)
        .symlink("d/link", "file")
        .device("d/null", &Attr::mode(0o666), EntryType::Char, 1, 3)
        .file("d/implied/file", &Attr::default(), b"")
        .whiteout("d/gone")
        .gzip()
}

/// What [`shown`] says of the directory of [`unpacked`].
const SHOWN: &str = "40750 3:4, 104755 5:6 2 value small, 1:3, file";

fn shown(at: &Path) -> std::io::Result<String> {
    let (directory, hard) = (fs::metadata(at)?, fs::metadata(at.join("hard"))?);
    let null = fs::metadata(at.join("null"))?.rdev();
    let mut value = [0; 16];
    let length = rustix::fs::lgetxattr(at.join("file"), "user.key", &mut value)?;
    Ok(format!(
        "{:o} {}:{}, {:o} {}:{} {} {} {}, {}:{}, {}",
        directory.mode(),
        directory.uid(),
        directory.gid(),
        hard.mode(),
        hard.uid(),
        hard.gid(),
        hard.nlink(),
        String::from_utf8_lossy(&value[..length]),
        fs::read_to_string(at.join("link"))?.trim_end(),
        rustix::fs::major(null),
        rustix::fs::minor(null),
        fs::read_link(at.join("link"))?.display(),
    ))
}

/// Has `work` done by one daemon after another, each killed one step later than the one before, until one lives. Which steps there
/// are depends on what else is under way, so each of `certain`, patterns of paths, that nobody was killed at gets a daemon of its
/// own. `check` looks at what the next daemon finds, and gets what `work` returned and the step; then it recovers.
async fn at_every_step<T>(
    certain: &[&str],
    work: impl AsyncFn(&mut Victim) -> T,
    check: impl AsyncFn(&mut Victim, T, &str),
) {
    let mut victim = Victim::new().await;
    let once = async |victim: &mut Victim, aim: Aim<'_>| {
        victim.aim(&aim);
        let worked = work(victim).await;
        let step = victim.died()?;
        victim.stage.start_again().await;
        check(victim, worked, &step).await;
        victim.recovers(&step).await;
        Some(step)
    };
    let mut left = certain.to_vec();
    let mut next = 1;
    while let Some(step) = once(&mut victim, Aim::Step(next)).await {
        left.retain(|pattern| !matches(pattern, step.split(' ').nth(2).unwrap()));
        next += 1;
        assert!(next < MANY, "a daemon that never lives");
    }
    assert!(next > 1, "nobody was killed");
    victim.recovers("by nobody").await;
    for pattern in left {
        let step = once(&mut victim, Aim::Path(pattern)).await;
        assert!(step.is_some(), "nobody was killed at {pattern}");
    }
}

/// Whether `path` is one of `pattern`, which has one `*` for anything.
fn matches(pattern: &str, path: &str) -> bool {
    let (start, end) = pattern.split_once('*').unwrap();
    path.len() >= start.len() + end.len() && path.starts_with(start) && path.ends_with(end)
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_of_a_start_or_a_pull_what_was_answered_is_there() {
    let certain = [
        "lock*",
        "*trial/merged",
        "ztocs/tmp/*",
        "ztocs/sha256*",
        "*snapshots/1/record",
        "*snapshots/2/fs",
        "*unpack/d/hard",
        "*unpack/d/null",
    ];
    let work = async |victim: &mut Victim| {
        victim.arm();
        if victim.stage.start_if_it_lives().await { victim.pull().await } else { 0 }
    };
    let check = async |victim: &mut Victim, answered: usize, step: &str| {
        let names = victim.names().await;
        let kept = chains(&victim.published).iter().take_while(|name| names.contains(*name)).count();
        assert!(kept >= answered, "killed {step}: {answered} layers were answered, {kept} are there");
    };
    at_every_step(&certain, work, check).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_of_a_read_the_next_one_is_right() {
    let work = async |victim: &mut Victim| {
        victim.stage.start_again().await;
        assert_eq!(victim.pull().await, 2);
        victim.arm();
        let read = victim.read().await;
        assert!(read.is_none_or(|read| read == victim.big), "other bytes");
    };
    let certain = ["soci/spans/tmp/*", "soci/spans/sha256/*.plain"];
    at_every_step(&certain, work, async |_: &mut Victim, (), _: &str| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_of_a_removal_it_ends_at_the_next_start() {
    let work = async |victim: &mut Victim| {
        victim.stage.start_again().await;
        assert_eq!(victim.pull().await, 2);
        assert!(victim.read().await.as_ref() == Some(&victim.big));
        victim.arm();
        let removed = victim.remove().await;
        if removed {
            // What an answered removal leaves goes soon after.
            let end = Instant::now() + Duration::from_secs(30);
            while victim.stage.files() != victim.before && victim.log().exists() {
                assert!(Instant::now() < end, "{:#?}", victim.stage.files());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        removed
    };
    let check = async |victim: &mut Victim, removed: bool, step: &str| {
        if removed {
            assert_eq!(victim.names().await, BTreeSet::new(), "killed {step}");
        }
    };
    at_every_step(&["*removed", "ztocs/sha256/*", "soci/spans/tmp/*", "*fs"], work, check).await;
}
