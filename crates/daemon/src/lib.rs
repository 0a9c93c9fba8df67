//! The snapshotter daemon: configuration, wiring, live layers, gRPC, metrics, shutdown.
//!
//! Everything that knows more than one of the other crates is here. The library exists so that tests run the daemon within
//! their own process; the program is [`run::main`].

mod allocator;
pub mod args;
pub mod config;
pub mod control;
mod cri;
pub mod daemon;
pub mod debug;
pub mod disk;
pub mod doctor;
pub mod dumps;
mod front;
pub mod grpc;
pub mod internal_docs;
pub mod keychains;
pub mod live;
pub mod lock;
pub mod logging;
pub mod metrics;
pub mod overlay;
pub mod peers;
pub mod probe;
pub mod proto;
pub mod registries;
pub mod run;
pub mod serve;
pub mod traces;
pub mod version;
pub mod watchdog;

pub use config::Config;
pub use daemon::{Daemon, Options};
