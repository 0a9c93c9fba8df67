//! Content digests: `sha256:<hex>` and `sha512:<hex>`, canonical lower case only.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// The digest of some content. Orders and prints as its canonical text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Digest {
    /// SHA-256, what practically everything uses.
    Sha256([u8; 32]),
    /// SHA-512, allowed by the OCI image specification.
    Sha512([u8; 64]),
}

/// A text that is not a canonical digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// No `algorithm:hex` form, or not canonical lower-case hex of the algorithm's length.
    #[error("invalid checksum digest format: {0:?}")]
    Format(String),
    /// An algorithm other than sha256 and sha512.
    #[error("unsupported digest algorithm: {0:?}")]
    Algorithm(String),
}

impl Digest {
    /// Returns the SHA-256 digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self::Sha256(sha2::Sha256::digest(bytes).into())
    }

    /// Returns the algorithm's name, `sha256` or `sha512`.
    pub fn algorithm(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "sha256",
            Self::Sha512(_) => "sha512",
        }
    }

    /// Returns the lower-case hex part, without the algorithm.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(self.bytes().len() * 2);
        push_hex(&mut text, self.bytes());
        text
    }

    /// Returns the first twelve hex digits, for messages that a person reads.
    pub fn short(&self) -> String {
        let mut text = String::with_capacity(12);
        push_hex(&mut text, &self.bytes()[..6]);
        text
    }

    /// Returns the raw hash.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Sha256(bytes) => bytes,
            Self::Sha512(bytes) => bytes,
        }
    }

    /// Returns a hasher of this digest's algorithm.
    pub fn hasher(&self) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::sha256(),
            Self::Sha512(_) => Hasher(Algorithm::Sha512(sha2::Sha512::new())),
        }
    }

    /// Whether `bytes` is the content this digest names.
    pub fn verifies(&self, bytes: &[u8]) -> bool {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finish() == *self
    }
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

fn parse_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    if hex.len() != 2 * N {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let invalid = || DigestError::Format(text.chars().take(160).collect());
        let (algorithm, hex) = text.split_once(':').ok_or_else(invalid)?;
        match algorithm {
            "sha256" => parse_hex(hex).map(Self::Sha256).ok_or_else(invalid),
            "sha512" => parse_hex(hex).map(Self::Sha512).ok_or_else(invalid),
            "" => Err(invalid()),
            other => Err(DigestError::Algorithm(other.chars().take(32).collect())),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Computes a digest from bytes fed piece by piece.
#[derive(Debug, Clone)]
pub struct Hasher(Algorithm);

#[derive(Debug, Clone)]
enum Algorithm {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    /// Returns a SHA-256 hasher.
    pub fn sha256() -> Self {
        Self(Algorithm::Sha256(sha2::Sha256::new()))
    }

    /// Adds the next bytes of the content.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Algorithm::Sha256(hasher) => hasher.update(bytes),
            Algorithm::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// Returns the digest of everything fed so far.
    pub fn finish(self) -> Digest {
        match self.0 {
            Algorithm::Sha256(hasher) => Digest::Sha256(hasher.finalize().into()),
            Algorithm::Sha512(hasher) => Digest::Sha512(hasher.finalize().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn text_round_trips() {
        let digest: Digest = EMPTY.parse().unwrap();
        assert_eq!(digest, Digest::of(b""));
        assert_eq!(digest.to_string(), EMPTY);
        assert_eq!(digest.short(), "e3b0c44298fc");
    }

    #[test]
    fn only_canonical_text_is_a_digest() {
        for text in ["", "sha256", "sha256:", "sha256:00", ":00", &EMPTY.to_uppercase(), &format!("{EMPTY}0")]
        {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
        assert_eq!("md5:00".parse::<Digest>(), Err(DigestError::Algorithm("md5".into())));
    }

    #[test]
    fn content_is_verified_with_the_digests_own_algorithm() {
        let digest = Digest::Sha512(sha2::Sha512::digest(b"x").into());
        assert!(digest.verifies(b"x"));
        assert!(!digest.verifies(b"y"));
    }
}
