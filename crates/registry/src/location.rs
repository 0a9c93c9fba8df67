//! Where a registry redirected a blob to, and how long that is good for.
//!
//! Times in an address are hints, never proof: an address is used until shortly before the time it names, and a refusal
//! at any time makes the registry be asked again.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::HeaderValue;
use soci_auth::{Origin, Scheme};
use url::Url;

use crate::hosts::Host;

/// An address is given up this long before its time.
const MARGIN: Duration = Duration::from_secs(10);
/// An address is not kept longer than this, whatever it says.
const LONGEST: Duration = Duration::from_secs(6 * 3600);

/// A place that served a blob, to be asked directly.
#[derive(Debug)]
pub(crate) struct Location {
    pub(crate) url: Url,
    pub(crate) origin: Origin,
    /// The host that redirected there: its trust applies.
    pub(crate) host: Arc<Host>,
    /// The registry's address of the blob, where some CDNs want it.
    pub(crate) referer: Option<HeaderValue>,
    until: Instant,
}

impl Location {
    /// Returns the location `url` that `asked` redirected to; nothing when it is no http address.
    pub(crate) fn new(url: Url, asked: &Url, host: Arc<Host>) -> Option<Self> {
        let origin = Origin::of_url(&url)?;
        let referer = referer(asked, origin.scheme());
        let left = lifetime(&url, SystemTime::now()).unwrap_or(LONGEST).min(LONGEST);
        let until = Instant::now() + left.saturating_sub(MARGIN.min(left / 4));
        Some(Self { url, origin, host, referer, until })
    }

    /// Whether it may still be used, as far as can be told.
    pub(crate) fn is_fresh(&self) -> bool {
        Instant::now() < self.until
    }
}

/// Returns the registry's address without user and query, unless that would leave https for http.
fn referer(asked: &Url, target: Scheme) -> Option<HeaderValue> {
    if asked.scheme() == "https" && target == Scheme::Http {
        return None;
    }
    let mut shown = asked.clone();
    shown.set_query(None);
    shown.set_fragment(None);
    shown.set_username("").ok()?;
    shown.set_password(None).ok()?;
    HeaderValue::from_str(shown.as_str()).ok()
}

/// Returns how long an address that was just received is good for, when the clock shows `now`; nothing when it does not say.
///
/// Nobody hands out an address that has ended. Where it has by this clock, the clock is wrong, and what the address says of
/// itself counts: else a node whose clock is ahead would ask the registry again for each range.
fn lifetime(url: &Url, now: SystemTime) -> Option<Duration> {
    let mut signed = None;
    let mut expires = None;
    let mut ends = None;
    for (key, value) in url.query_pairs() {
        if key.eq_ignore_ascii_case("X-Amz-Date") || key.eq_ignore_ascii_case("X-Goog-Date") {
            signed = compact(&value);
        } else if key.eq_ignore_ascii_case("X-Amz-Expires") || key.eq_ignore_ascii_case("X-Goog-Expires") {
            expires = value.parse::<u64>().ok().map(Duration::from_secs);
        } else if key == "Expires" {
            ends = value.parse::<u64>().ok().and_then(epoch);
        } else if key == "se" {
            ends = extended(&value);
        }
    }
    let left = |end: SystemTime| end.duration_since(now).ok().filter(|left| !left.is_zero());
    match (signed, expires) {
        (Some(signed), Some(expires)) => {
            let left = left(signed.checked_add(expires)?);
            Some(left.map_or(expires, |left| left.min(expires)))
        }
        // Without the time of signing, what is left is at most all of it.
        (None, Some(expires)) => Some(expires),
        _ => left(ends?),
    }
}

