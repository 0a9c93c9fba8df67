use soci_oci::{FetchErrorKind, annotation};
use soci_store::LocalStore;

use super::*;
use crate::testing::{MemoryRemote, context};

struct Fixture {
    _root: tempfile::TempDir,
    store: LocalStore,
    remote: Arc<MemoryRemote>,
    index: Arc<SociIndex>,
}

fn artifact(kind: &str, layer: &str, content: &str) -> Descriptor {
    let mut descriptor = Descriptor::of(kind, content.as_bytes());
    let layer = Digest::of(layer.as_bytes()).to_string();
    descriptor.annotations.insert(annotation::LAYER_DIGEST.into(), layer);
    descriptor
}

fn fixture() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let artifacts = vec![
        artifact(media_type::ZTOC, "one", "stale"),
        artifact(media_type::ZTOC, "one", "1"),
        artifact(media_type::ZTOC, "two", "2"),
        artifact(media_type::SOCI_PREFETCH, "two", "p"),
        artifact("text/plain", "two", "t"),
        Descriptor::of(media_type::ZTOC, b"of no layer"),
    ];
    let remote = Arc::new(MemoryRemote::default());
    for content in ["stale", "1", "2", "p", "t"] {
        remote.put(content);
    }
    let index = Arc::new(SociIndex::new(artifacts, None));
    Fixture { store: LocalStore::open(root.path()).unwrap(), _root: root, remote, index }
}

impl Fixture {
    async fn run(&self) -> Vec<Resolved> {
        let remote: Arc<dyn Remote> = Arc::<MemoryRemote>::clone(&self.remote);
        let mut all: Vec<Resolved> =
            resolve(Arc::clone(&self.index), remote, Arc::new(self.store.clone()), context()).collect().await;
        all.sort_by_key(|resolved| resolved.bytes.as_ref().ok().cloned());
        all
    }
}

#[tokio::test]
async fn what_counts_is_fetched_stored_and_delivered() {
    let fixture = fixture();
    let all = fixture.run().await;
    let texts: Vec<&[u8]> = all.iter().map(|resolved| resolved.bytes.as_deref().unwrap()).collect();
    assert_eq!(texts, [&b"1"[..], b"2", b"p"]);
    assert_eq!(all[2].kind, ArtifactKind::Prefetch);
    assert_eq!(all[0].layer, Digest::of(b"one"));
    assert!(all.iter().all(|resolved| !resolved.local && resolved.unstored.is_none()));
    for content in ["1", "2", "p", "{}"] {
        assert!(fixture.store.info(&Digest::of(content.as_bytes())).await.unwrap().is_some(), "{content}");
    }
    let stored = fixture.store.read(&fixture.index.digest, 1 << 20).await.unwrap().unwrap();
    assert_eq!(stored, fixture.index.bytes);
    fixture.remote.asked();
    assert!(fixture.run().await.iter().all(|resolved| resolved.local));
    assert_eq!(fixture.remote.asked(), Vec::<String>::new());
}

#[tokio::test]
async fn a_bad_artifact_costs_its_layer_only() {
    let fixture = fixture();
    fixture.remote.break_(Digest::of(b"1"));
    let all = fixture.run().await;
    let failed: Vec<&Resolved> = all.iter().filter(|resolved| resolved.bytes.is_err()).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].layer, Digest::of(b"one"));
    assert_eq!(failed[0].bytes.as_ref().unwrap_err().kind(), FetchErrorKind::Unavailable);
    assert_eq!(all.len(), 3);
}

#[tokio::test]
async fn damaged_local_content_is_replaced() {
    let fixture = fixture();
    fixture.run().await;
    let path = fixture.store.path(&Digest::of(b"2"));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "x").unwrap();
    let all = fixture.run().await;
    assert_eq!(all[1].bytes.as_deref().unwrap(), b"2");
    assert!(!all[1].local && all[0].local);
    assert_eq!(std::fs::read(&path).unwrap(), b"2");
}

#[tokio::test]
async fn a_full_disk_does_not_cost_the_bytes() {
    let fixture = fixture();
    // No ingest directory: nothing can be written, whoever the user is.
    std::fs::remove_dir(fixture.store.layout().join("ingest")).unwrap();
    let all = fixture.run().await;
    assert_eq!(all.len(), 3);
    for resolved in all {
        assert!(resolved.bytes.is_ok());
        assert!(matches!(resolved.unstored, Some(StoreError::Io { .. })));
    }
}
