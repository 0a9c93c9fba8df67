//! Bytes for which a read waited in vain a moment ago.
//!
//! The kernel asks for more than its reader does, to read ahead. When that fails it asks again for the page that the reader
//! wants, and so it does for each reader of the page, one after another. Every one of these would take as long as the first.
//! So a read of such bytes gets a short time only. It still is a real one: when the bytes can be had again it returns them,
//! and what it asked for goes on without it and serves the next one.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::attr::Inode;

/// How long a failure counts. And how long a read must have lasted for its failure to count: what fails sooner may be asked
/// again without harm.
const MOMENT: Duration = Duration::from_secs(1);
/// What a read gets of bytes that did not come a moment ago; enough for a registry that answers.
const SHORT: Duration = Duration::from_millis(500);
/// Failures that are kept, the newest ones.
const MAX: usize = 64;

/// The failures of one layer.
#[derive(Debug, Default)]
pub(crate) struct Late(Mutex<VecDeque<Failure>>);

#[derive(Debug)]
struct Failure {
    inode: Inode,
    bytes: Range<u64>,
    counts_until: Instant,
}

/// How long a read may last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Time {
    /// As long as reads of the layer may.
    Full,
    /// Only this.
    Short(Duration),
}

impl Time {
    /// Returns the time of a read that may last `full`.
    pub(crate) fn within(self, full: Duration) -> Duration {
        match self {
            Self::Full => full,
            Self::Short(short) => full.min(short),
        }
    }
}

impl Late {
    /// Remembers that `bytes` of a file did not come, at `now`, for a read that began at `begun` and had this `time`.
    pub(crate) fn note(&self, inode: Inode, bytes: Range<u64>, begun: Instant, time: Time, now: Instant) {
        if time == Time::Full && now.saturating_duration_since(begun) < MOMENT {
            return;
        }
        let mut failures = self.0.lock();
        failures.retain(|failure| now < failure.counts_until);
        if failures.len() >= MAX {
            failures.pop_front();
        }
        failures.push_back(Failure { inode, bytes, counts_until: now + MOMENT });
    }

    /// Returns how long a read of `bytes` may last that begins at `now`.
    pub(crate) fn time(&self, inode: Inode, bytes: &Range<u64>, now: Instant) -> Time {
        let late = self.0.lock().iter().any(|failure| {
            let overlaps = failure.bytes.start < bytes.end && bytes.start < failure.bytes.end;
            failure.inode == inode && overlaps && now < failure.counts_until
        });
        if late { Time::Short(SHORT) } else { Time::Full }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(300);
    const FILE: Inode = Inode(7);

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_kernels_second_read_of_a_page_is_short() {
        let (late, begun) = (Late::default(), Instant::now());
        let now = begun + LONG;
        late.note(FILE, 0..16384, begun, Time::Full, now);
        let after = |inode, bytes, passed| late.time(inode, &bytes, now + millis(passed));
        assert_eq!(after(FILE, 4096..8192, 0), Time::Short(SHORT));
        assert_eq!(after(FILE, 12288..32768, 999), Time::Short(SHORT));
        assert_eq!(after(FILE, 4096..8192, 1000), Time::Full, "the next reader's");
        assert_eq!(after(FILE, 16384..20480, 0), Time::Full, "of other bytes");
        assert_eq!(after(Inode(8), 4096..8192, 0), Time::Full, "of another file");
    }

    #[test]
    fn so_are_those_of_all_who_wait_for_the_page() {
        let (late, begun) = (Late::default(), Instant::now());
        let mut now = begun + LONG;
        late.note(FILE, 0..16384, begun, Time::Full, now);
        for _ in 0..10 {
            let time = late.time(FILE, &(4096..8192), now);
            assert_eq!(time, Time::Short(SHORT));
            late.note(FILE, 4096..8192, now, time, now + SHORT);
            now += SHORT;
        }
    }

    #[test]
    fn a_read_that_failed_soon_takes_nothing_from_the_next_one() {
        let (late, begun) = (Late::default(), Instant::now());
        late.note(FILE, 0..16384, begun, Time::Full, begun + MOMENT / 2);
        assert_eq!(late.time(FILE, &(0..4096), begun + MOMENT / 2), Time::Full);
    }

    #[test]
    fn a_short_time_is_never_longer_than_the_full_one() {
        assert_eq!(Time::Short(SHORT).within(LONG), SHORT);
        assert_eq!(Time::Short(SHORT).within(millis(50)), millis(50));
        assert_eq!(Time::Full.within(LONG), LONG);
    }

    #[test]
    fn the_newest_failures_are_kept() {
        let (late, begun) = (Late::default(), Instant::now());
        let now = begun + LONG;
        for number in 0..=MAX as u64 {
            late.note(Inode(number), 0..1, begun, Time::Full, now);
        }
        assert_eq!(late.0.lock().len(), MAX);
        assert_eq!(late.time(Inode(0), &(0..1), now), Time::Full);
        assert_eq!(late.time(Inode(MAX as u64), &(0..1), now), Time::Short(SHORT));
        late.note(FILE, 0..1, begun, Time::Full, now + MOMENT);
        assert_eq!(late.0.lock().len(), 1, "what counts no more is not kept");
    }
}
