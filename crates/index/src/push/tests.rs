use std::sync::Mutex;

use soci_oci::{Manifest, annotation};
use soci_store::LocalStore;

use super::*;
use crate::testing::{MemoryRemote, context};

#[derive(Default)]
struct Lines(Mutex<Vec<String>>);

/// What is shown on a terminal: each piece of work that is begun, and how far it came until it ended.
#[derive(Default)]
struct Bars {
    running: Mutex<Vec<(Work, Descriptor, u64)>>,
    ended: Mutex<Vec<(Work, Descriptor, u64)>>,
}

impl Observer for Bars {
    fn line(&self, _: &str) {}
    fn warn(&self, _: &str) {}
    fn begins(&self, work: Work, blob: &Descriptor) {
        self.running.lock().unwrap().push((work, blob.clone(), 0));
    }
    fn advances(&self, blob: &Digest, bytes: u64) {
        for (_, running, done) in self.running.lock().unwrap().iter_mut() {
            *done += if running.digest == *blob { bytes } else { 0 };
        }
    }
    fn ends(&self, blob: &Digest) {
        let mut running = self.running.lock().unwrap();
        let ended = running.extract_if(.., |(_, running, _)| running.digest == *blob);
        self.ended.lock().unwrap().extend(ended);
    }
}

impl Observer for Lines {
    fn line(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
    fn warn(&self, text: &str) {
        self.line(text);
    }
}

struct Fixture {
    _root: tempfile::TempDir,
    stores: Stores,
    remote: MemoryRemote,
    image: Bytes,
    index: SociIndex,
}

const OPTIONS: PushOptions =
    PushOptions { existing: ExistingIndex::Allow, parallel: NonZeroUsize::MIN, quiet: false };

/// An image of one layer, with an index, in one store.
async fn fixture() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let store: Arc<dyn ContentStore> = Arc::new(LocalStore::open(root.path()).unwrap());
    let layer = Descriptor::of("application/vnd.oci.image.layer.v1.tar", b"layer");
    let image = Bytes::from(
        Manifest {
            config: Descriptor::of(media_type::OCI_CONFIG, b"config"),
            layers: vec![layer.clone()],
            ..SociIndex::new(Vec::new(), None).manifest
        }
        .encode(),
    );
    let subject = Descriptor::of(media_type::OCI_MANIFEST, &image);
    let mut ztoc = Descriptor::of(media_type::ZTOC, b"ztoc");
    ztoc.annotations.insert(annotation::LAYER_DIGEST.into(), layer.digest.to_string());
    let index = SociIndex::new(vec![ztoc], Some(&subject));
    for content in [&b"layer"[..], b"config", b"{}", b"ztoc", &image, &index.bytes] {
        store.put(&Descriptor::of("", content), Bytes::copy_from_slice(content), &[]).await.unwrap();
    }
    let remote = MemoryRemote::default();
    let stores = Stores { image: Arc::clone(&store), artifacts: store };
    Fixture { _root: root, stores, remote, image, index }
}

impl Fixture {
    async fn push(&self, options: PushOptions) -> (Result<bool, PushError>, Vec<String>) {
        let lines = Lines::default();
        let result = push(&self.index, &self.stores, &self.remote, &options, &context(), &lines).await;
        (result, lines.0.into_inner().unwrap())
    }

    fn has(&self, content: &[u8]) -> bool {
        self.remote.content.lock().unwrap().contains_key(&Digest::of(content))
    }
}

#[tokio::test]
async fn the_graph_is_pushed_with_the_references_lines() {
    let fixture = fixture().await;
    fixture.remote.put(fixture.image.clone());
    fixture.remote.put(&b"{}"[..]);
    let (result, lines) = fixture.push(OPTIONS).await;
    assert!(result.unwrap());
    let (index, image) = (fixture.index.digest, Digest::of(&fixture.image));
    let (config, ztoc) = (Digest::of(b"{}"), Digest::of(b"ztoc"));
    assert_eq!(
        lines,
        [
            format!("pushing soci index with digest: {index}"),
            format!("pushing artifact with digest: {config}"),
            format!("skipped artifact with digest: {config}"),
            format!("pushing artifact with digest: {ztoc}"),
            format!("successfully pushed artifact with digest: {ztoc}"),
            format!("skipped artifact with digest: {image}"),
            format!("pushing artifact with digest: {index}"),
            format!("successfully pushed artifact with digest: {index}"),
        ]
    );
    assert!(fixture.has(&fixture.index.bytes) && !fixture.has(b"layer"));
    let (_, lines) = fixture.push(OPTIONS).await;
    assert_eq!(lines[1..], [format!("skipped artifact with digest: {index}")]);
}

#[tokio::test]
async fn an_image_the_registry_lacks_is_pushed_from_here() {
    let fixture = fixture().await;
    fixture.push(OPTIONS).await.0.unwrap();
    assert!(fixture.has(&fixture.image) && fixture.has(b"layer") && fixture.has(b"config"));
}

