//! Local content: the soci store, and containerd's content, image and lease services.
//!
//! One trait, [`ContentStore`], with two implementers: [`LocalStore`], an OCI image layout in a directory, and the
//! content service of [`Containerd`]. Whatever is written is verified against its digest and size while it is written,
//! and becomes visible only when it is whole; whatever [`ContentStore::read`] returns was verified. Sources for large
//! content hand bytes on unverified: their consumers hash as they go.
//!
//! Leases, and labels named `containerd.io/gc.…`, exist for containerd's garbage collector. The soci store has neither:
//! nothing is removed from it but by [`ContentStore::delete`].

mod containerd;
mod error;
mod local;
mod proto;
mod store;

pub use containerd::{Containerd, Image, Images, Lease};
pub use error::StoreError;
pub use local::{Collecting, FileBlob, LocalStore};
pub use store::{ContentInfo, ContentStore, rfc3339};
