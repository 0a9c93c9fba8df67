//! Things that are slow to make and the same each time, kept beside the build: root file systems, downloads, layers.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Returns the directory that cargo built us into.
///
/// # Errors
/// Where our own program has no path of the expected shape.
pub fn target() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find our own program")?;
    // <target>/<profile>/deps/<test> or <target>/<profile>/<program>
    let profile = program.parent().context("our own program is nowhere")?;
    let profile = if profile.ends_with("deps") { profile.parent().unwrap_or(profile) } else { profile };
    Ok(profile.parent().context("our own program is not in a target directory")?.to_owned())
}

/// Returns the cache's directory: `SOCI_CACHE_DIR`, or one beside the build.
///
/// # Errors
/// Where it cannot be made.
pub fn directory() -> Result<PathBuf> {
    let directory = match std::env::var_os("SOCI_CACHE_DIR") {
        Some(directory) => directory.into(),
        None => target()?.join("stage-cache"),
    };
    std::fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    Ok(directory)
}

/// Returns the cached `name`, made by `make` if it is not there. One process makes it, others wait.
///
/// `make` gets a path to fill with a file or a directory; it becomes `name` only when it succeeds.
///
/// # Errors
/// What `make` returns, or where the cache cannot be written.
pub fn keep(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let directory = directory()?;
    let wanted = directory.join(name);
    if wanted.exists() {
        return Ok(wanted);
    }
    let lock = directory.join(format!("{name}.lock"));
    let lock: File = OpenOptions::new().create(true).append(true).open(&lock).context("open a lock")?;
    lock.lock().context("wait for a lock")?;
    if wanted.exists() {
        return Ok(wanted);
    }
    let unfinished = directory.join(format!("{name}.unfinished"));
    remove(&unfinished)?;
    make(&unfinished).with_context(|| format!("make {name} for the cache"))?;
    std::fs::rename(&unfinished, &wanted).with_context(|| format!("keep {}", wanted.display()))?;
    Ok(wanted)
}

fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
