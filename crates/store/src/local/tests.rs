use std::time::{Duration, Instant, SystemTime};

use soci_oci::{FetchClass, FetchContext, FetchError, FetchErrorKind};

use super::*;

fn store() -> (tempfile::TempDir, LocalStore) {
    let root = tempfile::tempdir().unwrap();
    let store = LocalStore::open(root.path()).unwrap();
    (root, store)
}

fn descriptor(bytes: &[u8]) -> Descriptor {
    Descriptor::of("application/octet-stream", bytes)
}

fn ingests(store: &LocalStore) -> usize {
    fs::read_dir(store.layout().join("ingest")).unwrap().count()
}

fn context() -> FetchContext {
    FetchContext::new(Instant::now() + Duration::from_secs(10), FetchClass::OnDemand)
}

#[tokio::test]
async fn content_is_read_back_and_listed() {
    let (root, store) = store();
    let bytes = Bytes::from_static(b"content");
    let descriptor = descriptor(&bytes);
    assert_eq!(store.read(&descriptor.digest, 100).await.unwrap(), None);
    store.put(&descriptor, bytes.clone(), &[]).await.unwrap();
    store.put(&descriptor, bytes.clone(), &[]).await.unwrap();
    assert_eq!(store.read(&descriptor.digest, 7).await.unwrap(), Some(bytes));
    let walked = store.walk().await.unwrap();
    assert_eq!(walked.len(), 1);
    assert_eq!((walked[0].digest, walked[0].size), (descriptor.digest, 7));
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(store.path(&descriptor.digest)).unwrap());
    assert_eq!(mode & 0o7777, 0o444);
    let again = LocalStore::open(root.path()).unwrap();
    assert!(again.info(&descriptor.digest).await.unwrap().is_some());
    assert!(again.delete(&descriptor.digest).await.unwrap());
    assert!(!again.delete(&descriptor.digest).await.unwrap());
    assert_eq!(store.info(&descriptor.digest).await.unwrap(), None);
}

#[tokio::test]
async fn other_content_is_refused_and_leaves_nothing_behind() {
    let (_root, store) = store();
    let wanted = descriptor(b"content");
    for bytes in [&b"c0ntent"[..], b"conten", b"content+"] {
        let error = store.put(&wanted, Bytes::copy_from_slice(bytes), &[]).await.unwrap_err();
        assert!(matches!(error, StoreError::Mismatch { .. }), "{error}");
    }
    assert_eq!(store.walk().await.unwrap(), []);
    assert_eq!(ingests(&store), 0);
}

#[tokio::test]
async fn a_stream_is_stored_whole_or_not_at_all() {
    let (_root, store) = store();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let wanted = descriptor(&bytes);
    let pieces = || bytes.chunks(10_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect::<Vec<_>>();
    let mut broken = pieces();
    broken[200] = Err(FetchError::new(FetchErrorKind::Unavailable, "reset"));
    let error = store.put_stream(&wanted, futures::stream::iter(broken).boxed(), &[]).await.unwrap_err();
    assert!(matches!(error, StoreError::Source { .. }), "{error}");
    assert_eq!(store.info(&wanted.digest).await.unwrap(), None);
    store.put_stream(&wanted, futures::stream::iter(pieces()).boxed(), &[]).await.unwrap();
    assert_eq!(store.read(&wanted.digest, 3_000_000).await.unwrap().unwrap(), bytes);
    assert_eq!(ingests(&store), 0);
}

#[tokio::test]
async fn an_interrupted_write_is_ignored_and_cleaned_when_its_writer_is_gone() {
    let (root, store) = store();
    let wanted = descriptor(b"content");
    let path = store.layout().join(format!("ingest/{}_0", wanted.digest.hex()));
    fs::write(&path, b"conte").unwrap();
    assert_eq!(store.info(&wanted.digest).await.unwrap(), None);
    LocalStore::open(root.path()).unwrap();
    assert_eq!(ingests(&store), 1, "a file just created may be about to be locked");
    let old = SystemTime::now() - Duration::from_secs(3600);
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(old).unwrap();
    file.lock().unwrap();
    LocalStore::open(root.path()).unwrap();
    assert_eq!(ingests(&store), 1, "a locked file has a living writer");
    drop(file);
    LocalStore::open(root.path()).unwrap();
    assert_eq!(ingests(&store), 0);
    store.put(&wanted, Bytes::from_static(b"content"), &[]).await.unwrap();
    assert!(store.info(&wanted.digest).await.unwrap().is_some());
}

#[tokio::test]
async fn damaged_content_is_never_returned() {
    let (_root, store) = store();
    let wanted = descriptor(b"content");
    store.put(&wanted, Bytes::from_static(b"content"), &[]).await.unwrap();
    let path = store.path(&wanted.digest);
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"c0ntent").unwrap();
    assert!(matches!(store.read(&wanted.digest, 100).await, Err(StoreError::Corrupt { .. })));
    fs::write(&path, b"cont").unwrap();
    store.put(&wanted, Bytes::from_static(b"content"), &[]).await.unwrap();
    assert_eq!(store.read(&wanted.digest, 100).await.unwrap().unwrap(), &b"content"[..]);
}

#[tokio::test]
async fn limits_are_kept() {
    let (_root, store) = store();
    let wanted = descriptor(b"content");
    store.put(&wanted, Bytes::from_static(b"content"), &[]).await.unwrap();
    let error = store.read(&wanted.digest, 6).await.unwrap_err().to_string();
    assert!(error.contains("content of 7 bytes is over the limit of 6 bytes"), "{error}");
}

