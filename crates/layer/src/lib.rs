//! One layer's bytes: any verified range of it, or its whole tar stream; the span cache.

mod error;
mod read;

pub use error::{ReadError, ReadErrorKind};
pub use read::ReadChunks;
