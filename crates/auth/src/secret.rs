//! A value that must not be seen: wiped when the last holder lets go, starred in `Debug`, without `Display`.
//!
//! Clones share one buffer, so that no copy is left behind by passing a secret around. Bytes, not text: a password is
//! whatever the registry takes. [`Secret::expose`] is for the two places that put a secret on the wire.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

/// Secret bytes. Equality is not offered: compare [`Fingerprint`](crate::Fingerprint)s.
#[derive(Clone)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// Takes ownership of `bytes`; they are wiped when the last clone is dropped.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes.into())))
    }

    /// Returns the bytes. For building a header or a form body, nothing else.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Zeroizing<Vec<u8>>> for Secret {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(Arc::new(bytes))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_stars_only() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?}"), "***");
        assert_eq!(secret.expose(), b"hunter2");
        assert!(!secret.is_empty() && Secret::new("").is_empty());
    }

    #[test]
    fn any_bytes_are_kept() {
        assert_eq!(Secret::new(vec![0, 255, 10]).expose(), [0, 255, 10]);
    }
}
