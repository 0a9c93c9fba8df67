use super::*;
use crate::testing::{MemoryRemote, context};
use soci_store::LocalStore;

fn image(index: Option<&str>) -> Vec<u8> {
    let mut manifest = SociIndex::new(Vec::new(), None).manifest;
    manifest.config = Descriptor::of(media_type::OCI_CONFIG, b"{}");
    manifest.annotations.clear();
    if let Some(index) = index {
        manifest.annotations.insert(annotation::INDEX_DIGEST.into(), index.into());
    }
    manifest.encode()
}

fn v1(subject: &Digest, note: &str) -> SociIndex {
    let zone = Descriptor::of(media_type::ZTOC, note.as_bytes());
    SociIndex::new(vec![zone], Some(&Descriptor::new(media_type::OCI_MANIFEST, *subject, 1)))
}

fn request(manifest: Digest) -> DiscoverRequest {
    let image = "reg.example/a:1".parse().unwrap();
    DiscoverRequest { image, manifest, explicit: None, v1: true, v2: true }
}

async fn look(remote: &MemoryRemote, request: &DiscoverRequest) -> Result<Discovered, DiscoverError> {
    discover(request, remote, None, &context()).await
}

#[tokio::test]
async fn the_annotation_names_the_index() {
    let remote = MemoryRemote::default();
    let index = SociIndex::new(vec![Descriptor::of(media_type::ZTOC, b"z")], None);
    remote.put(index.bytes.clone());
    let manifest = remote.put(image(Some(&index.digest.to_string())));
    let found = look(&remote, &request(manifest)).await.unwrap();
    assert_eq!((found.index.digest, found.source, found.local), (index.digest, Source::Annotation, false));
    assert_eq!(found.image_manifest.config.media_type, media_type::OCI_CONFIG);
    assert_eq!(remote.asked(), [format!("manifest {manifest}"), format!("manifest {}", index.digest)]);
}

#[tokio::test]
async fn a_named_index_is_used_whatever_the_modes_are() {
    let remote = MemoryRemote::default();
    let manifest = remote.put(image(None));
    for index in [SociIndex::new(Vec::new(), None), v1(&manifest, "x")] {
        let explicit = Some(remote.put(index.bytes.clone()));
        let request = DiscoverRequest { explicit, v1: false, v2: false, ..request(manifest) };
        let found = look(&remote, &request).await.unwrap();
        assert_eq!((found.index.digest, found.source), (index.digest, Source::Explicit));
    }
}

#[tokio::test]
async fn modes_that_are_off_ask_nobody() {
    let remote = MemoryRemote::default();
    let manifest = remote.put(image(None));
    let error =
        look(&remote, &DiscoverRequest { v1: false, v2: false, ..request(manifest) }).await.unwrap_err();
    assert!(error.is_no_index());
    assert_eq!(error.to_string(), "all lazy pull modes are disabled");
    assert_eq!(remote.asked(), Vec::<String>::new());
    look(&remote, &DiscoverRequest { v1: false, ..request(manifest) }).await.unwrap_err();
    assert_eq!(remote.asked(), [format!("manifest {manifest}")]);
    let index = remote.put(SociIndex::new(Vec::new(), None).bytes);
    let annotated = remote.put(image(Some(&index.to_string())));
    let error = look(&remote, &DiscoverRequest { v2: false, ..request(annotated) }).await.unwrap_err();
    assert!(error.is_no_index(), "{error}");
}

#[tokio::test]
async fn the_newest_referrer_is_taken_then_the_smallest_digest() {
    let remote = MemoryRemote::default();
    let manifest = remote.put(image(None));
    let mut indexes: Vec<SociIndex> = ["a", "b", "c", "d"].map(|note| v1(&manifest, note)).to_vec();
    indexes.sort_by_key(|index| index.digest);
    let mut descriptors: Vec<Descriptor> = indexes.iter().map(SociIndex::descriptor).collect();
    for index in &indexes {
        remote.put(index.bytes.clone());
    }
    descriptors.reverse();
    *remote.referrers.lock().unwrap() = descriptors.clone();
    let found = look(&remote, &request(manifest)).await.unwrap();
    assert_eq!((found.index.digest, found.source), (indexes[0].digest, Source::Referrer));
    descriptors[0].annotations.insert(CREATED.into(), "2026-01-01T00:00:00Z".into());
    descriptors[1].annotations.insert(CREATED.into(), "2026-02-01T00:00:00Z".into());
    let newest = descriptors[1].digest;
    *remote.referrers.lock().unwrap() = descriptors;
    assert_eq!(look(&remote, &request(manifest)).await.unwrap().index.digest, newest);
}

