//! SOCI indexes v1 and v2: discover, resolve, decode, build, convert, push.
//!
//! A SOCI index is a manifest whose layers are the zTOCs (and prefetch artifacts) of an image's layers. Version 1 points
//! at the image manifest and is found by referrers; version 2 is named by an annotation of the image manifest itself.
//!
//! Reading: [`mod@discover`] says which index an image has, [`mod@resolve`] brings its artifacts here. Both look into local
//! content first, and verify every byte against its digest before anyone sees it. Writing: [`mod@build`], [`mod@convert`],
//! [`standalone`] and [`mod@push`]; what they write equals what the Go tools write, byte for byte.

pub mod build;
pub mod convert;
pub mod discover;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod manifest;
pub mod prefetch;
pub mod push;
pub mod remote;
pub mod resolve;
pub mod standalone;
pub mod tree;

#[cfg(test)]
mod testing;

pub use build::{BuildError, BuildOptions, Observer, Stores, Work, build};
pub use convert::{ConvertError, Converted, convert};
pub use discover::{DiscoverError, DiscoverRequest, Discovered, Source, discover};
pub use image::{Image, ImageError, Platforms};
pub use manifest::{IndexError, IndexVersion, SociIndex};
pub use push::{PushError, PushOptions, push};
pub use remote::{PushRemote, Remote};
pub use resolve::{ArtifactKind, Resolved, fetch_artifact, resolve};
