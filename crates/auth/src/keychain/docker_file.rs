//! What a Docker `config.json` (and a pull secret, which has its form) says about credentials.
//!
//! Read as Docker reads it, only more patiently: one entry that cannot be decoded costs that entry, not the file. Fields
//! other than `auths`, `credHelpers` and `credsStore` are nobody's business here. Source: docker/cli's `config` package.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

use crate::json::{self, Node};
use crate::{Credential, Secret};

/// The largest file that is read, in bytes.
pub const MAX_FILE: usize = 4 * 1024 * 1024;
/// How deeply it may be nested.
const MAX_DEPTH: usize = 32;

/// Standard alphabet; padding and trailing bits do not matter.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What the file says.
#[derive(Debug, Clone, Default)]
pub(crate) struct DockerFile {
    /// `auths`: each key once.
    pub(crate) auths: Vec<AuthsEntry>,
    /// `credHelpers`: registry key and helper suffix; an empty suffix means "the file, not the store".
    pub(crate) helpers: Vec<(String, String)>,
    /// `credsStore`, when not empty.
    pub(crate) store: Option<String>,
}

/// An entry of `auths`: the key, and the credential, or nothing for a mere marker, or why it is of no use.
pub type AuthsEntry = (String, Result<Option<Credential>, EntryError>);

/// Which document holds the entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `{"auths": {…}}`: `config.json`, and secrets of type `kubernetes.io/dockerconfigjson`.
    DockerConfigJson,
    /// The bare map: secrets of the old type `kubernetes.io/dockercfg`.
    DockerCfg,
}

/// Why one entry is of no use. Never quotes the entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Not an object.
    #[error("the entry is not an object")]
    NotAnObject,
    /// A field is not text.
    #[error("{0} is not a text")]
    NotText(&'static str),
    /// `auth` does not decode.
    #[error("auth is not base64")]
    NotBase64,
    /// `auth` has no colon inside.
    #[error("auth holds no colon between user name and password")]
    NoColon,
    /// `auth` has nothing before the colon.
    #[error("auth holds no user name")]
    NoUser,
    /// The user name is not text.
    #[error("the user name in auth is not UTF-8")]
    UserNotText,
}

/// Why the whole document is of no use. Never quotes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Larger than the cap.
    #[error("larger than {MAX_FILE} bytes")]
    TooLarge,
    /// Not JSON: where, and what kind of trouble.
    #[error("{0}")]
    Json(String),
    /// A known field is of another kind.
    #[error("{field} is {kind}, not {wanted}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it is.
        kind: &'static str,
        /// What it has to be.
        wanted: &'static str,
    },
    /// `DOCKER_AUTH_CONFIG` holds more than `auths` with `auth`.
    #[error("holds fields other than auths and auth")]
    UnknownField,
}

/// Reads the entries of `auths` and nothing else: for documents that must not name a helper.
///
/// # Errors
/// [`FileError`] when the document is of no use as a whole. A single bad entry is an error inside the result.
pub fn parse_auths(bytes: &[u8], form: Form) -> Result<Vec<AuthsEntry>, FileError> {
    let root = read(bytes)?;
    match form {
        Form::DockerConfigJson => auths(root.get("auths"), "auths"),
        Form::DockerCfg => auths(Some(&root), "the document"),
    }
}

