//! What is known of the line to the registries, and what is on it.
//!
//! One for all of them: what narrows it is mostly the node's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Those who wait for room are told each time that this many bytes came.
const STEP: u64 = 128 << 10;

/// Bytes that are on their way for a guess, at most, however much the line carries.
const MOST: u64 = 8 << 20;

/// The line that all ranges come along.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// Bytes that it carries in the time that an answer takes, as far as the last reader who waited could tell.
    idle: AtomicU64,
    /// Ranges on it that readers wait for.
    asked: AtomicUsize,
    /// Bytes that were asked for and are not here, but for those of ranges that stand still.
    expected: AtomicU64,
    /// Bytes that came.
    came: AtomicU64,
    moved: Notify,
}

/// A range that a reader waits for, counted until dropped.
#[derive(Debug)]
pub(crate) struct Asked(Arc<Line>);

/// Bytes that were asked for, until they came or this is dropped.
#[derive(Debug)]
pub(crate) struct Expected {
    line: Arc<Line>,
    bytes: u64,
    /// How many of them others have to reckon with.
    counted: u64,
}

/// A moment, to tell how fast bytes came since.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Since {
    at: Instant,
    came: u64,
}

impl Line {
    /// Counts a range that a reader waits for until the result is dropped.
    pub(crate) fn ask(self: &Arc<Self>) -> Asked {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Asked(Arc::clone(self))
    }

    /// Whether a reader waits for a range that has not come yet.
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) > 0
    }

    /// Counts `bytes` that are asked for now.
    pub(crate) fn expect(self: &Arc<Self>, bytes: u64) -> Expected {
        self.expected.fetch_add(bytes, Ordering::Relaxed);
        Expected { line: Arc::clone(self), bytes, counted: bytes }
    }

    /// Returns the present moment.
    pub(crate) fn now(&self) -> Since {
        Since { at: Instant::now(), came: self.came.load(Ordering::Relaxed) }
    }

    /// Takes note of a request that was answered after `answer`, and of what came along the line from there on.
    pub(crate) fn note(&self, answer: Duration, answered: Since) {
        let bytes = self.came.load(Ordering::Relaxed).wrapping_sub(answered.came);
        self.learn(answer, bytes, answered.at.elapsed());
    }

    fn learn(&self, answer: Duration, bytes: u64, arrival: Duration) {
        let now = bytes as f64 * answer.as_secs_f64() / arrival.as_secs_f64().max(1e-6);
        let before = self.idle.load(Ordering::Relaxed);
        // What others than we took of the line meanwhile makes it look narrow. The cast saturates, which is what is wanted.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative")]
        self.idle.store((now as u64).clamp(before - before / 8, MOST), Ordering::Relaxed);
    }

    /// Returns how many bytes the line carries in the time that an answer takes, [`MOST`] at most; zero until that is known.
    pub(crate) fn idle(&self) -> u64 {
        self.idle.load(Ordering::Relaxed)
    }

    /// Whether what was asked for leaves room: at least half of `bytes` more arrive in the time that an answer takes.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.expected.load(Ordering::Relaxed).saturating_add(bytes / 2) <= self.idle()
    }

    /// Returns what ends once there may be more room than now.
    pub(crate) fn moved(&self) -> Notified<'_> {
        self.moved.notified()
    }
}

impl Expected {
    /// Takes note of `bytes` that came.
    pub(crate) fn came(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        let before = self.line.came.fetch_add(bytes, Ordering::Relaxed);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.count(self.bytes);
        if before / STEP != before.wrapping_add(bytes) / STEP {
            self.line.moved.notify_waiters();
        }
    }

    /// Has others not reckon with what is still to come, until some of it does.
    pub(crate) fn let_go(&mut self) {
        self.count(0);
        self.line.moved.notify_waiters();
    }

    fn count(&mut self, bytes: u64) {
        if bytes > self.counted {
            self.line.expected.fetch_add(bytes - self.counted, Ordering::Relaxed);
        } else {
            self.line.expected.fetch_sub(self.counted - bytes, Ordering::Relaxed);
        }
        self.counted = bytes;
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.asked.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.let_go();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_as_wide_as_it_was_seen_and_forgets_that_slowly() {
        let line = Line::default();
        let ms = Duration::from_millis;
        line.learn(ms(20), 1_400_000, ms(14));
        assert_eq!(line.idle(), 2_000_000);
        line.learn(ms(20), 1_400_000, ms(28));
        assert_eq!(line.idle(), 1_750_000, "others had a part of it");
        line.learn(ms(20), 2_800_000, ms(14));
        assert_eq!(line.idle(), 4_000_000);
        (0..100).for_each(|_| line.learn(ms(20), 14_000, ms(140)));
        assert!((1_990..=2_000).contains(&line.idle()), "it has become narrow");
        line.learn(ms(20), u64::MAX, Duration::ZERO);
        assert_eq!(line.idle(), MOST, "or wider than is of use");
        line.learn(ms(20), u64::MAX, Duration::ZERO);
        assert_eq!(line.idle(), MOST);
    }

    #[test]
    fn what_is_expected_takes_room_until_it_came_or_is_given_up() {
        let line = Arc::new(Line::default());
        assert!(line.has_room(0) && !line.has_room(2), "nothing is known of it");
        let ms = Duration::from_millis;
        line.learn(ms(20), 1000, ms(20));
        assert!(line.has_room(2000) && !line.has_room(2002));
        let mut one = line.expect(800);
        let other = line.expect(100);
        assert!(line.has_room(200) && !line.has_room(202));
        one.came(300);
        assert!(line.has_room(800) && !line.has_room(802));
        one.let_go();
        assert!(line.has_room(1800));
        one.came(100);
        assert!(line.has_room(1000) && !line.has_room(1002), "it comes after all");
        one.came(1000);
        assert!(line.has_room(1800), "more than was asked for");
        drop((one, other));
        assert!(line.has_room(2000) && line.expected.load(Ordering::Relaxed) == 0);
    }

    #[tokio::test]
    async fn who_waits_for_room_is_told_of_bytes_and_of_what_is_given_up() {
        let line = Arc::new(Line::default());
        let mut expected = line.expect(STEP * 4);
        let moved = line.moved();
        expected.came(usize::try_from(STEP).unwrap());
        moved.await;
        let moved = line.moved();
        drop(expected);
        moved.await;
    }
}
