//! Completes open layers when nothing else is to do.
//!
//! Images take turns, and the layers of an image among themselves, one range of adjacent spans at a time. Within a layer
//! the spans of its prefetch list come first, then those next to where readers were last, then the rest from the start; in
//! each case those amid large files that nobody touched come after all others.
//! Two ranges are on their way at once, so that the pause between two requests is used. The first ones after a reader was
//! there are short. Before a range starts and between its chunks it steps aside for anybody who waits. What is there
//! already is known from the cache, so work goes on where it ended, also after a restart.
//!
//! A layer whose range failed rests, twice as long each time; it is never given up while it is open. A layer for which
//! the cache has no room rests for the longest time. When all open layers are complete no task is left.
//!
//! The queue holds layers weakly: a closed one falls out.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use soci_oci::{Digest, FetchClass, Priority};
use soci_ztoc::SpanId;
use tokio::sync::Notify;

use crate::core::LayerCore;
use crate::fetch;
use crate::meters::Event;
use crate::pool::Shared;
use crate::settings::BackgroundSettings;
use crate::slot::SpanForm;

/// Ranges that are on their way at once.
const LANES: usize = 2;
/// Compressed bytes of the first range after a reader was there.
const FIRST_RANGE: u64 = 1 << 20;
/// Seconds' worth of bytes of one range, under a bandwidth limit.
const PACED_RANGE: u64 = 30;
/// How long a layer rests when all that it lacks is on its way already.
const BUSY: Duration = Duration::from_millis(100);

/// The queue of layers to complete.
#[derive(Debug)]
pub(crate) struct Background {
    settings: BackgroundSettings,
    state: Mutex<State>,
    /// Signalled when a layer is added.
    added: Notify,
    /// When the next background byte may be taken, under a bandwidth limit.
    pace: Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order of their turns within a group.
    queue: VecDeque<Turn>,
    /// When groups had their last turn, by a count of turns.
    served: BTreeMap<Digest, u64>,
    turns: u64,
    /// Tasks that run.
    lanes: usize,
    /// Those of them that are at a layer, which may come back to the queue.
    working: usize,
    /// Compressed bytes of the range that began last.
    range: u64,
    /// When the last reader before it had what he wanted.
    reader: Option<tokio::time::Instant>,
}

#[derive(Debug)]
struct Turn {
    layer: Weak<LayerCore>,
    /// What it shares its turn with.
    group: Digest,
    since: Instant,
    /// Something was fetched for it.
    worked: bool,
    /// Only spans of the prefetch list are wanted.
    listed_only: bool,
    failures: u32,
    rests_until: Option<Instant>,
}

/// What a lane does next.
enum Next {
    Work(Arc<LayerCore>, Turn),
    Rest(Instant),
    End,
}

/// A range to be fetched.
struct Batch {
    spans: Vec<SpanId>,
    form: SpanForm,
    class: FetchClass,
}

impl Background {
    pub(crate) fn new(settings: BackgroundSettings) -> Self {
        Self { settings, state: Mutex::default(), added: Notify::new(), pace: Mutex::default() }
    }

    /// Queues a layer: all of it, or only the spans of its prefetch list.
    pub(crate) fn add(&self, layer: &Arc<LayerCore>, listed_only: bool, group: Digest) {
        let mut state = self.state.lock();
        let same = |turn: &&mut Turn| Weak::as_ptr(&turn.layer) == Arc::as_ptr(layer);
        if let Some(turn) = state.queue.iter_mut().find(same) {
            if turn.listed_only && !listed_only {
                (turn.listed_only, turn.group) = (false, group);
            }
            turn.rests_until = None;
        } else {
            let (layer, since) = (Arc::downgrade(layer), Instant::now());
            let turn =
                Turn { layer, group, since, worked: false, listed_only, failures: 0, rests_until: None };
            state.queue.push_back(turn);
        }
        let start = state.lanes == 0;
        if start {
            state.lanes = LANES;
        }
        drop(state);
        self.added.notify_waiters();
        if start {
            for _ in 0..LANES {
                layer.shared.handle.spawn(lane(Arc::clone(&layer.shared)));
            }
        }
    }

    /// Returns the most compressed bytes of one range. Under a bandwidth limit a range is no longer than what arrives well
    /// before its deadline.
    fn max_range(&self) -> u64 {
        let most = self.settings.max_range;
        self.settings.bytes_per_second.map_or(most, |rate| most.min(rate.saturating_mul(PACED_RANGE)))
    }

