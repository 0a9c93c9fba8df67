//! containerd 2.x from Debian's unstable suite, unpacked into the cache; nothing is installed.
//!
//! The package runs on older releases as it is. The archive is the one the machine already takes its packages from.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use soci_testkit::containerd::Programs;
use soci_testkit::process::output;

use crate::{archive, cache};

/// Returns containerd 2.x: the installed one where it is that new, else the one in the cache, fetched if need be.
///
/// # Errors
/// Where the package cannot be had.
pub fn programs() -> Result<Programs> {
    if let Ok(installed) = Programs::installed()
        && installed.major() >= 2
    {
        return Ok(installed);
    }
    let root = cache::keep("containerd-2", fetch)?;
    let programs = Programs::at(Some(root.join("usr/bin"))).context("run containerd of the cache")?;
    if programs.major() < 2 {
        bail!("the archive's containerd is {}, not 2.x", programs.version);
    }
    Ok(programs)
}

fn fetch(into: &Path) -> Result<()> {
    let (uri, signed_by) = archive::find()?;
    let work = tempfile::tempdir().context("make a temporary directory")?;
    let at = |name: &str| -> PathBuf { work.path().join(name) };
    for name in ["lists/partial", "cache/archives/partial"] {
        std::fs::create_dir_all(at(name))?;
    }
    let keyring = if signed_by.is_empty() { String::new() } else { format!("signed-by={signed_by}") };
    std::fs::write(at("sources.list"), format!("deb [{keyring}] {uri} sid main\n").replace("[] ", ""))?;
    let apt = |words: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(["--quiet", "-o", "APT::Sandbox::User=root", "-o", "Dir::Etc::sourceparts=/dev/null"])
            // Only what is needed to find one package.
            .args(["-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"])
            .arg("-o")
            .arg(format!("Dir::Etc::sourcelist={}", at("sources.list").display()))
            .arg("-o")
            .arg(format!("Dir::State::lists={}", at("lists").display()))
            .arg("-o")
            .arg(format!("Dir::Cache={}", at("cache").display()))
            .args(words)
            .current_dir(work.path());
        output(&mut command)
    };
    apt(&["update"])?;
    apt(&["download", "containerd"])?;
    let package = work
        .path()
        .read_dir()?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded no package")?;
    std::fs::create_dir_all(into)?;
    output(Command::new("dpkg").arg("-x").arg(package).arg(into))?;
    Ok(())
}
