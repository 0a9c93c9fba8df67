//! The first exchange on a mount: what the kernel can do, and what is used of it.
//!
//! It happens once in the life of a mount, however many processes serve it one after another. So its result is a value
//! that can be kept outside of the process and given to the next one.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

use crate::abi::{self, InHeader, InitIn, InitOut, OutHeader, feature, opcode};
use crate::wire;

/// Most pages of one read: 1 MiB, the kernel's limit unless an administrator raised it.
const MAX_PAGES: u16 = 256;
/// Reads that the kernel may have under way without anyone waiting for them: read-ahead.
const MAX_BACKGROUND: u16 = 64;
/// From how many on the kernel holds back: three quarters, as it would choose.
const CONGESTION: u16 = 48;
/// Most bytes that the kernel may write in one request. Nobody can write; it sets the least size of a read buffer.
const MAX_WRITE: u32 = 4096;
/// The request is in the queue when mount(2) returns.
const PATIENCE: Duration = Duration::from_secs(10);

// Not ASYNC_DIO: a direct reader would then wait for its pages without noticing signals.
const WANTED: u64 = feature::ASYNC_READ
    | feature::EXPORT_SUPPORT
    | feature::DO_READDIRPLUS
    | feature::PARALLEL_DIROPS
    | feature::MAX_PAGES
    | feature::CACHE_SYMLINKS
    | feature::EXPLICIT_INVAL_DATA
    | feature::INIT_EXT
    | feature::HAS_RESEND;

/// Why a mount cannot be served.
#[derive(Debug, Error)]
pub enum InitError {
    /// The device failed.
    #[error("cannot speak with the kernel through the FUSE device")]
    Device(#[from] Errno),
    /// The kernel said nothing.
    #[error("the kernel did not begin the FUSE protocol within {} s", PATIENCE.as_secs())]
    Silent,
    /// The first request was another one.
    #[error("the kernel began the FUSE protocol with operation {0}")]
    Unexpected(u32),
    /// The kernel is too old.
    #[error(
        "the kernel speaks FUSE {major}.{minor}, but {}.{} is needed: Linux 5.4 or later",
        abi::MAJOR,
        abi::MINOR_MIN
    )]
    TooOld {
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The kept result is not one.
    #[error("the kept result of the FUSE handshake is not readable")]
    Kept,
}

/// What kernel and server agreed on. Does not change while the mount exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitReply {
    /// Minor version of the protocol.
    pub minor: u32,
    /// Features in use.
    pub features: u64,
    /// Most bytes of one read.
    pub max_read: u32,
}

/// First byte of the kept form.
const KEPT_VERSION: u8 = 1;

impl InitReply {
    /// Returns the form in which the result is kept outside of the process.
    pub fn encode(&self) -> [u8; 17] {
        let mut bytes = [KEPT_VERSION; 17];
        bytes[1..5].copy_from_slice(&self.minor.to_le_bytes());
        bytes[5..13].copy_from_slice(&self.features.to_le_bytes());
        bytes[13..].copy_from_slice(&self.max_read.to_le_bytes());
        bytes
    }

    /// Reads the kept form.
    ///
    /// # Errors
    /// [`InitError::Kept`] when it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, InitError> {
        let (version, rest) = bytes.split_first().ok_or(InitError::Kept)?;
        let (minor, rest) = rest.split_first_chunk().ok_or(InitError::Kept)?;
        let (features, rest) = rest.split_first_chunk().ok_or(InitError::Kept)?;
        match (version, rest.first_chunk(), rest.len()) {
            (&KEPT_VERSION, Some(max_read), 4) => Ok(Self {
                minor: u32::from_le_bytes(*minor),
                features: u64::from_le_bytes(*features),
                max_read: u32::from_le_bytes(*max_read),
            }),
            _ => Err(InitError::Kept),
        }
    }
}

