//! Windows: the 32 KiB before a span, and how they are found again in a stored zTOC.

use std::fmt;
use std::ops::Range;

use sha2::{Digest as _, Sha256};

use crate::inflate::WINDOW;

/// Length of a window in bytes.
pub const WINDOW_LEN: usize = WINDOW;

/// Where the window of a span is in the bytes of the zTOC, and what it must hash to.
///
/// Nearly all of a zTOC is windows, so they stay on disk and are loaded one by one. The hash (the first half of a SHA-256)
/// was taken when the zTOC was decoded, so a file damaged since is noticed before wrong bytes are produced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowRef {
    /// Where in the zTOC's bytes; empty when the span needs no window (plain tar, and the first span).
    pub range: Range<u64>,
    pub(crate) hash: WindowHash,
}

/// The first half of a SHA-256.
pub(crate) type WindowHash = [u8; 16];

pub(crate) fn hash(bytes: &[u8]) -> WindowHash {
    let full: [u8; 32] = Sha256::digest(bytes).into();
    let mut half = [0; 16];
    half.copy_from_slice(&full[..16]);
    half
}

/// Bytes that are not the window asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// The wrong number of bytes was read.
    #[error("window at bytes {}..{} of the ztoc: {len} bytes were read", range.start, range.end)]
    Length {
        /// Where it should be.
        range: Range<u64>,
        /// How many bytes were given.
        len: usize,
    },
    /// The stored zTOC changed since it was decoded.
    #[error("window at bytes {}..{} of the ztoc is damaged; fetch the ztoc again", range.start, range.end)]
    Damaged {
        /// Where it is.
        range: Range<u64>,
    },
}

impl WindowRef {
    /// Returns the window, if `bytes` (those of `range`) are what they were when the zTOC was decoded.
    ///
    /// # Errors
    /// [`WindowError`] otherwise.
    pub fn check(&self, bytes: &[u8]) -> Result<Window, WindowError> {
        if self.range.is_empty() {
            return match bytes {
                [] => Ok(Window::NONE),
                _ => Err(WindowError::Length { range: self.range.clone(), len: bytes.len() }),
            };
        }
        let Ok(window) = <Box<[u8; WINDOW]>>::try_from(bytes.to_vec().into_boxed_slice()) else {
            return Err(WindowError::Length { range: self.range.clone(), len: bytes.len() });
        };
        if hash(bytes) != self.hash {
            return Err(WindowError::Damaged { range: self.range.clone() });
        }
        Ok(Window(Some(window)))
    }
}

/// A checked window; oldest byte first.
#[derive(Clone, PartialEq, Eq)]
pub struct Window(Option<Box<[u8; WINDOW]>>);

impl Window {
    /// The window of a span that needs none.
    pub const NONE: Self = Self(None);

    /// Returns the window's bytes, or `None` when the span needs no window.
    pub fn bytes(&self) -> Option<&[u8; WINDOW_LEN]> {
        self.0.as_deref()
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Its bytes are a layer's content: not for logs.
        f.write_str(if self.0.is_some() { "Window(32 KiB)" } else { "Window(none)" })
    }
}
