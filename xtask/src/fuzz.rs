//! Runs the fuzz targets of `fuzz/` with the stable toolchain.
//!
//! libFuzzer needs coverage counters and nothing else of a nightly compiler, so the flags are given here and no tool is
//! installed. Crashes land in `fuzz/artifacts/<target>`; a finding becomes a named test and a file of the corpus.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, heading, program, root, succeed};

const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";

/// No longer inputs are tried: most formats say all they can in this, and longer ones only slow the search.
const MAX_LEN: u32 = 64 * 1024;

/// A zTOC has 32 KiB for each of its checkpoints: those of the fixtures have up to twelve.
const MAX_ZTOC_LEN: u32 = 512 * 1024;

/// A target that needs more than this has unbounded memory: that is a finding.
const RSS_LIMIT_MB: u32 = 1024;

/// Runs the verb.
pub(crate) fn fuzz(arguments: &[String]) -> Result<()> {
    let (minutes, wanted) = parse(arguments)?;
    let directory = root().join("fuzz");
    let known = targets(&directory)?;
    for name in &wanted {
        if !known.contains(name) {
            bail!("no fuzz target {name:?}; there are: {}", known.join(", "));
        }
    }
    let chosen = if wanted.is_empty() { known } else { wanted };
    if program("c++").is_none() {
        bail!("a C++ compiler is missing: libFuzzer is built from source (Debian package g++)");
    }
    let host = host()?;
    let target = directory.join("target");
    heading("build: fuzz targets");
    let manifest = directory.join("Cargo.toml");
    let mut build = cargo(&["build", "--release", "--target", &host, "--manifest-path"]);
    build.arg(&manifest).env("RUSTFLAGS", FLAGS).env("CARGO_TARGET_DIR", &target);
    succeed(&mut build)?;
    let mut failed = Vec::new();
    for name in &chosen {
        heading(&format!("fuzz: {name}, {minutes} min"));
        let artifacts = directory.join("artifacts").join(name);
        let scratch = target.join("corpus").join(name);
        let corpus = directory.join("corpus").join(name);
        for path in [&artifacts, &scratch, &corpus] {
            std::fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
        }
        let mut run = Command::new(target.join(&host).join("release").join(name));
        run.arg(format!("-max_total_time={}", minutes * 60))
            .arg(format!("-max_len={}", max_len(name)))
            .arg(format!("-rss_limit_mb={RSS_LIMIT_MB}"))
            .args(["-timeout=20", "-print_final_stats=1", "-verbosity=1"])
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            // New inputs go to the first directory; the committed corpus is only read.
            .args([&scratch, &corpus])
            .args(seeds(name));
        if let Err(error) = succeed(&mut run) {
            eprintln!("{error:#}");
            failed.push(name.as_str());
        }
    }
    if !failed.is_empty() {
        bail!("findings in: {}; inputs are in fuzz/artifacts", failed.join(", "));
    }
    println!("{} targets, {minutes} min each, no findings", chosen.len());
    Ok(())
}

fn max_len(target: &str) -> u32 {
    if target == "ztoc_decode" { MAX_ZTOC_LEN } else { MAX_LEN }
}

/// Directories whose files a target begins with as well: too large to be there twice.
fn seeds(target: &str) -> Vec<PathBuf> {
    match target {
        "ztoc_decode" => vec![root().join("crates/ztoc/tests/fixtures/ztoc")],
        _ => Vec::new(),
    }
}

fn parse(arguments: &[String]) -> Result<(u64, Vec<String>)> {
    let mut minutes = 1;
    let mut wanted = Vec::new();
    let mut rest = arguments.iter();
    while let Some(word) = rest.next() {
        if word == "--minutes" {
            let value = rest.next().context("--minutes wants a number")?;
            minutes = value.parse().with_context(|| format!("--minutes {value:?} is not a whole number"))?;
            if minutes == 0 {
                bail!("--minutes 0 would never end");
            }
        } else if word.starts_with('-') {
            bail!("usage: cargo xtask fuzz [--minutes N] [TARGET...]");
        } else {
            wanted.push(word.clone());
        }
    }
    Ok((minutes, wanted))
}

fn targets(directory: &Path) -> Result<Vec<String>> {
    let list = directory.join("fuzz_targets");
    let entries = list.read_dir().with_context(|| format!("list {}", list.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(stem) = path.file_stem()
        {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// With the target named, cargo does not apply the flags to build scripts.
fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("start rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("host: "));
    line.map(str::to_owned).context("rustc -vV names no host")
}
