//! The project's one tar parser, with the semantics of Go's `archive/tar`.
//!
//! Everyone who reads a layer's tar must see the same files at the same offsets: the builder that indexes it, the file
//! system that checks a header before it serves a file, the unpacker. And all of them must agree with the Go tools, down
//! to which PAX record wins. So there is one state machine, [`Parser`], fed with bytes as they come; [`parse_group`] runs
//! it over the headers of a single member.
//!
//! Understood: V7, ustar, PAX (`x` records), GNU long names and links, base-256 numbers, star's prefix. Header-only kinds
//! (links, devices, directories, pipes) have no data, whatever their size field says, and their [`Member::size`] is 0.
//! Not understood, and an error that names the reason: sparse files (GNU's and PAX's) and kinds no file system has.
//! Everything is bounded: an extension header by [`MAX_EXTENSION`], the headers of one member by [`MAX_GROUP`].

mod block;
mod error;
mod member;
mod parser;
mod pax;

pub use error::{TarError, TarFault};
pub use member::{Member, PaxRecords};
pub use parser::{Parser, Step, parse_group};

/// The unit of a tar: headers take whole blocks, data are padded to whole blocks.
pub const BLOCK: usize = 512;

/// Most bytes of one extension header (PAX records, GNU long name); the limit of Go's reader.
pub const MAX_EXTENSION: u64 = 1 << 20;

/// Most bytes that all headers of one member may take: three extensions of the largest size and room to spare.
pub const MAX_GROUP: u64 = 4 << 20;

/// Rounds up to whole blocks; saturates.
pub(crate) fn align(offset: u64) -> u64 {
    offset.checked_next_multiple_of(512).unwrap_or(u64::MAX)
}
