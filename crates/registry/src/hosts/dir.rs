//! A hosts directory on disk: which one is a registry's, what it says, and whether it changed since.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use soci_oci::RegistryName;

use crate::hosts_toml::{self, HostTable, nothing};

/// More entries of a directory than this are not looked at.
const MAX_ENTRIES: usize = 1024;

/// What a hosts directory says.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    pub(crate) hosts: Vec<HostTable>,
    pub(crate) server: HostTable,
}

/// What the files looked like when they were read.
#[derive(Debug, Clone)]
pub(crate) struct Stamp {
    /// The hosts directory, if there is one.
    pub(crate) path: Option<PathBuf>,
    files: Vec<(PathBuf, Option<Mark>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Starts with the hosts directory, if there is one.
    pub(crate) fn of(directory: Option<&Path>) -> Self {
        let mut stamp = Self { path: directory.map(Path::to_owned), files: Vec::new() };
        if let Some(directory) = directory {
            stamp.add(directory);
        }
        stamp
    }

    /// Notes what `path` looks like.
    pub(crate) fn add(&mut self, path: &Path) {
        if !self.files.iter().any(|(known, _)| known == path) {
            self.files.push((path.to_owned(), mark(path)));
        }
    }

    /// Whether everything still looks the same.
    pub(crate) fn is_current(&self) -> bool {
        self.files.iter().all(|(path, seen)| mark(path) == *seen)
    }
}

fn mark(path: &Path) -> Option<Mark> {
    let found = fs::metadata(path).ok()?;
    Some(Mark {
        device: found.dev(),
        inode: found.ino(),
        len: found.len(),
        modified: (found.mtime(), found.mtime_nsec()),
        changed: (found.ctime(), found.ctime_nsec()),
    })
}

impl Default for Directory {
    fn default() -> Self {
        Self { hosts: Vec::new(), server: nothing() }
    }
}

/// Returns the directory for `registry` under `root`: `<host>_<port>_`, `<host>:<port>`, `<host>`, `_default`.
pub(crate) fn find(root: &Path, registry: &RegistryName) -> Option<PathBuf> {
    let host = registry.host();
    let names = match registry.port() {
        Some(port) => {
            vec![format!("{host}_{port}_"), format!("{host}:{port}"), host.to_owned(), "_default".into()]
        }
        None => vec![host.to_owned(), "_default".into()],
    };
    names.into_iter().map(|name| root.join(name)).find(|path| path.is_dir())
}

/// Reads the directory. A file that cannot be used is a warning, and the certificates beside it are used.
pub(crate) fn load(path: PathBuf, stamp: &mut Stamp) -> Directory {
    let file = path.join("hosts.toml");
    stamp.add(&file);
    match read(&file) {
        Ok(None) => certificates(&path),
        Ok(Some(text)) => match hosts_toml::parse(&text, &file) {
            Ok(parsed) => {
                for key in &parsed.unknown {
                    tracing::warn!(file = %file.display(), key, "unknown key in hosts.toml, ignored");
                }
                Directory { hosts: parsed.hosts, server: parsed.server }
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    "hosts.toml cannot be used: its mirrors are ignored, the registry itself is asked"
                );
                certificates(&path)
            }
        },
        Err(error) => {
            tracing::warn!(
                file = %file.display(), %error,
                "hosts.toml cannot be read: its mirrors are ignored, the registry itself is asked"
            );
            certificates(&path)
        }
    }
}

fn read(file: &Path) -> std::io::Result<Option<String>> {
    match fs::metadata(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(found) if found.len() > hosts_toml::MAX_FILE => {
            return Err(std::io::Error::other(format!(
                "{} bytes are more than the limit of {}",
                found.len(),
                hosts_toml::MAX_FILE
            )));
        }
        Ok(found) if found.len() == 0 => return Ok(None),
        Ok(_) => {}
    }
    fs::read_to_string(file).map(Some)
}

/// Docker's layout: `*.crt` are authorities, `*.cert` with `*.key` are ours.
fn certificates(path: &Path) -> Directory {
    let mut server = nothing();
    let mut files: Vec<PathBuf> = match fs::read_dir(path) {
        Ok(entries) => entries.take(MAX_ENTRIES).filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) => {
            tracing::warn!(directory = %path.display(), %error, "hosts directory cannot be read");
            Vec::new()
        }
    };
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => server.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                let key = key.is_file().then_some(key);
                server.client.push((file, key));
            }
            _ => {}
        }
    }
    Directory { hosts: Vec::new(), server }
}
