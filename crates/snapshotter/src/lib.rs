//! containerd snapshot semantics and the Prepare plan, over values.
//!
//! This crate owns what a snapshot is on disk ([`records`]), who may change it when ([`store`]), what containerd is
//! answered ([`service`]), and which way a layer of an image comes into being ([`plan`]). It sees neither FUSE nor HTTP:
//! mounting, unpacking and everything that needs a registry is the [`LayerProvider`]'s, which the daemon implements.
//!
//! What must hold:
//! - a call is answered only when what it says is on disk, so a crash after the answer loses nothing;
//! - no lock is held while a provider works, and none across a file being synced;
//! - a Prepare is one task per (namespace, target, parent): callers wait for it, and a caller who gives up stops nothing;
//! - a fallback ends in a container that starts, unless `strict` says otherwise.

pub mod durable;
pub mod error;
pub mod filter;
pub mod jobs;
pub mod mounts;
pub mod plan;
pub mod provider;
pub mod reclaim;
pub mod records;
pub mod service;
pub mod store;
mod sync;
pub mod usage;
pub mod verdict;

pub use error::{Code, Error};
pub use filter::{Filter, Subject};
pub use mounts::Mount;
pub use plan::{
    ImageFacts, Intent, LayerFacts, LayerRequest, Next, PreparePlan, PullModes, Reason, ResolveError, Setback,
};
pub use provider::{
    Ancestor, LayerProvider, LazyError, Lower, MountRecord, ReleaseError, RestoreError, SnapshotDir,
    UnpackError,
};
pub use records::{Info, Kind, Record, Usage};
pub use service::{Commit, Prepare, Settings, Snapshotter, Update};
pub use store::Store;
pub use verdict::Verdict;
