//! The 512-byte header block: which dialect it is, and its fields.

use super::error::TarFault;

/// What a header block says, before extension headers are applied.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) flag: u8,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) mtime: i64,
    pub(super) uname: Vec<u8>,
    pub(super) gname: Vec<u8>,
    pub(super) dev_major: i64,
    pub(super) dev_minor: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// Bytes up to the first NUL, or all.
pub(super) fn c_string(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

/// An octal number among spaces and NULs; empty is 0. `None` when it is no number or needs more than 64 bits.
fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let begin = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let end = field.iter().rposition(|byte| !blank(byte)).map_or(begin, |last| last + 1);
    let mut value: u64 = 0;
    for byte in c_string(&field[begin..end]) {
        if !(b'0'..=b'7').contains(byte) || value >> 61 != 0 {
            return None;
        }
        value = value << 3 | u64::from(byte - b'0');
    }
    // The Go reader stores the 64 bits as a signed number.
    Some(value.cast_signed())
}

/// A number field: octal, or base-256 (two's complement, big endian) when its first bit is set.
fn numeric(field: &[u8]) -> Option<i64> {
    let Some((first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) else {
        return octal(field);
    };
    let negative = first & 0x40 != 0;
    let invert = if negative { 0xff } else { 0 };
    let mut value = u64::from((first ^ invert) & 0x7f);
    for byte in rest {
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte ^ invert);
    }
    let value = i64::try_from(value).ok()?;
    Some(if negative { !value } else { value })
}

fn dialect(block: &[u8; 512]) -> Result<Dialect, TarFault> {
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for byte in block[..148].iter().chain(&block[156..]) {
        unsigned += i64::from(*byte);
        signed += i64::from(byte.cast_signed());
    }
    // The checksum field itself counts as eight spaces. Sun's tar summed signed bytes.
    let blanks = 8 * i64::from(b' ');
    let stored = octal(&block[148..156]).ok_or(TarFault::Checksum)?;
    if stored != unsigned + blanks && stored != signed + blanks {
        return Err(TarFault::Checksum);
    }
    Ok(match (&block[257..263], &block[263..265], &block[508..512]) {
        (b"ustar\0", _, b"tar\0") => Dialect::Star,
        (b"ustar\0", ..) => Dialect::Ustar,
        (b"ustar ", b" \0", _) => Dialect::Gnu,
        _ => Dialect::V7,
    })
}

impl Header {
    pub(super) fn parse(block: &[u8; 512]) -> Result<Self, TarFault> {
        let dialect = dialect(block)?;
        let number =
            |range: std::ops::Range<usize>, field| numeric(&block[range]).ok_or(TarFault::Number(field));
        let mut header = Self {
            flag: block[156],
            name: c_string(&block[..100]).to_vec(),
            link: c_string(&block[157..257]).to_vec(),
            size: number(124..136, "size")?,
            mode: number(100..108, "mode")?,
            uid: number(108..116, "uid")?,
            gid: number(116..124, "gid")?,
            mtime: number(136..148, "mtime")?,
            ..Self::default()
        };
        if dialect == Dialect::V7 {
            return Ok(header);
        }
        header.uname = c_string(&block[265..297]).to_vec();
        header.gname = c_string(&block[297..329]).to_vec();
        header.dev_major = number(329..337, "major device")?;
        header.dev_minor = number(337..345, "minor device")?;
        let prefix = match dialect {
            Dialect::V7 => &[],
            Dialect::Ustar => c_string(&block[345..500]),
            Dialect::Star => {
                number(476..488, "atime")?;
                number(488..500, "ctime")?;
                c_string(&block[345..476])
            }
            Dialect::Gnu => gnu_prefix(block),
        };
        if !prefix.is_empty() {
            header.name = [prefix, b"/", &header.name].concat();
        }
        Ok(header)
    }
}

/// GNU headers have access and change time where ustar has the prefix. Go before 1.8 wrote a prefix nevertheless, and its
/// reader still takes one for it when the times do not parse and the field is ASCII; so do we.
fn gnu_prefix(block: &[u8; 512]) -> &[u8] {
    let is_time = |field: &[u8]| field[0] == 0 || numeric(field).is_some();
    if is_time(&block[345..357]) && is_time(&block[357..369]) {
        return &[];
    }
    let prefix = c_string(&block[345..500]);
    if prefix.is_ascii() { prefix } else { &[] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_may_be_padded_with_blanks() {
        let table: [(&[u8], Option<i64>); 8] = [
            (b"0000644\0", Some(0o644)),
            (b" 644 \0\0", Some(0o644)),
            (b"\0\0\0", Some(0)),
            (b"   ", Some(0)),
            (b"12\0junk", Some(0o12)),
            (b"8", None),
            (b"-1", None),
            (b"1777777777777777777777", Some(-1)),
        ];
        for (field, value) in table {
            assert_eq!(octal(field), value, "{field:?}");
        }
        assert_eq!(octal(b"2000000000000000000000"), None);
    }

    #[test]
    fn base256_fields_are_signed_and_bounded() {
        assert_eq!(numeric(&[0x80, 0, 0, 0, 0, 0, 0, 5]), Some(5));
        assert_eq!(numeric(&[0xff; 8]), Some(-1));
        assert_eq!(numeric(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), Some(i64::MAX));
        assert_eq!(numeric(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(numeric(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(numeric(&[0xff, 0xff, 0xff, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0]), Some(i64::MIN));
    }
}
