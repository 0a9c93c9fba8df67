//! The storage behind a registry: locations carry a signature that expires; a credential beside it is an error.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Shared, blobs};
use crate::faults::{Listener, RequestInfo};
use crate::http::Answer;

/// Returns a location of a blob that is good for `ttl`.
pub(crate) fn sign(shared: &Arc<Shared>, digest: &str, ttl: Duration) -> String {
    let mut signatures = shared.signatures.lock();
    let signature = format!("s{}", signatures.len());
    signatures.push((signature.clone(), Instant::now() + ttl));
    let made = now();
    format!(
        "{}/storage/{digest}?X-Amz-Date={made}&X-Amz-Expires={}&X-Amz-Signature={signature}",
        shared.url(Listener::Storage),
        ttl.as_secs(),
    )
}

/// Returns the present time as `YYYYMMDDTHHMMSSZ`.
fn now() -> String {
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from a day count (proleptic Gregorian), eras of 400 years starting in March.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

pub(crate) fn answer(shared: &Arc<Shared>, info: &RequestInfo) -> Answer {
    if info.headers.contains_key("authorization") {
        return xml(400, "InvalidArgument", "Only one auth mechanism allowed");
    }
    let Some(digest) = info.path.strip_prefix("/storage/") else {
        return xml(404, "NoSuchKey", "no such key");
    };
    let signature = info.query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-Signature="));
    let after = shared.behaviour.lock().signed_after;
    let good = shared.signatures.lock().iter().any(|(known, until)| {
        let ttl_left = *until > Instant::now();
        // `signed_after` cuts off whatever was signed before it: entries are appended in order of time.
        Some(known.as_str()) == signature && ttl_left
    });
    let cut = after.is_some_and(|after| !signed_later(shared, signature, after));
    if !good || cut {
        return xml(403, "AccessDenied", "Request has expired");
    }
    match shared.store.content(digest) {
        Some(content) => blobs::ranged(info, content),
        None => xml(404, "NoSuchKey", "no such key"),
    }
}

fn signed_later(shared: &Arc<Shared>, signature: Option<&str>, after: Instant) -> bool {
    let ttl = shared.behaviour.lock().storage.unwrap_or_default();
    let signatures = shared.signatures.lock();
    signatures.iter().any(|(known, until)| {
        Some(known.as_str()) == signature && until.checked_sub(ttl).is_some_and(|signed| signed >= after)
    })
}

fn xml(status: u16, code: &str, message: &str) -> Answer {
    let body =
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>");
    Answer::new(status).bytes("application/xml; charset=utf-8", body)
}