impl DockerFile {
    /// Reads a `config.json`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        let root = read(bytes)?;
        let store = match root.get("credsStore") {
            None => None,
            Some(Node::Text(store)) => Some(store.to_string()).filter(|store| !store.is_empty()),
            Some(other) => return Err(wrong("credsStore", other, "a text")),
        };
        let mut helpers: Vec<(String, String)> = Vec::new();
        match root.get("credHelpers") {
            None => {}
            Some(Node::Map(members)) => {
                for (key, value) in members {
                    let suffix = match value {
                        Node::Text(suffix) => suffix.to_string(),
                        Node::Null => String::new(),
                        other => return Err(wrong("a value of credHelpers", other, "a text")),
                    };
                    helpers.retain(|(known, _)| known != key);
                    helpers.push((key.clone(), suffix));
                }
            }
            Some(other) => return Err(wrong("credHelpers", other, "an object")),
        }
        Ok(Self { auths: auths(root.get("auths"), "auths")?, helpers, store })
    }

    /// Reads the value of `DOCKER_AUTH_CONFIG`, which is stricter than the file: a field that is not known makes it
    /// invalid as a whole.
    pub(crate) fn parse_environment(bytes: &[u8]) -> Result<Self, FileError> {
        let root = read(bytes)?;
        let only = |node: &Node, name: &str| match node {
            Node::Map(members) => members.iter().all(|(key, _)| key.eq_ignore_ascii_case(name)),
            _ => true,
        };
        let entries_ok = match root.get("auths") {
            Some(Node::Map(members)) => members.iter().all(|(_, entry)| only(entry, "auth")),
            _ => true,
        };
        if !only(&root, "auths") || !entries_ok {
            return Err(FileError::UnknownField);
        }
        Ok(Self { auths: auths(root.get("auths"), "auths")?, helpers: Vec::new(), store: None })
    }
}

fn read(bytes: &[u8]) -> Result<Node, FileError> {
    if bytes.len() > MAX_FILE {
        return Err(FileError::TooLarge);
    }
    match json::parse(bytes, MAX_DEPTH).map_err(|error| FileError::Json(error.to_string()))? {
        Node::Null => Ok(Node::Map(Vec::new())),
        root @ Node::Map(_) => Ok(root),
        other => Err(wrong("the document", &other, "an object")),
    }
}

fn wrong(field: &'static str, node: &Node, wanted: &'static str) -> FileError {
    FileError::Field { field, kind: node.kind(), wanted }
}

fn auths(node: Option<&Node>, field: &'static str) -> Result<Vec<AuthsEntry>, FileError> {
    let members = match node {
        None => return Ok(Vec::new()),
        Some(Node::Map(members)) => members,
        Some(other) => return Err(wrong(field, other, "an object")),
    };
    // The last of equal keys wins; the order of the rest is kept.
    let mut last = std::collections::HashMap::new();
    for (at, (key, _)) in members.iter().enumerate() {
        last.insert(key, at);
    }
    let kept = members.iter().enumerate().filter(|(at, (key, _))| last.get(key) == Some(at));
    Ok(kept.map(|(_, (key, value))| (key.clone(), entry(value))).collect())
}