#[tokio::test]
async fn ranges_are_exact() {
    let (_root, store) = store();
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|at| (at % 253) as u8).collect();
    let wanted = descriptor(&bytes);
    store.put(&wanted, bytes.clone().into(), &[]).await.unwrap();
    let (source, size) = store.source(&wanted.digest).await.unwrap().unwrap();
    assert_eq!(size, 1_000_000);
    for range in [0..0, 0..1, 5..700_000, 999_999..1_000_000, 0..1_000_000] {
        let stream = source.open(range.clone(), &context()).await.unwrap();
        let pieces: Vec<Bytes> = stream.map(|item| item.unwrap()).collect().await;
        let expected = &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        assert_eq!(pieces.concat(), expected);
    }
    assert_eq!(source.open(0..1_000_001, &context()).await.err().unwrap().kind(), FetchErrorKind::Local);
    fs::remove_file(store.path(&wanted.digest)).unwrap();
    assert_eq!(source.open(0..1, &context()).await.err().unwrap().kind(), FetchErrorKind::NotFound);
}

#[tokio::test]
async fn strangers_in_the_layout_are_no_content() {
    let (_root, store) = store();
    fs::write(store.layout().join("blobs/sha256/README"), b"{}").unwrap();
    fs::create_dir(store.path(&Digest::of(b"directory"))).unwrap();
    assert_eq!(store.walk().await.unwrap(), []);
}

#[tokio::test]
async fn deleting_also_unlists() {
    let (_root, store) = store();
    let wanted = descriptor(b"{}");
    store.put(&wanted, Bytes::from_static(b"{}"), &[]).await.unwrap();
    let listed = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{{\"digest\":\"{}\"}},{{\"digest\":\"x\"}}]}}",
        wanted.digest
    );
    let path = store.layout().join("index.json");
    fs::write(&path, listed).unwrap();
    assert!(store.delete(&wanted.digest).await.unwrap());
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "{\"manifests\":[{\"digest\":\"x\"}],\"schemaVersion\":2}"
    );
}

#[tokio::test]
async fn only_json_objects_may_be_indexes() {
    let (_root, store) = store();
    for bytes in [&b"{}"[..], b"\x14\0\0\0ztoc", b""] {
        store.put(&descriptor(bytes), Bytes::copy_from_slice(bytes), &[]).await.unwrap();
    }
    let candidates = store.index_candidates().await.unwrap();
    assert_eq!(candidates.iter().map(|info| info.digest).collect::<Vec<_>>(), [Digest::of(b"{}")]);
}

#[test]
fn a_file_of_the_layout_that_was_left_empty_is_made_again_and_a_written_one_is_not() {
    let root = tempfile::tempdir().unwrap();
    let file = |name: &str| root.path().join("content").join(name);
    let made = LocalStore::open(root.path()).unwrap();
    let whole = std::fs::read(file("index.json")).unwrap();
    assert!(whole.len() > 10);
    for name in ["oci-layout", "index.json"] {
        std::fs::write(file(name), b"").unwrap();
    }
    drop(made);
    LocalStore::open(root.path()).unwrap();
    assert_eq!(std::fs::read(file("index.json")).unwrap(), whole);
    assert!(std::fs::metadata(file("oci-layout")).unwrap().len() > 0);
    std::fs::write(file("index.json"), b"more").unwrap();
    LocalStore::open(root.path()).unwrap();
    assert_eq!(std::fs::read(file("index.json")).unwrap(), b"more");
    assert_eq!(std::fs::read_dir(file("ingest")).unwrap().count(), 0);
}

#[tokio::test]
async fn labels_are_merged_found_and_forgotten() {
    let (_root, store) = store();
    let wanted = descriptor(b"content");
    let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert!(store.label(&wanted.digest, &[label("a", "1")]).await.unwrap_err().is_not_found());
    let collector = label("containerd.io/gc.root", "now");
    store.put(&wanted, Bytes::from_static(b"content"), &[label("a", "1"), collector]).await.unwrap();
    store.label(&wanted.digest, &[label("b", "2")]).await.unwrap();
    let labels = store.info(&wanted.digest).await.unwrap().unwrap().labels;
    assert_eq!(labels.into_iter().collect::<Vec<_>>(), [label("a", "1"), label("b", "2")]);
    assert_eq!(store.find("b", "2").await.unwrap()[0].digest, wanted.digest);
    assert_eq!(store.find("b", "1").await.unwrap(), []);
    fs::write(store.layout().join(format!("labels/sha256-{}", wanted.digest.hex())), "damaged").unwrap();
    assert_eq!(store.find("b", "2").await.unwrap(), []);
    store.delete(&wanted.digest).await.unwrap();
    assert_eq!(fs::read_dir(store.layout().join("labels")).unwrap().count(), 0);
}

#[tokio::test]
async fn nothing_is_collected_while_an_index_is_made() {
    let (root, store) = store();
    let other = LocalStore::open(root.path()).unwrap();
    let writer = store.clone().for_writing().unwrap();
    let second = other.clone().for_writing().unwrap();
    drop(second);
    let clone = writer.clone();
    drop(writer);
    assert!(other.try_collect().unwrap().is_none(), "a clone still writes");
    drop(clone);
    let collecting = other.try_collect().unwrap().unwrap();
    assert!(store.try_collect().unwrap().is_none(), "one collects at a time");
    drop(collecting);
    store.for_writing().unwrap();
}
