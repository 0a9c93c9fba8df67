//! Answers that mean "not authorised" in the words of one registry or store.

use http::{HeaderMap, StatusCode};

/// What a refusal is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Meaning {
    /// 401: authenticate, or authenticate anew.
    Unauthorized,
    /// 403: what was presented does not suffice.
    Forbidden,
    /// What was presented is too old, however the answer says so.
    Expired,
    /// Something else; a credential does not help. 429 is here: a registry that wants a pause refuses nobody.
    Other,
}

/// Returns what an answer of a *registry* is about; `body` is its start.
pub fn meaning(status: StatusCode, _headers: &HeaderMap, body: &[u8]) -> Meaning {
    match status {
        StatusCode::UNAUTHORIZED => Meaning::Unauthorized,
        StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST if has_expired(body) => Meaning::Expired,
        StatusCode::FORBIDDEN => Meaning::Forbidden,
        _ => Meaning::Other,
    }
}

/// Whether an answer of a *redirect target* asks for a fresh location: any refusal does, since the location carries its
/// own credential, and stores word its expiry in many ways.
pub fn is_stale_location(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 410)
}

/// ECR answers an expired password with 403 `DENIED` "Your authorization token has expired. Reauthenticate and try
/// again."; S3 an expired session with 400 `ExpiredToken`. The words are looked for without their sentence.
fn has_expired(body: &[u8]) -> bool {
    const LOOKED_AT: usize = 4096;
    let text = String::from_utf8_lossy(&body[..body.len().min(LOOKED_AT)]).to_ascii_lowercase();
    text.contains("token has expired") || text.contains("<code>expiredtoken</code>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t109_the_words_of_ecr_mean_expired() {
        let ecr = br#"{"errors":[{"code":"DENIED","message":"Your Authorization Token has expired. Reauthenticate and try again."}]}"#;
        let headers = HeaderMap::new();
        let s3 = b"<Error><Code>ExpiredToken</Code></Error>".as_slice();
        for (status, body, expected) in [
            (403, ecr.as_slice(), Meaning::Expired),
            (403, b"no", Meaning::Forbidden),
            (400, ecr, Meaning::Expired),
            (400, s3, Meaning::Expired),
            (400, b"bad digest", Meaning::Other),
            (401, b"", Meaning::Unauthorized),
            (429, ecr, Meaning::Other),
            (404, ecr, Meaning::Other),
            (500, b"", Meaning::Other),
        ] {
            assert_eq!(meaning(StatusCode::from_u16(status).unwrap(), &headers, body), expected, "{status}");
        }
    }

    #[test]
    fn t111_any_refusal_of_a_location_asks_for_a_fresh_one() {
        for (status, stale) in
            [(400, true), (401, true), (403, true), (410, true), (404, false), (416, false), (503, false)]
        {
            assert_eq!(is_stale_location(StatusCode::from_u16(status).unwrap()), stale, "{status}");
        }
    }
}
