//! Which binaries are under test: ours as built, or others of the same names.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};

/// The directory that holds `soci` and `soci-snapshotter-grpc`.
#[derive(Debug, Clone)]
pub struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// Ours. `SOCI_BIN_DIR` names where they are; without it they are built first, as `cargo test` does not do that.
    ///
    /// # Errors
    /// Where they do not build.
    pub fn ours() -> Result<Self> {
        static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let built = BUILT.get_or_init(|| match std::env::var_os("SOCI_BIN_DIR") {
            Some(directory) => Ok(directory.into()),
            None => build().map_err(|error| format!("{error:#}")),
        });
        match built {
            Ok(directory) => Self::at(directory),
            Err(error) => bail!("{error}"),
        }
    }

    /// Those in a directory.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn at(directory: &Path) -> Result<Self> {
        let directory = directory.canonicalize().with_context(|| format!("find {}", directory.display()))?;
        for name in ["soci", "soci-snapshotter-grpc"] {
            let path = directory.join(name);
            if !path.is_file() {
                bail!("{} is missing: build it, or name the directory by SOCI_BIN_DIR", path.display());
            }
        }
        Ok(Self { directory })
    }

    /// Returns the path of one.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

fn build() -> Result<PathBuf> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--quiet", "--workspace", "--bins"]).stdin(Stdio::null());
    let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status().context("start cargo build")?;
    if !status.success() {
        bail!("cargo build --workspace --bins: {status}");
    }
    Ok(crate::cache::target()?.join("debug"))
}
