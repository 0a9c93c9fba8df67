//! Test helpers: an in-process registry and token server with fault scripts, a certificate authority.
//!
//! Nothing here ships. The crate depends on no shipping crate, so that what it says about the protocol is said a second
//! time and independently. It serves unit tests (`TestRegistry::start(Options::default())`) and the project's demo and
//! benchmarks alike, where it holds real images on disk.

pub mod faults;
mod http;
pub mod registry;
pub mod tls;
pub mod token_server;

pub use faults::{Action, Fault, Listener, Matcher, RequestInfo, Seen};
pub use registry::{AuthMode, Options, Referrers, TestRegistry};
pub use tls::{Identity, TestCa};
pub use token_server::{ExpiresIn, PostSupport, TokenField, TokenOptions};
