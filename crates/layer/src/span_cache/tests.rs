use std::os::unix::fs::MetadataExt;

use super::*;

fn key(span: u32, form: SpanForm) -> SpanKey {
    SpanKey { ztoc: Digest::of(b"a layer"), span: SpanId(span), form }
}

fn plain(span: u32) -> SpanKey {
    key(span, SpanForm::Plain)
}

fn content(len: usize) -> Bytes {
    (0..len).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect::<Vec<_>>().into()
}

fn open(root: &Path, max_bytes: Option<u64>) -> Arc<SpanCache> {
    SpanCache::open(root, CacheSettings { max_bytes, max_percent: None }).unwrap()
}

fn put(cache: &SpanCache, key: &SpanKey, bytes: &Bytes, class: FetchClass) -> io::Result<Stored> {
    cache.put(key, bytes, class, || true)
}

fn temporaries(root: &Path) -> usize {
    fs::read_dir(root.join("tmp")).unwrap().count()
}

#[test]
fn any_range_comes_back_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(200_001);
    let cache = open(dir.path(), None);
    assert_eq!(cache.put(&plain(3), &bytes, FetchClass::OnDemand, || true).unwrap(), Stored::Yes);
    for cache in [Arc::clone(&cache), open(dir.path(), None)] {
        for range in [0..0, 0..1, 65_535..65_537, 0..200_001, 131_072..131_073, 200_000..200_001] {
            assert_eq!(cache.read(&plain(3), range.clone()).unwrap(), bytes[range]);
        }
        assert_eq!(cache.read_all(&plain(3)).unwrap(), bytes);
        assert!(!cache.contains(&key(3, SpanForm::Compressed)) && !cache.contains(&plain(4)));
        assert_eq!((cache.spans(&plain(3).ztoc), cache.usage()), (vec![SpanId(3)], 4096 + 200_001));
    }
    assert_eq!(fs::metadata(cache.path(&plain(3))).unwrap().mode() & 0o777, 0o600);
}

/// A cache is expendable: a disk that fails in a corner of it is no reason not to start.
#[test]
fn a_directory_that_cannot_be_listed_costs_what_is_in_it_only() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(1000);
    put(&open(dir.path(), None), &plain(0), &bytes, FetchClass::OnDemand).unwrap();
    let other = SpanKey { ztoc: Digest::of(b"another layer"), ..plain(0) };
    let broken = dir.path().join("sha256").join(other.ztoc.hex());
    std::os::unix::fs::symlink(&broken, &broken).unwrap();
    assert_ne!(fs::read_dir(&broken).unwrap_err().kind(), io::ErrorKind::NotFound);
    let cache = open(dir.path(), None);
    assert_eq!(cache.read_all(&plain(0)).unwrap(), bytes);
    assert!(!cache.contains(&other));
}

#[test]
fn a_clock_that_jumped_costs_the_order_of_eviction_only() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(50_000);
    let cache = open(dir.path(), None);
    for (span, seconds) in [(0, 0), (1, 1 << 33), (2, 1)] {
        put(&cache, &plain(span), &bytes, FetchClass::OnDemand).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let file = fs::OpenOptions::new().write(true).open(cache.path(&plain(span))).unwrap();
        file.set_modified(time).unwrap();
    }
    drop(cache);
    let cache = open(dir.path(), Some(3 * entry::file_size(50_000)));
    (0..3).for_each(|span| assert_eq!(cache.read_all(&plain(span)).unwrap(), bytes));
    // What is used now is newer than any time of a file.
    assert!(cache.read(&plain(0), 0..1).is_some() && cache.read(&plain(2), 0..1).is_some());
    put(&cache, &plain(3), &bytes, FetchClass::OnDemand).unwrap();
    assert_eq!(cache.spans(&plain(0).ztoc), [0, 2, 3].map(SpanId));
}

