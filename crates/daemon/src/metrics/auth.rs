//! What is counted about credentials, and the one event per failure that a person can act on.
//!
//! Labels come from fixed lists: options, outcomes, the methods of CRI's image service, gRPC's codes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use soci_auth::keychain::cri::CriStore;
use soci_auth::{AuthError, CredentialScope};
use soci_kubernetes::SecretsKeychain;

use super::text::{Histogram, Scrape};
use super::{Metrics, micros, millis, names};

/// Methods of the image service that are told apart.
const METHODS: [&str; 7] =
    ["ListImages", "StreamImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo", "other"];
/// gRPC's codes by number; what is none of them has no name of its own.
const CODES: [&str; 17] = [
    "ok",
    "cancelled",
    "unknown",
    "invalid-argument",
    "deadline-exceeded",
    "not-found",
    "already-exists",
    "permission-denied",
    "resource-exhausted",
    "failed-precondition",
    "aborted",
    "out-of-range",
    "unimplemented",
    "internal",
    "unavailable",
    "data-loss",
    "unauthenticated",
];
/// For how long the same failure is not told again.
const TOLD: Duration = Duration::from_secs(60);
/// How many different failures are remembered as told.
const MAX_TOLD: usize = 1024;

/// Host, repository, option and reason of a failure.
type FailureKey = (String, String, &'static str, &'static str);

/// Numbers that are kept between scrapes.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    helpers: [Histogram<16>; 2],
    calls: [Histogram<26>; METHODS.len()],
    in_flight: AtomicU64,
    told: Mutex<HashMap<FailureKey, Instant>>,
}

impl Numbers {
    pub(super) fn collect(&self, scrape: &mut Scrape) {
        for (outcome, histogram) in ["ok", "failed"].iter().zip(&self.helpers) {
            scrape.add_histogram(&names::HELPERS, &[outcome], histogram.read());
        }
        for (method, histogram) in METHODS.iter().zip(&self.calls) {
            let read = histogram.read();
            if read.0.iter().any(|count| *count > 0) {
                scrape.add_histogram(&names::CALL_TIME, &[method], read);
            }
        }
        scrape.add(&names::CALLS_IN_FLIGHT, &[], self.in_flight.load(Ordering::Relaxed));
    }

    /// Whether a failure is to be told now: once a minute at most.
    fn may_tell(&self, key: FailureKey) -> bool {
        let (mut told, now) = (self.told.lock(), Instant::now());
        if told.get(&key).is_some_and(|last| now.duration_since(*last) < TOLD) {
            return false;
        }
        if told.len() >= MAX_TOLD {
            told.retain(|_, last| now.duration_since(*last) < TOLD);
        }
        if told.len() >= MAX_TOLD {
            told.clear();
        }
        told.insert(key, now);
        true
    }
}

impl soci_auth::Meters for Metrics {
    fn resolved(&self, option: &'static str, found: bool) {
        self.add(&names::LOOKUPS, &[option, if found { "found" } else { "none" }], 1);
    }

    fn option_failed(&self, option: &'static str) {
        self.add(&names::LOOKUPS, &[option, "failed"], 1);
    }

    fn rejected(&self, option: &'static str) {
        self.add(&names::REJECTIONS, &[option], 1);
    }

    fn denied(&self, scope: &CredentialScope, option: Option<&'static str>, error: &AuthError) {
        let option = option.unwrap_or("none");
        let Failure { reason, status, advice } = Failure::of(error);
        self.add(&names::DENIALS, &[option, reason], 1);
        let (host, repository) = (scope.origin.to_string(), scope.image.repository().to_owned());
        if scope.mirror {
            tracing::debug!(host, repository, option, status, reason, "a mirror gives no access");
        } else if self.0.auth.may_tell((host.clone(), repository.clone(), option, reason)) {
            let error = soci_oci::with_causes(error);
            let explain = format!("soci auth explain --daemon {}", scope.image);
            tracing::warn!(
                image = %scope.image, host, repository, option, status, reason, advice, explain, error,
                "a registry gives no access"
            );
        }
    }

    fn token_fetched(&self, success: bool) {
        self.add(&names::GRANTS, &[if success { "granted" } else { "failed" }], 1);
    }

    fn helper_ran(&self, took: Duration, success: bool) {
        let [ok, failed] = &self.0.auth.helpers;
        (if success { ok } else { failed }).observe(millis(took));
    }
}

/// A failure in words of fixed lists.
struct Failure<'a> {
    reason: &'static str,
    status: Option<u16>,
    advice: &'a str,
}

impl<'a> Failure<'a> {
    fn of(error: &'a AuthError) -> Self {
        match error {
            AuthError::Denied(denied) => {
                Self { reason: denied.reason.code(), status: denied.status, advice: denied.advice() }
            }
            AuthError::Policy(_) => Self {
                reason: "policy",
                status: None,
                advice: "check the realm that the registry names; no credential is sent there",
            },
            AuthError::Token { .. } => Self {
                reason: "token-server",
                status: None,
                advice: "check that the registry's token server can be reached from this machine",
            },
            AuthError::Deadline { .. } => Self {
                reason: "deadline",
                status: None,
                advice: "check what is slow: the registry's token server or a credential helper",
            },
        }
    }
}

/// A call through the relay, from its first byte to its last. Dropped without an end it counts as cancelled.
#[derive(Debug)]
pub(crate) struct Call {
    metrics: Metrics,
    method: usize,
    started: Instant,
    ended: bool,
}

