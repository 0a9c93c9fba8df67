//! Takes secrets out of text that is about to be shown: userinfo and query values of URLs.

use url::Url;

/// Returns `url` without userinfo and fragment, and with stars for the values of its query.
pub fn url(url: &Url) -> String {
    let mut shown = url.clone();
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_fragment(None);
    let names: Vec<String> = url.query_pairs().map(|(name, _)| name.into_owned()).collect();
    shown.set_query(None);
    let mut text = shown.to_string();
    for (at, name) in names.iter().enumerate() {
        text.push(if at == 0 { '?' } else { '&' });
        text.extend(url::form_urlencoded::byte_serialize(name.as_bytes()));
        text.push_str("=***");
    }
    text
}

/// Returns `text` with every URL in it shown as by [`url`](self::url), whether it parses or not.
///
/// For messages of libraries that quote the URL they failed on.
pub fn text(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let scheme = rest[..at]
            .rfind(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c))
            .map_or(0, |before| before + rest[before..].chars().next().map_or(1, char::len_utf8));
        let ends = |c: char| c.is_whitespace() || c.is_control() || "\"'<>()`".contains(c);
        let end = rest[at + 3..].find(ends).map_or(rest.len(), |end| at + 3 + end);
        shown.push_str(&rest[..scheme]);
        match Url::parse(&rest[scheme..end]) {
            Ok(parsed) => shown.push_str(&url(&parsed)),
            Err(_) => shown.push_str("(address withheld)"),
        }
        rest = &rest[end..];
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t123_userinfo_and_query_values_go() {
        let signed = "https://user:hunter2@s3.example/b/o?X-Amz-Signature=hunter2&a=hunter2#hunter2";
        assert_eq!(url(&signed.parse().unwrap()), "https://s3.example/b/o?X-Amz-Signature=***&a=***");
        let message =
            format!("error for url ({signed}): connect, then {signed}. \"http://[bad?hunter2\" end");
        let shown = text(&message);
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("(https://s3.example/b/o?X-Amz-Signature=***&a=***): connect"), "{shown}");
        assert!(shown.ends_with("\" end"), "{shown}");
        assert_eq!(text("no address: //x"), "no address: //x");
    }
}
