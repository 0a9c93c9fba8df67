//! Notices sequential readers and says which spans they need next.
//!
//! The stream that matters is the layer's tar, not a file: a program that loads many small files in archive order is a
//! sequential reader as well. A few streams are told apart, since two files may be read side by side, and reads of one
//! stream may arrive slightly out of order, since the kernel sends several at once. A reader that crosses into
//! the next span gets the window opened; each further crossing doubles it. New spans are asked for when half of the window
//! is used up, so that they travel in one request. A jump starts anew, and a random reader causes nothing.

use soci_ztoc::SpanId;

/// Streams that are told apart.
const STREAMS: usize = 4;
/// How far a read may be off the position of its stream, in bytes.
const SLACK: u64 = 1 << 20;
/// The window when it opens, in spans.
const FIRST: u32 = 2;
/// What a reader must have read in sequence before its window opens within its first span, in bytes.
const EARLY: u64 = 1 << 20;

/// The streams of one layer.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead {
    streams: [Option<Stream>; STREAMS],
    clock: u64,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Where the next read is expected.
    next: u64,
    /// How much was read in sequence.
    run: u64,
    /// The last span that was read.
    span: SpanId,
    /// Spans to be ahead; zero while it is unknown whether the reader is sequential.
    window: u32,
    /// The first span that was not asked for yet.
    asked: u32,
    used: u64,
}

/// A read as far as it matters here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    /// First byte.
    pub(crate) at: u64,
    /// Number of bytes.
    pub(crate) len: u64,
    /// The span of its last byte.
    pub(crate) last: SpanId,
}

impl ReadAhead {
    /// Takes note of a read. Returns the spans to ask for next, half open, empty for none.
    pub(crate) fn note(&mut self, access: Access, spans: u32, most: u32) -> std::ops::Range<u32> {
        if most == 0 || access.len == 0 {
            return 0..0;
        }
        self.clock += 1;
        let end = access.at + access.len;
        let near = |stream: &Stream| access.at.abs_diff(stream.next) <= SLACK;
        let found = self
            .streams
            .iter_mut()
            .flatten()
            .filter(|stream| near(stream))
            .min_by_key(|s| access.at.abs_diff(s.next));
        let Some(stream) = found else {
            let fresh = Stream {
                next: end,
                run: access.len,
                span: access.last,
                window: 0,
                asked: 0,
                used: self.clock,
            };
            // An empty place first, else the one not used for the longest time.
            if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.map_or(0, |s| s.used)) {
                *oldest = Some(fresh);
            }
            return 0..0;
        };
        stream.used = self.clock;
        if end > stream.next {
            // A hole is not read; only what follows on counts towards a run.
            stream.run += end - access.at.max(stream.next);
            stream.next = end;
        }
        if access.last > stream.span {
            stream.span = access.last;
            stream.window =
                if stream.window == 0 { FIRST } else { stream.window.saturating_mul(2) }.min(most);
        } else if stream.window == 0 && stream.run >= EARLY {
            stream.window = FIRST.min(most);
        }
        if stream.window == 0 {
            return 0..0;
        }
        let here = stream.span.0.saturating_add(1);
        let ahead = stream.asked.saturating_sub(here);
        if ahead > stream.window / 2 {
            return 0..0;
        }
        let from = stream.asked.max(here);
        let to = here.saturating_add(stream.window).min(spans);
        if from >= to {
            return 0..0;
        }
        stream.asked = to;
        from..to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: u64 = 4 << 20;

    fn read(ahead: &mut ReadAhead, at: u64, len: u64) -> std::ops::Range<u32> {
        let last = SpanId(u32::try_from((at + len - 1) / SPAN).unwrap());
        ahead.note(Access { at, len, last }, 100, 8)
    }

    #[test]
    fn a_sequential_reader_is_always_ahead_and_nothing_is_asked_twice() {
        let mut ahead = ReadAhead::default();
        let mut asked = Vec::new();
        let mut requests = 0;
        for at in (0..60 * SPAN).step_by(128 << 10) {
            let next = read(&mut ahead, at, 128 << 10);
            if at > 2 * SPAN {
                let here = u32::try_from(at / SPAN).unwrap();
                assert!(asked.contains(&here), "span {here} was not asked for");
            }
            requests += usize::from(!next.is_empty());
            asked.extend(next);
        }
        let mut once = asked.clone();
        once.dedup();
        assert_eq!(asked, once);
        assert!(requests < 22, "{requests} requests for 60 spans");
        assert!(asked.iter().all(|span| *span <= 68));
    }

    #[test]
    fn reads_slightly_out_of_order_are_one_stream() {
        let mut ahead = ReadAhead::default();
        let mut asked = Vec::new();
        for pair in (0..5 * SPAN).step_by(256 << 10) {
            asked.extend(read(&mut ahead, pair + (128 << 10), 128 << 10));
            asked.extend(read(&mut ahead, pair, 128 << 10));
        }
        assert!(asked.contains(&4) && asked.contains(&8), "{asked:?}");
    }

    #[test]
    fn a_random_reader_causes_nothing() {
        let mut ahead = ReadAhead::default();
        let mut state = 12345_u64;
        for _ in 0..1000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (state >> 20) % (390 * 1024 * 1024) / 4096 * 4096 * 8 % (99 * SPAN);
            assert_eq!(read(&mut ahead, at / SPAN * SPAN + SPAN / 2, 4096).len(), 0);
        }
    }

    #[test]
    fn two_files_side_by_side_are_two_streams() {
        let mut ahead = ReadAhead::default();
        let mut asked = Vec::new();
        for step in 0..64 {
            asked.extend(read(&mut ahead, step * (128 << 10), 128 << 10));
            asked.extend(read(&mut ahead, 50 * SPAN + step * (128 << 10), 128 << 10));
        }
        assert!(asked.contains(&2) && asked.contains(&52), "{asked:?}");
    }

    #[test]
    fn the_end_of_the_layer_bounds_the_window() {
        let mut ahead = ReadAhead::default();
        let mut asked = Vec::new();
        for at in (96 * SPAN..100 * SPAN).step_by(128 << 10) {
            asked.extend(read(&mut ahead, at, 128 << 10));
        }
        assert_eq!(asked, [97, 98, 99]);
    }
}
