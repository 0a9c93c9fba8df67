//! Background work while a reader comes again and again.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod support;

use std::time::Duration;

use soci_layer::{BackgroundSettings, RangeRead, Settings};
use soci_oci::FetchErrorKind;
use soci_ztoc::UncompressedOffset;
use support::{Case, Fault, Layer, Rig, Script, settings, soon, tar_of, until};

/// How long an answer takes: longer than the pause of readers that background work waits for.
const ANSWER: Duration = Duration::from_millis(40);

impl Case {
    fn new(background: BackgroundSettings) -> Self {
        let layer = Layer::gzip(tar_of(&[300_000; 10]), 64 << 10);
        let rig = Rig::new(Settings { read_ahead: 0, background, ..settings() });
        Self::open(layer, rig, ANSWER)
    }

    /// Reads a span. The layer is to be completed, which begins while that is waited for.
    async fn first_read(&self) {
        self.source.gate(false);
        let begun = async {
            until("the first is asked for", || self.source.opened().len() == 1).await;
            self.reader.complete();
            self.source.gate(true);
        };
        assert!(tokio::join!(self.read(5), begun).0);
    }

    /// Reads two spans so, one right after the other.
    async fn two_reads(&self) {
        self.first_read().await;
        assert!(self.read(30).await);
    }

    /// Returns the first spans of the requests so far.
    fn requests(&self) -> Vec<u32> {
        let spans = &self.layer.spans;
        let first = |start| spans.ids().find(|id| spans.compressed(*id).start.0 == start).unwrap().0;
        self.source.opened().iter().map(|range| first(range.start)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_next_to_a_read_is_fetched_though_the_reader_makes_no_pause() {
    let case = Case::new(BackgroundSettings::default());
    case.two_reads().await;
    let requests = case.requests();
    assert!(requests.len() > 2, "nothing but what was read is asked for: {requests:?}");
    assert_eq!(requests[0], 5);
    assert!(requests.contains(&6), "{requests:?}");
    until("the layer is complete", || case.reader.is_complete()).await;
    let mut once = case.requests();
    once.sort_unstable();
    let mut distinct = once.clone();
    distinct.dedup();
    assert_eq!(once, distinct, "each span was asked for once");
    case.rig.quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_nobodys_error() {
    let case = Case::new(BackgroundSettings::default());
    case.source.next(Fault::None);
    for _ in 0..3 {
        case.source.next(Fault::Refuse(FetchErrorKind::Unavailable));
    }
    case.first_read().await;
    until("others are asked for", || case.source.opened().len() > 3).await;
    assert!(case.read(5).await);
    until("the layer is complete", || case.reader.is_complete()).await;
    case.rig.quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_none_under_a_bandwidth_limit() {
    let limited = BackgroundSettings { bytes_per_second: Some(1), ..BackgroundSettings::default() };
    let case = Case::new(limited);
    case.two_reads().await;
    let requests = case.requests();
    let aside = requests.iter().filter(|span| ![5, 30].contains(*span)).count();
    assert!(aside <= 2, "more than the two ranges of completion itself: {requests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_does_not_answer_takes_no_room() {
    let case = Case::new(BackgroundSettings::default());
    // More than is ever on its way for a guess.
    let hanging = Layer::plain(tar_of(&[10 << 20]), 64 << 10);
    let source = Script::far(hanging.blob.clone(), Duration::from_secs(3600));
    let reader = case.rig.open(&hanging, &source);
    let waiting = tokio::spawn(async move { reader.read_at(UncompressedOffset(0), 10 << 20, soon()).await });
    until("all of it is asked for", || source.opened().len() > 32).await;
    until("it is waited for no more", || case.rig.pool.gauges().waiting == 0).await;
    case.two_reads().await;
    assert!(case.requests().len() > 2, "{:?}", case.requests());
    waiting.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_the_layer() {
    let case = Case::new(BackgroundSettings::default());
    case.first_read().await;
    let Case { rig, source, reader, .. } = case;
    source.gate(false);
    until("others are asked for", || source.opened().len() > 1).await;
    drop(reader);
    rig.quiet().await;
}
