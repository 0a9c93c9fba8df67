//! Modification times: seconds and nanoseconds, and their RFC 3339 text in a zTOC.

/// A moment as a file system keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mtime {
    /// Seconds since 1970-01-01T00:00:00Z; negative before.
    pub secs: i64,
    /// Nanoseconds after `secs`, 0 to 999,999,999.
    pub nanos: u32,
}

const DAY: i64 = 86_400;

/// Days from 1970-01-01 to a date of the proleptic Gregorian calendar. Source: Howard Hinnant, "chrono-compatible
/// low-level date algorithms".
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The inverse of [`days_from_civil`]: year, month, day.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

impl Mtime {
    /// 0001-01-01T00:00:00Z: what the reference reads where the text is not a time.
    pub const YEAR_ONE: Self = Self { secs: -62_135_596_800, nanos: 0 };

    /// Returns the RFC 3339 text in UTC, with as many fractional digits as needed.
    ///
    /// The text is empty when the year is outside 0 to 9999, since RFC 3339 cannot say it; the reference writes the same.
    pub fn to_rfc3339(self) -> String {
        let (year, month, day) = civil_from_days(self.secs.div_euclid(DAY));
        if !(0..=9999).contains(&year) {
            return String::new();
        }
        let second = self.secs.rem_euclid(DAY);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
        if self.nanos != 0 {
            text.push_str(format!(".{:09}", self.nanos).trim_end_matches('0'));
        }
        text.push('Z');
        text
    }

    /// What a zTOC says of this time: itself, or [`Mtime::YEAR_ONE`] when its year has no RFC 3339 text.
    pub fn in_ztoc(self) -> Self {
        if self.to_rfc3339().is_empty() { Self::YEAR_ONE } else { self }
    }

    /// Parses RFC 3339 text with any offset and any number of fractional digits (those past nanoseconds are cut off).
    ///
    /// `None` when the text is something else.
    pub fn parse_rfc3339(text: &[u8]) -> Option<Self> {
        let shape = text.get(..19)?;
        if shape[4] != b'-' || shape[7] != b'-' || shape[10] != b'T' || shape[13] != b':' || shape[16] != b':'
        {
            return None;
        }
        let year = number(&shape[..4])?;
        let (month, day) = (number(&shape[5..7])?, number(&shape[8..10])?);
        let (hour, minute, second) =
            (number(&shape[11..13])?, number(&shape[14..16])?, number(&shape[17..19])?);
        if !(1..=12).contains(&month) || day < 1 || day > days_in_month(year, month) {
            return None;
        }
        if hour > 23 || minute > 59 || second > 59 {
            return None;
        }
        let mut rest = &text[19..];
        let mut nanos = 0;
        if let Some(fraction) = rest.strip_prefix(b".") {
            let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
            if digits == 0 {
                return None;
            }
            let mut scale = 100_000_000;
            for byte in &fraction[..digits.min(9)] {
                nanos += u32::from(byte - b'0') * scale;
                scale /= 10;
            }
            rest = &fraction[digits..];
        }
        let ahead = match rest {
            b"Z" => 0,
            [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
                let (hours, minutes) = (number(&[*h1, *h2])?, number(&[*m1, *m2])?);
                if hours > 23 || minutes > 59 {
                    return None;
                }
                let seconds = hours * 3600 + minutes * 60;
                if *sign == b'+' { seconds } else { -seconds }
            }
            _ => return None,
        };
        let secs = days_from_civil(year, month, day) * DAY + hour * 3600 + minute * 60 + second - ahead;
        Some(Self { secs, nanos })
    }
}

/// The value of ASCII digits; `None` if there is anything else.
fn number(digits: &[u8]) -> Option<i64> {
    digits
        .iter()
        .try_fold(0, |value, byte| byte.is_ascii_digit().then(|| value * 10 + i64::from(byte - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times_print_and_parse() {
        let table = [
            (0, 0, "1970-01-01T00:00:00Z"),
            (-1, 0, "1969-12-31T23:59:59Z"),
            (1_700_000_000, 123_456_789, "2023-11-14T22:13:20.123456789Z"),
            (1_700_000_000, 500_000_000, "2023-11-14T22:13:20.5Z"),
            (951_782_400, 0, "2000-02-29T00:00:00Z"),
            (253_402_300_799, 0, "9999-12-31T23:59:59Z"),
            (Mtime::YEAR_ONE.secs, 0, "0001-01-01T00:00:00Z"),
        ];
        for (secs, nanos, text) in table {
            let time = Mtime { secs, nanos };
            assert_eq!(time.to_rfc3339(), text);
            assert_eq!(Mtime::parse_rfc3339(text.as_bytes()), Some(time), "{text}");
        }
    }

    #[test]
    fn offsets_and_long_fractions_are_read() {
        let time = Mtime { secs: 1_700_000_000, nanos: 123_456_789 };
        for text in ["2023-11-15T00:13:20.123456789+02:00", "2023-11-14T16:43:20.1234567899999-05:30"] {
            assert_eq!(Mtime::parse_rfc3339(text.as_bytes()), Some(time), "{text}");
        }
    }

    #[test]
    fn a_year_that_rfc3339_cannot_say_has_no_text() {
        assert_eq!(Mtime { secs: 253_402_300_800, nanos: 0 }.to_rfc3339(), "");
        assert_eq!(Mtime { secs: i64::MAX, nanos: 0 }.to_rfc3339(), "");
        assert_eq!(Mtime { secs: i64::MIN, nanos: 0 }.to_rfc3339(), "");
    }

    #[test]
    fn other_text_is_no_time() {
        for text in [
            "",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14 22:13:20Z",
            "2023-02-29T00:00:00Z",
            "2023-13-01T00:00:00Z",
            "2023-11-14T24:00:00Z",
            "2023-11-14T22:13:60Z",
            "2023-11-14T22:13:20,5Z",
            "2023-11-14T22:13:20.Z",
            "2023-11-14T22:13:20+24:00",
            "2023-11-14T22:13:20Zx",
            "+023-11-14T22:13:20Z",
        ] {
            assert_eq!(Mtime::parse_rfc3339(text.as_bytes()), None, "{text}");
        }
    }
}
