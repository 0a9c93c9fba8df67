//! Where a secret that a test has planted could turn up.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};

/// Writes an executable script.
///
/// # Errors
/// Where it cannot be written.
pub fn script(path: &Path, text: &str) -> Result<()> {
    std::fs::create_dir_all(path.parent().context("no directory")?)?;
    std::fs::write(path, text)?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
}

/// Returns which secret is in these bytes, if one is. What they have beside text does not hide it.
pub fn found<'a>(bytes: &[u8], secrets: &'a [String]) -> Option<&'a str> {
    let text = String::from_utf8_lossy(bytes);
    secrets.iter().map(String::as_str).find(|secret| text.contains(secret))
}

/// Looks into every regular file beneath `directory`, mounts left out.
///
/// # Errors
/// Where one holds a secret, or cannot be read.
pub fn in_no_file(directory: &Path, secrets: &[String]) -> Result<()> {
    let device = std::fs::metadata(directory)?.dev();
    for entry in std::fs::read_dir(directory)?.flatten() {
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() && std::fs::metadata(&path).is_ok_and(|beneath| beneath.dev() == device) {
            in_no_file(&path, secrets)?;
        } else if kind.is_file()
            && let Some(secret) = found(&std::fs::read(&path)?, secrets)
        {
            bail!("{secret:?} is in {}", path.display());
        }
    }
    Ok(())
}

/// Looks at the limit of a process for core dumps.
///
/// # Errors
/// Where it may leave one.
pub fn in_no_core(process: u32) -> Result<()> {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
    if core.split_whitespace().filter(|word| *word == "0").count() != 2 {
        bail!("it may leave a core: {core}");
    }
    Ok(())
}
