//! A private image runs lazily, end to end. The stage is `tests/e2e/src/bin/demo.rs`; this builds and starts it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::packages;
use crate::run::{cargo, heading, succeed, target};

/// Runs the verb. `--peer DIR` takes other binaries of the same names instead of ours.
pub(crate) fn demo(arguments: &[String]) -> Result<()> {
    packages::ensure(&[packages::CONTAINERS, packages::ROOTFS])?;
    stage("demo", "fast", arguments)
}

/// Builds the binaries with a profile and runs a stage of the end-to-end crate with them.
pub(crate) fn stage(name: &str, profile: &str, arguments: &[String]) -> Result<()> {
    if !packages::is_root() {
        bail!(
            "{name} mounts file systems and starts containerd: run it as root (sudo -E cargo xtask {name})"
        );
    }
    heading(&format!("build, profile {profile}"));
    succeed(&mut cargo(&["build", "--workspace", "--bins", "--profile", profile]))?;
    let directory = target()?.join(profile);
    let mut command = Command::new(directory.join(name));
    command
        .args(arguments)
        .env("SOCI_BIN_DIR", &directory)
        .env("SOCI_CACHE_DIR", target()?.join("stage-cache"));
    // In our place, so that an interrupt reaches the stage alone, which then cleans up.
    let error = command.exec();
    Err(error).with_context(|| format!("start {}", directory.join(name).display()))
}
