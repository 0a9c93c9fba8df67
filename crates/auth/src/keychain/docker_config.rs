//! The Docker config option: `config.json` and the helpers that it names.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::Secret;

/// What the option takes from the process environment; read by the caller, never here.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// `DOCKER_CONFIG`: a directory.
    pub docker_config: Option<PathBuf>,
    /// `PATH`, in which helpers are searched.
    pub path: Option<OsString>,
    /// `DOCKER_AUTH_CONFIG`: JSON.
    pub docker_auth_config: Option<Secret>,
}
