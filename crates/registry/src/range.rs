//! Byte ranges of requests and answers.
//!
//! What is asked for is half open; what HTTP writes is closed. An answer is believed only when it says exactly what was
//! asked for: a server that sends another range, another length or an encoding would shift every byte after it.

use std::ops::Range;

use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};

/// Why an answer does not carry the range that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RangeFault {
    #[error(
        "answered 200 with the whole blob to a request for a part of it: ranged requests are not supported there"
    )]
    Whole,
    #[error("answered 206 without a Content-Range that can be read")]
    NoContentRange,
    #[error("answered bytes {got:?} of {total:?} instead of bytes {wanted:?} of {size}")]
    Other { wanted: Range<u64>, size: u64, got: Range<u64>, total: Option<u64> },
    #[error("announced a body of {got} bytes instead of {wanted}")]
    Length { wanted: u64, got: u64 },
    #[error("encoded the blob as {0:?} though that was declined")]
    Encoding(String),
    #[error("answered status {0} instead of 206")]
    Status(u16),
}

/// What a `Content-Range` header says: the half-open range and the whole length where known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContentRange {
    pub(crate) range: Range<u64>,
    pub(crate) total: Option<u64>,
}

impl ContentRange {
    /// Parses `bytes a-b/total` or `bytes a-b/*`; nothing for anything else, unsatisfied ranges included.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let (unit, rest) = value.trim().split_once(' ')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (range, total) = rest.trim().split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let first = number(first)?;
        let last = number(last)?;
        let total = match total {
            "*" => None,
            text => Some(number(text)?),
        };
        let end = last.checked_add(1)?;
        if first > last || total.is_some_and(|total| end > total) {
            return None;
        }
        Some(Self { range: first..end, total })
    }
}

/// Digits only: `u64::from_str` would take a plus sign.
fn number(text: &str) -> Option<u64> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Returns the `Range` header that asks for `range`, which must not be empty.
pub(crate) fn header(range: &Range<u64>) -> HeaderValue {
    let last = range.end.saturating_sub(1);
    HeaderValue::from_str(&format!("bytes={}-{last}", range.start))
        .unwrap_or(HeaderValue::from_static("bytes=0-"))
}

/// Checks that an answer carries exactly `wanted` of a blob of `size` bytes.
pub(crate) fn check(
    status: StatusCode,
    headers: &HeaderMap,
    wanted: &Range<u64>,
    size: u64,
) -> Result<(), RangeFault> {
    if let Some(encoding) = headers.get(CONTENT_ENCODING)
        && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return Err(RangeFault::Encoding(
            String::from_utf8_lossy(encoding.as_bytes()).chars().take(40).collect(),
        ));
    }
    let len = wanted.end.saturating_sub(wanted.start);
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| number(value.to_str().ok()?));
    match status {
        StatusCode::OK => {
            if *wanted != (0..size) {
                return Err(RangeFault::Whole);
            }
        }
        StatusCode::PARTIAL_CONTENT => {
            let said = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
            let said = said.and_then(ContentRange::parse).ok_or(RangeFault::NoContentRange)?;
            if said.range != *wanted || said.total.is_some_and(|total| total != size) {
                let (got, total) = (said.range, said.total);
                return Err(RangeFault::Other { wanted: wanted.clone(), size, got, total });
            }
        }
        other => return Err(RangeFault::Status(other.as_u16())),
    }
    match announced {
        Some(got) if got != len => Err(RangeFault::Length { wanted: len, got }),
        _ => Ok(()),
    }
}

/// Body of the fuzz target `content_range`: whatever parses is a sane range.
#[doc(hidden)]
pub fn fuzz_content_range(bytes: &[u8]) {
    if let Some(parsed) = std::str::from_utf8(bytes).ok().and_then(ContentRange::parse) {
        assert!(parsed.range.start < parsed.range.end);
        assert!(parsed.total.is_none_or(|total| parsed.range.end <= total));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_range_is_digits_in_order() {
        let good = |range: Range<u64>, total| Some(ContentRange { range, total });
        let table = [
            ("bytes 0-0/1", good(0..1, Some(1))),
            ("bytes 5-9/10", good(5..10, Some(10))),
            ("Bytes 5-9/*", good(5..10, None)),
            ("bytes 9-5/10", None),
            ("bytes 5-10/10", None),
            ("bytes */10", None),
            ("bytes +5-9/10", None),
            ("bytes 0-18446744073709551615/*", None),
            ("bytes=0-1/2", None),
            ("items 0-1/2", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(ContentRange::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn only_the_exact_range_is_accepted() {
        let headers = |pairs: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, HeaderValue::from_str(value).unwrap());
            }
            headers
        };
        let partial = |pairs| check(StatusCode::PARTIAL_CONTENT, &headers(pairs), &(5..10), 20);
        assert_eq!(partial(&[("content-range", "bytes 5-9/20"), ("content-length", "5")]), Ok(()));
        assert_eq!(partial(&[("content-range", "bytes 5-9/*")]), Ok(()));
        assert_eq!(partial(&[]), Err(RangeFault::NoContentRange));
        assert!(matches!(partial(&[("content-range", "bytes 6-10/20")]), Err(RangeFault::Other { .. })));
        assert!(matches!(partial(&[("content-range", "bytes 5-8/20")]), Err(RangeFault::Other { .. })));
        assert!(matches!(partial(&[("content-range", "bytes 5-9/21")]), Err(RangeFault::Other { .. })));
        assert_eq!(
            partial(&[("content-range", "bytes 5-9/20"), ("content-length", "4")]),
            Err(RangeFault::Length { wanted: 5, got: 4 })
        );
        assert!(matches!(
            partial(&[("content-range", "bytes 5-9/20"), ("content-encoding", "gzip")]),
            Err(RangeFault::Encoding(_))
        ));
        let none = headers(&[]);
        assert_eq!(check(StatusCode::OK, &none, &(5..10), 20), Err(RangeFault::Whole));
        assert_eq!(check(StatusCode::OK, &none, &(0..20), 20), Ok(()));
        assert_eq!(check(StatusCode::NO_CONTENT, &none, &(0..20), 20), Err(RangeFault::Status(204)));
    }

    #[test]
    fn ranges_are_written_closed() {
        assert_eq!(header(&(5..10)), "bytes=5-9");
    }
}
