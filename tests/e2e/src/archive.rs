//! Where this machine's Debian packages come from. No host is written down here: apt's own sources name it.

use std::process::Command;

use anyhow::{Context as _, Result};
use soci_testkit::process::output;

/// Returns the archive's address, and the keyring that apt checks it with (empty where apt uses its default).
///
/// # Errors
/// Where apt knows no Debian archive.
pub fn find() -> Result<(String, String)> {
    let format = "$(ORIGIN)|$(LABEL)|$(REPO_URI)|$(SIGNED_BY)";
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", format, "Created-By: Packages"]);
    let mut listed = output(&mut targets)?;
    if debian(&listed).is_none() {
        output(Command::new("apt-get").args(["--quiet", "update"]))?;
        listed = output(&mut targets)?;
    }
    debian(&listed).context("apt's sources name no Debian archive: packages cannot be fetched")
}

fn debian(listed: &str) -> Option<(String, String)> {
    listed.lines().find_map(|line| {
        let mut fields = line.split('|');
        let (origin, label) = (fields.next()?, fields.next()?);
        let (uri, signed_by) = (fields.next()?, fields.next().unwrap_or_default());
        // Security updates have an archive of their own, without the unstable suite.
        // An unset field is printed as its name.
        let signed_by = if signed_by.starts_with('/') { signed_by } else { "" };
        (origin == "Debian" && label == "Debian").then(|| (uri.to_owned(), signed_by.to_owned()))
    })
}
