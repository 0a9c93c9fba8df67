//! What callers and operators read when a request fails.
//!
//! A message names what was being done, the repository, each host with its answer, and the next step where there is one.
//! Text that a registry sent is shortened, freed of control characters, and loses the queries of addresses in it.

use serde::Deserialize;
use soci_oci::{FetchError, FetchErrorKind};

/// A request that failed at every host that could be asked.
#[derive(Debug)]
pub(crate) struct CallError {
    pub(crate) error: FetchError,
    /// The hosts do not know this operation: there may be another way.
    pub(crate) unsupported: bool,
    /// The deciding host's status, if it answered.
    pub(crate) status: Option<u16>,
    /// The deciding host's error code, e.g. `NAME_UNKNOWN`.
    pub(crate) code: Option<String>,
}

impl CallError {
    pub(crate) fn new(kind: FetchErrorKind, message: impl Into<String>) -> Self {
        Self { error: FetchError::new(kind, message), unsupported: false, status: None, code: None }
    }
}

impl From<CallError> for FetchError {
    fn from(error: CallError) -> Self {
        error.error
    }
}

/// What a registry's error body says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Said {
    pub(crate) code: Option<String>,
    pub(crate) message: Option<String>,
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<One>,
}

#[derive(Deserialize)]
struct One {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Said {
    /// Reads a body in the registries' own form; anything else says nothing.
    pub(crate) fn parse(body: &[u8]) -> Self {
        let Ok(Errors { errors }) = serde_json::from_slice::<Errors>(body) else {
            return Self::default();
        };
        let Some(first) = errors.into_iter().next() else {
            return Self::default();
        };
        let filled = |text: String, max: usize| Some(clean(&text, max)).filter(|text| !text.is_empty());
        Self { code: filled(first.code, 64), message: filled(first.message, 200) }
    }
}

/// Makes text from the network fit for a log line: one line, at most `max` characters, no query of an address.
pub(crate) fn clean(text: &str, max: usize) -> String {
    let mut cleaned = String::new();
    for word in text.split_whitespace() {
        if !cleaned.is_empty() {
            cleaned.push(' ');
        }
        let word = match word.find("://") {
            Some(_) => word.split(['?', '#']).next().unwrap_or(""),
            None => word,
        };
        cleaned.extend(word.chars().filter(|character| !character.is_control()));
    }
    match cleaned.char_indices().nth(max) {
        Some((at, _)) => {
            cleaned.truncate(at);
            cleaned.push('…');
            cleaned
        }
        None => cleaned,
    }
}

/// Returns the words for a status.
pub(crate) fn status_text(status: u16) -> String {
    match http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()) {
        Some(reason) => format!("status {status} {}", reason.to_ascii_lowercase()),
        None => format!("status {status}"),
    }
}

/// Body of the fuzz target `error_body`: whatever a registry says is short, one line, and shows no query.
#[doc(hidden)]
pub fn fuzz_error_body(bytes: &[u8]) {
    let Said { code, message } = Said::parse(bytes);
    for (text, max) in [(code, 64), (message, 200)] {
        let Some(text) = text else { continue };
        assert!(!text.is_empty() && text.chars().count() <= max + 1);
        assert!(!text.chars().any(char::is_control));
        let shows_query = |word: &str| word.contains("://") && word.contains('?');
        assert!(!text.split(' ').any(shows_query), "{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_bodies_are_read_and_cleaned() {
        let body =
            br#"{"errors":[{"code":"DENIED","message":"see\nhttps://s.example/x?X-Amz-Signature=hunter2 \u0007now"}]}"#;
        let said = Said::parse(body);
        assert_eq!(said.code.as_deref(), Some("DENIED"));
        assert_eq!(said.message.as_deref(), Some("see https://s.example/x now"));
        assert_eq!(Said::parse(b"<html>"), Said::default());
        assert_eq!(Said::parse(br#"{"errors":[]}"#), Said::default());
        assert_eq!(clean(&"x".repeat(300), 200).chars().count(), 201);
        assert_eq!(status_text(404), "status 404 not found");
    }
}
