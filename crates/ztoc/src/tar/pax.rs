//! PAX records: how they are written, and what they change in a header.

use super::block::Header;
use super::error::TarFault;
use super::member::PaxRecords;
use crate::mtime::Mtime;

/// Splits the payload of an `x` or `g` header into records. The last of equal keys wins; empty values are kept.
///
/// The records of sparse format 0.0, the only ones that legitimately repeat, are folded into `GNU.sparse.map`.
pub(super) fn parse(mut payload: &[u8]) -> Result<PaxRecords, TarFault> {
    let mut records = PaxRecords::new();
    let mut sparse: Vec<&[u8]> = Vec::new();
    while !payload.is_empty() {
        let (key, value, rest) = record(payload).ok_or(TarFault::Pax)?;
        payload = rest;
        if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
            let expected: &[u8] =
                if sparse.len().is_multiple_of(2) { b"GNU.sparse.offset" } else { b"GNU.sparse.numbytes" };
            if key != expected || value.contains(&b',') {
                return Err(TarFault::Pax);
            }
            sparse.push(value);
        } else {
            records.insert(key.to_vec(), value.to_vec());
        }
    }
    if !sparse.is_empty() {
        records.insert(b"GNU.sparse.map".to_vec(), sparse.join(&b','));
    }
    Ok(records)
}

/// Takes one `"%d %s=%s\n"` off the front: key, value, rest.
fn record(payload: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = payload.iter().position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&payload[..space])?).ok()?;
    // A newline ends the record, and something stands before it.
    if len < 5 || len > payload.len() || len <= space + 1 || payload[len - 1] != b'\n' {
        return None;
    }
    let body = &payload[space + 1..len - 1];
    let equals = body.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    let text = if matches!(key, b"path" | b"linkpath" | b"uname" | b"gname") { value } else { key };
    (!key.is_empty() && !text.contains(&0)).then_some((key, value, &payload[len..]))
}

/// A decimal number as Go's `ParseInt` takes it: an optional sign and digits.
fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with an optional fraction; digits past nanoseconds are cut off. A negative number counts back as a whole.
fn time(text: &[u8]) -> Option<Mtime> {
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &text[text.len()..]),
    };
    let secs = decimal(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = 0;
    let mut scale = 100_000_000;
    for byte in fraction.iter().take(9) {
        nanos += u32::from(byte - b'0') * scale;
        scale /= 10;
    }
    if whole.starts_with(b"-") && nanos != 0 {
        return Some(Mtime { secs: secs.wrapping_sub(1), nanos: 1_000_000_000 - nanos });
    }
    Some(Mtime { secs, nanos })
}

/// Applies the records that override header fields; returns the modification time.
pub(super) fn apply(header: &mut Header, records: &PaxRecords) -> Result<Mtime, TarFault> {
    let mut mtime = Mtime { secs: header.mtime, nanos: 0 };
    for (key, value) in records {
        if value.is_empty() {
            continue;
        }
        let number = || decimal(value).ok_or(TarFault::Pax);
        match key.as_slice() {
            b"path" => header.name.clone_from(value),
            b"linkpath" => header.link.clone_from(value),
            b"uname" => header.uname.clone_from(value),
            b"gname" => header.gname.clone_from(value),
            b"uid" => header.uid = number()?,
            b"gid" => header.gid = number()?,
            b"size" => header.size = number()?,
            b"mtime" => mtime = time(value).ok_or(TarFault::Pax)?,
            b"atime" | b"ctime" => {
                time(value).ok_or(TarFault::Pax)?;
            }
            _ => {}
        }
    }
    Ok(mtime)
}

/// Whether the records make the member a sparse file, by the rules of Go's reader (an unknown version is none).
pub(super) fn is_sparse(records: &PaxRecords) -> bool {
    let value = |key: &str| records.get(key.as_bytes()).map_or(&[][..], Vec::as_slice);
    match (value("GNU.sparse.major"), value("GNU.sparse.minor")) {
        (b"0", b"0" | b"1") | (b"1", b"0") => true,
        (b"", b"") => !value("GNU.sparse.map").is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_equal_keys_wins_and_order_is_by_key() {
        let records = parse(b"8 b=one\n8 a=two\n8 b=thr\n").unwrap();
        let pairs: Vec<_> = records.iter().map(|(key, value)| (key.as_slice(), value.as_slice())).collect();
        assert_eq!(pairs, [(&b"a"[..], &b"two"[..]), (b"b", b"thr")]);
    }

    #[test]
    fn values_may_hold_anything_but_names_no_nul() {
        let records = parse(b"30 SCHILY.xattr.user.a=x\0y\n=\xff\n").unwrap();
        assert_eq!(records[&b"SCHILY.xattr.user.a"[..]], b"x\0y\n=\xff");
        assert_eq!(parse(b"10 path=a\0\n"), Err(TarFault::Pax));
        assert_eq!(parse(b"7 a\0=b\n"), Err(TarFault::Pax));
    }

    #[test]
    fn malformed_records_are_refused() {
        for payload in [
            &b"a"[..],
            b"5 a=b\n",
            b"7 a=b\n",
            b"6 a=bc",
            b"6 =bc\n",
            b"6 abc\n",
            b"-6 a=b\n",
            b"x a=b\n",
            b"5     \n",
        ] {
            assert_eq!(parse(payload), Err(TarFault::Pax), "{payload:?}");
        }
        assert!(parse(b"6 a=b\n").is_ok());
        assert!(parse(b"+7 a=b\n").is_ok(), "Go accepts a sign");
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let table = [
            ("5", Some((5, 0))),
            ("5.", Some((5, 0))),
            ("5.25", Some((5, 250_000_000))),
            ("5.1234567899", Some((5, 123_456_789))),
            ("-1", Some((-1, 0))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-0.5", Some((-1, 500_000_000))),
            ("", None),
            (".5", None),
            ("5.x", None),
            ("5.1-", None),
        ];
        for (text, expected) in table {
            let expected = expected.map(|(secs, nanos)| Mtime { secs, nanos });
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }
}
