//! Measures ours, and by `--peer DIR` other binaries in alternation. The stage is `tests/e2e/src/bin/bench`.

use anyhow::Result;

use crate::demo::stage;
use crate::packages;

/// Runs the verb.
pub(crate) fn bench(arguments: &[String]) -> Result<()> {
    packages::ensure(&[packages::CONTAINERS, packages::ROOTFS])?;
    stage("bench", "release", arguments)
}