    /// Returns the most compressed bytes of a range that begins now: few after a reader was there, who may come again and
    /// then has to share the line with all that was asked for, and twice as many each time that nobody came.
    fn next_range(&self, reader: Option<tokio::time::Instant>) -> u64 {
        let mut state = self.state.lock();
        let undisturbed = state.range > 0 && state.reader == reader;
        state.range = if undisturbed { state.range.saturating_mul(2) } else { FIRST_RANGE };
        state.range = state.range.min(self.max_range());
        state.reader = reader;
        state.range
    }

    /// Waits until `bytes` more may be taken under the bandwidth limit.
    pub(crate) async fn pace(&self, bytes: usize) {
        let Some(rate) = self.settings.bytes_per_second else { return };
        let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let until = {
            let mut pace = self.pace.lock();
            let until = pace.map_or_else(Instant::now, |at| at.max(Instant::now())) + cost;
            *pace = Some(until);
            until
        };
        tokio::time::sleep_until(until.into()).await;
    }

    /// Returns how many layers wait.
    pub(crate) fn queued(&self) -> usize {
        let state = self.state.lock();
        let waits = |turn: &&Turn| turn.layer.upgrade().is_some_and(|layer| !layer.closed.is_cancelled());
        state.queue.iter().filter(waits).count()
    }

    fn next(&self) -> Next {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.queue.retain(|turn| turn.layer.upgrade().is_some_and(|layer| !layer.closed.is_cancelled()));
        state.served.retain(|group, _| state.queue.iter().any(|turn| turn.group == *group));
        let now = Instant::now();
        let mut earliest: Option<Instant> = None;
        let mut first: Option<(u64, usize)> = None;
        for (place, turn) in state.queue.iter().enumerate() {
            if let Some(until) = turn.rests_until.filter(|until| *until > now) {
                earliest = Some(earliest.map_or(until, |at| at.min(until)));
                continue;
            }
            let served = state.served.get(&turn.group).copied().unwrap_or_default();
            if first.is_none_or(|(least, _)| served < least) {
                first = Some((served, place));
            }
        }
        let next = first.and_then(|(_, place)| state.queue.remove(place));
        if let Some((layer, turn)) = next.and_then(|turn| Some((turn.layer.upgrade()?, turn))) {
            state.turns += 1;
            state.served.insert(turn.group, state.turns);
            state.working += 1;
            return Next::Work(layer, turn);
        }
        match earliest {
            Some(until) => Next::Rest(until),
            None if state.working > 0 => Next::Rest(now + BUSY),
            None => {
                state.lanes -= 1;
                Next::End
            }
        }
    }

    fn back(&self, mut turn: Turn, rest: Option<Duration>) {
        turn.rests_until = rest.map(|rest| Instant::now() + rest);
        self.state.lock().queue.push_back(turn);
    }
}

/// A lane that runs. One that ends by a panic is made good by the next layer that is added.
struct Lane<'a> {
    background: &'a Background,
    working: bool,
    ended: bool,
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let mut state = self.background.state.lock();
            state.lanes -= 1;
            state.working -= usize::from(self.working);
        }
    }
}

async fn lane(shared: Arc<Shared>) {
    let background = &shared.background;
    let mut lane = Lane { background, working: false, ended: false };
    let priority = Priority::new(FetchClass::Background);
    loop {
        shared.demand.turn_of(&priority).await;
        let added = background.added.notified();
        match background.next() {
            Next::End => {
                lane.ended = true;
                return;
            }
            Next::Rest(until) => {
                tokio::select! {
                    () = tokio::time::sleep_until(until.into()) => {}
                    () = added => {}
                }
            }
            Next::Work(layer, turn) => {
                lane.working = true;
                step(background, &layer, turn).await;
                lane.working = false;
                background.state.lock().working -= 1;
            }
        }
    }
}

