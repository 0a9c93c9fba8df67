//! Names and documents of OCI images, and the traits through which bytes travel.
//!
//! This crate owns the vocabulary that every other crate shares: digests, descriptors, references, manifests, labels
//! and the byte stream. It opens no file and no socket. What it parses comes from registries, containerd and users, so
//! every parser is bounded and returns a typed error.
//!
//! Wire names (media types, annotations, labels) equal those of the Go SOCI snapshotter, so that artifacts of the two
//! are interchangeable.

pub mod annotation;
pub mod blob;
pub mod causes;
pub mod descriptor;
pub mod digest;
pub mod go_json;
pub mod labels;
pub mod manifest;
pub mod media_type;
pub mod platform;
pub mod reference;

pub use blob::{BlobSource, BlobStream, FetchClass, FetchContext, FetchError, FetchErrorKind, Priority};
pub use causes::{causes, with_causes};
pub use descriptor::Descriptor;
pub use digest::{Digest, DigestError, Hasher};
pub use labels::SnapshotLabels;
pub use manifest::{Index, Manifest};
pub use platform::Platform;
pub use reference::{ImageRef, RefError, RegistryName, registry_identity};
