//! `cargo xtask demo`: a private image, pulled lazily with credentials that the daemon finds itself, and a report.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use soci_e2e::binaries::Binaries;
use soci_e2e::interrupt::Interrupt;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, cache, rootfs};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::{AuthMode, Seen, cri};

/// Size of the large file beside the root file system.
const LARGE: usize = 400 * 1000 * 1000;

const NAMESPACE: &str = "k8s.io";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let interrupt = Interrupt::listen()?;
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.log_level = "info".to_owned();
    // With it the whole image would be here a moment later; the demo shows what the container itself needs.
    options.config = "[background_fetch]\ndisable = true\n".to_owned();
    if let Some(peer) = peer()? {
        options.binaries = Binaries::at(&peer)?;
    }
    say("image", "a Debian root file system and one large file (made once, then kept)");
    let image = Image::new(vec![rootfs::debian()?, rootfs::one_file(LARGE)?], Dialect::Oci, &["/bin/sh"]);
    interrupt.check()?;
    let logs = cache::target()?.join("demo-logs");
    if logs.exists() {
        std::fs::remove_dir_all(&logs).with_context(|| format!("remove {}", logs.display()))?;
    }
    options.logs = Some(logs.clone());
    // The stage is down again after this, and its logs are kept, whether or not it came up.
    let outcome = Stage::start(options).and_then(|stage| play(&stage, &image, &interrupt));
    if logs.exists() {
        println!("\nlogs       {}", logs.display());
    }
    // A program that the interrupt ended failed for no reason of its own.
    interrupt.check()?;
    outcome
}

fn peer() -> Result<Option<PathBuf>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.as_slice() {
        [] => Ok(None),
        [flag, directory] if flag == "--peer" => Ok(Some(directory.into())),
        _ => bail!("usage: cargo xtask demo [--peer DIR]"),
    }
}

fn play(stage: &Stage, image: &Image, interrupt: &Interrupt) -> Result<()> {
    say(
        "registry",
        &format!("https://{} (own certificate authority, basic authentication)", stage.registry.host()),
    );
    say("node", &format!("containerd {} and soci-snapshotter-grpc", stage.containerd.version()));

    let start = Instant::now();
    let published = stage.publish_v1(image, "private/debian", "demo")?;
    say("index", &format!("soci create, soci push: {}", seconds(start.elapsed())));
    interrupt.check()?;

    let anonymous = stage.containerd.pull("anonymous", "overlayfs", "", &published.reference);
    let Err(refusal) = anonymous else {
        bail!("the registry served an anonymous pull: this would prove nothing")
    };
    if !refusal.to_string().contains("401") && !refusal.to_string().contains("authorization") {
        bail!("an anonymous pull failed for another reason: {refusal}");
    }
    say("anonymous", "pull refused (401), as it should be");
    interrupt.check()?;

    stage.registry.clear_log();
    let service = stage.containerd.image_service()?;
    let start = Instant::now();
    service.pull(&published.reference, Some(cri::basic(USER, PASSWORD)), "default").context("PullImage")?;
    let lazy_pull = start.elapsed();
    let mounted = stage.snapshotter.fuse_mounts()?.len();
    let echo = |namespace: &str, snapshotter: &str| {
        let words = ["echo", "hello from a lazy image"];
        stage.containerd.run_container(namespace, snapshotter, &published.reference, "demo", &words)
    };
    let said = echo(NAMESPACE, "soci")?;
    let lazy = start.elapsed();
    let log = stage.registry.log();
    interrupt.check()?;
    if mounted != image.layers.len() {
        bail!("{mounted} of {} layers are lazy: see the daemon's log for the reason", image.layers.len());
    }
    say("lazy", &format!("(background fetch off) pulled in {}, then: {}", seconds(lazy_pull), said.trim()));

    let start = Instant::now();
    stage.containerd.pull("plain", "overlayfs", &format!("{USER}:{PASSWORD}"), &published.reference)?;
    let plain_pull = start.elapsed();
    echo("plain", "overlayfs")?;
    let plain = start.elapsed();
    say("overlayfs", &format!("pulled in {}", seconds(plain_pull)));

    let blobs: Vec<&Seen> = log.iter().filter(|seen| seen.request.path.contains("/blobs/")).collect();
    let ranged = blobs.iter().filter(|seen| seen.status == 206).count();
    let fetched: u64 = blobs.iter().map(|seen| seen.bytes).sum();
    let size = published.size;
    println!();
    row("", "lazy", "overlayfs");
    row("pull", &seconds(lazy_pull), &seconds(plain_pull));
    row("pull to first output", &seconds(lazy), &seconds(plain));
    row("bytes fetched", &format!("{} of {}", megabytes(fetched), megabytes(size)), &megabytes(size));
    row("spans read", &spans(&stage.snapshotter.root(), ranged), "-");
    row("layers mounted lazily", &format!("{mounted} of {}", image.layers.len()), "-");
    println!();
    for line in answers(&stage.snapshotter.log_text(), &stage.registry.host()) {
        println!("keychain   {line}");
    }
    let refused = log.iter().filter(|seen| seen.status == 401).count();
    let named = log.iter().filter(|seen| seen.user.as_deref() == Some(USER)).count();
    println!("registry   {named} requests as {USER:?}, {refused} challenged first, 0 served to nobody");
    let nobody = log.iter().filter(|seen| seen.user.is_none() && seen.status < 400).count();
    if nobody > 0 {
        bail!("{nobody} requests were served without credentials");
    }
    Ok(())
}

/// What the daemon's log says of who answered for which host.
fn answers(log: &str, host: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()) {
        let (Some(keychain), Some(at)) = (line["keychain"].as_str(), line["host"].as_str()) else { continue };
        let text = format!("{keychain} answered for {at}");
        if at.ends_with(host) && !found.contains(&text) {
            found.push(text);
        }
    }
    if found.is_empty() {
        found.push("the daemon's log names none".to_owned());
    }
    found
}

/// Spans in the daemon's cache, where it keeps them in files; else how many ranges were asked for.
fn spans(root: &Path, ranged: usize) -> String {
    fn count(directory: &Path) -> usize {
        let Ok(entries) = directory.read_dir() else { return 0 };
        let each = entries.flatten().map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => count(&entry.path()),
            Ok(kind) if kind.is_file() => 1,
            _ => 0,
        });
        each.sum()
    }
    let cached = count(&root.join("soci/spancache")) + count(&root.join("soci/spans"));
    if cached > 0 {
        format!("{cached} in {ranged} ranged requests")
    } else {
        format!("{ranged} ranged requests")
    }
}

fn say(what: &str, text: &str) {
    println!("{what:<10} {text}");
    let _ = std::io::stdout().flush();
}

fn row(name: &str, left: &str, right: &str) {
    println!("  {name:<24} {left:>28} {right:>14}");
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