/// Fetches one range of a layer and queues the layer again, unless it is complete.
async fn step(background: &Background, layer: &Arc<LayerCore>, mut turn: Turn) {
    let settings = &background.settings;
    let most = background.next_range(layer.shared.demand.last_reader());
    let Some(batch) = batch(layer, most, turn.listed_only) else {
        if layer.slots.len() > 0 {
            background.back(turn, Some(BUSY));
        } else if turn.worked && !turn.listed_only && layer.is_complete() {
            layer.meter.completed(turn.since.elapsed());
        }
        return;
    };
    let len = |span: &SpanId| match batch.form {
        SpanForm::Plain => layer.plain_len(*span),
        SpanForm::Compressed => layer.compressed_len(*span),
    };
    let wanted = batch.spans.iter().map(len).sum();
    if !layer.shared.cache.has_room(wanted, batch.class) {
        layer.meter.count(Event::NotCached, batch.spans.len() as u64);
        if batch.class == FetchClass::Prefetch {
            relist(layer, &batch);
        }
        return background.back(turn, Some(settings.max_backoff));
    }
    let permits = batch.spans.iter().filter_map(|span| layer.bring(*span, batch.form, batch.class)).collect();
    // A layer is queued while one of its ranges is on its way, so that the other lane may take its next one.
    background.back(Turn { layer: turn.layer.clone(), worked: true, ..turn }, None);
    let failed = fetch::bring(layer, permits, most).await.is_err();
    if failed && batch.class == FetchClass::Prefetch {
        relist(layer, &batch);
    }
    let mut state = background.state.lock();
    let Some(queued) = state.queue.iter_mut().find(|queued| queued.layer.ptr_eq(&turn.layer)) else { return };
    if failed {
        turn.failures = queued.failures.saturating_add(1);
        let rest = settings.backoff.saturating_mul(1 << turn.failures.min(16).saturating_sub(1));
        queued.failures = turn.failures;
        queued.rests_until = Some(Instant::now() + rest.min(settings.max_backoff));
    } else if layer.take_full() {
        queued.rests_until = Some(Instant::now() + settings.max_backoff);
    } else {
        queued.failures = 0;
    }
}

/// Puts a range of the prefetch list back in front.
fn relist(layer: &LayerCore, batch: &Batch) {
    let mut list = layer.listed.lock();
    batch.spans.iter().rev().for_each(|span| list.push_front(*span));
}

/// Returns the next range of what a layer lacks, or `None` when nothing is left to start.
fn batch(layer: &LayerCore, most: u64, listed_only: bool) -> Option<Batch> {
    {
        let mut list = layer.listed.lock();
        while let Some(first) = list.pop_front() {
            if !layer.lacks(first, SpanForm::Plain) {
                continue;
            }
            let mut spans = vec![first];
            let mut bytes = layer.compressed_len(first);
            while let Some(next) = list.front().copied() {
                bytes = bytes.saturating_add(layer.compressed_len(next));
                let follows = spans.last().is_some_and(|last| last.0.checked_add(1) == Some(next.0));
                if !follows || bytes > most || !layer.lacks(next, SpanForm::Plain) {
                    break;
                }
                spans.push(next);
                list.pop_front();
            }
            return Some(Batch { spans, form: SpanForm::Plain, class: FetchClass::Prefetch });
        }
    }
    if listed_only {
        return None;
    }
    let missing = missing(layer);
    let first = likeliest_of(layer, &missing)?;
    let len = |span| layer.compressed_len(span);
    let spans = around(first, &missing, most, len).map(SpanId).collect();
    Some(Batch { spans, form: SpanForm::Compressed, class: FetchClass::Background })
}

/// Returns the span that a layer lacks and a reader is likeliest to want next: what its prefetch list has first, or else what
/// is nearest to the touched places.
pub(crate) fn likeliest(layer: &LayerCore) -> Option<SpanId> {
    let listed = layer.listed.lock().clone();
    let listed = listed.into_iter().find(|span| layer.lacks(*span, SpanForm::Compressed));
    listed.or_else(|| likeliest_of(layer, &missing(layer)))
}

/// Tells of each span whether the layer lacks it.
fn missing(layer: &LayerCore) -> Vec<bool> {
    layer.spans.ids().map(|span| layer.lacks(span, SpanForm::Compressed)).collect()
}

/// Returns the missing span that is nearest to what was touched, of those that are likely to be wanted if there are any.
fn likeliest_of(layer: &LayerCore, missing: &[bool]) -> Option<SpanId> {
    let touched = layer.touched.lock().latest();
    let small: Vec<bool> = layer.spans.ids().map(|span| layer.spans.has_small_files(span)).collect();
    let likely = likely(&small, &touched);
    let likely: Vec<bool> = missing.iter().zip(likely).map(|(missing, likely)| *missing && likely).collect();
    nearest(&likely, &touched).or_else(|| nearest(missing, &touched))
}

/// Tells of each span whether it is likely to be wanted: where small files are, and amid large ones that were touched. Most large
/// files of a layer are never read.
fn likely(small: &[bool], touched: &[SpanId]) -> Vec<bool> {
    let mut likely = small.to_vec();
    let large = |span: &usize| small.get(*span).is_some_and(|small| !small);
    for place in touched.iter().map(|place| place.0 as usize).filter(large) {
        let around = (place..).take_while(large).chain((0..place).rev().take_while(large));
        around.for_each(|span| likely[span] = true);
    }
    likely
}

