//! The one safe door to zlib-rs's C-shaped interface, which alone can stop at block boundaries and resume mid-byte.
//!
//! All of the crate's `unsafe` is in this module. What must hold, and does by construction:
//! - the stream is initialised before any other call and freed exactly once;
//! - the stream is boxed and not moved while it lives;
//! - the pointers handed over are those of slices that outlive the call, and are cleared after it.
//!
//! The decoder may write scratch bytes past what it reports as produced, anywhere in the output slice. So callers must
//! not keep anything behind the position they decode to: output buffers are linear, preceded by what must be kept, and
//! never circular (as in zlib's `zran` example, where the bytes behind the position are the oldest of the window).
#![allow(
    unsafe_code,
    reason = "zlib-rs offers block boundaries, priming and dictionaries only by its C interface"
)]

use std::fmt;

use libz_rs_sys as z;

/// Bytes a deflate stream can refer back to.
pub(crate) const WINDOW: usize = 32 << 10;

/// How the input is wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Deflate data alone.
    Raw,
    /// A gzip member: header, deflate data, checked trailer.
    Gzip,
}

impl Format {
    fn window_bits(self) -> i32 {
        match self {
            Self::Raw => -15,
            Self::Gzip => 31,
        }
    }
}

/// When to come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// Input used up or output full.
    Full,
    /// That, or at the next boundary of a deflate block, or after a gzip header.
    Block,
}

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) consumed: usize,
    pub(crate) produced: usize,
    pub(crate) stop: Stop,
}

/// Where the decoder stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// In the middle of something.
    Midway,
    /// Between blocks (or after the header): `bits` of the last consumed byte belong to what follows; `last` is
    /// whether the block that ended was the member's last.
    Boundary { bits: u8, last: bool },
    /// At the end of the member.
    End,
}

/// The data are not valid deflate data or not a valid gzip member, in the decoder's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Corrupt(pub(crate) &'static str);

/// A decoder.
pub(crate) struct Inflater {
    stream: Box<z::z_stream>,
}

// SAFETY: the stream holds only memory it allocated itself and pointers that are null between calls.
unsafe impl Send for Inflater {}
// SAFETY: nothing can be done to it through a shared reference.
unsafe impl Sync for Inflater {}

impl fmt::Debug for Inflater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflater").finish_non_exhaustive()
    }
}

impl Inflater {
    /// `None` when memory is short.
    pub(crate) fn new(format: Format) -> Option<Self> {
        let mut stream = Box::new(z::z_stream::default());
        let size = i32::try_from(size_of::<z::z_stream>()).ok()?;
        // SAFETY: the stream is valid and its allocator fields are at their defaults; the version is a C string.
        let status =
            unsafe { z::inflateInit2_(&raw mut *stream, format.window_bits(), z::zlibVersion(), size) };
        (status == z::Z_OK).then_some(Self { stream })
    }

    /// Forgets everything and expects `format` next.
    pub(crate) fn reset(&mut self, format: Format) -> Result<(), Corrupt> {
        // SAFETY: the stream was initialised by `new`.
        let status = unsafe { z::inflateReset2(&raw mut *self.stream, format.window_bits()) };
        self.check(status)
    }

    /// Puts `bits` bits (1 to 7) of `value` before the input. Raw streams only, before any input.
    pub(crate) fn prime(&mut self, bits: u8, value: u8) -> Result<(), Corrupt> {
        // SAFETY: the stream was initialised by `new`.
        let status = unsafe { z::inflatePrime(&raw mut *self.stream, i32::from(bits), i32::from(value)) };
        self.check(status)
    }

    /// Sets what precedes the output. Raw streams only.
    pub(crate) fn set_dictionary(&mut self, window: &[u8; WINDOW]) -> Result<(), Corrupt> {
        let len = u32::try_from(window.len()).unwrap_or(0);
        // SAFETY: the stream was initialised by `new`; the pointer and length are of a live slice, which is copied.
        let status = unsafe { z::inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), len) };
        self.check(status)
    }

    fn check(&self, status: i32) -> Result<(), Corrupt> {
        if status == z::Z_OK { Ok(()) } else { Err(Corrupt("inconsistent decoder state")) }
    }

    /// Decodes from `input` to the front of `output`, as far as both reach.
    ///
    /// Bytes of `output` past `produced` have unspecified values afterwards. At most 1 GiB of each is used per call.
    pub(crate) fn run(&mut self, input: &[u8], output: &mut [u8], until: Until) -> Result<Progress, Corrupt> {
        const CHUNK: usize = 1 << 30;
        let input = &input[..input.len().min(CHUNK)];
        let room = output.len().min(CHUNK);
        let output = &mut output[..room];
        let flush = match until {
            Until::Full => z::Z_NO_FLUSH,
            Until::Block => z::Z_BLOCK,
        };
        let stream = &mut *self.stream;
        let (have, room) = (len_u32(input.len()), len_u32(output.len()));
        (stream.next_in, stream.avail_in) = (input.as_ptr(), have);
        (stream.next_out, stream.avail_out) = (output.as_mut_ptr(), room);
        // SAFETY: the stream was initialised by `new`; both pointers and lengths are of slices that live through the
        // call, the output's exclusively borrowed.
        let status = unsafe { z::inflate(&raw mut *stream, flush) };
        let (left_in, left_out) = (stream.avail_in, stream.avail_out);
        (stream.next_in, stream.avail_in) = (std::ptr::null(), 0);
        (stream.next_out, stream.avail_out) = (std::ptr::null_mut(), 0);
        let stop = match status {
            z::Z_STREAM_END => Stop::End,
            // Z_BUF_ERROR only says that this call could do nothing.
            z::Z_OK | z::Z_BUF_ERROR if stream.data_type & 128 != 0 => Stop::Boundary {
                bits: u8::try_from(stream.data_type & 7).unwrap_or(0),
                last: stream.data_type & 64 != 0,
            },
            z::Z_OK | z::Z_BUF_ERROR => Stop::Midway,
            z::Z_DATA_ERROR => return Err(Corrupt(self.message())),
            z::Z_MEM_ERROR => return Err(Corrupt("out of memory")),
            _ => return Err(Corrupt("inconsistent decoder state")),
        };
        Ok(Progress {
            consumed: input.len() - usize_of(left_in).min(input.len()),
            produced: output.len() - usize_of(left_out).min(output.len()),
            stop,
        })
    }

    /// The decoder's own word for what is wrong.
    fn message(&self) -> &'static str {
        let message = self.stream.msg;
        if message.is_null() {
            return "invalid data";
        }
        // SAFETY: the decoder points this at one of its own static C strings.
        unsafe { std::ffi::CStr::from_ptr(message) }.to_str().unwrap_or("invalid data")
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `new` and is freed only here. The result tells nothing of use.
        let _ = unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn usize_of(len: u32) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
