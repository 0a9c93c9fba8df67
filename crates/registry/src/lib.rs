//! The distribution protocol over an ordered list of hosts: manifests, referrers, ranged blobs, push.
//!
//! [`Registry`] is what a process has one of; [`Repository`] is what an image is read from or pushed to. Every request goes
//! through one stack of small layers, written in the order in which it is passed:
//!
//! deadline → retry → hosts → redirect → auth → concurrency limit → connection
//!
//! What holds everywhere: a credential goes to the origin that it is for and to no other; https is never left for http;
//! bytes are what was asked for or an error; every wait ends by the caller's deadline; no message holds a secret or the
//! query of an address. Digests are checked for what is returned whole (manifests, small blobs); streams are checked by
//! their readers, span by span.

mod blob;
mod client;
mod error;
mod explain;
mod hosts;
mod hosts_toml;
mod link;
mod location;
mod manifest;
pub mod meters;
mod push;
mod range;
mod referrers;
mod repository;
pub mod settings;
mod stack;
mod status;
mod transport;

pub use client::Registry;
pub use meters::{Meters, NoMeters};
pub use push::{ManifestPushed, Pushed};
pub use repository::Repository;
pub use settings::{Settings, SettingsError};
pub use status::Operation;

/// Bodies of the fuzz targets, so that they run as ordinary tests too.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::error::fuzz_error_body as error_body;
    pub use crate::hosts_toml::fuzz_hosts_toml as hosts_toml;
    pub use crate::link::fuzz_link as link;
    pub use crate::location::fuzz_presigned as presigned;
    pub use crate::range::fuzz_content_range as content_range;
    pub use crate::referrers::fuzz_referrers as referrers;
}
