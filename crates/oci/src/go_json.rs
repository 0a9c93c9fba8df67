//! JSON exactly as Go's `encoding/json` writes it.
//!
//! The Go snapshotter decodes a SOCI index, encodes it again and stores the result under the original digest. So an
//! index it shall accept must be written as its encoder would: compact, fields in declaration order, map keys sorted,
//! and `<`, `>`, `&`, U+2028 and U+2029 escaped. Source: `docs/ztoc-format.md`, "JSON".

use std::io;

use serde::Serialize;

/// Encodes `value` compactly with Go's escapes, without a trailing newline.
///
/// # Errors
/// When `value` cannot be a JSON document (a map with keys that are not strings).
pub fn to_vec<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = Vec::with_capacity(1024);
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, GoEscapes))?;
    Ok(bytes)
}

struct GoEscapes;

impl serde_json::ser::Formatter for GoEscapes {
    fn write_string_fragment<W: io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            writer.write_all(&rest.as_bytes()[..at])?;
            let character = rest[at..].chars().next().unwrap_or_default();
            write!(writer, "\\u{:04x}", u32::from(character))?;
            rest = &rest[at + character.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        escape: serde_json::ser::CharEscape,
    ) -> io::Result<()> {
        use serde_json::ser::CharEscape;
        match escape {
            CharEscape::Quote => writer.write_all(b"\\\""),
            CharEscape::ReverseSolidus => writer.write_all(b"\\\\"),
            CharEscape::Solidus => writer.write_all(b"/"),
            CharEscape::Backspace => writer.write_all(b"\\b"),
            CharEscape::FormFeed => writer.write_all(b"\\f"),
            CharEscape::LineFeed => writer.write_all(b"\\n"),
            CharEscape::CarriageReturn => writer.write_all(b"\\r"),
            CharEscape::Tab => writer.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(writer, "\\u{byte:04x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn html_characters_and_line_separators_are_escaped() {
        let bytes = super::to_vec("a<b>&\u{2028}é\"\\\n\u{1}").unwrap();
        assert_eq!(bytes, "\"a\\u003cb\\u003e\\u0026\\u2028é\\\"\\\\\\n\\u0001\"".as_bytes());
    }
}
