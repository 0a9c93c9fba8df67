//! Debian packages that a verb needs: installed where we may, else named.

use std::process::Command;

use anyhow::{Result, bail};

use crate::run::{heading, program, succeed};

/// A program and the Debian package that brings it.
pub(crate) struct Need {
    program: &'static str,
    package: &'static str,
}

/// What runs containers.
pub(crate) const CONTAINERS: &[Need] =
    &[Need { program: "containerd", package: "containerd" }, Need { program: "runc", package: "runc" }];

/// What runs the units that we ship.
pub(crate) const SYSTEMD: &[Need] = &[Need { program: "systemctl", package: "systemd" }];

/// A credential helper as a distribution has it.
pub(crate) const HELPERS: &[Need] = &[
    Need { program: "docker-credential-pass", package: "golang-docker-credential-helpers" },
    Need { program: "pass", package: "pass" },
    Need { program: "gpg", package: "gpg" },
    Need { program: "gpg-agent", package: "gpg-agent" },
];

/// What changes the clock of one process.
pub(crate) const CLOCK: &[Need] = &[Need { program: "faketime", package: "faketime" }];

/// What makes a Debian root file system, for images with real bytes.
pub(crate) const ROOTFS: &[Need] = &[Need { program: "debootstrap", package: "debootstrap" }];

/// Whether we run as root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Installs the packages of the programs that are missing.
///
/// # Errors
/// Where something is missing and we are not root, or this is no Debian: the message names what to install.
pub(crate) fn ensure(needs: &[&[Need]]) -> Result<()> {
    let missing = || -> Vec<&'static str> {
        let absent = |need: &&Need| program(need.program).is_none();
        needs.iter().copied().flatten().filter(absent).map(|need| need.package).collect()
    };
    let packages = missing();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if program("apt-get").is_none() {
        bail!("missing: {list}; this machine has no apt-get, install them by its own means");
    }
    if !is_root() {
        bail!("missing: {list}; install them by `sudo apt-get install {list}`, or run this as root");
    }
    heading(&format!("installing {list}"));
    succeed(&mut apt(&["update"]))?;
    let mut install = apt(&["install", "--yes", "--no-install-recommends"]);
    succeed(install.args(&packages))?;
    let packages = missing();
    if !packages.is_empty() {
        bail!("apt-get installed {list}, yet {} brought no program", packages.join(" "));
    }
    Ok(())
}

fn apt(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.arg("--quiet").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command.stdin(std::process::Stdio::null());
    command
}
