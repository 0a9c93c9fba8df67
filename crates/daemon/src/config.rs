//! The configuration file: [`raw`] as written, [`checked`] as used.
//!
//! The file is read once at start. A file that is malformed stops the start with its name, the line and the key; what is
//! unknown or without effect is warned about once. Only the default path may be absent.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub mod address;
pub mod checked;
pub mod document;
pub mod dump;
pub mod raw;
pub mod read;
pub mod schema;
#[cfg(test)]
mod tests;

pub use checked::Config;
pub use raw::Raw;
pub use read::{Finding, Places};

/// Where the file is looked for when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/soci-snapshotter-grpc/config.toml";

/// A configuration that does not load.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to open config file {path:?}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is malformed, or a value cannot be meant.
    #[error("failed to load config file {path:?}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: read::ReadError,
    },
}

/// A file that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// As written.
    pub raw: Raw,
    /// As used.
    pub config: Config,
    /// What of it has no effect.
    pub findings: Vec<Finding>,
    /// Where it says what.
    pub places: Places,
}

/// Loads the file at `path`; the default path may be absent.
///
/// # Errors
/// [`ConfigError`], which names the file and the place.
pub fn load(path: &Path) -> Result<Loaded, ConfigError> {
    let text = match text(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => {
            String::new()
        }
        Err(source) => return Err(ConfigError::Open { path: path.to_owned(), source }),
        Ok(text) => text,
    };
    let malformed = |source| ConfigError::Malformed { path: path.to_owned(), source };
    let read::Parsed { raw, findings, places } = read::parse(&text).map_err(malformed)?;
    let config = Config::check(&raw).map_err(|error| malformed(places.locate(error)))?;
    Ok(Loaded { raw, config, findings, places })
}

fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(read::MAX_SIZE + 1).read_to_string(&mut text)?;
    if read as u64 > read::MAX_SIZE {
        let message = format!("it is larger than the limit of {} bytes", read::MAX_SIZE);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(text)
}