#[test]
fn an_entry_damaged_at_any_byte_is_a_miss_and_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(70_000);
    let cache = open(dir.path(), None);
    put(&cache, &plain(0), &bytes, FetchClass::OnDemand).unwrap();
    let file = cache.path(&plain(0));
    let good = fs::read(&file).unwrap();
    // Every byte of the header and of the checksums, and some of the payload; the padding between them means nothing.
    let header = 0..HEADER;
    for at in header.chain((4096..good.len()).step_by(997)) {
        let mut damaged = good.clone();
        damaged[at] ^= 0x10;
        fs::write(&file, damaged).unwrap();
        let cache = open(dir.path(), None);
        assert!(cache.read_all(&plain(0)).is_none(), "byte {at}");
        assert!(!file.exists() && !cache.contains(&plain(0)), "byte {at}");
        fs::write(&file, &good).unwrap();
    }
}

/// 68 bytes, and a checksum for each of two units.
const HEADER: usize = 68 + 2 * 4;

#[test]
fn an_entry_cut_at_any_byte_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(70_000);
    let cache = open(dir.path(), None);
    put(&cache, &plain(0), &bytes, FetchClass::OnDemand).unwrap();
    let file = cache.path(&plain(0));
    let good = fs::read(&file).unwrap();
    for len in (0..100).chain((100..good.len()).step_by(1009)) {
        fs::write(&file, &good[..len]).unwrap();
        let cache = open(dir.path(), None);
        assert!(cache.read_all(&plain(0)).is_none(), "{len} bytes");
        // What is there in full may be served: here the first unit.
        fs::write(&file, &good[..len]).unwrap();
        if let Some(part) = open(dir.path(), None).read(&plain(0), 0..10) {
            assert_eq!(part, bytes[..10]);
        }
    }
}

#[test]
fn without_a_directory_for_what_is_being_written_it_is_made_and_layers_go_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), None);
    let bytes = content(1000);
    for _ in 0..2 {
        fs::remove_dir(dir.path().join("tmp")).unwrap();
        assert_eq!(put(&cache, &plain(0), &bytes, FetchClass::OnDemand).unwrap(), Stored::Yes);
        assert_eq!(cache.read_all(&plain(0)).unwrap(), bytes);
        fs::remove_dir(dir.path().join("tmp")).unwrap();
        cache.remove_layer(&plain(0).ztoc).unwrap();
        assert!(!cache.contains(&plain(0)) && cache.layers().is_empty() && cache.usage() == 0);
        assert!(!cache.path(&plain(0)).exists());
        fs::create_dir(dir.path().join("tmp")).unwrap();
    }
}

#[test]
fn an_entry_under_the_name_of_another_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), None);
    put(&cache, &plain(0), &content(10), FetchClass::OnDemand).unwrap();
    fs::copy(cache.path(&plain(0)), cache.path(&plain(1))).unwrap();
    fs::copy(cache.path(&plain(0)), cache.path(&key(0, SpanForm::Compressed))).unwrap();
    let cache = open(dir.path(), None);
    assert!(cache.read_all(&plain(1)).is_none());
    assert!(cache.read_all(&key(0, SpanForm::Compressed)).is_none());
    assert!(cache.read_all(&plain(0)).is_some());
}

#[test]
fn the_least_recently_used_goes_and_background_work_evicts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let one = entry::file_size(50_000);
    let cache = open(dir.path(), Some(3 * one));
    let bytes = content(50_000);
    for span in 0..3 {
        assert_eq!(put(&cache, &plain(span), &bytes, FetchClass::ReadAhead).unwrap(), Stored::Yes);
    }
    assert!(!cache.has_room(1, FetchClass::Background));
    assert_eq!(put(&cache, &plain(3), &bytes, FetchClass::Background).unwrap(), Stored::NoRoom);
    assert_eq!((cache.usage(), temporaries(dir.path())), (3 * one, 0));
    // The first is used, the second is being read: the third goes.
    assert!(cache.read(&plain(0), 0..1).is_some());
    let held = cache.entry(&plain(1)).unwrap();
    assert!(cache.read(&plain(0), 0..1).is_some());
    assert_eq!(put(&cache, &plain(3), &bytes, FetchClass::OnDemand).unwrap(), Stored::Yes);
    assert_eq!(cache.spans(&plain(0).ztoc), [0, 1, 3].map(SpanId));
    assert_eq!(put(&cache, &plain(4), &bytes, FetchClass::OnDemand).unwrap(), Stored::Yes);
    assert_eq!(cache.spans(&plain(0).ztoc), [1, 3, 4].map(SpanId));
    drop(held);
    assert_eq!(put(&cache, &plain(5), &bytes, FetchClass::ReadAhead).unwrap(), Stored::Yes);
    assert_eq!(cache.spans(&plain(0).ztoc), [3, 4, 5].map(SpanId));
    assert!(cache.usage() <= 3 * one);
    let files = fs::read_dir(cache.layer_dir(&plain(0).ztoc)).unwrap().count();
    assert_eq!(files, 3);
}

