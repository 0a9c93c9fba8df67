//! `read_at` against a slice of the plain tar, with a source that misbehaves.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod support;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use soci_layer::{LayerReader, LayerSpec, RangeRead, ReadErrorKind, Settings, ZtocFile};
use soci_oci::{FetchContext, FetchError, FetchErrorKind};
use soci_ztoc::{SpanId, UncompressedOffset};
use support::{Fault, Layer, PATIENCE, Rig, Script, settings, soon, tar_of, until};

async fn read(reader: &Arc<LayerReader>, at: u64, len: usize) -> Result<Vec<u8>, ReadErrorKind> {
    match reader.read_at(UncompressedOffset(at), len, soon()).await {
        Ok(chunks) => Ok(chunks.into_bytes().to_vec()),
        Err(error) => Err(error.kind()),
    }
}

fn expected(layer: &Layer, at: u64, len: usize) -> Vec<u8> {
    let start = usize::try_from(at).unwrap().min(layer.tar.len());
    layer.tar[start..start.saturating_add(len).min(layer.tar.len())].to_vec()
}

fn layer() -> Layer {
    Layer::gzip(tar_of(&[900_000, 10, 0, 400_000, 5_000, 777_777]), 64 << 10)
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        3 => Just(Fault::None),
        1 => prop_oneof![
            Just(FetchErrorKind::NotFound),
            Just(FetchErrorKind::Denied),
            Just(FetchErrorKind::Unavailable),
            Just(FetchErrorKind::Local)
        ]
        .prop_map(Fault::Refuse),
        1 => any::<u64>().prop_map(Fault::Short),
        1 => any::<u64>().prop_map(Fault::Break),
        1 => any::<u64>().prop_map(Fault::Corrupt),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn reads_are_slices_of_the_tar_whatever_the_source_does(
        plain in any::<bool>(),
        read_ahead in 0_u32..5,
        steps in prop::collection::vec((0_u64..2_200_000, 0_usize..200_000, fault(), fault()), 1..20),
    ) {
        let layer = if plain { Layer::plain(tar_of(&[900_000, 3, 1_200_000]), 50_000) } else { layer() };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let rig = Rig::new(Settings { read_ahead, ..settings() });
            let source = layer.source();
            let reader = rig.open(&layer, &source);
            for (at, len, first, second) in steps {
                source.next(first);
                source.next(second);
                let want = expected(&layer, at, len);
                if let Some(chunks) = reader.try_read(UncompressedOffset(at), len) {
                    assert_eq!(chunks.into_bytes(), want);
                }
                if let Ok(bytes) = read(&reader, at, len).await {
                    assert_eq!(bytes, want);
                }
                source.heal();
                rig.quiet().await;
                assert_eq!(read(&reader, at, len).await, Ok(want));
                rig.quiet().await;
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_readers_fetch_each_span_once_and_in_joined_ranges() {
    let layer = layer();
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    let tasks: Vec<_> = (0..16_u64)
        .map(|task| {
            let (reader, want) = (Arc::clone(&reader), expected(&layer, task * 1000, 1_000_000));
            tokio::spawn(async move { assert_eq!(read(&reader, task * 1000, 1_000_000).await, Ok(want)) })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    rig.quiet().await;
    let opened = source.opened();
    let mut bytes: Vec<_> = opened.clone();
    bytes.sort_by_key(|range| range.start);
    for pair in bytes.windows(2) {
        // Neighbouring spans may share one byte.
        assert!(pair[1].start + 1 >= pair[0].end, "{pair:?} overlap");
    }
    let spans = layer.spans.at(UncompressedOffset(1_014_999)).0 + 1;
    assert!(opened.len() < spans as usize, "{} requests for {spans} spans", opened.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequential_reader_gets_its_spans_ahead_in_few_requests() {
    let layer = layer();
    let rig = Rig::new(settings());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    let mut all = Vec::new();
    while all.len() < layer.tar.len() {
        let at = all.len() as u64;
        let piece = match reader.try_read(UncompressedOffset(at), 30_000) {
            Some(chunks) => chunks.into_bytes().to_vec(),
            None => read(&reader, at, 30_000).await.unwrap(),
        };
        all.extend(piece);
    }
    assert_eq!(all, layer.tar);
    rig.quiet().await;
    let opened = source.opened().len();
    assert!(opened * 2 < layer.spans.len() as usize, "{opened} requests for {} spans", layer.spans.len());
    let distinct: HashSet<_> = source.opened().into_iter().collect();
    assert_eq!(distinct.len(), opened, "a range was fetched twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_gives_up_cancels_nothing() {
    let layer = layer();
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    source.gate(false);
    let given_up = tokio::time::timeout(Duration::from_millis(20), read(&reader, 5, 100)).await;
    assert!(given_up.is_err());
    let other = tokio::spawn({
        let reader = Arc::clone(&reader);
        async move { read(&reader, 7, 100).await }
    });
    until("the other waits", || rig.pool.gauges().waiting >= 2).await;
    source.gate(true);
    assert_eq!(other.await.unwrap(), Ok(expected(&layer, 7, 100)));
    assert_eq!(source.opened().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_source_ends_the_read_at_its_deadline_and_the_next_one_succeeds() {
    let layer = layer();
    let rig = Rig::new(Settings { stall_timeout: Duration::from_millis(200), ..settings() });
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    source.next(Fault::Stall(1000));
    let deadline = Instant::now() + Duration::from_millis(20);
    let error = reader.read_at(UncompressedOffset(0), 100, deadline).await.unwrap_err();
    assert_eq!(error.kind(), ReadErrorKind::TimedOut);
    // The fetch goes on: it notices the stall and opens the range again.
    assert_eq!(read(&reader, 0, 100).await, Ok(expected(&layer, 0, 100)));
    assert_eq!(source.opened().len(), 2);
    rig.quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_that_stall_hold_up_no_reader_of_another_layer() {
    let (one, two) = (layer(), Layer::gzip(tar_of(&[300_000, 1, 70_000]), 32 << 10));
    // Room for one span at a time.
    let rig = Rig::new(Settings { in_flight: 1, reserve: 0, read_ahead: 0, ..settings() });
    let (stalled, sound) = (one.source(), two.source());
    let (a, b) = (rig.open(&one, &stalled), rig.open(&two, &sound));
    stalled.always(Fault::Stall(10));
    let stuck: Vec<_> = [0, 150_000]
        .map(|at| {
            tokio::spawn({
                let a = Arc::clone(&a);
                async move { read(&a, at, 100).await }
            })
        })
        .into();
    until("a share is held", || rig.pool.gauges().bytes > 0).await;
    assert_eq!(read(&b, 7, 100).await, Ok(expected(&two, 7, 100)));
    assert!(stuck.iter().all(|read| !read.is_finished()), "the others wait still");
    stuck.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_asked_for_once_more_and_never_served() {
    let layer = layer();
    // Far away a span is hashed and inflated while it arrives.
    for source in [layer.source(), Script::far(layer.blob.clone(), Duration::from_millis(5))] {
        let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
        let reader = rig.open(&layer, &source);
        source.next(Fault::Corrupt(50));
        assert_eq!(read(&reader, 0, 100).await, Ok(expected(&layer, 0, 100)));
        assert_eq!(source.opened().len(), 2);
        let far = layer.tar.len() as u64 - 100;
        for at in [50, 19_000, u64::MAX] {
            source.always(Fault::Corrupt(at));
            assert_eq!(read(&reader, far, 100).await, Err(ReadErrorKind::Integrity));
            assert_eq!(reader.try_read(UncompressedOffset(far), 100).map(|chunks| chunks.len()), None);
        }
        source.heal();
        assert_eq!(read(&reader, far, 100).await, Ok(expected(&layer, far, 100)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_one_source_are_asked_of_another() {
    let layer = layer();
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let (good, bad) = (layer.source(), layer.source());
    let _first = rig.open(&layer, &good);
    let reader = rig.open(&layer, &bad);
    bad.always(Fault::Corrupt(9));
    assert_eq!(read(&reader, 0, 100).await, Ok(expected(&layer, 0, 100)));
    assert_eq!((good.opened().len(), bad.opened().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_images_source_serves_when_the_newest_is_refused() {
    let layer = layer();
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let (old, new) = (layer.source(), layer.source());
    let first = rig.open(&layer, &old);
    let second = rig.open(&layer, &new);
    for kind in [FetchErrorKind::Denied, FetchErrorKind::NotFound] {
        new.next(Fault::Refuse(kind));
        let at = if kind == FetchErrorKind::Denied { 0 } else { 1_000_000 };
        assert_eq!(read(&second, at, 10).await, Ok(expected(&layer, at, 10)));
    }
    assert_eq!(old.opened().len(), 2);
    // With the old image gone its credentials are gone too, and the refusal is what the reader is told.
    drop(first);
    new.always(Fault::Refuse(FetchErrorKind::Denied));
    assert_eq!(read(&second, 2_000_000, 10).await, Err(ReadErrorKind::Denied));
    assert_eq!(old.opened().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_closes_ends_its_requests() {
    let layer = layer();
    let rig = Rig::new(settings());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    source.gate(false);
    let _given_up = tokio::time::timeout(Duration::from_millis(20), read(&reader, 5, 100)).await;
    reader.complete();
    drop(reader);
    rig.quiet().await;
    assert_eq!(rig.pool.gauges().layers, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_larger_than_the_budget_is_read() {
    let layer = Layer::gzip(tar_of(&[3_000_000]), 1 << 30);
    assert_eq!(layer.spans.len(), 1);
    let rig = Rig::new(Settings { in_flight: 1000, reserve: 10, recent: 0, ..settings() });
    let reader = rig.open(&layer, &layer.source());
    assert_eq!(read(&reader, 2_000_000, 5000).await, Ok(expected(&layer, 2_000_000, 5000)));
}

/// A stored zTOC that is had again as its script says.
#[derive(Debug)]
struct Mended {
    path: PathBuf,
    whole: bytes::Bytes,
    fails: AtomicBool,
    fetched: AtomicUsize,
}

#[async_trait::async_trait]
impl ZtocFile for Mended {
    fn path(&self) -> &Path {
        &self.path
    }

    async fn fetch_again(&self, _: &FetchContext) -> Result<(), FetchError> {
        self.fetched.fetch_add(1, Ordering::Relaxed);
        // As long as others have the time to come.
        tokio::time::sleep(Duration::from_millis(50)).await;
        if self.fails.load(Ordering::Relaxed) {
            return Err(FetchError::new(FetchErrorKind::Denied, "refused by the script"));
        }
        std::fs::write(&self.path, &self.whole).unwrap();
        Ok(())
    }
}

impl Mended {
    /// Opens a layer with a stored zTOC that is had again, or not as long as that `fails`.
    fn open(rig: &Rig, layer: &Layer, source: Arc<Script>, fails: bool) -> (Arc<LayerReader>, Arc<Self>) {
        let spec = layer.spec(rig.dir.path());
        let file = Arc::new(Self {
            path: spec.ztoc_file.path().to_owned(),
            whole: layer.ztoc.clone(),
            fails: AtomicBool::new(fails),
            fetched: AtomicUsize::new(0),
        });
        let spec = LayerSpec { ztoc_file: file.clone(), ..spec };
        (rig.pool.open(spec, source), file)
    }
}

/// Damages each window of a stored zTOC.
fn damage(layer: &Layer, file: &Path) {
    let mut damaged = layer.ztoc.to_vec();
    for span in 0..layer.spans.len() {
        let window = layer.spans.window(SpanId(span)).range;
        if !window.is_empty() {
            damaged[usize::try_from(window.start).unwrap() + 5] ^= 1;
        }
    }
    std::fs::write(file, damaged).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_ztoc_file_is_an_error_and_not_wrong_bytes() {
    let layer = layer();
    let rig = Rig::new(settings());
    let reader = rig.open(&layer, &layer.source());
    let spec = layer.spec(rig.dir.path());
    let file = spec.ztoc_file.path();
    damage(&layer, file);
    let at = layer.spans.uncompressed(SpanId(3)).start.0;
    assert_eq!(read(&reader, at, 10).await, Err(ReadErrorKind::Integrity));
    std::fs::write(file, &layer.ztoc).unwrap();
    assert_eq!(read(&reader, at, 10).await, Ok(expected(&layer, at, 10)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_lost_ztoc_file_is_fetched_again_once_while_readers_wait() {
    let layer = layer();
    for lost in [false, true] {
        let rig = Rig::new(settings());
        let source = layer.source();
        let (reader, file) = Mended::open(&rig, &layer, source.clone(), false);
        if lost {
            std::fs::remove_file(&file.path).unwrap();
        } else {
            damage(&layer, &file.path);
        }
        assert_eq!(read(&reader, 0, layer.tar.len()).await.unwrap(), layer.tar);
        rig.quiet().await;
        assert_eq!(file.fetched.load(Ordering::Relaxed), 1, "for all spans");
        let bytes: u64 = source.opened().iter().map(|range| range.end - range.start).sum();
        assert!(
            bytes < layer.blob.len() as u64 + 1000,
            "{bytes} bytes were fetched for a layer of {}",
            layer.blob.len()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_file_that_cannot_be_had_again_is_an_error_with_pauses_and_heals() {
    let layer = layer();
    let rig = Rig::new(settings());
    let (reader, file) = Mended::open(&rig, &layer, layer.source(), true);
    damage(&layer, &file.path);
    let at = layer.spans.uncompressed(SpanId(3)).start.0;
    for _ in 0..20 {
        assert_eq!(read(&reader, at, 10).await, Err(ReadErrorKind::Denied));
    }
    assert!(file.fetched.load(Ordering::Relaxed) < 10, "each read asks");
    file.fails.store(false, Ordering::Relaxed);
    let end = soon();
    while read(&reader, at, 10).await != Ok(expected(&layer, at, 10)) {
        assert!(Instant::now() < end, "it does not heal");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_spans_outlive_the_process_and_the_registry() {
    let layer = layer();
    let rig = Rig::new(settings());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    assert_eq!(read(&reader, 0, layer.tar.len()).await.unwrap(), layer.tar);
    rig.quiet().await;
    assert!(reader.is_complete());
    assert!(reader.fetched_bytes() >= layer.blob.len() as u64 - 100);
    drop(reader);
    let dead = Script::new(layer.blob.clone());
    dead.always(Fault::Refuse(FetchErrorKind::Unavailable));
    let cache = soci_layer::SpanCache::open(&rig.dir.path().join("cache"), Default::default()).unwrap();
    let pool = soci_layer::LayerPool::new(cache, settings(), Default::default());
    let reader = pool.open(layer.spec(rig.dir.path()), dead.clone());
    let chunks = reader.try_read(UncompressedOffset(0), layer.tar.len()).unwrap();
    assert_eq!(chunks.into_bytes(), layer.tar);
    assert_eq!(dead.opened().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tar_comes_as_a_stream() {
    use futures::TryStreamExt;
    let layer = layer();
    let rig = Rig::new(settings());
    let reader = rig.open(&layer, &layer.source());
    let pieces: Vec<_> = reader.tar().try_collect().await.unwrap();
    assert_eq!(pieces.concat(), layer.tar);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_full_disk_reads_are_served_from_memory_and_nothing_stays_behind() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts a tmpfs of 256 KiB, which needs root");
    let layer = layer();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("cache");
    std::fs::create_dir(&root).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &root, "tmpfs", flags, Some(c"size=256k")).unwrap();
    let cache = soci_layer::SpanCache::open(&root, Default::default()).unwrap();
    let pool = soci_layer::LayerPool::new(cache, settings(), Default::default());
    let reader = pool.open(layer.spec(dir.path()), layer.source());
    let mut results = Vec::new();
    for at in (0..layer.tar.len() as u64).step_by(100_000) {
        results.push((at, read(&reader, at, 100_000).await));
    }
    until("nothing is in flight", || pool.gauges().spans == 0).await;
    let temporaries = std::fs::read_dir(root.join("tmp")).unwrap().count();
    let cached: Vec<_> = pool.cache().spans(&layer.digest);
    drop((reader, pool));
    let again = soci_layer::SpanCache::open(&root, Default::default()).unwrap();
    let intact = cached.iter().all(|span| {
        let key = soci_layer::SpanKey { ztoc: layer.digest, span: *span, form: soci_layer::SpanForm::Plain };
        let range = layer.spans.uncompressed(*span);
        let len = usize::try_from(range.end.0 - range.start.0).unwrap();
        again.read(&key, 0..len).is_some_and(|bytes| bytes == expected(&layer, range.start.0, len))
    });
    drop(again);
    rustix::mount::unmount(&root, rustix::mount::UnmountFlags::DETACH).unwrap();
    for (at, result) in results {
        assert_eq!(result, Ok(expected(&layer, at, 100_000)), "at {at}");
    }
    assert_eq!(temporaries, 0);
    assert!(intact, "what stayed in the cache is not what was read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_credential_ends_all_reads_at_once_and_a_later_one_succeeds() {
    let layer = layer();
    let rig = Rig::new(settings());
    let source = layer.source();
    let reader = rig.open(&layer, &source);
    source.always(Fault::Refuse(FetchErrorKind::Denied));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let reader = Arc::clone(&reader);
            tokio::spawn(async move { read(&reader, 0, 1000).await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap(), Err(ReadErrorKind::Denied));
    }
    source.heal();
    assert_eq!(read(&reader, 0, 1000).await, Ok(expected(&layer, 0, 1000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_that_refuse_wait_for_better_credentials_together_and_after_all_were_asked() {
    let layer = layer();
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let sources = [(); 8].map(|()| layer.source());
    let readers = sources.each_ref().map(|source| rig.open(&layer, source));
    sources.iter().for_each(|source| source.always(Fault::RefusePatiently));
    sources[0].heal();
    assert_eq!(read(&readers[7], 0, 10).await, Ok(expected(&layer, 0, 10)));
    assert!(sources.iter().all(|source| source.waited().is_empty()), "the last one had it");

    sources[0].always(Fault::RefusePatiently);
    let begun = Instant::now();
    assert_eq!(read(&readers[7], 1_000_000, 10).await, Err(ReadErrorKind::Denied));
    assert!(begun.elapsed() < PATIENCE * 2, "{:?}", begun.elapsed());
    let since: Vec<_> = sources.iter().flat_map(|source| source.waited()).collect();
    assert!(since.len() == 8 && since.windows(2).all(|pair| pair[0] == pair[1]), "{since:?}");

    // The kernel asks again at once.
    assert_eq!(read(&readers[7], 1_000_000, 10).await, Err(ReadErrorKind::Denied));
    assert_eq!(sources.iter().map(|source| source.waited().len()).sum::<usize>(), 8, "nobody waits again");
    sources[3].heal();
    assert_eq!(read(&readers[7], 1_000_000, 10).await, Ok(expected(&layer, 1_000_000, 10)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_heals_while_others_wait_serves_the_read() {
    let layer = layer();
    let rig = Rig::new(Settings { read_ahead: 0, ..settings() });
    let sources = [(); 2].map(|()| layer.source());
    let readers = sources.each_ref().map(|source| rig.open(&layer, source));
    sources.iter().for_each(|source| source.always(Fault::RefusePatiently));
    let reading = tokio::spawn({
        let reader = Arc::clone(&readers[1]);
        async move { read(&reader, 0, 10).await }
    });
    until("both wait", || sources.iter().all(|source| source.waited().len() == 1)).await;
    sources[0].heal();
    assert_eq!(reading.await.unwrap(), Ok(expected(&layer, 0, 10)));
}