fn epoch(seconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Parses `20260102T030405Z`.
fn compact(text: &str) -> Option<SystemTime> {
    let digits = text.strip_suffix('Z')?;
    let (date, time) = digits.split_once('T')?;
    if date.len() != 8 || time.len() != 6 || !digits.is_ascii() {
        return None;
    }
    moment([date.get(..4)?, date.get(4..6)?, date.get(6..)?, time.get(..2)?, time.get(2..4)?, time.get(4..)?])
}

/// Parses `2026-01-02T03:04:05Z`, seconds optional, a fraction ignored.
fn extended(text: &str) -> Option<SystemTime> {
    let (date, time) = text.strip_suffix('Z').unwrap_or(text).split_once('T').unwrap_or((text, "00:00:00"));
    let mut date = date.split('-');
    let mut time = time.split(':');
    let parts = [
        date.next()?,
        date.next()?,
        date.next()?,
        time.next()?,
        time.next()?,
        time.next().map_or("0", |seconds| seconds.split('.').next().unwrap_or("0")),
    ];
    moment(parts)
}

/// Returns the moment of year, month, day, hour, minute and second in UTC.
fn moment(parts: [&str; 6]) -> Option<SystemTime> {
    let mut numbers = [0u64; 6];
    for (number, part) in numbers.iter_mut().zip(parts) {
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    let [year, month, day, hour, minute, second] = numbers;
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days from civil (proleptic Gregorian), years starting in March.
    let year_from_march = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year_from_march / 400, year_from_march % 400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (era * 146_097 + day_of_era).checked_sub(719_468)?;
    epoch(days * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Body of the fuzz target `presigned`: an address that is not for ever is good for no longer than it says.
#[doc(hidden)]
pub fn fuzz_presigned(bytes: &[u8]) {
    let Some(url) = std::str::from_utf8(bytes).ok().and_then(|text| text.parse::<Url>().ok()) else { return };
    let at = |seconds| epoch(seconds).expect("a time of this century");
    // 2026, and a second later.
    let second = Duration::from_secs(1);
    let (now, later) = (at(1_767_322_800), at(1_767_322_801));
    match (lifetime(&url, now), lifetime(&url, later)) {
        // A second later it is good for a second less, or for as long where this clock is of no help.
        (Some(left), Some(then)) => {
            assert!(left <= second || then <= left && left <= then.saturating_add(second))
        }
        (Some(left), None) => assert!(left <= second),
        (None, then) => assert_eq!(then, None),
    }
    if let Some(referer) = referer(&url, Scheme::Http) {
        assert!(!referer.as_bytes().contains(&b'?') && !referer.as_bytes().contains(&b'#'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails unless each address is good for so many seconds at 2026-01-02T03:00:00Z.
    fn have_lifetimes(table: &[(&str, Option<u64>)]) {
        let now = epoch(1_767_322_800).unwrap();
        for (url, expected) in table {
            let found = lifetime(&url.parse().unwrap(), now);
            assert_eq!(found, expected.map(Duration::from_secs), "{url}");
        }
    }

    #[test]
    fn lifetimes_are_read_from_all_known_forms() {
        have_lifetimes(&[
            ("https://s/x?X-Amz-Date=20260102T025500Z&X-Amz-Expires=600", Some(300)),
            ("https://s/x?X-Amz-Expires=600", Some(600)),
            ("https://s/x?Expires=1767322860", Some(60)),
            ("https://s/x?se=2026-01-02T03%3A01%3A00Z&sig=x", Some(60)),
            ("https://s/x?X-Goog-Date=20260102T030000Z&X-Goog-Expires=60", Some(60)),
            ("https://s/x?Expires=soon", None),
            ("https://s/x?X-Amz-Date=2026&X-Amz-Expires=18446744073709551615", Some(u64::MAX)),
            ("https://s/x", None),
        ]);
    }

    #[test]
    fn a_clock_that_is_wrong_makes_no_address_older_or_younger_than_it_is() {
        have_lifetimes(&[
            // Ahead: all of these have ended.
            ("https://s/x?X-Amz-Date=20260102T010000Z&X-Amz-Expires=600", Some(600)),
            ("https://s/x?X-Amz-Date=20260102T025000Z&X-Amz-Expires=600", Some(600)),
            ("https://s/x?Expires=1767322800", None),
            ("https://s/x?se=2026-01-02", None),
            // Behind: this is yet to be signed.
            ("https://s/x?X-Goog-Date=20260102T050000Z&X-Goog-Expires=600", Some(600)),
        ]);
    }

    #[test]
    fn dates_are_checked() {
        for text in [
            "20261301T000000Z",
            "20260100T000000Z",
            "2026010T2000000Z",
            "x",
            "20260102T240000Z",
            "99999999T000000Z",
        ] {
            assert_eq!(compact(text), None, "{text}");
        }
        assert_eq!(compact("19700101T000000Z"), Some(SystemTime::UNIX_EPOCH));
        assert_eq!(compact("20240229T000000Z"), epoch(1_709_164_800));
    }

    #[test]
    fn the_referer_has_no_query_and_never_goes_down_to_http() {
        let asked: Url = "https://u:p@r.example/v2/a/blobs/x?ns=b#c".parse().unwrap();
        assert_eq!(referer(&asked, Scheme::Https).unwrap(), "https://r.example/v2/a/blobs/x");
        assert_eq!(referer(&asked, Scheme::Http), None);
    }
}