#[tokio::test]
async fn each_upload_is_shown_from_its_first_byte_to_its_end() {
    for quiet in [false, true] {
        let fixture = fixture().await;
        let bars = Bars::default();
        let options = PushOptions { quiet, ..OPTIONS };
        push(&fixture.index, &fixture.stores, &fixture.remote, &options, &context(), &bars).await.unwrap();
        assert!(bars.running.into_inner().unwrap().is_empty());
        let mut ended = bars.ended.into_inner().unwrap();
        ended.sort_by_key(|(_, blob, _)| blob.size);
        let shown: Vec<(Work, u64, u64)> =
            ended.iter().map(|(work, blob, sent)| (*work, blob.size, *sent)).collect();
        // Of an upload in pieces, what is before the piece that is being sent is done.
        let uploads = [(2, 0), (4, 2), (5, 4), (6, 4)].map(|(size, sent)| (Work::Upload, size, sent));
        assert_eq!(shown, if quiet { &[][..] } else { &uploads[..] }, "quiet: {quiet}");
    }
}

#[tokio::test]
async fn an_upload_that_fails_is_shown_no_longer() {
    let fixture = fixture().await;
    let bars = Bars::default();
    let ztoc = fixture.index.manifest.layers[0].digest;
    fixture.remote.break_(ztoc);
    let pushed = push(&fixture.index, &fixture.stores, &fixture.remote, &OPTIONS, &context(), &bars).await;
    assert!(matches!(pushed, Err(PushError::Upload { digest, .. }) if digest == ztoc));
    assert!(bars.running.into_inner().unwrap().is_empty());
}

#[tokio::test]
async fn an_image_that_is_nowhere_is_named() {
    let fixture = fixture().await;
    fixture.stores.image.delete(&Digest::of(&fixture.image)).await.unwrap();
    let error = fixture.push(OPTIONS).await.0.unwrap_err();
    assert!(matches!(error, PushError::NoImage { .. }));
    assert!(error.to_string().ends_with("push the image first"), "{error}");
    assert!(!fixture.has(&fixture.index.bytes));
}

#[tokio::test]
async fn an_index_that_is_there_is_treated_as_asked() {
    let fixture = fixture().await;
    fixture.remote.put(fixture.image.clone());
    let one = Descriptor::of(media_type::OCI_MANIFEST, b"one");
    *fixture.remote.referrers.lock().unwrap() = vec![one.clone()];
    let (result, lines) = fixture.push(PushOptions { existing: ExistingIndex::Skip, ..OPTIONS }).await;
    assert!(!result.unwrap());
    assert_eq!(
        lines[1],
        format!(
            "soci index found in remote repository with digest: {}: skipping pushing artifacts for image manifest: {}",
            one.digest,
            Digest::of(&fixture.image)
        )
    );
    assert!(!fixture.has(&fixture.index.bytes));
    *fixture.remote.referrers.lock().unwrap() = vec![one.clone(), one];
    let quiet = PushOptions { existing: ExistingIndex::Warn, quiet: true, ..OPTIONS };
    let (result, lines) = fixture.push(quiet).await;
    assert!(result.unwrap());
    assert_eq!(
        lines,
        [
            "[WARN] multiple soci indices found in remote repository: pushing index anyway".to_owned(),
            fixture.index.digest.to_string()
        ]
    );
}

#[tokio::test]
async fn an_index_v2_is_not_pushed_alone() {
    let mut fixture = fixture().await;
    fixture.index = SociIndex::new(Vec::new(), None);
    let error = fixture.push(OPTIONS).await.0.unwrap_err();
    assert!(matches!(error, PushError::NoSubject(_)));
}

#[tokio::test]
async fn the_newest_index_of_the_subject_is_chosen() {
    let fixture = fixture().await;
    let store = &fixture.stores.artifacts;
    let subject = Descriptor::of(media_type::OCI_MANIFEST, &fixture.image);
    let other = SociIndex::new(Vec::new(), Some(&Descriptor::of(media_type::OCI_MANIFEST, b"other")));
    let newer = SociIndex::new(Vec::new(), Some(&subject));
    for index in [&newer, &other] {
        store.put(&index.descriptor(), index.bytes.clone(), &[]).await.unwrap();
    }
    let path = LocalStore::open(fixture._root.path()).unwrap().path(&newer.digest);
    let file = std::fs::File::open(path).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(60)).unwrap();
    let (found, v2) = newest(&subject.digest, None, store).await.unwrap();
    assert_eq!((found.unwrap().digest, v2), (newer.digest, false));
    let second = SociIndex::new(fixture.index.manifest.layers.clone(), None);
    store.put(&second.descriptor(), second.bytes.clone(), &[]).await.unwrap();
    let (found, v2) = newest(&Digest::of(b"absent"), Some(&second.digest), store).await.unwrap();
    assert!(found.is_none() && v2);
    // The same layers converted elsewhere are no index of this image.
    let (found, v2) = newest(&subject.digest, None, store).await.unwrap();
    assert!(found.is_some() && !v2);
}
