//! A layer's tar as a directory for overlayfs, as containerd's own unpack makes it.
//!
//! Whatever the bytes come from is a [`TarStream`](crate::TarStream): spans of a lazy layer, or a whole blob through
//! [`LayerBytes`]. [`mod@apply`] consumes only that.

mod apply;
mod below;
mod codec;
mod error;
mod names;
mod tree;

pub use apply::{ApplyOptions, OpaqueXattr, Usage, apply};
pub use below::{Below, BelowError, DirAttr, NothingBelow};
pub use codec::{Codec, LayerBytes};
pub use error::UnpackError;