#[tokio::test]
async fn a_referrer_to_other_content_is_passed_over() {
    let remote = MemoryRemote::default();
    let manifest = remote.put(image(None));
    let (foreign, own) = (v1(&Digest::of(b"other"), "x"), v1(&manifest, "y"));
    let mut first = foreign.descriptor();
    first.annotations.insert(CREATED.into(), "2026-01-01T00:00:00Z".into());
    remote.put(foreign.bytes.clone());
    remote.put(own.bytes.clone());
    *remote.referrers.lock().unwrap() = vec![first.clone(), own.descriptor()];
    assert_eq!(look(&remote, &request(manifest)).await.unwrap().index.digest, own.digest);
    *remote.referrers.lock().unwrap() = vec![first];
    assert!(look(&remote, &request(manifest)).await.unwrap_err().is_no_index());
}

#[tokio::test]
async fn could_not_look_is_not_no_index() {
    let remote = MemoryRemote::default();
    let absent = look(&remote, &request(Digest::of(b"absent"))).await.unwrap_err();
    assert!(matches!(absent, DiscoverError::FetchManifest { .. }));
    let manifest = remote.put(image(None));
    let own = v1(&manifest, "y");
    *remote.referrers.lock().unwrap() = vec![own.descriptor()];
    let unfetched = look(&remote, &request(manifest)).await.unwrap_err();
    assert!(matches!(unfetched, DiscoverError::FetchIndex { .. }));
    let annotated = remote.put(image(Some(&own.digest.to_string())));
    let unfetched = look(&remote, &request(annotated)).await.unwrap_err();
    assert!(matches!(unfetched, DiscoverError::FetchIndex { .. }));
    let nonsense = remote.put(image(Some("nonsense")));
    let bad = look(&remote, &request(nonsense)).await.unwrap_err();
    assert!(matches!(bad, DiscoverError::BadAnnotation { .. }));
    let garbage = remote.put(&b"garbage"[..]);
    let bad = look(&remote, &request(garbage)).await.unwrap_err();
    assert!(matches!(bad, DiscoverError::BadManifest { .. }));
    let not_an_index = remote.put(image(Some(&manifest.to_string())));
    let bad = look(&remote, &request(not_an_index)).await.unwrap_err();
    assert!(matches!(bad, DiscoverError::BadIndex { .. }));
    for error in [absent, unfetched, bad] {
        assert!(!error.is_no_index(), "{error}");
    }
    remote.break_(manifest);
    let local = tempfile::tempdir().unwrap();
    let local = LocalStore::open(local.path()).unwrap();
    let bytes = Bytes::from(image(None));
    local.put(&Descriptor::of(media_type::OCI_MANIFEST, &bytes), bytes, &[]).await.unwrap();
    let refused = discover(&request(manifest), &remote, Some(&local), &context()).await.unwrap_err();
    assert!(matches!(&refused, DiscoverError::Referrers { .. }));
    assert_eq!(refused.fetch().unwrap().kind(), soci_oci::FetchErrorKind::Denied);
}

#[tokio::test]
async fn local_content_is_asked_first_and_verified() {
    let remote = MemoryRemote::default();
    let index = SociIndex::new(Vec::new(), None);
    let bytes = image(Some(&index.digest.to_string()));
    let manifest = remote.put(bytes.clone());
    remote.put(index.bytes.clone());
    let root = tempfile::tempdir().unwrap();
    let local = LocalStore::open(root.path()).unwrap();
    local.put(&Descriptor::of(media_type::OCI_MANIFEST, &bytes), bytes.into(), &[]).await.unwrap();
    local.put(&index.descriptor(), index.bytes.clone(), &[]).await.unwrap();
    let found = discover(&request(manifest), &remote, Some(&local), &context()).await.unwrap();
    assert!(found.local);
    assert_eq!(remote.asked(), Vec::<String>::new());
    let path = local.path(&index.digest);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "damaged").unwrap();
    let found = discover(&request(manifest), &remote, Some(&local), &context()).await.unwrap();
    assert_eq!((found.local, found.index.digest), (false, index.digest));
}
