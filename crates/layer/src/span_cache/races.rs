//! Readers, writers, eviction and removal at once, in orders that shuttle chooses.

use std::fs;
use std::sync::Arc;

use shuttle::thread;

use super::*;

const SIZE: usize = 1000;

fn key(span: u32) -> SpanKey {
    SpanKey { ztoc: Digest::of(b"layer"), span: SpanId(span), form: SpanForm::Plain }
}

fn content(span: u32) -> Vec<u8> {
    let byte = u8::try_from(span).unwrap();
    vec![byte; SIZE]
}

/// Bytes of all files beneath a directory.
fn on_disk(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => on_disk(&entry.path()),
            Ok(data) => data.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Runs two writers of spans that do not all fit, a reader and, if `removes`, one who removes the layer.
fn run(removes: bool) {
    let dir = tempfile::tempdir().unwrap();
    let limit = 2 * entry::file_size(SIZE) + 10;
    let cache =
        SpanCache::open(dir.path(), CacheSettings { max_bytes: Some(limit), max_percent: None }).unwrap();
    let mut threads = Vec::new();
    for spans in [[0, 1], [2, 3]] {
        let cache = Arc::clone(&cache);
        threads.push(thread::spawn(move || {
            for span in spans {
                let stored = cache.put(&key(span), &content(span), FetchClass::OnDemand, || true).unwrap();
                assert!(matches!(stored, Stored::Yes | Stored::NoRoom));
                assert!(cache.usage() <= limit, "{} of {limit} bytes", cache.usage());
            }
        }));
    }
    let reader = Arc::clone(&cache);
    threads.push(thread::spawn(move || {
        for span in 0..4 {
            if let Some(bytes) = reader.read(&key(span), 10..SIZE) {
                assert_eq!(bytes, content(span)[10..]);
            }
        }
    }));
    if removes {
        let cache = Arc::clone(&cache);
        threads.push(thread::spawn(move || cache.remove_layer(&key(0).ztoc).unwrap()));
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(cache.usage(), on_disk(dir.path()), "the index and the disk disagree");
    assert!(cache.usage() <= limit);
    assert_eq!(cache.index.lock().coming, 0);
}

#[test]
fn the_limit_holds_for_writers_side_by_side_and_the_index_is_true() {
    shuttle::check_random(|| run(false), 1500);
}

#[test]
fn a_layer_that_is_removed_meanwhile_leaves_no_file_that_the_index_does_not_know() {
    shuttle::check_random(|| run(true), 1500);
}
