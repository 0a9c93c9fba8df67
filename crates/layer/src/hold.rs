//! What a span on its way keeps from others: its share of the byte budget, and background work's turn.
//!
//! It does so only as long as its bytes come. One registry that stalls, or sends a byte now and then, would else hold up the
//! readers of every other image, and the completion of all of them, for as long as somebody waits for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::budget::Grant;
use crate::demand::{Demand, Demanding, PATIENCE};

/// Bytes per second below which bytes do not count as coming. A slow line to a registry is ten times faster.
const SLOW: f64 = 128.0 * 1024.0;

/// What one span holds.
#[derive(Debug)]
pub(crate) struct Hold {
    grant: Grant,
    demand: Arc<Demand>,
    urgent: Option<Demanding>,
    since: Instant,
    arrived: usize,
}

impl Hold {
    /// Holds `grant`, and background work where `urgent`.
    pub(crate) fn new(grant: Grant, demand: Arc<Demand>, urgent: bool) -> Self {
        let urgent = urgent.then(|| demand.enter());
        Self { grant, demand, urgent, since: Instant::now(), arrived: 0 }
    }

    /// Returns until when the next bytes are in time.
    pub(crate) fn due(&self) -> Instant {
        self.since + PATIENCE + Duration::from_secs_f64(self.arrived as f64 / SLOW)
    }

    /// Leaves the time that was spent aside for others out of what its bytes took.
    pub(crate) fn was_aside(&mut self, time: Duration) {
        self.since += time;
    }

    /// Takes note of `bytes` that came, for somebody who waits where `urgent`.
    pub(crate) fn came(&mut self, bytes: usize, urgent: bool) {
        self.arrived += bytes;
        if Instant::now() >= self.due() {
            return;
        }
        self.grant.take_back();
        if urgent && self.urgent.is_none() {
            self.urgent = Some(self.demand.enter());
        }
    }

    /// Lets others go first until bytes come again.
    pub(crate) fn let_go(&mut self) {
        self.grant.lend();
        self.urgent = None;
    }

    /// Returns the share of the span, whose bytes are all here.
    pub(crate) fn complete(mut self) -> Grant {
        self.grant.take_back();
        self.grant
    }
}
