//! What a registry is shown, and the fingerprint by which two of them are compared.
//!
//! A fingerprint is a hash under a key that is random per process: equal credentials have equal fingerprints inside one
//! process, and nothing can be learnt from a logged one.

use std::fmt;
use std::sync::LazyLock;

use base64::Engine as _;
use bytes::Bytes;
use http::HeaderValue;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::Secret;

/// One stored credential.
#[derive(Clone)]
pub enum Credential {
    /// A user name and a password, the password as raw bytes.
    Basic {
        /// The user name; never holds a colon when it can be used.
        username: String,
        /// The password; may be empty, which is an incomplete credential, not an absent one.
        password: Secret,
    },
    /// An OAuth2 refresh token, to be exchanged for an access token; never sent as a password.
    IdentityToken(Secret),
    /// A bearer token to be sent as it is.
    RegistryToken(Secret),
}

/// A keyed hash of a credential. `Display` gives its first six hexadecimal digits, fit for a log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 16]);

static KEY: LazyLock<[u8; 32]> = LazyLock::new(rand::random);

impl Credential {
    /// Returns a pair of user name and password.
    pub fn basic(username: impl Into<String>, password: impl Into<Vec<u8>>) -> Self {
        Self::Basic { username: username.into(), password: Secret::new(password) }
    }

    /// Whether there is nothing in it at all. A user name with an empty password is not empty.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Basic { username, password } => username.is_empty() && password.is_empty(),
            Self::IdentityToken(secret) | Self::RegistryToken(secret) => secret.is_empty(),
        }
    }

    /// Returns the hash by which this credential is told from others.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hash = Sha256::new();
        hash.update(*KEY);
        let (kind, name, secret): (u8, &str, &Secret) = match self {
            Self::Basic { username, password } => (0, username, password),
            Self::IdentityToken(secret) => (1, "", secret),
            Self::RegistryToken(secret) => (2, "", secret),
        };
        hash.update([kind]);
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update(secret.expose());
        let mut print = [0; 16];
        print.copy_from_slice(&hash.finalize()[..16]);
        Fingerprint(print)
    }

    /// Returns what kind of credential it is, in words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Basic { .. } => "user name and password",
            Self::IdentityToken(_) => "identity token",
            Self::RegistryToken(_) => "registry token",
        }
    }

    /// Returns why the credential cannot be presented although it is there, if so.
    ///
    /// Neither Basic nor a token endpoint takes a pair with an empty half, and a colon in the user name would move the
    /// border between the two.
    pub fn flaw(&self) -> Option<&'static str> {
        match self {
            Self::Basic { username, .. } if username.is_empty() => Some("the user name is empty"),
            Self::Basic { username, .. } if username.contains(':') => Some("the user name holds a colon"),
            Self::Basic { password, .. } if password.is_empty() => Some("the password is empty"),
            _ => None,
        }
    }
}

/// Returns `Basic base64(username:password)`, marked sensitive.
pub(crate) fn basic_header(username: &str, password: &Secret) -> Option<HeaderValue> {
    let mut pair = Zeroizing::new(Vec::with_capacity(username.len() + 1 + password.expose().len()));
    pair.extend_from_slice(username.as_bytes());
    pair.push(b':');
    pair.extend_from_slice(password.expose());
    let mut text = Zeroizing::new(vec![0; 6 + pair.len().div_ceil(3) * 4]);
    text[..6].copy_from_slice(b"Basic ");
    base64::engine::general_purpose::STANDARD.encode_slice(&*pair, &mut text[6..]).ok()?;
    sensitive(text)
}

/// Returns `Bearer <token>`, marked sensitive; nothing when the token holds bytes that no header can carry.
pub(crate) fn bearer_header(token: &Secret) -> Option<HeaderValue> {
    let mut text = Zeroizing::new(Vec::with_capacity(7 + token.expose().len()));
    text.extend_from_slice(b"Bearer ");
    text.extend_from_slice(token.expose());
    sensitive(text)
}

/// Makes a header value that shares `text`, so that it is wiped with the last clone of the value.
fn sensitive(text: Zeroizing<Vec<u8>>) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_maybe_shared(Bytes::from_owner(text)).ok()?;
    value.set_sensitive(true);
    Some(value)
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.fingerprint())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..3].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_tell_credentials_apart() {
        let pair = Credential::basic("user", "pass");
        assert_eq!(pair.fingerprint(), Credential::basic("user", "pass").fingerprint());
        for other in [
            Credential::basic("use", "rpass"),
            Credential::basic("user", "pass2"),
            Credential::IdentityToken(Secret::new("userpass")),
            Credential::RegistryToken(Secret::new("userpass")),
        ] {
            assert_ne!(pair.fingerprint(), other.fingerprint(), "{other:?}");
        }
    }

    #[test]
    fn debug_names_the_kind_and_six_digits() {
        let text = format!("{:?}", Credential::basic("user", "hunter2"));
        assert!(text.starts_with("user name and password ") && !text.contains("hunter2"), "{text}");
        assert_eq!(Credential::basic("a", "b").fingerprint().to_string().len(), 6);
    }

    #[test]
    fn r5_a_user_without_password_is_not_empty_but_flawed() {
        let half = Credential::basic("user", "");
        assert!(!half.is_empty());
        assert_eq!(half.flaw(), Some("the password is empty"));
        assert!(Credential::basic("", "").is_empty());
        assert_eq!(Credential::basic("a:b", "c").flaw(), Some("the user name holds a colon"));
    }

    #[test]
    fn headers_are_sensitive_and_take_raw_bytes() {
        let header = basic_header("user", &Secret::new(vec![0xff, b':', 0])).unwrap();
        assert!(header.is_sensitive());
        assert_eq!(header.to_str().unwrap(), "Basic dXNlcjr/OgA=");
        assert!(bearer_header(&Secret::new("a\nb")).is_none());
        assert_eq!(bearer_header(&Secret::new("t")).unwrap().to_str().unwrap(), "Bearer t");
    }
}
