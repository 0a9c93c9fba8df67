//! The CRI image service on the snapshotter's own socket: a relay to containerd that learns credentials on the way.
//!
//! The kubelet is pointed at our socket for images. Every call under the two versions of `ImageService` is forwarded
//! frame by frame as raw bytes, so fields and methods that are newer than this program survive; only `PullImage` and
//! `RemoveImage` are looked into. A credential is stored before the pull is forwarded, because containerd calls our
//! `Prepare` before it answers.
//!
//! Files: `tap` reads the few fields that matter, `backend` keeps the connection to containerd, `relay` forwards, `service`
//! is what the server mounts.

mod backend;
mod relay;
mod service;
mod tap;
#[cfg(test)]
mod tests;

pub(crate) use backend::Backend;
pub(crate) use relay::Relay;
pub(crate) use service::{ImageV1, ImageV1Alpha2, Relayed, RuntimeV1};