impl Call {
    /// A call of `method` begins.
    pub(crate) fn begin(metrics: &Metrics, method: &str) -> Self {
        metrics.0.auth.in_flight.fetch_add(1, Ordering::Relaxed);
        let method = METHODS.iter().position(|known| *known == method).unwrap_or(METHODS.len() - 1);
        Self { metrics: metrics.clone(), method, started: Instant::now(), ended: false }
    }

    /// The call ended with this gRPC status.
    pub(crate) fn end(&mut self, code: Option<usize>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let auth = &self.metrics.0.auth;
        auth.in_flight.fetch_sub(1, Ordering::Relaxed);
        auth.calls[self.method].observe(micros(self.started.elapsed()));
        let code = code.and_then(|code| CODES.get(code)).copied().unwrap_or("unknown");
        self.metrics.add(&names::CALLS, &[METHODS[self.method], code], 1);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Some(1));
    }
}

/// What is looked at when somebody scrapes.
#[derive(Debug)]
pub(crate) struct Gauges {
    /// What pulls brought, where that option is on.
    pub(crate) pulls: Option<Arc<CriStore>>,
    /// The synced secrets, where that option is on.
    pub(crate) secrets: Option<Arc<SecretsKeychain>>,
}

impl Gauges {
    pub(crate) fn collect(&self, scrape: &mut Scrape) {
        let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        if let Some(pulls) = &self.pulls {
            scrape.add(&names::PULLS, &[], number(pulls.len()));
        }
        if let Some(secrets) = &self.secrets {
            scrape.add(&names::SECRETS, &[], number(secrets.len()));
            scrape.add(&names::BEHIND, &[], secrets.behind().as_secs());
        }
    }
}

#[cfg(test)]
mod tests {
    use soci_auth::{Meters, Origin, Scheme};

    use super::*;

    fn text(metrics: &Metrics) -> String {
        let mut scrape = Scrape::default();
        metrics.collect(&mut scrape);
        scrape.text()
    }

    #[test]
    fn calls_are_counted_by_method_and_code_and_those_cut_off_too() {
        let metrics = Metrics::default();
        let mut served = Call::begin(&metrics, "PullImage");
        let cut = Call::begin(&metrics, "FutureMethod");
        assert!(text(&metrics).contains("soci_cri_calls_in_flight 2"));
        served.end(Some(0));
        served.end(Some(14));
        drop((served, cut));
        Call::begin(&metrics, "ListImages").end(Some(99));
        let shown = text(&metrics);
        for line in [
            "soci_cri_calls_in_flight 0",
            "soci_cri_calls_total{method=\"PullImage\",code=\"ok\"} 1",
            "soci_cri_calls_total{method=\"other\",code=\"cancelled\"} 1",
            "soci_cri_calls_total{method=\"ListImages\",code=\"unknown\"} 1",
            "soci_cri_call_duration_microseconds_count{method=\"PullImage\"} 1",
        ] {
            assert!(shown.contains(line), "{line} in\n{shown}");
        }
        assert!(!shown.contains("unavailable"), "a call ends once");
    }

    #[test]
    fn what_happens_to_credentials_is_counted_by_option() {
        let metrics = Metrics::default();
        metrics.resolved("cri", true);
        metrics.resolved("docker-config", false);
        metrics.option_failed("docker-config");
        metrics.rejected("cri");
        metrics.token_fetched(true);
        metrics.helper_ran(Duration::from_millis(3), false);
        let scope = CredentialScope::new(
            Origin::new(Scheme::Https, "reg.example", None),
            "reg.example/a:1".parse().unwrap(),
        );
        let error = AuthError::Deadline { host: "https://reg.example".into(), repository: "a".into() };
        metrics.denied(&scope, Some("cri"), &error);
        let shown = text(&metrics);
        for line in [
            "soci_auth_lookups_total{option=\"cri\",outcome=\"found\"} 1",
            "soci_auth_lookups_total{option=\"docker-config\",outcome=\"none\"} 1",
            "soci_auth_lookups_total{option=\"docker-config\",outcome=\"failed\"} 1",
            "soci_auth_rejections_total{option=\"cri\"} 1",
            "soci_auth_grants_total{outcome=\"granted\"} 1",
            "soci_auth_helper_duration_milliseconds_count{outcome=\"failed\"} 1",
            "soci_auth_denials_total{option=\"cri\",reason=\"deadline\"} 1",
        ] {
            assert!(shown.contains(line), "{line} in\n{shown}");
        }
    }

    #[test]
    fn a_failure_is_told_with_the_command_that_explains_it() {
        let (log, _guard) = soci_testkit::log::capture();
        let image: soci_oci::ImageRef = "reg.example/a:1".parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        let error = AuthError::Deadline { host: "https://reg.example".into(), repository: "a".into() };
        Metrics::default().denied(&scope, None, &error);
        assert_eq!(log.warnings("soci auth explain --daemon reg.example/a:1"), 1, "{}", log.text());
    }

    #[test]
    fn the_same_failure_is_told_once_a_minute() {
        let numbers = Numbers::default();
        let key = |host: &str| (host.to_owned(), "a".to_owned(), "cri", "refused");
        assert!(numbers.may_tell(key("h")) && !numbers.may_tell(key("h")) && numbers.may_tell(key("i")));
        for at in 0..2 * MAX_TOLD {
            assert!(numbers.may_tell(key(&at.to_string())));
            assert!(numbers.told.lock().len() <= MAX_TOLD);
        }
    }
}