#[test]
fn what_nobody_asked_for_goes_first_and_does_not_fill_what_readers_made_room_in() {
    let dir = tempfile::tempdir().unwrap();
    let one = entry::file_size(1000);
    let cache = open(dir.path(), Some(128 * one));
    let bytes = content(1000);
    assert_eq!(put(&cache, &plain(0), &bytes, FetchClass::OnDemand).unwrap(), Stored::Yes);
    let stored = (1..).take_while(|span| {
        assert_eq!(cache.has_room(one, FetchClass::Background), *span < 124, "span {span}");
        put(&cache, &plain(*span), &bytes, FetchClass::Background).unwrap() == Stored::Yes
    });
    assert_eq!(stored.count(), 123, "a part is left free");
    for span in 200..300 {
        assert_eq!(put(&cache, &plain(span), &bytes, FetchClass::OnDemand).unwrap(), Stored::Yes);
        assert!(!cache.has_room(one, FetchClass::Background));
    }
    let spans = cache.spans(&plain(0).ztoc);
    assert!(spans.contains(&SpanId(0)), "what was read stays, though it is the oldest");
    assert!((200..300).all(|span| spans.contains(&SpanId(span))));
}

#[test]
fn a_prefetch_list_takes_the_place_of_what_nobody_asked_for_only() {
    let dir = tempfile::tempdir().unwrap();
    let one = entry::file_size(1000);
    let cache = open(dir.path(), Some(64 * one));
    let bytes = content(1000);
    for span in 0..10 {
        assert_eq!(put(&cache, &plain(span), &bytes, FetchClass::OnDemand).unwrap(), Stored::Yes);
    }
    let fill = (100..).take_while(|span| {
        put(&cache, &plain(*span), &bytes, FetchClass::Background).unwrap() == Stored::Yes
    });
    assert_eq!(fill.count(), 52);
    let stored = (200..).take_while(|span| {
        let room = cache.has_room(one, FetchClass::Prefetch);
        let stored = put(&cache, &plain(*span), &bytes, FetchClass::Prefetch).unwrap();
        assert_eq!(room, stored == Stored::Yes, "span {span}");
        room
    });
    assert_eq!(stored.count(), 54, "all but what was read");
    let spans = cache.spans(&plain(0).ztoc);
    assert!((0..10).all(|span| spans.contains(&SpanId(span))), "{spans:?}");
    // A reader comes before both.
    assert_eq!(put(&cache, &plain(300), &bytes, FetchClass::OnDemand).unwrap(), Stored::Yes);
}

#[test]
fn a_limit_in_percent_is_of_what_is_free_or_ours_and_a_lower_one_evicts_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), None);
    assert_eq!(cache.limit(), None);
    (0..10).for_each(|span| {
        put(&cache, &plain(span), &content(50_000), FetchClass::OnDemand).unwrap();
    });
    drop(cache);
    let percent = |max_percent| {
        let settings = CacheSettings { max_bytes: None, max_percent: Some(max_percent) };
        SpanCache::open(dir.path(), settings).unwrap()
    };
    let (half, all) = (percent(50).limit().unwrap(), percent(100).limit().unwrap());
    // Others may write to the disk meanwhile.
    assert!(half > all / 4 && half < all / 4 * 3, "{half} of {all}");
    let one = entry::file_size(50_000);
    let cache = open(dir.path(), Some(3 * one));
    assert_eq!(cache.usage(), 3 * one);
}

