//! Measures ours, and by `--peer DIR` other binaries in alternation. The stage is `tests/e2e/src/bin/bench`.

use anyhow::Result;

use crate::demo::stage;
use crate::packages;
use crate::run::{cargo, succeed};

/// Runs the verb.
pub(crate) fn bench(arguments: &[String]) -> Result<()> {
    packages::ensure(&[packages::CONTAINERS, packages::ROOTFS])?;
    // What is measured without a daemon.
    let example = ["build", "--release", "--package", "soci-kubernetes", "--example", "lookup"];
    succeed(&mut cargo(&example))?;
    stage("bench", "release", arguments)
}
