//! Waits between attempts.

use std::time::Duration;

use rand::Rng;

use crate::settings::Timing;

/// How long something has to last before the next failure counts as the first one.
const HEALTHY: Duration = Duration::from_secs(120);

/// Waits that double, with jitter.
pub(crate) struct BackOff {
    first: Duration,
    limit: Duration,
    step: u32,
}

impl BackOff {
    pub(crate) fn new(timing: &Timing) -> Self {
        Self { first: timing.back_off.0, limit: timing.back_off.1, step: 0 }
    }

    /// What is tried again had lasted so long.
    pub(crate) fn lasted(&mut self, time: Duration) {
        if time > HEALTHY {
            self.step = 0;
        }
    }

    /// Returns the next wait.
    pub(crate) fn next(&mut self) -> Duration {
        self.next_up_to(self.limit)
    }

    /// Returns the next wait, which may become as long as `limit`.
    pub(crate) fn next_up_to(&mut self, limit: Duration) -> Duration {
        let base = self.first.saturating_mul(1 << self.step.min(20)).min(limit);
        self.step = self.step.saturating_add(1);
        base.mul_f64(rand::rng().random_range(0.5..1.0))
    }
}
