//! One file per command.

pub(crate) mod auth;
pub(crate) mod convert;
pub(crate) mod create;
pub(crate) mod index;
pub(crate) mod prefetch;
pub(crate) mod push;
pub(crate) mod rebuild_db;
pub(crate) mod ztoc;

use anyhow::{Context as _, bail};
use soci_index::build::BuildOptions;
use soci_oci::Digest;

use soci_registry::settings::{PlainHttp, TlsSettings, Verify};

use crate::cli::{RegistryFlags, ZtocFlags};

/// The largest file of paths to prefetch that is read, in bytes.
const MAX_PATHS_SIZE: u64 = 16 << 20;

impl ZtocFlags {
    /// Returns the options that the flags mean.
    ///
    /// # Errors
    /// When a value is out of range, or the file of paths cannot be read.
    pub(crate) fn options(self) -> anyhow::Result<BuildOptions> {
        let Ok(span_size) = u64::try_from(self.span_size) else { bail!("span size must be >= 0") };
        let Ok(min_layer_size) = u64::try_from(self.min_layer_size) else {
            bail!("min layer size must be >= 0")
        };
        for optimization in &self.optimizations {
            if optimization != "xattr" {
                bail!("optimization {optimization} is not a valid optimization [xattr]");
            }
        }
        let mut prefetch = self.prefetch_file;
        if let Some(path) = &self.prefetch_files_json {
            let paths = read_paths(path)
                .with_context(|| "failed to parse prefetch files: failed to load prefetch files from JSON")?;
            prefetch.extend(paths);
        }
        Ok(BuildOptions {
            span_size,
            min_layer_size,
            xattr: !self.optimizations.is_empty(),
            force: self.force,
            prefetch,
            ..BuildOptions::default()
        })
    }
}

impl RegistryFlags {
    /// Returns the registry client's settings that the flags mean.
    pub(crate) fn settings(&self) -> soci_registry::Settings {
        let mut settings = soci_registry::Settings::default();
        if self.plain_http {
            settings.plain_http = PlainHttp::Always;
        }
        if !self.hosts_dir.is_empty() {
            settings.hosts_dirs.clone_from(&self.hosts_dir);
        }
        settings.tls = TlsSettings {
            ca: self.tlscacert.iter().cloned().collect(),
            client: self.tlscert.clone().zip(self.tlskey.clone()),
            verify: if self.skip_verify { Verify::Skip } else { Verify::Yes },
        };
        settings
    }
}

fn read_paths(path: &std::path::Path) -> anyhow::Result<Vec<String>> {
    let what = || format!("failed to read JSON file {}", path.display());
    let size = std::fs::metadata(path).with_context(what)?.len();
    if size > MAX_PATHS_SIZE {
        bail!("{}: {size} bytes are over the limit of {MAX_PATHS_SIZE} bytes", what());
    }
    let bytes = std::fs::read(path).with_context(what)?;
    serde_json::from_slice(&bytes).context("failed to parse JSON")
}

/// Parses the digest that an `info` command was given.
fn digest(text: &str) -> anyhow::Result<Digest> {
    text.parse::<Digest>().map_err(anyhow::Error::new)
}
