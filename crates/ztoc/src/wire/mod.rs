//! FlatBuffers, as much of it as zTOCs need: a checked reader and a writer that repeats the reference's byte order.
//!
//! The reader verifies as it goes: no offset is followed before it is known to stay inside the buffer, with checked
//! arithmetic. Texts are byte strings, since names and attribute values need not be UTF-8.

pub(crate) mod read;
pub(crate) mod schema;
pub(crate) mod write;

pub use read::WireFault;
pub(crate) use read::{Table, Tables};
