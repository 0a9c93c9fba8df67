//! Command line and environment.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::config::DEFAULT_PATH;
use crate::doctor::DoctorArgs;
use crate::internal_docs::Document;
use crate::serve::DEFAULT_ADDRESS;

/// Where state is kept when nothing else is said.
pub const DEFAULT_ROOT: &str = "/var/lib/soci-snapshotter-grpc/";

/// What the process was started with.
#[derive(Debug, Parser)]
#[command(name = "soci-snapshotter-grpc", version = version(), about = "Lazy-loading snapshotter for containerd")]
pub struct Args {
    /// Address to serve on: a path, unix://path, or fd:// for the socket systemd hands over.
    #[arg(long, env = "SOCI_SNAPSHOTTER_ADDRESS", default_value = DEFAULT_ADDRESS)]
    pub address: String,
    /// Configuration file; may be absent only at the default path.
    #[arg(long, env = "SOCI_SNAPSHOTTER_CONFIG", default_value = DEFAULT_PATH)]
    pub config: PathBuf,
    /// trace, debug, info, warn, error, fatal or panic.
    #[arg(long, env = "SOCI_SNAPSHOTTER_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// State directory.
    #[arg(long, env = "SOCI_SNAPSHOTTER_ROOT", default_value = DEFAULT_ROOT)]
    pub root: PathBuf,
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Things to do instead of serving.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Print the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Say what keeps images from being lazy on this node, and how to change it.
    Doctor(DoctorArgs),
    /// Documents that the program writes about itself.
    #[command(subcommand, hide = true)]
    InternalDocs(Document),
}

/// Which configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum ConfigCommand {
    /// The one in effect.
    Dump,
    /// The defaults.
    Default,
}

/// Returns version and revision.
pub fn version() -> String {
    format!("version {} {}", env!("CARGO_PKG_VERSION"), revision())
}

/// Returns the source revision the binary was built from, where the builder said it.
pub fn revision() -> &'static str {
    option_env!("SOCI_REVISION").unwrap_or("unknown")
}
