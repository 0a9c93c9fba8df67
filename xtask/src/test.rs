//! Every test, set-up included: what the README names and what CI runs.
//!
//! Tests that need root or /dev/fuse fail with that reason where it is missing; nothing is skipped in silence. The one thing that
//! a machine may refuse, a systemd in a container, is named in the summary where it does.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, heading, line, succeed, target};
use crate::{check, packages};

/// Runs the verb. Words after it go to the test programs, e.g. a name to run only what contains it.
pub(crate) fn test(arguments: &[String]) -> Result<()> {
    packages::ensure(&[packages::CONTAINERS, packages::SYSTEMD, packages::HELPERS, packages::CLOCK])?;
    let checked = check::check();
    heading("build: the binaries that the end-to-end tests run");
    succeed(&mut cargo(&["build", "--workspace", "--bins"]))?;
    heading("test: unit, property, fixtures, FUSE, end to end, documentation examples");
    let binaries = target()?.join("debug");
    let not_run = target()?.join("not-run");
    std::fs::write(&not_run, "").with_context(|| format!("empty {}", not_run.display()))?;
    let mut command = cargo(&["test", "--workspace", "--no-fail-fast", "--"]);
    command
        .args(arguments)
        .env("SOCI_BIN_DIR", binaries)
        .env("SOCI_NOT_RUN", &not_run)
        .stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {}", line(&command)))?;
    let mut tally = Tally::default();
    if let Some(output) = child.stdout.take() {
        for text in BufReader::new(output).lines() {
            let text = text.context("read the output of the tests")?;
            tally.read(&text);
            println!("{text}");
        }
    }
    let status = child.wait()?;
    if arguments.is_empty() {
        heading("test: races, in orders that shuttle chooses");
        for package in ["soci-layer", "soci-snapshotter"] {
            succeed(&mut cargo(&["test", "-p", package, "--features", "shuttle", "--lib", "races"]))?;
        }
        heading("test: traces, which the daemon exports when it is built with them");
        let traces = ["test", "-p", "soci-snapshotter-grpc", "--features", "otlp", "--test", "traces"];
        succeed(&mut cargo(&traces))?;
    }
    heading("summary");
    for name in &tally.failures {
        println!("failed: {name}");
    }
    let left_out = std::fs::read_to_string(&not_run);
    for text in left_out.with_context(|| format!("read {}", not_run.display()))?.lines() {
        println!("NOT RUN on this machine: {text}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if tally.ignored > 0 {
        bail!("{} tests are marked as ignored: every test runs or goes", tally.ignored);
    }
    checked.context("the tests ran, but the check before them failed")?;
    if !status.success() {
        bail!("{}: {status}", line(&command));
    }
    Ok(())
}

/// What the test programs reported.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
}

impl Tally {
    /// Reads one line of a test program's output.
    fn read(&mut self, text: &str) {
        if let Some(name) = text.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
        let Some(counts) = text.strip_prefix("test result: ") else { return };
        for part in counts.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(word)) = (words.next(), words.next()) else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_add_up() {
        let mut tally = Tally::default();
        for text in [
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 12 passed; 1 failed; 0 ignored; 0 measured; 2 filtered out; finished in 1.25s",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            tally.read(text);
        }
        let failures = vec!["a::c".to_owned()];
        assert_eq!(tally, Tally { passed: 15, failed: 1, ignored: 1, failures });
    }
}
