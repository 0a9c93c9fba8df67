//! The read-only layer file system and its FUSE session.
//!
//! From the inside out: [`LayerTree`] is a layer's files as an immutable arena, built from a zTOC. [`LayerFs`] is that
//! tree with its bytes as a file system, without FUSE. [`mount()`] attaches a FUSE device to a directory, and a
//! [`Session`] answers the kernel's requests on it with a [`LayerFs`]; a [`FuseHub`]'s few threads serve all sessions.
//!
//! What must hold: no byte is served that the layer reader did not give, and none of a file whose tar header is not the
//! one that the zTOC describes. No thread of the hub waits for the network. Inode numbers follow from the zTOC alone and
//! handles carry nothing, so that another process can go on with a mount.
//!
//! Nothing here knows of snapshots, images or registries.

mod abi;
mod adapter;
mod attr;
mod build;
mod errno;
mod fs;
mod header_check;
mod hub;
mod init;
mod late;
mod meter;
mod mount;
mod overlay;
mod path;
mod pending;
mod session;
mod startup;
mod state_dir;
mod tree;
mod wire;

pub use adapter::CacheTimes;
pub use attr::{Attr, Inode, Target};
pub use build::{TreeError, TreeOptions};
pub use errno::FsError;
pub use fs::{DirItem, FsOptions, HeaderCheck, LayerFs, Opened, ReadFuture, ReadReply};
pub use header_check::HeaderError;
pub use hub::FuseHub;
pub use init::{InitError, InitReply};
pub use meter::{FsMeter, Operation};
pub use mount::{FuseDevice, MountError, MountOptions, Unmount, mount, unmount};
pub use overlay::OpaqueXattr;
pub use path::PathError;
pub use session::{ServeOptions, Session};
pub use state_dir::LayerState;
pub use tree::{LayerTree, NodeIndex};
