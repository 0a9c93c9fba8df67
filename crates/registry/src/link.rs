//! The `Link` header of paged answers.

use http::HeaderMap;
use http::header::LINK;

/// Nothing longer than this is looked at.
const MAX_LEN: usize = 8 << 10;

/// Returns the target of `rel="next"`, as written: relative or absolute.
pub(crate) fn next(headers: &HeaderMap) -> Option<String> {
    headers.get_all(LINK).iter().find_map(|value| parse_next(value.to_str().ok()?))
}

/// Finds `<target>; rel="next"` among the links of one header value.
fn parse_next(value: &str) -> Option<String> {
    if value.len() > MAX_LEN {
        return None;
    }
    let mut rest = value;
    loop {
        let (target, after) = rest.trim_start_matches([' ', '\t', ',']).strip_prefix('<')?.split_once('>')?;
        let end = end_of_parameters(after);
        let parameters = after.get(..end)?;
        if is_next(parameters) && !target.is_empty() {
            return Some(target.to_owned());
        }
        rest = after.get(end..)?;
        if rest.is_empty() {
            return None;
        }
    }
}

/// Returns where the parameters end: at a comma outside of quotes.
fn end_of_parameters(text: &str) -> usize {
    find_unquoted(text, b',').unwrap_or(text.len())
}

/// Returns where `wanted` stands first outside of quotes.
fn find_unquoted(text: &str, wanted: u8) -> Option<usize> {
    let mut quoted = false;
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if byte == wanted && !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

fn is_next(parameters: &str) -> bool {
    let mut rest = parameters;
    loop {
        let (parameter, after) = match find_unquoted(rest, b';') {
            Some(at) => (rest.get(..at).unwrap_or(""), rest.get(at + 1..)),
            None => (rest, None),
        };
        let next = parameter.split_once('=').is_some_and(|(name, value)| {
            let mut relations = value.trim().trim_matches('"').split_ascii_whitespace();
            name.trim().eq_ignore_ascii_case("rel") && relations.any(|rel| rel.eq_ignore_ascii_case("next"))
        });
        match after {
            _ if next => return true,
            Some(after) => rest = after,
            None => return false,
        }
    }
}

/// Body of the fuzz target `link`: it ends, and a target has no closing bracket.
#[doc(hidden)]
pub fn fuzz_link(bytes: &[u8]) {
    if let Some(target) = std::str::from_utf8(bytes).ok().and_then(parse_next) {
        assert!(!target.is_empty() && !target.contains('>'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found() {
        let table = [
            ("</v2/a/referrers/x?next=2>; rel=\"next\"", Some("/v2/a/referrers/x?next=2")),
            ("<https://h/p>; rel=next", Some("https://h/p")),
            ("<a>; rel=\"prev\", <b>; rel=\"next\"", Some("b")),
            ("<a>; title=\"x, <c>; rel=next\"; rel=prev, <b>; REL=\"last NEXT\"", Some("b")),
            ("<a>; rel=\"prev\"", None),
            ("<a", None),
            ("a; rel=next", None),
            ("<>; rel=next", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_next(text).as_deref(), expected, "{text}");
        }
        assert_eq!(parse_next(&"<a>;".repeat(10_000)), None);
    }
}
