//! Waiting for a condition, with a deadline, instead of for time.

use std::time::{Duration, Instant};

/// How long a poll rests between two looks.
const REST: Duration = Duration::from_millis(5);

/// Looks until `look` returns something, for at most `limit`. Blocks the thread.
pub fn until<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::park_timeout(REST);
    }
}
