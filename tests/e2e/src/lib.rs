//! The stage on which the end-to-end tests, the demo and the benchmarks play: a registry of our own, a private
//! containerd, the snapshotter daemon and the command line as built.
//!
//! Nothing here links a product crate: binaries are run as users run them. All state is beneath one temporary directory
//! per stage. Needs root, /dev/fuse and the programs that `cargo xtask test` installs; what is missing is an error that
//! names it.

pub mod archive;
pub mod binaries;
pub mod cache;
pub mod children;
pub mod clock;
pub mod containerd2;
pub mod guest;
pub mod images;
pub mod interrupt;
pub mod keyring;
pub mod layout;
pub mod not_run;
pub mod planted;
pub mod publish;
pub mod pull;
pub mod rootfs;
pub mod scrape;
pub mod stage;
pub mod state;

pub use stage::{Stage, StageOptions};
