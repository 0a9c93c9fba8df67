//! What a reader's range takes along of what lies behind it.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod support;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use soci_layer::{BackgroundSettings, LayerPool, Settings};
use soci_ztoc::SpanId;
use support::{Case, Fault, Layer, Rig, settings, tar_of, until};

/// How long an answer takes: its bytes come much faster, so that the line seems to carry many in that time.
const ANSWER: Duration = Duration::from_millis(30);
/// Compressed bytes that a range takes along at most: those of two spans.
const MOST: u64 = 40 << 10;

impl Case {
    /// A layer far away whose background work does not begin, since a pull is under way.
    async fn new(background: BackgroundSettings) -> Self {
        let layer = Layer::gzip(tar_of(&[1_500_000]), 64 << 10);
        let rig = Rig::new(Settings { read_ahead: 0, background, ..settings() });
        let pool = Arc::clone(&rig.pool);
        tokio::spawn(pulls(pool));
        until("pulls are under way", || rig.pool.gauges().waiting == 2).await;
        Self::open(layer, rig, ANSWER)
    }

    /// Returns the spans of the requests so far, half open.
    fn requests(&self) -> Vec<Range<u32>> {
        let spans = &self.layer.spans;
        let first = |range: &Range<u64>| {
            spans.ids().find(|id| spans.compressed(*id).start.0 == range.start).unwrap().0
        };
        let last =
            |range: &Range<u64>| spans.ids().find(|id| spans.compressed(*id).end.0 == range.end).unwrap().0;
        self.source.opened().iter().map(|range| first(range)..last(range) + 1).collect()
    }
}

/// Pulls one image after another, twice at once: none is waited for without end, and when one ends the other is there.
async fn pulls(pool: Arc<LayerPool>) {
    let pull = || async {
        loop {
            pool.before_background(tokio::time::sleep(Duration::from_secs(1))).await;
        }
    };
    tokio::join!(pull(), pull());
}

fn most() -> BackgroundSettings {
    BackgroundSettings { max_range: MOST, ..BackgroundSettings::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_spans_come_along_where_the_layer_is_to_be_completed_and_the_line_is_known() {
    let case = Case::new(most()).await;
    case.reader.complete();
    assert!(case.read(3).await);
    assert_eq!(case.requests().as_slice(), std::slice::from_ref(&(3..4)), "nothing is known of the line yet");
    assert!(case.read(9).await);
    let requests = case.requests();
    assert_eq!(requests[1].start, 9);
    let along = requests[1].len() - 1;
    let bytes: u64 = (10..requests[1].end).map(|id| case.len(id)).sum();
    assert!(along > 0 && bytes < MOST + case.len(10), "{along} spans with {bytes} bytes came along");
    // What came along is not asked for again, and what is there ends it.
    assert!(case.read(10).await);
    assert!(case.read(8).await);
    assert_eq!(case.requests().get(2..), Some(std::slice::from_ref(&(8..9))));
    until("what came along is stored", || case.rig.pool.cache().spans(&case.layer.digest).len() == 3 + along)
        .await;
    let mut once: Vec<u32> = case.requests().into_iter().flatten().collect();
    once.sort_unstable();
    let mut distinct = once.clone();
    distinct.dedup();
    assert_eq!(once, distinct, "each span was asked for once");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_along_where_it_is_not_wanted_or_the_bandwidth_is_limited() {
    let case = Case::new(most()).await;
    assert!(case.read(3).await && case.read(9).await && case.read(15).await);
    assert_eq!(case.requests(), [3..4, 9..10, 15..16], "the layer is not to be completed");

    let limited = BackgroundSettings { bytes_per_second: Some(1 << 30), ..most() };
    let case = Case::new(limited).await;
    case.reader.complete();
    assert!(case.read(3).await && case.read(9).await && case.read(15).await);
    assert_eq!(case.requests(), [3..4, 9..10, 15..16], "the bandwidth is limited");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_along_while_another_reader_waits_for_bytes() {
    let case = Case::new(most()).await;
    case.reader.complete();
    assert!(case.read(3).await);
    case.source.gate(false);
    let (one, other) = (case.read(15), case.read(9));
    let opened = async {
        until("both are asked for", || case.source.opened().len() == 3).await;
        case.source.gate(true);
    };
    let (one, other, ()) = tokio::join!(one, other, opened);
    assert!(one && other);
    let mut lengths: Vec<_> = case.requests()[1..].iter().map(ExactSizeIterator::len).collect();
    lengths.sort_unstable();
    assert_eq!(lengths[0], 1, "the one who came later took nothing along");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_behind_the_reader_is_nobodys_error_and_not_asked_for_again() {
    let case = Case::new(most()).await;
    case.reader.complete();
    assert!(case.read(3).await);
    case.source.next(Fault::Break(case.len(9) + 100));
    assert!(case.read(9).await);
    until("the range has ended", || case.rig.pool.gauges().spans == 0).await;
    assert_eq!(case.source.opened().len(), 2);
    assert!(case.read(10).await, "who wants it asks for it");
    assert_eq!(case.requests()[2].start, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_joins_what_comes_along_has_it_brought_though_it_breaks_off() {
    let case = Case::new(most()).await;
    case.reader.complete();
    assert!(case.read(3).await);
    case.source.next(Fault::Break(case.len(9) + 100));
    case.source.gate(false);
    let joined = async {
        until("the range is opened", || case.source.opened().len() == 2).await;
        let next = case.read(10);
        let open = async {
            until("both wait", || case.rig.pool.gauges().waiting >= 4).await;
            case.source.gate(true);
        };
        tokio::join!(next, open).0
    };
    let (first, next) = tokio::join!(case.read(9), joined);
    assert!(first && next);
}

impl Case {
    fn len(&self, span: u32) -> u64 {
        let range = self.layer.spans.compressed(SpanId(span));
        range.end.0 - range.start.0
    }
}
