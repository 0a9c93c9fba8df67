//! Trying again: what may pass, after a pause that doubles, as often as the settings and the deadline allow.
//!
//! A host's `Retry-After` is honoured between the shortest and the longest wait of the settings: 0, a date in the past
//! and a year are all values a registry may send. Over all requests for one registry's images retries are paced, so that
//! thousands of page faults do not hammer a registry that is down; nobody is refused a retry for that, it only comes later.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use soci_oci::{FetchContext, FetchError, RegistryName};

use super::hosts::{self, Round};
use super::{Call, Journey, Reply, Session};
use crate::error::CallError;
use crate::settings::Retries;
use crate::status::Operation;

/// Time between retries of one registry's requests, once the burst is used up.
const PACE: Duration = Duration::from_millis(20);
/// How far ahead of the pace retries may run.
const BURST: Duration = Duration::from_secs(2);

/// Sends `call` until a round over the hosts succeeds or there is no point in another.
pub(crate) async fn call(
    session: &Session,
    call: &Call,
    journey: &mut Journey,
    context: &FetchContext,
) -> Result<Reply, CallError> {
    let settings = &session.inner.settings;
    let retries = match call.operation {
        Operation::Blob => &settings.blob.retries,
        _ => &settings.http.retries,
    };
    let mut backoff = Backoff::new(retries);
    loop {
        let Round { error, again } = match hosts::walk(session, call, journey, context).await {
            Ok(reply) => return Ok(reply),
            Err(round) => round,
        };
        let Some(after) = again else { return Err(error) };
        let Some(wait) = backoff.next(after) else { return Err(gave_up(error, &backoff, "")) };
        let wait = wait.max(session.inner.pace.take(session.image.registry()));
        if wait >= context.remaining() {
            return Err(gave_up(error, &backoff, ", no time is left for another"));
        }
        session.inner.meters.retried(call.operation);
        tracing::debug!(
            repository = session.image.repository(),
            operation = call.operation.doing(),
            attempt = backoff.attempts(),
            wait_ms = wait.as_millis(),
            error = %error.error,
            "trying again"
        );
        tokio::time::sleep(wait).await;
    }
}

fn gave_up(error: CallError, backoff: &Backoff, why: &str) -> CallError {
    let attempts = backoff.attempts();
    if attempts <= 1 && why.is_empty() {
        return error;
    }
    let message = format!("{} (gave up after {attempts} attempts{why})", error.error);
    CallError { error: FetchError::new(error.error.kind(), message), ..error }
}

/// The pauses of one request.
#[derive(Debug)]
pub(crate) struct Backoff {
    retries: Retries,
    done: u32,
}

impl Backoff {
    pub(crate) fn new(retries: &Retries) -> Self {
        Self { retries: retries.clone(), done: 0 }
    }

    /// Returns how long to wait before the next attempt, nothing when there shall be none. `after` is what the host asked
    /// for.
    pub(crate) fn next(&mut self, after: Option<Duration>) -> Option<Duration> {
        if self.done >= self.retries.max {
            return None;
        }
        let factor = 1u32.checked_shl(self.done).unwrap_or(u32::MAX);
        let doubled = self.retries.min_wait.saturating_mul(factor);
        self.done += 1;
        let base = after.unwrap_or(doubled).clamp(self.retries.min_wait, self.retries.max_wait);
        Some(base + base.mul_f64(rand::random::<f64>() * 0.125))
    }

    /// Returns the attempts made so far, the first one included.
    pub(crate) fn attempts(&self) -> u32 {
        self.done.saturating_add(1)
    }

    /// Starts over: there was progress.
    pub(crate) fn reset(&mut self) {
        self.done = 0;
    }
}

/// Parses `Retry-After`: seconds, or a date; a date in the past is no wait.
pub(crate) fn retry_after(value: &str) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are still "long".
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::from(u32::MAX))));
    }
    let at = httpdate::parse_http_date(value).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// Spreads the retries of each registry's requests: when its next one is due. One that is down delays no other.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<HashMap<String, Instant>>);

impl Pace {
    /// Takes the next place; returns how long until it is due.
    pub(crate) fn take(&self, registry: &RegistryName) -> Duration {
        let now = Instant::now();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let mut next = self.0.lock();
        // Those who rested for so long begin anew, so this is bounded by what can be retried meanwhile.
        next.retain(|_, due| *due > earliest);
        let due = next.get(registry.identity()).copied().unwrap_or(earliest);
        next.insert(registry.identity().to_owned(), due + PACE);
        due.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retries(max: u32) -> Retries {
        Retries { max, min_wait: Duration::from_millis(30), max_wait: Duration::from_secs(2) }
    }

    #[test]
    fn pauses_double_up_to_the_longest_with_an_eighth_of_jitter() {
        let retries = retries(40);
        let mut backoff = Backoff::new(&retries);
        let mut expected = Duration::from_millis(30);
        for _ in 0..40 {
            let wait = backoff.next(None).unwrap();
            assert!(wait >= expected && wait <= expected.mul_f64(1.1251), "{wait:?} for {expected:?}");
            expected = (expected * 2).min(Duration::from_secs(2));
        }
        assert_eq!(backoff.next(None), None);
        assert_eq!(backoff.attempts(), 41);
    }

    #[test]
    fn what_the_host_asks_for_is_clamped() {
        let retries = retries(3);
        for (value, low, high) in [("0", 30, 34), ("1", 1000, 1125), ("99999999999999999999", 2000, 2250)] {
            let wait = Backoff::new(&retries).next(retry_after(value)).unwrap();
            let range = Duration::from_millis(low)..=Duration::from_millis(high);
            assert!(range.contains(&wait), "{value}: {wait:?}");
        }
        assert_eq!(retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("soon"), None);
        assert_eq!(retry_after(""), None);
    }

    #[test]
    fn many_retries_of_one_registry_are_spread_and_delay_no_other() {
        let registry = |name: &str| name.parse::<soci_oci::ImageRef>().unwrap().registry().clone();
        let (down, sound) = (registry("down.example/a"), registry("sound.example/a"));
        let pace = Pace::default();
        let waits: Vec<Duration> = (0..200).map(|_| pace.take(&down)).collect();
        assert_eq!(waits[0], Duration::ZERO);
        assert!(waits[199] > Duration::from_millis(1500), "{:?}", waits[199]);
        assert_eq!(pace.take(&sound), Duration::ZERO);
    }
}
