//! Decode, validate, build and encode zTOCs; map offsets to spans; resume deflate at a checkpoint.
//!
//! A zTOC describes one layer of an image: the files in its tar ([`Ztoc::entries`]), and spans, pieces that can be
//! fetched, verified and decompressed on their own ([`SpanTable`]). [`ZtocBuilder`] makes one from
//! a layer in a single pass; [`SpanInflate`] turns a span's compressed bytes into bytes of the tar; [`mod@tar`] is the
//! project's only tar parser.
//!
//! This crate does no I/O. What it reads comes from registries and is not trusted: every parser checks before it
//! follows, has limits, and returns a typed error. `unsafe` is confined to the private module `inflate`.
//!
//! The format is described in `docs/ztoc-format.md`; what is written here is byte for byte what the Go SOCI tools write.

mod builder;
#[cfg(test)]
mod decode_tests;
mod encode;
mod entry;
mod error;
mod inflate;
mod limits;
mod mtime;
mod offset;
mod path;
mod span_inflate;
mod span_table;
pub mod tar;
mod window;
mod wire;
mod zinfo;
mod ztoc;

pub use builder::{BuildError, BuildOptions, BuiltZtoc, ZtocBuilder};
pub use entry::{Entry, EntryKind, XATTR_PREFIX};
pub use error::{EntryFault, ZtocError};
pub use limits::DecodeLimits;
pub use mtime::Mtime;
pub use offset::{CompressedOffset, SpanId, UncompressedOffset};
pub use span_inflate::{InflateError, InflateFault, SpanInflate, inflate_span};
pub use span_table::{Compression, SpanError, SpanSlice, SpanSlices, SpanTable};
pub use window::{WINDOW_LEN, Window, WindowError, WindowRef};
pub use wire::WireFault;
pub use zinfo::ZinfoFault;
pub use ztoc::{Entries, Ztoc};
