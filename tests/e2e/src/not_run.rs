//! What this machine does not allow a test to do. The test passes by what it can do, and not in silence: what was left out is
//! said beside the results, and once more in the summary of `cargo xtask test`.

use std::fs::OpenOptions;
use std::io::Write as _;

use anyhow::{Context as _, Result};

/// Names the file where `cargo xtask test` finds what was left out.
const FILE: &str = "SOCI_NOT_RUN";

/// Says that something was not run, and why.
///
/// # Errors
/// Where it cannot be said.
pub fn report(what: &str, reason: &str) -> Result<()> {
    let line = format!("{what}: {}\n", reason.split_whitespace().collect::<Vec<_>>().join(" "));
    // Not by a macro, whose output the harness keeps of a test that passes.
    write!(std::io::stderr(), "NOT RUN: {line}")?;
    if let Some(file) = std::env::var_os(FILE) {
        let mut file = OpenOptions::new().append(true).create(true).open(file).context(FILE)?;
        file.write_all(line.as_bytes())?;
    }
    Ok(())
}
