//! Writing replies to the device.

use std::io::IoSlice;
use std::os::fd::AsFd;

use rustix::io::Errno;
use soci_layer::ReadChunks;
use zerocopy::IntoBytes;

use crate::abi::OutHeader;

/// Room for one request. The kernel wants room for a largest write and 8 KiB at least; the rest lets it send many
/// forgotten inodes at once.
pub(crate) const READ_BUFFER: usize = 32 << 10;

/// Most pieces of one write, the header included: the system's limit is 1024.
const MAX_PIECES: usize = 512;

fn header(unique: u64, error: i32, body: usize) -> Result<OutHeader, Errno> {
    let len = u32::try_from(body + size_of::<OutHeader>()).map_err(|_| Errno::OVERFLOW)?;
    Ok(OutHeader { len, error, unique })
}

/// Replies with a body in pieces. A request that the kernel no longer waits for is no error.
pub(crate) fn reply(device: impl AsFd, unique: u64, body: &[&[u8]]) -> Result<(), Errno> {
    let header = header(unique, 0, body.iter().map(|piece| piece.len()).sum())?;
    let mut pieces = [IoSlice::new(&[]); 4];
    let all = std::iter::once(header.as_bytes()).chain(body.iter().copied());
    let count = pieces.iter_mut().zip(all).map(|(slot, piece)| *slot = IoSlice::new(piece)).count();
    write(device, pieces.get(..count).unwrap_or_default())
}

/// Replies with content, from where it lies.
pub(crate) fn reply_chunks(device: impl AsFd, unique: u64, chunks: ReadChunks) -> Result<(), Errno> {
    let header = header(unique, 0, chunks.len())?;
    let count = chunks.iter().len();
    if count <= 3 {
        let mut pieces = [IoSlice::new(header.as_bytes()); 4];
        pieces.iter_mut().skip(1).zip(&chunks).for_each(|(slot, chunk)| *slot = IoSlice::new(chunk));
        return write(device, pieces.get(..=count).unwrap_or_default());
    }
    if count >= MAX_PIECES {
        return write(device, &[IoSlice::new(header.as_bytes()), IoSlice::new(&chunks.into_bytes())]);
    }
    let mut pieces = Vec::with_capacity(count + 1);
    pieces.push(IoSlice::new(header.as_bytes()));
    pieces.extend(chunks.iter().map(|chunk| IoSlice::new(chunk)));
    write(device, &pieces)
}

/// Replies that the request failed.
pub(crate) fn reply_error(device: impl AsFd, unique: u64, errno: Errno) -> Result<(), Errno> {
    let header = header(unique, -errno.raw_os_error(), 0)?;
    write(device, &[IoSlice::new(header.as_bytes())])
}

fn write(device: impl AsFd, pieces: &[IoSlice<'_>]) -> Result<(), Errno> {
    loop {
        return match rustix::io::writev(&device, pieces) {
            // NOENT: the reader is gone. NODEV: the mount is.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(errno) => Err(errno),
        };
    }
}
