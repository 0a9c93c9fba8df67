//! The `--user` option of the command line: one credential, bound to one registry.

use async_trait::async_trait;
use soci_oci::RegistryName;

use crate::keychain::{Candidate, CandidateId, Keychain, KeychainError, Lookup, Outcome, Rejected};
use crate::{Credential, CredentialScope, Secret};

/// Offers one credential to one registry and nothing to any other (R60).
#[derive(Debug)]
pub struct ExplicitKeychain {
    credential: Credential,
    registry: String,
}

/// A parsed `USERNAME[:PASSWORD]`.
#[derive(Debug, Clone)]
pub enum UserArgument {
    /// Both halves; the password may be empty.
    Pair(Credential),
    /// A user name alone: the password is to be asked for, without echo.
    NameOnly(String),
}

/// A `--user` value that is of no use. Never quotes the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// Nothing before the colon, or nothing at all.
    #[error("--user: the user name is empty; give USERNAME:PASSWORD")]
    EmptyName,
    /// A user name that is not text.
    #[error("--user: the user name is not UTF-8; give USERNAME:PASSWORD")]
    NameNotText,
    /// A user name alone where nobody can be asked for the password.
    #[error(
        "--user: no password given and no terminal to ask for it; give USERNAME:PASSWORD or --password-stdin"
    )]
    NoPassword,
}

/// Splits a `--user` value at the first colon; the password is used byte for byte.
///
/// # Errors
/// [`UserError`] for an empty user name or one that is not text.
pub fn parse_user(value: &[u8]) -> Result<UserArgument, UserError> {
    let colon = value.iter().position(|byte| *byte == b':');
    let name =
        std::str::from_utf8(&value[..colon.unwrap_or(value.len())]).map_err(|_| UserError::NameNotText)?;
    if name.is_empty() {
        return Err(UserError::EmptyName);
    }
    Ok(match colon {
        Some(at) => UserArgument::Pair(Credential::basic(name, &value[at + 1..])),
        None => UserArgument::NameOnly(name.to_owned()),
    })
}

impl UserArgument {
    /// Returns the credential when the password is there.
    ///
    /// # Errors
    /// [`UserError::NoPassword`] for a user name alone: to be called where no terminal can be asked.
    pub fn complete(self) -> Result<Credential, UserError> {
        match self {
            Self::Pair(credential) => Ok(credential),
            Self::NameOnly(_) => Err(UserError::NoPassword),
        }
    }

    /// Returns the credential with a password that was asked for or read from standard input, which outranks one in
    /// the argument.
    pub fn with_password(self, password: Secret) -> Credential {
        let username = match self {
            Self::Pair(Credential::Basic { username, .. }) | Self::NameOnly(username) => username,
            Self::Pair(other) => return other,
        };
        Credential::Basic { username, password }
    }
}

impl ExplicitKeychain {
    /// Returns a keychain that offers `credential` to `registry` only.
    pub fn new(credential: Credential, registry: &RegistryName) -> Self {
        Self { credential, registry: registry.identity().to_owned() }
    }

    fn find(&self, scope: &CredentialScope) -> Lookup {
        match scope.is_at(&self.registry) {
            true => {
                Lookup::one(Candidate::new("--user", self.credential.clone()), "given on the command line")
            }
            false => Lookup::empty(format!("given for {} only", self.registry)),
        }
    }
}

#[async_trait]
impl Keychain for ExplicitKeychain {
    fn name(&self) -> &'static str {
        "--user"
    }

    async fn lookup(&self, scope: &CredentialScope, _rejected: &Rejected) -> Result<Lookup, KeychainError> {
        Ok(self.find(scope))
    }

    async fn peek(&self, scope: &CredentialScope) -> Option<Lookup> {
        Some(self.find(scope))
    }

    fn verdict(&self, _scope: &CredentialScope, _candidate: &CandidateId, _outcome: Outcome) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Origin, Scheme};

    fn pair(value: &str) -> (String, Vec<u8>) {
        match parse_user(value.as_bytes()).unwrap() {
            UserArgument::Pair(Credential::Basic { username, password }) => {
                (username, password.expose().to_vec())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn t119_the_first_colon_splits_and_the_password_is_kept_byte_for_byte() {
        let token = "t0ken+/=".repeat(350);
        for (value, name, password) in [
            ("user:pa:ss", "user", "pa:ss"),
            (&format!("AWS:{token}"), "AWS", &token),
            ("robot$ci:s3cr3t", "robot$ci", "s3cr3t"),
            ("_json_key:{\n \"a\": \"b=/+$ \"\n}", "_json_key", "{\n \"a\": \"b=/+$ \"\n}"),
            ("user:", "user", ""),
            ("user: pass ", "user", " pass "),
        ] {
            assert_eq!(pair(value), (name.to_owned(), password.as_bytes().to_vec()), "{value}");
        }
    }

    #[test]
    fn t122_values_without_user_or_password_are_usage_errors() {
        assert_eq!(parse_user(b":p").unwrap_err(), UserError::EmptyName);
        assert_eq!(parse_user(b"").unwrap_err(), UserError::EmptyName);
        assert_eq!(parse_user(b"\xff:p").unwrap_err(), UserError::NameNotText);
        assert_eq!(parse_user(b"name").unwrap().complete().unwrap_err(), UserError::NoPassword);
        let asked = parse_user(b"name").unwrap().with_password(Secret::new("pw"));
        assert_eq!(asked.fingerprint(), Credential::basic("name", "pw").fingerprint());
        assert!(!format!("{:?}", parse_user(b"name:hunter2")).contains("hunter2"));
    }

    #[tokio::test]
    async fn r60_the_credential_is_for_the_named_registry_only() {
        let image: soci_oci::ImageRef = "reg.example:443/team/app:1".parse().unwrap();
        let keychain = ExplicitKeychain::new(Credential::basic("u", "p"), image.registry());
        let mut scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        let rejected = Rejected::default();
        assert_eq!(keychain.lookup(&scope, &rejected).await.unwrap().candidates.len(), 1);
        scope.image = "other.example/team/app:1".parse().unwrap();
        assert_eq!(keychain.lookup(&scope, &rejected).await.unwrap().candidates.len(), 0);
        scope.image = "reg.example/team/app:1".parse().unwrap();
        scope.mirror = true;
        scope.origin = Origin::new(Scheme::Https, "mirror.example", None);
        assert_eq!(keychain.lookup(&scope, &rejected).await.unwrap().candidates.len(), 0);
    }

    /// Port 80 is named although it is the default there.
    #[tokio::test]
    async fn t119_a_registry_over_plain_http_is_the_one_it_was_given_for() {
        for (given, image) in [
            ("reg.example:80", "reg.example:80/a"),
            ("reg.example", "reg.example/a"),
            ("reg.example:80", "reg.example/a"),
        ] {
            let keychain =
                ExplicitKeychain::new(Credential::basic("u", "p"), &RegistryName::new(given).unwrap());
            let image: soci_oci::ImageRef = image.parse().unwrap();
            let mut scope = CredentialScope::new(Origin::of_registry(Scheme::Http, image.registry()), image);
            assert_eq!(keychain.find(&scope).candidates.len(), 1, "{given} {scope:?}");
            scope.origin = Origin::of_registry(Scheme::Https, scope.image.registry());
            let same = scope.image.registry().as_str() == given;
            assert_eq!(keychain.find(&scope).candidates.len(), usize::from(same), "{given} {scope:?}");
        }
    }
}