#[test]
fn a_span_larger_than_the_limit_evicts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), Some(10_000));
    put(&cache, &plain(0), &content(10), FetchClass::OnDemand).unwrap();
    assert_eq!(put(&cache, &plain(1), &content(10_000), FetchClass::OnDemand).unwrap(), Stored::NoRoom);
    assert!(cache.contains(&plain(0)));
}

#[test]
fn a_removed_layer_leaves_nothing_and_late_spans_of_it_are_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), None);
    put(&cache, &plain(0), &content(10), FetchClass::OnDemand).unwrap();
    let other = SpanKey { ztoc: Digest::of(b"another layer"), ..plain(0) };
    put(&cache, &other, &content(10), FetchClass::OnDemand).unwrap();
    cache.remove_layer(&plain(0).ztoc).unwrap();
    let late = cache.put(&plain(1), &content(10), FetchClass::OnDemand, || false).unwrap();
    assert_eq!(late, Stored::Unwanted);
    assert!(!cache.layer_dir(&plain(0).ztoc).exists());
    assert_eq!((cache.layers(), temporaries(dir.path())), (vec![other.ztoc], 0));
    assert_eq!(cache.layer_usage(&plain(0).ztoc), (0, 0));
}

#[test]
fn what_a_killed_process_was_writing_is_gone_after_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), None));
    fs::write(dir.path().join("tmp/7"), b"half a span").unwrap();
    fs::write(dir.path().join("tmp/8"), b"").unwrap();
    let cache = open(dir.path(), None);
    assert_eq!((temporaries(dir.path()), cache.usage()), (0, 0));
}

#[test]
fn foreign_files_in_the_cache_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let layer = dir.path().join("sha256").join("ab".repeat(32));
    fs::create_dir_all(&layer).unwrap();
    fs::write(layer.join("README"), b"?").unwrap();
    fs::write(dir.path().join("sha256/x"), b"?").unwrap();
    let cache = open(dir.path(), None);
    assert_eq!((cache.usage(), cache.layers().len()), (0, 0));
    assert!(layer.join("README").exists());
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing_behind() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts a tmpfs of 1 MiB, which needs root");
    let dir = tempfile::tempdir().unwrap();
    rustix::mount::mount("tmpfs", dir.path(), "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=1m"))
        .unwrap();
    let cache = open(&dir.path().join("cache"), None);
    let bytes = content(400_000);
    assert_eq!(put(&cache, &plain(0), &bytes, FetchClass::ReadAhead).unwrap(), Stored::Yes);
    assert_eq!(put(&cache, &plain(1), &bytes, FetchClass::ReadAhead).unwrap(), Stored::Yes);
    let error = put(&cache, &plain(2), &bytes, FetchClass::ReadAhead).unwrap_err();
    let left = temporaries(&dir.path().join("cache"));
    let spans = cache.spans(&plain(0).ztoc);
    let readable = cache.read_all(&plain(1));
    // What a reader needs pushes out what was used least recently.
    let demanded = put(&cache, &plain(3), &bytes, FetchClass::OnDemand);
    drop(cache);
    rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!((error.kind(), left, spans), (io::ErrorKind::StorageFull, 0, vec![SpanId(0), SpanId(1)]));
    assert_eq!(readable, Some(bytes));
    assert_eq!(demanded.unwrap(), Stored::Yes);
}

#[test]
fn a_quota_that_is_used_up_is_a_full_disk_and_damage_is_not() {
    use rustix::io::Errno;
    for (errno, full) in
        [(Errno::NOSPC, true), (Errno::DQUOT, true), (Errno::IO, false), (Errno::ROFS, false)]
    {
        assert_eq!(is_full(&errno.into()), full, "{errno:?}");
    }
}
