//! `cargo xtask bench`: what a user waits for, measured; with `--peer DIR` other binaries in alternation with ours.
//!
//! Every sample begins with fresh roots, a fresh daemon and a fresh containerd before one registry process that serves
//! all of them. Before a sample counts it proves its mode: the layers are FUSE mounts, and reads asked for ranges. A
//! fallback fails the run; it is not a slow sample.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

mod auth;
mod limits;
mod node;
mod pipe;
mod rows;
mod samples;
mod sides;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use soci_e2e::interrupt::Interrupt;

use samples::Samples;
use sides::{Bench, Side};

/// What the user asked for.
#[derive(Debug)]
struct Arguments {
    peer: Option<PathBuf>,
    rounds: u32,
    only: Vec<String>,
}

const USAGE: &str = "\
usage: cargo xtask bench [--peer DIR] [--rounds N] [--only PART,...]
parts: index, big, read, files10k, files100k, py, far, background, layers127, restart, idle500, auth";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nbench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments = parse()?;
    let interrupt = Interrupt::listen()?;
    let sides = Side::all(arguments.peer.as_deref())?;
    let bench = Bench::prepare(&sides, |part| wants(&arguments, part))?;
    interrupt.check()?;
    eprintln!("machine limits");
    let limits = limits::measure()?;
    let mut samples = Samples::default();
    for round in 0..arguments.rounds {
        // A B, B A, A B, …: what drifts hits both.
        let order: Vec<&Side> =
            if round % 2 == 0 { sides.iter().collect() } else { sides.iter().rev().collect() };
        for (part, measure) in rows::PARTS {
            if !wants(&arguments, part) {
                continue;
            }
            for side in &order {
                interrupt.check()?;
                eprintln!("round {} of {}: {part}, {}", round + 1, arguments.rounds, side.name);
                measure(&bench, side, &mut samples).with_context(|| format!("{part} of {}", side.name))?;
            }
        }
    }
    println!("{}", table::markdown(&samples, &sides, &limits, arguments.rounds));
    Ok(())
}

fn wants(arguments: &Arguments, part: &str) -> bool {
    arguments.only.is_empty() || arguments.only.iter().any(|only| only == part)
}

fn parse() -> Result<Arguments> {
    let mut arguments = Arguments { peer: None, rounds: 5, only: Vec::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} wants a value\n{USAGE}"));
        match word.as_str() {
            "--peer" => arguments.peer = Some(value()?.into()),
            "--rounds" => arguments.rounds = value()?.parse().context("--rounds wants a number")?,
            "--only" => arguments.only = value()?.split(',').map(str::to_owned).collect(),
            _ => bail!("unknown word {word:?}\n{USAGE}"),
        }
    }
    let unknown = arguments.only.iter().find(|only| !rows::PARTS.iter().any(|(part, _)| part == *only));
    if let Some(part) = unknown {
        bail!("no part {part:?}\n{USAGE}");
    }
    Ok(arguments)
}
