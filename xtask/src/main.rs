//! Project chores, one file per verb: `cargo xtask help` lists them.
//!
//! Nothing but Rust and, for the verbs that run containers, a Debian-like machine is expected: what a verb needs it
//! installs, or names and stops where it may not. The verbs start programs and read their output; what drives
//! registries and containers lives in the `soci-e2e` and `soci-testkit` crates, so that this crate builds in seconds.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

mod audit;
mod bench;
mod check;
mod demo;
mod deps;
mod docs;
mod fuzz;
mod package;
mod packages;
mod run;
mod test;

use std::process::ExitCode;

const HELP: &str = "\
usage: cargo xtask <verb>

  demo     run a private image lazily, end to end, and print a report
  test     install what the tests need, check, then run every test
  check    formatting, lints, documentation, crate directions, generated documents
  bench    measure; `--peer DIR` runs other binaries in alternation with ours
  fuzz     run the fuzz targets: `--minutes N` each, `TARGET...` to choose
  deps     assert which crate may depend on which
  docs     write the generated documents (`--check`: only compare)
  package  a Debian package; `--profile NAME`, `--binaries DIR`, `--output DIR`
  audit    licences, bans and sources of dependencies
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let verb = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    let outcome = match verb.as_str() {
        "demo" => demo::demo(&rest),
        "test" => test::test(&rest),
        "check" => check::check(),
        "bench" => bench::bench(&rest),
        "fuzz" => fuzz::fuzz(&rest),
        "deps" => deps::deps(),
        "docs" => docs::docs(&rest),
        "package" => package::package(&rest),
        "audit" => audit::audit(),
        "" | "help" | "--help" | "-h" => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        unknown => {
            eprintln!("xtask: no verb {unknown:?}\n\n{HELP}");
            return ExitCode::FAILURE;
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
