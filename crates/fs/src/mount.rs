//! Attaching a FUSE device to a directory and taking it off again, as root and without helper programs.
//!
//! Mounting is apart from serving, because a later process may go on serving a device that an earlier one mounted. The
//! mount has no `nosuid` and no `nodev`, as a directory that containerd unpacked has neither: an image's programs must
//! work whether the layer is below overlayfs or bound alone.

use std::ffi::CString;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use thiserror::Error;

/// Where the device is.
const DEVICE: &str = "/dev/fuse";

/// How a layer is mounted.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// What the table of mounts shows as the source.
    pub source: String,
    /// What it shows as the type, after `fuse.`.
    pub subtype: String,
}

impl Default for MountOptions {
    /// `soci` of type `fuse.soci`.
    fn default() -> Self {
        Self { source: "soci".into(), subtype: "soci".into() }
    }
}

/// Why a layer could not be mounted.
#[derive(Debug, Error)]
pub enum MountError {
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}: load the kernel's module with \"modprobe fuse\", and run as root")]
    Device(#[source] Errno),
    /// The source or type has a zero byte.
    #[error("mount source {0:?} has a zero byte")]
    Source(String),
    /// The kernel refused.
    #[error("cannot mount a layer on {at:?}")]
    Mount {
        /// Where.
        at: PathBuf,
        /// Why.
        source: Errno,
    },
    /// The kernel did not let go.
    #[error("cannot unmount {at:?}")]
    Unmount {
        /// Where.
        at: PathBuf,
        /// Why.
        source: Errno,
    },
}

/// One mount's connection to the kernel. Closing the last copy of its descriptor ends the connection; the mount itself
/// stays in place, dead, until it is unmounted.
#[derive(Debug)]
pub struct FuseDevice {
    fd: OwnedFd,
    at: PathBuf,
    number: Result<Number, Errno>,
}

/// The number of a mounted file system: no two have the same at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Number {
    major: u32,
    minor: u32,
}

impl Number {
    /// Returns that of what is mounted on `at`, without asking whoever serves it.
    fn of(at: &Path) -> Result<Self, Errno> {
        let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(CWD, at, flags, StatxFlags::empty())?;
        Ok(Self { major: stat.stx_dev_major, minor: stat.stx_dev_minor })
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FuseDevice {
    /// Takes over a descriptor that an earlier process mounted on `at`.
    ///
    /// # Errors
    /// When the descriptor cannot be made non-blocking.
    pub fn inherited(fd: OwnedFd, at: &Path) -> Result<Self, MountError> {
        rustix::fs::fcntl_getfl(&fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
            .map_err(MountError::Device)?;
        Ok(Self { fd, at: at.to_owned(), number: Number::of(at) })
    }

    /// Returns where it is mounted.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// Returns the number of the mount's file system.
    pub(crate) fn number(&self) -> Result<Number, Errno> {
        self.number
    }

    /// Whether the mount is in its place: neither unmounted nor detached nor covered by another. Asks nobody who serves.
    pub(crate) fn in_place(&self) -> bool {
        self.number.is_ok() && self.number == Number::of(&self.at)
    }
}

impl AsFd for FuseDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Mounts a new device on the directory `at`. Whoever looks into it waits until it is served.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(at: &Path, options: &MountOptions) -> Result<FuseDevice, MountError> {
    let zero = |_| MountError::Source(options.source.clone());
    let source = CString::new(options.source.as_str()).map_err(zero)?;
    let kind = CString::new(format!("fuse.{}", options.subtype)).map_err(zero)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(MountError::Device)?;
    // overlayfs enforces permissions in a container; default_permissions does for whoever comes to the directory itself.
    let data =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fd.as_raw_fd());
    let data = CString::new(data).map_err(zero)?;
    rustix::mount::mount(source, at, kind, MountFlags::RDONLY, data.as_c_str())
        .map_err(|source| MountError::Mount { at: at.to_owned(), source })?;
    Ok(FuseDevice { fd, at: at.to_owned(), number: Number::of(at) })
}

/// How a mount is taken off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Only when nobody uses it.
    Idle,
    /// At once for all who come later; whoever uses it keeps it for as long as it is served.
    Detach,
}

/// Takes the topmost mount off the directory `at`. Returns whether there was one.
///
/// Never asks whoever serves it, so it cannot hang on a dead one.
///
/// # Errors
/// [`MountError::Unmount`], with `EBUSY` when it is in use and not to be detached.
pub fn unmount(at: &Path, how: Unmount) -> Result<bool, MountError> {
    let detach = match how {
        Unmount::Idle => UnmountFlags::empty(),
        Unmount::Detach => UnmountFlags::DETACH,
    };
    match rustix::mount::unmount(at, detach | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOENT) => Ok(false),
        Err(source) => Err(MountError::Unmount { at: at.to_owned(), source }),
    }
}