/// Returns the run of missing spans with `first` in it, half open, of at most `most` compressed bytes unless `first` alone is
/// more: on from `first` as far as it goes, then back from there. What lies before a place that was touched is fetched in
/// few requests that way, too.
fn around(first: SpanId, missing: &[bool], most: u64, len: impl Fn(SpanId) -> u64) -> Range<u32> {
    let lacks = |span: u32| missing.get(span as usize).is_some_and(|missing| *missing);
    let mut bytes = len(first);
    let mut fits = |span: u32| {
        lacks(span) && {
            bytes = bytes.saturating_add(len(SpanId(span)));
            bytes <= most
        }
    };
    let end = (first.0 + 1..).find(|span| !fits(*span)).unwrap_or(u32::MAX);
    let start = (0..first.0).rev().take_while(|span| fits(*span)).last().unwrap_or(first.0);
    start..end
}

/// Returns the missing span that is nearest to what was touched, the latest touch first; after a place rather than
/// before it. Without touches, the first.
fn nearest(missing: &[bool], touched: &[SpanId]) -> Option<SpanId> {
    let at = |index: usize| u32::try_from(index).ok().map(SpanId);
    touched
        .iter()
        .filter_map(|place| {
            let place = place.0 as usize;
            let after = (place..missing.len()).find(|index| missing[*index]);
            let before = (0..place.min(missing.len())).rev().find(|index| missing[*index]);
            // A span before the place counts as twice as far away: programs read on rather than back.
            let after = after.map(|index| (index - place, index));
            let before = before.map(|index| (2 * (place - index), index));
            after.into_iter().chain(before).min()
        })
        .min_by_key(|(distance, _)| *distance)
        .and_then(|(_, index)| at(index))
        .or_else(|| missing.iter().position(|missing| *missing).and_then(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ranges_after_a_reader_are_short() {
        let background = Background::new(BackgroundSettings::default());
        let lengths = |reader| (0..5).map(|_| background.next_range(reader) >> 20).collect::<Vec<_>>();
        assert_eq!(lengths(None), [1, 2, 4, 8, 8]);
        let now = tokio::time::Instant::now();
        assert_eq!(lengths(Some(now)), [1, 2, 4, 8, 8]);
        assert_eq!(lengths(Some(now)), [8; 5]);
        let paced = BackgroundSettings { bytes_per_second: Some(10_000), ..BackgroundSettings::default() };
        assert_eq!(Background::new(paced).next_range(None), 10_000 * PACED_RANGE, "a limit goes first");
    }

    #[test]
    fn a_range_goes_on_and_then_back_as_far_as_it_may() {
        let missing: Vec<bool> = (0..10).map(|span| span != 8).collect();
        let ten = |_| 10;
        assert_eq!(around(SpanId(3), &missing, 1000, ten), 0..8);
        assert_eq!(around(SpanId(3), &missing, 30, ten), 3..6);
        assert_eq!(around(SpanId(7), &missing, 30, ten), 5..8);
        assert_eq!(around(SpanId(7), &missing, 5, ten), 7..8, "larger than a range may be, but alone");
        assert_eq!(around(SpanId(9), &missing, 30, ten), 9..10);
    }

    #[test]
    fn amid_large_files_only_what_was_touched_is_likely() {
        let small = [true, false, false, true, false, true];
        let likely = |touched: &[u32]| {
            let touched: Vec<_> = touched.iter().copied().map(SpanId).collect();
            super::likely(&small, &touched)
        };
        assert_eq!(likely(&[]), small);
        assert_eq!(likely(&[0, 3, 9]), small, "places with small files say nothing of large ones");
        assert_eq!(likely(&[2]), [true, true, true, true, false, true]);
        assert_eq!(likely(&[4, 1]), [true; 6]);
    }

    #[test]
    fn the_neighbours_of_what_was_touched_come_first() {
        let mut missing = vec![true; 10];
        assert_eq!(nearest(&missing, &[]), Some(SpanId(0)));
        missing[5] = false;
        assert_eq!(nearest(&missing, &[SpanId(5)]), Some(SpanId(6)));
        missing[6..8].fill(false);
        assert_eq!(nearest(&missing, &[SpanId(5)]), Some(SpanId(4)));
        missing[4] = false;
        assert_eq!(nearest(&missing, &[SpanId(5)]), Some(SpanId(8)));
        assert_eq!(nearest(&missing, &[SpanId(1), SpanId(5)]), Some(SpanId(1)));
        assert_eq!(nearest(&[false; 4], &[SpanId(1)]), None);
    }
}