/// Reads one entry. A ready token outranks a refresh token, which outranks a pair; `auth` outranks `username`.
fn entry(node: &Node) -> Result<Option<Credential>, EntryError> {
    match node {
        Node::Null => return Ok(None),
        Node::Map(_) => {}
        _ => return Err(EntryError::NotAnObject),
    }
    let text = |name: &'static str| match node.get(name) {
        None => Ok(None),
        Some(Node::Text(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
        Some(_) => Err(EntryError::NotText(name)),
    };
    if let Some(token) = text("registrytoken")? {
        return Ok(Some(Credential::RegistryToken(Secret::new(token.as_bytes()))));
    }
    if let Some(token) = text("identitytoken")? {
        return Ok(Some(Credential::IdentityToken(Secret::new(token.as_bytes()))));
    }
    if let Some(auth) = text("auth")? {
        return decode_auth(auth).map(Some);
    }
    let username = text("username")?.map_or(String::new(), |name| name.to_string());
    let password = text("password")?.map_or(Secret::new(""), |password| Secret::new(password.as_bytes()));
    Ok(Some(Credential::Basic { username, password }).filter(|pair| !pair.is_empty()))
}

/// Decodes `base64(username:password)`: blanks and line breaks inside are ignored, NUL bytes around the password are
/// trimmed (Windows stores leave them).
///
/// # Errors
/// [`EntryError`], which never quotes the value.
pub fn decode_auth(auth: &str) -> Result<Credential, EntryError> {
    let text: Zeroizing<Vec<u8>> =
        Zeroizing::new(auth.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect());
    let mut pair = Zeroizing::new(vec![0; text.len()]);
    let len = LENIENT.decode_slice(&*text, &mut pair).map_err(|_| EntryError::NotBase64)?;
    let pair = &pair[..len];
    let colon = pair.iter().position(|byte| *byte == b':').ok_or(EntryError::NoColon)?;
    let (username, mut password) = (&pair[..colon], &pair[colon + 1..]);
    if username.is_empty() {
        return Err(EntryError::NoUser);
    }
    while let Some((0, rest)) = password.split_first() {
        password = rest;
    }
    while let Some((0, rest)) = password.split_last() {
        password = rest;
    }
    let username = std::str::from_utf8(username).map_err(|_| EntryError::UserNotText)?;
    Ok(Credential::basic(username, password))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(json: &str) -> Result<Option<Credential>, EntryError> {
        let mut file = DockerFile::parse(json.as_bytes()).unwrap();
        assert_eq!(file.auths.len(), 1, "{json}");
        file.auths.remove(0).1
    }

    fn pair(json: &str) -> (String, String) {
        match only(json) {
            Ok(Some(Credential::Basic { username, password })) => {
                (username, String::from_utf8(password.expose().to_vec()).unwrap())
            }
            other => panic!("{json}: {other:?}"),
        }
    }

    fn auth(value: &str) -> String {
        format!(r#"{{"auths":{{"H":{{"auth":"{value}"}}}}}}"#)
    }

    fn expect(json: &str, name: &str, password: &str) {
        assert_eq!(pair(json), (name.to_owned(), password.to_owned()), "{json}");
    }

    #[test]
    fn t31_the_first_colon_splits() {
        expect(&auth("dXNlcjpwYTpzcw=="), "user", "pa:ss");
        expect(&auth("cm9ib3QkY2k6czNjcjN0"), "robot$ci", "s3cr3t");
    }

    #[test]
    fn t32_auth_outranks_user_and_password() {
        expect(r#"{"auths":{"H":{"auth":"dTI6cDI=","username":"user","password":"pass"}}}"#, "u2", "p2");
    }

    #[test]
    fn t33_user_and_password_alone_are_used() {
        expect(r#"{"auths":{"H":{"username":"user","password":"pass"}}}"#, "user", "pass");
        expect(r#"{"Auths":{"H":{"Username":"user","PASSWORD":"pass","auth":""}}}"#, "user", "pass");
    }

    #[test]
    fn t34_t35_tokens_outrank_the_pair() {
        let identity = only(r#"{"auths":{"H":{"identitytoken":"R","auth":"dTI6cDI="}}}"#);
        assert!(matches!(identity, Ok(Some(Credential::IdentityToken(token))) if token.expose() == b"R"));
        let registry = only(r#"{"auths":{"H":{"registrytoken":"B"}}}"#);
        assert!(matches!(registry, Ok(Some(Credential::RegistryToken(token))) if token.expose() == b"B"));
    }

    #[test]
    fn t36_t37_base64_without_padding_and_with_line_breaks() {
        expect(&auth("QVdTOnRvazplbg"), "AWS", "tok:en");
        expect(&auth(r" dXNl\ncjpw\r\nYXNz "), "user", "pass");
        expect(&auth("dXNlcjpwYXN0"), "user", "past");
    }

    #[test]
    fn t38_nul_bytes_around_the_password_go() {
        expect(&auth("dXNlcjpwYXNzAAA="), "user", "pass");
    }

    #[test]
    fn t39_a_bad_entry_costs_itself() {
        let json = r#"{"auths":{"a":{"auth":"dXNlcg=="},"b":{"auth":"%%"},"c":7,"d":{"auth":5},"H":{"auth":"dTI6cDI="}}}"#;
        let file = DockerFile::parse(json.as_bytes()).unwrap();
        let errors: Vec<_> = file
            .auths
            .iter()
            .filter_map(|(key, value)| Some((key.as_str(), *value.as_ref().err()?)))
            .collect();
        let expected = [
            ("a", EntryError::NoColon),
            ("b", EntryError::NotBase64),
            ("c", EntryError::NotAnObject),
            ("d", EntryError::NotText("auth")),
        ];
        assert_eq!(errors, expected);
        assert!(matches!(&file.auths[4].1, Ok(Some(_))));
    }

    #[test]
    fn t40_an_empty_user_is_invalid() {
        assert_eq!(only(&auth("OnBhc3M=")).unwrap_err(), EntryError::NoUser);
    }

    #[test]
    fn t41_null_is_absence() {
        for json in [r#"{"auths":null,"credHelpers":null,"credsStore":null}"#, "null", "", " \n", "{}"] {
            let file = DockerFile::parse(json.as_bytes()).unwrap();
            assert!(file.auths.is_empty() && file.helpers.is_empty() && file.store.is_none(), "{json}");
        }
        assert!(matches!(only(r#"{"auths":{"H":{"auth":null}}}"#), Ok(None)));
        assert!(matches!(only(r#"{"auths":{"H":null}}"#), Ok(None)));
        assert!(matches!(only(r#"{"auths":{"H":{}}}"#), Ok(None)));
    }

    #[test]
    fn t42_the_last_of_equal_keys_wins() {
        expect(r#"{"auths":{"H":{"auth":"dXNlcjpwYXNz"},"H":{"auth":"dTI6cDI="}}}"#, "u2", "p2");
        let file = DockerFile::parse(br#"{"credHelpers":{"H":"a","H":"b"}}"#).unwrap();
        assert_eq!(file.helpers, [("H".to_owned(), "b".to_owned())]);
    }

    #[test]
    fn t43_trailing_data_is_ignored_and_a_byte_order_mark_is_an_error() {
        expect(&format!("{} garbage", auth("dTI6cDI=")), "u2", "p2");
        assert!(DockerFile::parse(b"\xef\xbb\xbf{}").is_err());
        assert!(DockerFile::parse(b"{").is_err());
        assert!(DockerFile::parse(b"[]").is_err());
    }

    #[test]
    fn t44_other_fields_may_be_of_any_type() {
        expect(
            r#"{"detachKeys":5,"HttpHeaders":[],"proxies":"x","auths":{"H":{"auth":"dTI6cDI=","email":7}}}"#,
            "u2",
            "p2",
        );
    }

    #[test]
    fn known_fields_of_another_type_and_excess_are_errors() {
        for json in
            [r#"{"auths":5}"#, r#"{"credsStore":[]}"#, r#"{"credHelpers":{"H":5}}"#, r#"{"credHelpers":""}"#]
        {
            assert!(matches!(DockerFile::parse(json.as_bytes()), Err(FileError::Field { .. })), "{json}");
        }
        assert_eq!(DockerFile::parse(&vec![b' '; MAX_FILE + 1]).unwrap_err(), FileError::TooLarge);
        let deep = format!(r#"{{"x":{}{}}}"#, "[".repeat(32), "]".repeat(32));
        assert!(matches!(DockerFile::parse(deep.as_bytes()), Err(FileError::Json(_))));
    }

    #[test]
    fn r52_only_auths_are_read_from_a_secret() {
        let json = br#"{"credsStore":"evil","credHelpers":5,"auths":{"H":{"auth":"dTI6cDI="}}}"#;
        assert_eq!(parse_auths(json, Form::DockerConfigJson).unwrap().len(), 1);
        assert_eq!(parse_auths(br#"{"H":{"auth":"dTI6cDI="}}"#, Form::DockerCfg).unwrap().len(), 1);
        assert!(parse_auths(b"7", Form::DockerCfg).is_err());
    }

    #[test]
    fn the_environment_is_read_strictly() {
        let ok = br#"{"auths":{"H":{"auth":"dTI6cDI="}}}"#;
        assert_eq!(DockerFile::parse_environment(ok).unwrap().auths.len(), 1);
        for json in [r#"{"auths":{},"credsStore":"x"}"#, r#"{"auths":{"H":{"auth":"dTI6cDI=","email":""}}}"#]
        {
            assert_eq!(DockerFile::parse_environment(json.as_bytes()).unwrap_err(), FileError::UnknownField);
        }
    }

    #[test]
    fn errors_and_debug_never_quote_a_secret() {
        let file = DockerFile::parse(
            br#"{"auths":{"a":{"auth":"aHVudGVyMg=="},"b":{"username":"u","password":"hunter2"}}}"#,
        );
        let shown = format!("{file:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("aHVudGVyMg"), "{shown}");
        let error = DockerFile::parse(br#"{"auths":{"a":{"password":"hunter2" hunter2"#).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
