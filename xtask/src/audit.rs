//! Licences, bans and sources of what we depend on, by `cargo deny` and deny.toml.

use anyhow::{Result, bail};

use crate::run::{cargo, program, succeed};

/// Runs the verb.
pub(crate) fn audit() -> Result<()> {
    if program("cargo-deny").is_none() {
        bail!("cargo-deny is missing: install it by `cargo install --locked cargo-deny` (some minutes)");
    }
    succeed(&mut cargo(&["deny", "--all-features", "check", "licenses", "bans", "sources"]))
}
