//! What a reader's range takes along of what lies behind it.
//!
//! A program that loads jumps about in a layer, but mostly to places next to where it was, and it asks for one after the
//! other: with each miss the line stands still for a round trip. Where a layer is to be completed anyway, the range
//! therefore goes on behind the span that is waited for, over spans that are missing, as far as the line carries in the
//! time that an answer takes. The next miss is often among them, and if not, its answer is on its way while they arrive.
//!
//! In all else they are background work's: stored as they came, within its share of the budget and of the cache. There
//! are none while others wait for bytes of the layer too, since the line does not stand still then, and none under a
//! bandwidth limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use soci_oci::FetchClass;
use soci_ztoc::SpanId;

use crate::core::LayerCore;
use crate::slot::{FetchPermit, SpanForm};

/// What is known of the line to the sources of a layer.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// Bytes that it carries in the time that an answer takes, as far as the last reader who waited could tell.
    idle: AtomicU64,
    /// Ranges on it that readers wait for.
    asked: AtomicUsize,
}

/// A range that a reader waits for, counted until dropped.
#[derive(Debug)]
pub(crate) struct Asked(Arc<Line>);

impl Line {
    /// Counts a range that a reader waits for until the result is dropped.
    pub(crate) fn ask(self: &Arc<Self>) -> Asked {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Asked(Arc::clone(self))
    }

    /// Takes note of a request that was answered after `answer`, and of `bytes` that took `arrival` from there.
    pub(crate) fn note(&self, answer: Duration, bytes: u64, arrival: Duration) {
        let now = bytes as f64 * answer.as_secs_f64() / arrival.as_secs_f64().max(1e-6);
        let before = self.idle.load(Ordering::Relaxed);
        // What others took of the line meanwhile makes it look narrow. The cast saturates, which is what is wanted.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative")]
        self.idle.store((now as u64).max(before - before / 8), Ordering::Relaxed);
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.asked.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Returns the permits for the spans behind `last` that its range takes along, in order; none for most ranges.
pub(crate) fn behind(core: &LayerCore, last: &FetchPermit) -> Vec<FetchPermit> {
    let settings = &core.shared.settings.background;
    let wanted = last.priority().class() == FetchClass::OnDemand
        && core.completing.load(Ordering::Relaxed)
        && settings.bytes_per_second.is_none()
        && core.line.asked.load(Ordering::Relaxed) == 0;
    let most = core.line.idle.load(Ordering::Relaxed).min(settings.max_range);
    if !wanted || most == 0 {
        return Vec::new();
    }
    let (mut spans, mut bytes) = (Vec::new(), 0);
    for span in (last.id().0.saturating_add(1)..core.spans.len()).map(SpanId) {
        let len = core.compressed_len(span);
        // One of which more than half fits is taken whole.
        if bytes + len / 2 > most || !core.lacks(span, SpanForm::Compressed) {
            break;
        }
        spans.push(span);
        bytes += len;
    }
    if spans.is_empty() || !core.shared.cache.has_room(bytes, FetchClass::Background) {
        return Vec::new();
    }
    spans
        .into_iter()
        .map_while(|span| core.bring(span, SpanForm::Compressed, FetchClass::Background))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_as_wide_as_it_was_seen_and_forgets_that_slowly() {
        let line = Line::default();
        let idle = || line.idle.load(Ordering::Relaxed);
        let ms = Duration::from_millis;
        line.note(ms(20), 1_400_000, ms(14));
        assert_eq!(idle(), 2_000_000);
        line.note(ms(20), 1_400_000, ms(28));
        assert_eq!(idle(), 1_750_000, "others had a part of it");
        line.note(ms(20), 2_800_000, ms(14));
        assert_eq!(idle(), 4_000_000);
        (0..100).for_each(|_| line.note(ms(20), 14_000, ms(140)));
        assert!((1_990..=2_000).contains(&idle()), "it has become narrow");
        line.note(ms(20), u64::MAX, Duration::ZERO);
        assert_eq!(idle(), u64::MAX);
    }
}
