//! JSON as Docker's tools read it: keys in any case, the last of two equal keys wins, `null` is absence.
//!
//! Default derives reject duplicate keys and tell cases apart, and they leave secrets in freed memory; this reads into a
//! small tree whose texts are wiped when dropped. Depth is capped by the caller, size before the call.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use zeroize::Zeroizing;

/// A JSON value. Lists are known to be there, their items are not kept.
#[derive(Clone)]
pub(crate) enum Node {
    Null,
    Bool,
    Number(f64),
    Text(Zeroizing<String>),
    List,
    Map(Vec<(String, Node)>),
}

/// Why bytes are not JSON: position, never content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JsonError {
    #[error("not JSON at line {line}, column {column}")]
    Syntax { line: usize, column: usize },
    #[error("nested deeper than {0} levels")]
    TooDeep(usize),
    #[error("starts with a byte-order mark")]
    ByteOrderMark,
}

/// Reads the first JSON value of `bytes`; what follows it is ignored, as Docker does. Blank input is `null`.
pub(crate) fn parse(bytes: &[u8], depth: usize) -> Result<Node, JsonError> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(JsonError::ByteOrderMark);
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Node::Null);
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    Seed { left: depth }.deserialize(&mut reader).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => JsonError::TooDeep(depth),
        _ if error.to_string().contains("recursion limit") => JsonError::TooDeep(depth),
        _ => JsonError::Syntax { line: error.line(), column: error.column() },
    })
}

impl Node {
    /// Returns the member `name`, spelt exactly or else in any case, the last one of several; absent when `null`.
    pub(crate) fn get(&self, name: &str) -> Option<&Node> {
        let Self::Map(members) = self else { return None };
        let last = |same: &dyn Fn(&str) -> bool| {
            members.iter().rev().find(|(key, _)| same(key)).map(|(_, node)| node)
        };
        last(&|key| key == name)
            .or_else(|| last(&|key| key.eq_ignore_ascii_case(name)))
            .filter(|node| !matches!(node, Self::Null))
    }

    /// Returns the text of the member `name`; absent when it is not text.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns what kind of value it is, in words.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Number(_) => "a number",
            Self::Text(_) => "a text",
            Self::List => "a list",
            Self::Map(_) => "an object",
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())
    }
}

struct Seed {
    left: usize,
}

impl<'de> DeserializeSeed<'de> for Seed {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Node, D::Error> {
        reader.deserialize_any(self)
    }
}

impl Seed {
    fn inner<E: serde::de::Error>(&self) -> Result<usize, E> {
        self.left.checked_sub(1).ok_or_else(|| E::custom("too deep"))
    }
}

impl<'de> Visitor<'de> for Seed {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, _value: bool) -> Result<Node, E> {
        Ok(Node::Bool)
    }

    #[expect(clippy::cast_precision_loss, reason = "numbers are durations in seconds here")]
    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Number(value as f64))
    }

    #[expect(clippy::cast_precision_loss, reason = "numbers are durations in seconds here")]
    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(Zeroizing::new(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let left = self.inner::<A::Error>()?;
        while items.next_element_seed(Seed { left })?.is_some() {}
        Ok(Node::List)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let left = self.inner::<A::Error>()?;
        let mut members = Vec::new();
        while let Some(key) = entries.next_key::<String>()? {
            members.push((key, entries.next_value_seed(Seed { left })?));
        }
        Ok(Node::Map(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_exactly_first_then_in_any_case_and_the_last_wins() {
        let node = parse(br#"{"AUTH":"a","auth":"b","auth":"c","User":"d","n":null}"#, 4).unwrap();
        assert_eq!(node.text("auth"), Some("c"));
        assert_eq!(node.text("user"), Some("d"));
        assert!(node.get("n").is_none() && node.get("x").is_none());
    }

    #[test]
    fn t43_trailing_data_is_ignored_blank_is_null_and_a_mark_is_an_error() {
        assert!(parse(b"{} garbage", 4).is_ok());
        assert!(matches!(parse(b" \n", 4), Ok(Node::Null)));
        assert_eq!(parse(b"\xef\xbb\xbf{}", 4).unwrap_err(), JsonError::ByteOrderMark);
        assert_eq!(parse(b"{", 4).unwrap_err(), JsonError::Syntax { line: 1, column: 1 });
    }

    #[test]
    fn depth_is_capped() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse(nested(32).as_bytes(), 32).is_ok());
        assert_eq!(parse(nested(33).as_bytes(), 32).unwrap_err(), JsonError::TooDeep(32));
        assert_eq!(parse(nested(100_000).as_bytes(), 32).unwrap_err(), JsonError::TooDeep(32));
    }

    #[test]
    fn debug_shows_no_text() {
        assert_eq!(format!("{:?}", parse(br#"{"a":"hunter2"}"#, 4).unwrap()), "an object");
    }
}
