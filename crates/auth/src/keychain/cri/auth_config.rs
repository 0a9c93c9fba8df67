//! What a pull request says about its credential, and which one that is.

use std::fmt;

use soci_oci::RegistryName;
use zeroize::Zeroizing;

use crate::keychain::docker_file::{EntryError, decode_auth};
use crate::{Credential, Secret};

/// The longest field of an `AuthConfig` that is kept, in bytes.
const MAX_FIELD: usize = 64 << 10;

/// The credential fields of a pull request, wiped on drop.
pub struct AuthConfig {
    username: Zeroizing<String>,
    password: Zeroizing<String>,
    auth: Zeroizing<String>,
    server_address: String,
    identity_token: Zeroizing<String>,
    registry_token: Zeroizing<String>,
}

impl AuthConfig {
    /// Takes the fields of CRI's `AuthConfig`, in the order of their numbers.
    pub fn new(
        username: String,
        password: String,
        auth: String,
        server_address: String,
        identity_token: String,
        registry_token: String,
    ) -> Self {
        Self {
            username: Zeroizing::new(username),
            password: Zeroizing::new(password),
            auth: Zeroizing::new(auth),
            server_address,
            identity_token: Zeroizing::new(identity_token),
            registry_token: Zeroizing::new(registry_token),
        }
    }

    /// Returns the credential, by containerd's precedence; `None` when all is empty.
    ///
    /// # Errors
    /// [`Useless`] when there is one that cannot be read.
    pub(super) fn credential(&self) -> Result<Option<Credential>, Useless> {
        let fields = [&self.username, &self.password, &self.auth, &self.identity_token, &self.registry_token];
        if fields.iter().any(|field| field.len() > MAX_FIELD) {
            return Err(Useless::TooLong);
        }
        if !self.username.is_empty() {
            return Ok(Some(Credential::basic(self.username.as_str(), self.password.as_bytes())));
        }
        if !self.identity_token.is_empty() {
            return Ok(Some(Credential::IdentityToken(Secret::new(self.identity_token.as_bytes()))));
        }
        if !self.auth.is_empty() {
            return decode_auth(&self.auth).map(Some).map_err(Useless::Auth);
        }
        let token = &self.registry_token;
        Ok((!token.is_empty()).then(|| Credential::RegistryToken(Secret::new(token.as_bytes()))))
    }

    /// Returns the registry that the credential is for, where the caller says it.
    ///
    /// # Errors
    /// [`Useless`] when what it says is no registry.
    pub(super) fn server(&self) -> Result<Option<String>, Useless> {
        let text = self.server_address.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        RegistryName::new(host).map(|name| Some(name.identity().to_owned())).map_err(|_| Useless::Server)
    }
}

/// Why the credential of a pull is not kept. Never quotes it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Useless {
    #[error("a field is longer than {MAX_FIELD} bytes")]
    TooLong,
    #[error("field auth cannot be read: {0}")]
    Auth(#[source] EntryError),
    #[error("server_address is no registry")]
    Server,
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig").finish_non_exhaustive()
    }
}
