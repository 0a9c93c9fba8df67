//! Test helpers: an in-process registry and token server with fault scripts, generated layers and images, private
//! containerd daemons, and the comparison of directory trees.
//!
//! Nothing here ships. The crate depends on no shipping crate, so that what it says about the protocol is said a second
//! time and independently. It serves unit tests (`TestRegistry::start(Options::default())`) and the project's demo and
//! benchmarks alike, where it holds real images on disk.

#[cfg(feature = "containerd")]
pub mod containerd;
#[cfg(feature = "containerd")]
pub mod cri;
pub mod faults;
pub mod frames;
#[cfg(feature = "containerd")]
pub mod gate;
mod http;
pub mod image;
pub mod kube_api;
pub mod layer_gen;
pub mod log;
pub mod mounts;
pub mod process;
pub mod registry;
#[cfg(feature = "containerd")]
pub mod snapshots;
#[cfg(feature = "containerd")]
pub mod snapshotter;
pub mod tls;
pub mod token_server;
pub mod wait;
pub mod walk;

pub use faults::{Action, Fault, Listener, Matcher, RequestInfo, Seen};
pub use registry::{AuthMode, Options, Referrers, TestRegistry};
pub use tls::{Identity, TestCa};
pub use token_server::{ExpiresIn, PostSupport, TokenField, TokenOptions};
