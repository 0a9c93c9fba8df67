//! Background completion and prefetch: order, fairness, yielding, ends.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod support;

use std::ops::Range;
use std::time::Duration;

use soci_layer::{BackgroundSettings, CacheSettings, RangeRead, Settings};
use soci_oci::FetchErrorKind;
use soci_ztoc::{SpanId, UncompressedOffset};
use support::{Fault, Layer, Rig, settings, soon, tar_of, until};

fn layer(seed: usize) -> Layer {
    Layer::gzip(tar_of(&[1_500_000 + seed, 700_000]), 64 << 10)
}

fn small_ranges() -> Settings {
    let background = BackgroundSettings { max_range: 40 << 10, ..BackgroundSettings::default() };
    Settings { read_ahead: 0, background, ..settings() }
}

/// Returns the spans that a range of the blob holds, by its first byte.
fn first_span(layer: &Layer, range: &Range<u64>) -> u32 {
    layer.spans.ids().find(|id| layer.spans.compressed(*id).end.0 > range.start + 1).unwrap().0
}

async fn complete(reader: &soci_layer::LayerReader) {
    until("the layer is complete", || reader.is_complete()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_completed_in_joined_ranges_each_span_once_and_then_nothing_runs() {
    let layer = layer(0);
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    reader.complete();
    complete(&reader).await;
    rig.quiet().await;
    let mut opened = source.opened();
    assert!(opened.len() * 3 < layer.spans.len() as usize, "{} requests", opened.len());
    opened.sort_by_key(|range| range.start);
    assert!(opened.windows(2).all(|pair| pair[1].start + 1 >= pair[0].end));
    // What is complete is read without the network.
    source.always(Fault::Refuse(FetchErrorKind::Unavailable));
    let chunks = reader.read_at(UncompressedOffset(0), layer.tar.len(), soon()).await.unwrap();
    assert_eq!(chunks.into_bytes(), layer.tar);
    // Asked again, there is nothing to do.
    let requests = source.opened().len();
    reader.complete();
    rig.quiet().await;
    assert_eq!(source.opened().len(), requests);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_before_the_last_read_is_joined_too() {
    let layer = layer(0);
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    reader.read_at(UncompressedOffset(layer.tar.len() as u64 - 100), 100, soon()).await.unwrap();
    rig.quiet().await;
    reader.complete();
    complete(&reader).await;
    let requests = source.opened().len();
    assert!(requests * 3 < layer.spans.len() as usize, "{requests} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completed_span_is_stored_compressed_and_inflated_when_it_is_read() {
    let layer = layer(0);
    let rig = Rig::new(settings());
    let reader = rig.open(&layer, &layer.source());
    reader.complete();
    complete(&reader).await;
    rig.quiet().await;
    let compressed = rig.pool.cache().usage();
    assert!(
        compressed < layer.tar.len() as u64 * 3 / 4,
        "{compressed} bytes for a tar of {}",
        layer.tar.len()
    );
    reader.read_at(UncompressedOffset(0), layer.tar.len(), soon()).await.unwrap();
    rig.quiet().await;
    assert!(rig.pool.cache().usage() > layer.tar.len() as u64);
    assert!(reader.try_read(UncompressedOffset(100), layer.tar.len()).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_next_to_the_last_read_comes_first() {
    let layer = layer(0);
    let rig = Rig::new(small_ranges());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    let at = layer.tar.len() as u64 / 2;
    reader.read_at(UncompressedOffset(at), 100, soon()).await.unwrap();
    rig.quiet().await;
    let touched = layer.spans.at(UncompressedOffset(at)).0;
    reader.complete();
    complete(&reader).await;
    let order: Vec<_> = source.opened().iter().map(|range| first_span(&layer, range)).collect();
    assert_eq!(order[0], touched);
    // Two ranges are on their way at once, so either may be opened first.
    assert!(order[1..3].contains(&(touched + 1)), "touched {touched}, then {order:?}");
    let last = *order.last().unwrap();
    assert!(last == 0 || last < touched, "{order:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_small_files_are_comes_last_unless_it_was_touched() {
    // A small file on either side of a large one.
    let layer = Layer::gzip(tar_of(&[300_000, 1_500_000, 300_000]), 64 << 10);
    let small: Vec<u32> =
        layer.spans.ids().filter(|id| layer.spans.has_small_files(*id)).map(|id| id.0).collect();
    let count = layer.spans.len() as usize;
    assert!(small.len() > 6 && small.len() < count - 10, "{small:?}");
    for (at, touched) in [(150_000_u64, false), (1_000_000, true)] {
        let rig = Rig::new(small_ranges());
        let source = layer.source();
        let reader = rig.open(&layer, &source);
        reader.read_at(UncompressedOffset(at), 100, soon()).await.unwrap();
        rig.quiet().await;
        reader.complete();
        complete(&reader).await;
        let order: Vec<_> = source.opened().iter().map(|range| first_span(&layer, range)).collect();
        // Beyond the read itself and the two ranges that are on their way at once.
        let first = order.iter().skip(3).position(|span| !small.contains(span)).unwrap();
        let last = order.iter().skip(3).rposition(|span| small.contains(span)).unwrap();
        assert_eq!(first < last, touched, "{order:?}, of which {small:?} have small files");
    }
}

// On one thread, so that both layers are queued before the first lane looks.
#[tokio::test]
async fn layers_take_turns() {
    let (one, two) = (layer(0), layer(1000));
    let rig = Rig::new(small_ranges());
    let (first, second) = (one.source(), two.source());
    let (a, b) = (rig.open(&one, &first), rig.open(&two, &second));
    first.gate(false);
    second.gate(false);
    a.complete();
    b.complete();
    until("both have a range on its way", || !first.opened().is_empty() && !second.opened().is_empty()).await;
    assert_eq!((first.opened().len(), second.opened().len()), (1, 1));
    first.gate(true);
    second.gate(true);
    complete(&a).await;
    complete(&b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn background_work_steps_aside_while_a_reader_waits() {
    let (one, two) = (layer(0), layer(1000));
    let rig = Rig::new(small_ranges());
    let (background, demand) = (one.source(), two.source());
    let (a, b) = (rig.open(&one, &background), rig.open(&two, &demand));
    demand.gate(false);
    let waiting =
        tokio::spawn(async move { b.read_at(UncompressedOffset(0), 10, soon()).await.map(|c| c.len()) });
    until("the reader waits", || rig.pool.gauges().waiting > 0 && !demand.opened().is_empty()).await;
    a.complete();
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
    assert_eq!(background.opened().len(), 0);
    demand.gate(true);
    assert_eq!(waiting.await.unwrap().unwrap(), 10);
    complete(&a).await;
}

// Both kinds: a registry that sends nothing more, and one that answers at once that it has nothing.
#[tokio::test(flavor = "multi_thread")]
async fn background_work_goes_on_while_somebody_waits_for_a_source_that_gives_nothing() {
    for fault in [Fault::Stall(10), Fault::Refuse(FetchErrorKind::Unavailable)] {
        let (one, two) = (layer(0), layer(1000));
        let rig = Rig::new(small_ranges());
        let (background, demand) = (one.source(), two.source());
        let (a, b) = (rig.open(&one, &background), rig.open(&two, &demand));
        demand.always(fault);
        // A program that tries again and again.
        let reads =
            tokio::spawn(async move { while b.read_at(UncompressedOffset(0), 10, soon()).await.is_err() {} });
        until("the reader waits", || !demand.opened().is_empty()).await;
        a.complete();
        complete(&a).await;
        assert!(!reads.is_finished());
        reads.abort();
    }
}

// Spans larger than all that may be in flight are the extreme of it: a share for one is granted alone.
#[tokio::test(flavor = "multi_thread")]
async fn what_background_work_holds_while_it_is_aside_is_not_missing_to_readers() {
    let (one, two) = (layer(0), layer(1000));
    let rig = Rig::new(Settings { in_flight: 1, reserve: 0, read_ahead: 0, ..small_ranges() });
    let (background, demand) = (one.source(), two.source());
    let (a, b) = (rig.open(&one, &background), rig.open(&two, &demand));
    background.gate(false);
    a.complete();
    until("background work holds a share", || rig.pool.gauges().bytes > 0).await;
    let read = b.read_at(UncompressedOffset(0), 10, soon()).await.unwrap();
    assert_eq!(read.into_bytes(), two.tar[..10]);
    assert!(rig.pool.gauges().bytes > 0, "it still holds the share");
    background.gate(true);
    complete(&a).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_takes_over_a_background_range() {
    let layer = layer(0);
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    source.gate(false);
    reader.complete();
    until("a range is on its way", || !source.opened().is_empty()).await;
    let requests = source.opened().len();
    let other = std::sync::Arc::clone(&reader);
    let waiting = tokio::spawn(async move { other.read_at(UncompressedOffset(10), 600, soon()).await });
    until("the reader waits", || rig.pool.gauges().waiting > 0).await;
    source.gate(true);
    assert_eq!(waiting.await.unwrap().unwrap().into_bytes(), layer.tar[10..610]);
    complete(&reader).await;
    let again = source.opened()[requests..].iter().any(|range| range.start < 100);
    assert!(!again, "the first range was fetched twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_layer_is_left_at_once_and_asks_for_nothing_more() {
    let layer = layer(0);
    let rig = Rig::new(small_ranges());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    source.gate(false);
    reader.complete();
    until("a range is on its way", || !source.opened().is_empty()).await;
    drop(reader);
    rig.quiet().await;
    let requests = source.opened().len();
    source.gate(true);
    rig.quiet().await;
    assert_eq!((source.opened().len(), rig.pool.gauges().layers), (requests, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_range_is_tried_again_and_the_layer_is_never_given_up() {
    let layer = layer(0);
    let background = BackgroundSettings { backoff: Duration::from_millis(1), ..small_ranges().background };
    let rig = Rig::new(Settings { background, ..small_ranges() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    for kind in [FetchErrorKind::Denied, FetchErrorKind::Unavailable, FetchErrorKind::NotFound] {
        source.next(Fault::Refuse(kind));
    }
    reader.complete();
    complete(&reader).await;
}

/// Also where nothing but the list is fetched.
#[tokio::test(flavor = "multi_thread")]
async fn a_listed_span_that_failed_stays_in_front() {
    let layer = layer(0);
    let background = BackgroundSettings { backoff: Duration::from_millis(1), ..small_ranges().background };
    let rig = Rig::new(Settings { background, ..small_ranges() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    for kind in [FetchErrorKind::Unavailable, FetchErrorKind::Denied] {
        source.next(Fault::Refuse(kind));
    }
    reader.prefetch([5, 6, 9].map(SpanId));
    until("the listed spans are there", || {
        let spans = rig.pool.cache().spans(&layer.digest);
        [5, 6, 9].iter().all(|span| spans.contains(&SpanId(*span)))
    })
    .await;
    rig.quiet().await;
    assert_eq!(rig.pool.cache().spans(&layer.digest).len(), 3, "nothing else");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_that_is_wrong_does_not_keep_the_rest_away() {
    let layer = layer(0);
    let rig = Rig::new(small_ranges());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    // Twice wrong: the span is left out until the sources change.
    source.next(Fault::Corrupt(0));
    source.next(Fault::Corrupt(0));
    source.next(Fault::Corrupt(0));
    source.next(Fault::Corrupt(0));
    reader.complete();
    let total = layer.spans.len() as usize;
    until("nearly all is there", || rig.pool.cache().spans(&layer.digest).len() + 4 >= total).await;
    rig.quiet().await;
    let chunks = reader.read_at(UncompressedOffset(0), layer.tar.len(), soon()).await.unwrap();
    assert_eq!(chunks.into_bytes(), layer.tar);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_size_limit_background_work_stops_and_evicts_nothing() {
    let layer = layer(0);
    let cache = CacheSettings { max_bytes: Some(layer.tar.len() as u64 / 4), max_percent: None };
    let rig = Rig::with_cache(small_ranges(), cache);
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    reader.read_at(UncompressedOffset(0), 100, soon()).await.unwrap();
    rig.quiet().await;
    reader.complete();
    until("the cache is full", || rig.pool.cache().usage() > layer.tar.len() as u64 / 6).await;
    rig.quiet().await;
    let requests = source.opened().len();
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
    assert!(source.opened().len() <= requests + 1, "background work goes on although nothing can be stored");
    assert!(reader.try_read(UncompressedOffset(0), 100).is_some(), "what was read is gone");
    assert!(rig.pool.cache().usage() <= layer.tar.len() as u64 / 4);
    // A reader is served at the limit, and makes room.
    let chunks = reader.read_at(UncompressedOffset(0), layer.tar.len(), soon()).await.unwrap();
    assert_eq!(chunks.into_bytes(), layer.tar);
}

#[tokio::test(flavor = "multi_thread")]
async fn listed_spans_come_first_inflated_and_hostile_ids_are_left_out() {
    let layer = layer(0);
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    let listed = [5, 6, 7, 2].map(SpanId);
    let hostile = [SpanId(u32::MAX), SpanId(layer.spans.len()), SpanId(5)];
    assert_eq!(reader.prefetch(listed.into_iter().chain(hostile)), 4);
    until("the list is there", || rig.pool.cache().spans(&layer.digest).len() == 4).await;
    rig.quiet().await;
    assert_eq!(rig.pool.cache().spans(&layer.digest), [2, 5, 6, 7].map(SpanId));
    let at = layer.spans.uncompressed(SpanId(6)).start;
    assert!(reader.try_read(at, 100).is_some());
    assert!(source.opened().len() == 2, "{:?}", source.opened());
    assert_eq!(reader.prefetch((0..u32::MAX).map(SpanId)), layer.spans.len() as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn completion_goes_on_after_a_restart_where_it_ended() {
    let layer = layer(0);
    let rig = Rig::new(small_ranges());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    let half = layer.tar.len() / 2;
    reader.read_at(UncompressedOffset(0), half, soon()).await.unwrap();
    rig.quiet().await;
    drop(reader);
    let cache = soci_layer::SpanCache::open(&rig.dir.path().join("cache"), CacheSettings::default()).unwrap();
    let pool = soci_layer::LayerPool::new(cache, small_ranges(), soci_layer::Meters::default());
    let later = layer.source();
    let reader = pool.open(layer.spec(rig.dir.path()), later.clone());
    reader.complete();
    complete(&reader).await;
    let there = layer.spans.at(UncompressedOffset(half as u64 - 1)).0;
    assert!(later.opened().iter().all(|range| first_span(&layer, range) > there));
}

// On one thread, so that all layers are queued before the first lane looks.
#[tokio::test]
async fn an_image_with_many_layers_does_not_outweigh_one_with_few() {
    let rig = Rig::new(small_ranges());
    let (large, small) = (soci_oci::Digest::of(b"large"), soci_oci::Digest::of(b"small"));
    let many: Vec<Layer> = (1..6).map(|seed| layer(seed * 1000)).collect();
    let sources: Vec<_> = many.iter().map(Layer::source).collect();
    let readers: Vec<_> = many.iter().zip(&sources).map(|(layer, source)| rig.open(layer, source)).collect();
    let few = layer(0);
    let source = few.source();
    let reader = rig.open(&few, &source);
    sources.iter().chain([&source]).for_each(|source| source.gate(false));
    readers.iter().for_each(|reader| reader.complete_for(&large));
    reader.complete_for(&small);
    // Two ranges are on their way at once: one is the small image's, though it came last.
    let opened = || sources.iter().map(|source| source.opened().len()).sum::<usize>();
    until("both images have a range on its way", || opened() > 0 && !source.opened().is_empty()).await;
    assert_eq!((opened(), source.opened().len()), (1, 1));
    sources.iter().chain([&source]).for_each(|source| source.gate(true));
    complete(&reader).await;
    for reader in &readers {
        complete(reader).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bandwidth_limit_holds_for_background_work() {
    let layer = layer(0);
    let rate = layer.spans.compressed_size();
    let background =
        BackgroundSettings { bytes_per_second: Some(rate), max_range: 40 << 10, ..Default::default() };
    let rig = Rig::new(Settings { read_ahead: 0, background, ..settings() });
    let reader = rig.open(&layer, &layer.source());
    let begun = std::time::Instant::now();
    reader.complete();
    complete(&reader).await;
    // One second's worth of bytes; the last piece is taken without waiting for what follows.
    assert!(begun.elapsed() > Duration::from_millis(700), "complete after {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_joins_a_slow_background_range_is_not_slowed() {
    let layer = layer(0);
    // A byte a second: nothing would arrive before the reader's deadline.
    let background =
        BackgroundSettings { bytes_per_second: Some(1), max_range: 1 << 20, ..Default::default() };
    let rig = Rig::new(Settings { read_ahead: 0, background, ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    reader.complete();
    until("a range is on its way", || !source.opened().is_empty()).await;
    let chunks = reader.read_at(UncompressedOffset(0), layer.tar.len(), soon()).await.unwrap();
    assert_eq!(chunks.into_bytes(), layer.tar);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_closed_by_force_stores_nothing_more_and_opens_anew() {
    let layer = layer(0);
    let rig = Rig::new(small_ranges());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    source.gate(false);
    reader.complete();
    until("a range is on its way", || !source.opened().is_empty()).await;
    rig.pool.close(&layer.digest);
    rig.pool.cache().remove_layer(&layer.digest).unwrap();
    source.gate(true);
    let again = rig.open(&layer, &layer.source());
    // The old reader goes after the new one came, and takes nothing of it along.
    drop(reader);
    rig.quiet().await;
    assert_eq!(rig.pool.cache().spans(&layer.digest), []);
    assert_eq!(rig.pool.gauges().layers, 1);
    again.complete();
    complete(&again).await;
}