/// Answers the kernel's first request on a new mount.
pub(crate) fn handshake(device: impl AsFd) -> Result<InitReply, InitError> {
    let patience = Timespec::try_from(PATIENCE).map_err(|_| InitError::Silent)?;
    let mut poll = [PollFd::new(&device, PollFlags::IN)];
    let mut buffer = vec![0; wire::READ_BUFFER];
    let len = loop {
        if rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&patience)))? == 0 {
            return Err(InitError::Silent);
        }
        match rustix::io::read(&device, &mut buffer[..]) {
            Ok(len) => break len,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let (header, body) = InHeader::read_from_prefix(buffer.get(..len).unwrap_or_default())
        .map_err(|_| InitError::Unexpected(0))?;
    if header.opcode != opcode::INIT {
        return Err(InitError::Unexpected(header.opcode));
    }
    let (init, extension) = InitIn::read_from_prefix(body).map_err(|_| InitError::Unexpected(0))?;
    let (reply, out) = match negotiate(&init, extension) {
        Ok(agreed) => agreed,
        Err(error) => {
            wire::reply_error(&device, header.unique, Errno::PROTO)?;
            return Err(error);
        }
    };
    wire::reply(&device, header.unique, &[out.as_bytes()])?;
    Ok(reply)
}

fn negotiate(init: &InitIn, extension: &[u8]) -> Result<(InitReply, InitOut), InitError> {
    if init.major != abi::MAJOR || init.minor < abi::MINOR_MIN {
        return Err(InitError::TooOld { major: init.major, minor: init.minor });
    }
    let mut offered = u64::from(init.flags);
    if offered & feature::INIT_EXT != 0 {
        let upper = u32::read_from_prefix(extension).map_or(0, |(upper, _)| upper);
        offered |= u64::from(upper) << 32;
    }
    let features = offered & WANTED;
    let max_pages = if features & feature::MAX_PAGES == 0 { 0 } else { MAX_PAGES };
    let minor = init.minor.min(abi::MINOR_MAX);
    let [lower, upper] =
        [features & 0xffff_ffff, features >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    let out = InitOut {
        major: abi::MAJOR,
        minor,
        max_readahead: u32::MAX,
        flags: lower,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION,
        max_write: MAX_WRITE,
        time_gran: 1,
        max_pages,
        flags2: upper,
        ..InitOut::default()
    };
    // Without that feature the kernel reads 32 pages at a time.
    let max_read = u32::from(if max_pages == 0 { 32 } else { max_pages }) * 4096;
    Ok((InitReply { minor, features, max_read }, out))
}

/// Asks the kernel to send unanswered requests again, on a mount whose server died.
pub(crate) fn ask_again(device: impl AsFd, init: &InitReply) -> Result<(), Errno> {
    if init.features & feature::HAS_RESEND == 0 {
        return Ok(());
    }
    let header = OutHeader { len: 16, error: abi::NOTIFY_RESEND, unique: 0 };
    match rustix::io::write(device, header.as_bytes()) {
        Ok(_) => Ok(()),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(major: u32, minor: u32, flags: u32) -> InitIn {
        InitIn { major, minor, max_readahead: 131_072, flags }
    }

    #[test]
    fn only_what_the_kernel_offers_is_used() {
        let (reply, out) = negotiate(&offer(7, 31, 1 | 1 << 13), &[]).unwrap();
        assert_eq!(reply, InitReply { minor: 31, features: 1 | 1 << 13, max_read: 131_072 });
        assert_eq!((out.flags, out.flags2, out.max_pages), (1 | 1 << 13, 0, 0));
        let (reply, out) = negotiate(&offer(7, 99, u32::MAX), &u32::MAX.to_ne_bytes()).unwrap();
        assert_eq!((reply.minor, reply.features, reply.max_read), (40, WANTED, 1 << 20));
        assert_eq!(u64::from(out.flags) | u64::from(out.flags2) << 32, WANTED);
        // The upper half counts only when the kernel says so.
        let (reply, _) = negotiate(&offer(7, 40, 1), &u32::MAX.to_ne_bytes()).unwrap();
        assert_eq!(reply.features, 1);
    }

    #[test]
    fn old_kernels_are_refused() {
        assert!(matches!(negotiate(&offer(7, 30, 0), &[]), Err(InitError::TooOld { minor: 30, .. })));
        assert!(matches!(negotiate(&offer(6, 40, 0), &[]), Err(InitError::TooOld { major: 6, .. })));
    }

    #[test]
    fn the_result_survives_the_process() {
        let reply = InitReply { minor: 38, features: WANTED, max_read: 1 << 20 };
        assert_eq!(InitReply::decode(&reply.encode()).unwrap(), reply);
        for len in 0..17 {
            assert!(InitReply::decode(&reply.encode()[..len]).is_err());
        }
        assert!(InitReply::decode(&[2; 17]).is_err());
        assert!(InitReply::decode(&[1; 18]).is_err());
    }
}
