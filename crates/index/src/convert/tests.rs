use std::sync::{Arc, Mutex};

use soci_oci::{Index, Manifest};
use soci_store::{ContentStore, LocalStore};

use super::*;

#[derive(Default)]
struct Lines(Mutex<Vec<String>>);

impl Observer for Lines {
    fn line(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
    fn warn(&self, text: &str) {
        self.line(text);
    }
}

struct World {
    _root: tempfile::TempDir,
    store: Arc<LocalStore>,
    lines: Lines,
}

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::open(root.path()).unwrap());
        Self { _root: root, store, lines: Lines::default() }
    }

    async fn put(&self, media_type: &str, bytes: impl Into<Bytes>) -> Descriptor {
        let bytes = bytes.into();
        let descriptor = Descriptor::of(media_type, &bytes);
        self.store.put(&descriptor, bytes, &[]).await.unwrap();
        descriptor
    }

    /// An image manifest of one layer, a tar that holds `file`, with a member that OCI does not define.
    async fn image(&self, media_type: &str, architecture: &str, file: &str) -> Descriptor {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(4096);
        tar.append_data(&mut header, file, &[7; 4096][..]).unwrap();
        let layer = self.put(LAYER, tar.into_inner().unwrap()).await;
        let config = format!("{{\"architecture\":\"{architecture}\",\"os\":\"linux\"}}");
        let config = self.put(media_type::OCI_CONFIG, config).await;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media_type, "x-unknown": {"kept": [1, 2.5]},
            "config": config, "layers": [layer], "annotations": {"own": "1"},
        });
        let mut descriptor = self.put(media_type, manifest.to_string()).await;
        descriptor.platform = Some(Platform::new("linux", architecture, None));
        descriptor
    }

    async fn index(&self, entries: &[Value]) -> Descriptor {
        let index = json!({
            "schemaVersion": 2, "mediaType": media_type::DOCKER_INDEX, "manifests": entries, "x-index": "kept",
        });
        self.put(media_type::DOCKER_INDEX, index.to_string()).await
    }

    async fn convert(&self, target: &Descriptor, platforms: &Platforms) -> Result<Converted, ConvertError> {
        let store: Arc<dyn ContentStore> = Arc::<LocalStore>::clone(&self.store);
        let stores = Stores { image: Arc::clone(&store), artifacts: store };
        let options = BuildOptions { min_layer_size: 0, ..BuildOptions::default() };
        super::convert(target, platforms, &stores, &options, &self.lines).await
    }

    async fn bytes(&self, digest: &Digest) -> Bytes {
        self.store.read(digest, 1 << 20).await.unwrap().unwrap()
    }

    async fn entries(&self, target: &Descriptor) -> Vec<Descriptor> {
        Index::decode(&self.bytes(&target.digest).await).unwrap().manifests
    }
}

fn attestation(image: &Descriptor, of: &Descriptor) -> Value {
    let mut entry = of.clone();
    entry.platform = Some(Platform::new("unknown", "unknown", None));
    entry.annotations.insert(annotation::DOCKER_REFERENCE_TYPE.into(), "attestation-manifest".into());
    entry.annotations.insert(annotation::DOCKER_REFERENCE_DIGEST.into(), image.digest.to_string());
    serde_json::to_value(entry).unwrap()
}

#[tokio::test]
async fn only_indexed_manifests_change_and_references_follow() {
    let world = World::new();
    let amd = world.image(media_type::DOCKER_MANIFEST, "amd64", "a").await;
    let arm = world.image(media_type::DOCKER_MANIFEST, "arm64", "b").await;
    let about = world.put(media_type::OCI_MANIFEST, &b"attestation"[..]).await;
    let signature = json!({
        "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(b"absent"), "size": 3, "artifactType": "application/x",
    });
    let entries = [json!(amd), json!(arm), attestation(&amd, &about), attestation(&arm, &about), signature];
    let target = world.index(&entries).await;
    let wanted = Platforms::These(vec!["linux/amd64".parse().unwrap(), "linux/x86_64".parse().unwrap()]);
    let converted = world.convert(&target, &wanted).await.unwrap();
    assert_eq!(converted.target.media_type, media_type::OCI_INDEX);
    assert_eq!(converted.indexes.len(), 1);

    let after = world.entries(&converted.target).await;
    assert_eq!(after.len(), 6);
    let soci = converted.indexes[0].1.digest;
    assert_eq!(after[0].media_type, media_type::OCI_MANIFEST);
    assert_eq!(after[0].annotation(annotation::INDEX_DIGEST), Some(soci.to_string().as_str()));
    assert_eq!((after[0].annotation("own"), &after[0].platform), (Some("1"), &amd.platform));
    assert_eq!(after[1], arm);
    let reference = |at: usize| after[at].annotation(annotation::DOCKER_REFERENCE_DIGEST).unwrap().to_owned();
    assert_eq!((reference(2), reference(3)), (after[0].digest.to_string(), arm.digest.to_string()));
    assert_eq!(json!(after[4]), entries[4]);
    assert_eq!(after[5].digest, soci);
    assert_eq!(after[5].artifact_type.as_deref(), Some(media_type::SOCI_INDEX_V2));
    assert_eq!(
        after[5].annotation(annotation::IMAGE_MANIFEST_DIGEST),
        Some(after[0].digest.to_string().as_str())
    );

    let text = String::from_utf8(world.bytes(&after[0].digest).await.to_vec()).unwrap();
    assert!(text.ends_with(",\"x-unknown\":{\"kept\":[1,2.5]}}"), "{text}");
    let manifest = Manifest::decode(text.as_bytes()).unwrap();
    assert_eq!(manifest.config.media_type, media_type::OCI_CONFIG);
    assert_eq!(manifest.layers[0].media_type, LAYER);
    let index = world.bytes(&converted.target.digest).await;
    assert!(index.ends_with(b",\"x-index\":\"kept\"}"));
}

#[tokio::test]
async fn converting_again_changes_nothing_and_adds_what_is_missing() {
    let world = World::new();
    let amd = world.image(media_type::OCI_MANIFEST, "amd64", "a").await;
    let arm = world.image(media_type::OCI_MANIFEST, "arm64", "b").await;
    let target = world.index(&[json!(amd), json!(arm)]).await;
    let both = world.convert(&target, &Platforms::All).await.unwrap();
    assert_eq!(world.convert(&both.target, &Platforms::All).await.unwrap().target, both.target);
    let amd_only = Platforms::These(vec!["linux/amd64".parse().unwrap()]);
    assert_eq!(world.convert(&both.target, &amd_only).await.unwrap().target, both.target);
    let first = world.convert(&target, &amd_only).await.unwrap();
    assert_eq!(world.entries(&first.target).await.len(), 3);
    let second = world.convert(&first.target, &Platforms::All).await.unwrap();
    assert_eq!(second.target, both.target);
}

#[tokio::test]
async fn a_single_manifest_is_converted_for_its_own_platform() {
    let world = World::new();
    let mut target = world.image(media_type::OCI_MANIFEST, "s390x", "a").await;
    target.platform = None;
    let converted = world.convert(&target, &Platforms::Own).await.unwrap();
    let entries = world.entries(&converted.target).await;
    assert_eq!(entries.len(), 2);
    for entry in &entries {
        assert_eq!(entry.platform, Some(Platform::new("linux", "s390x", None)));
    }
    let other = Platforms::These(vec![Platform::new("linux", "riscv64", None)]);
    let error = world.convert(&target, &other).await.unwrap_err().to_string();
    assert!(error.starts_with("image manifest for linux/") && error.ends_with("not found"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_converted_is_said() {
    let world = World::new();
    let amd = world.image(media_type::OCI_MANIFEST, "amd64", "a").await;
    let target = world.index(&[json!(amd)]).await;
    let riscv = Platforms::These(vec!["linux/riscv64".parse().unwrap()]);
    let error = world.convert(&target, &riscv).await.unwrap_err().to_string();
    assert_eq!(error, format!("image manifest for linux/riscv64: {} has none: not found", target.digest));
    let empty = world.index(&[]).await;
    let error = world.convert(&empty, &Platforms::All).await.unwrap_err().to_string();
    assert_eq!(error, "image does not support any platforms");
    let absent = Descriptor::new(media_type::OCI_INDEX, Digest::of(b"absent"), 6);
    let error = world.convert(&absent, &Platforms::All).await.unwrap_err().to_string();
    assert!(error.ends_with("not found in the content store"), "{error}");
    let strange = Descriptor::new("text/plain", Digest::of(b"absent"), 6);
    assert!(matches!(
        world.convert(&strange, &Platforms::All).await,
        Err(ConvertError::Image(ImageError::MediaType { .. }))
    ));
}

#[tokio::test]
async fn unsuitable_layers_are_skipped_and_damaged_ones_are_errors() {
    let world = World::new();
    let good = world.image(media_type::OCI_MANIFEST, "amd64", "a").await;
    let good = Manifest::decode(&world.bytes(&good.digest).await).unwrap();
    let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
    let encrypted = world.put(gzip, &b"not gzip at all, but something else"[..]).await;
    let artifact = world.put("application/vnd.in-toto+json", &b"{}"[..]).await;
    let zstd = Descriptor::new("application/vnd.oci.image.layer.v1.tar+zstd", Digest::of(b"zstd"), 4);
    let build = |layers: Vec<Descriptor>| {
        let manifest = Manifest { layers, ..good.clone() };
        let (lines, store): (_, Arc<dyn ContentStore>) =
            (&world.lines, Arc::<LocalStore>::clone(&world.store));
        async move {
            let stores = Stores { image: Arc::clone(&store), artifacts: store };
            let options = BuildOptions { min_layer_size: 0, force: true, ..BuildOptions::default() };
            build::build(&manifest, None, &stores, &options, lines).await
        }
    };
    let layer = good.layers[0].clone();
    let index = build(vec![encrypted.clone(), layer.clone(), artifact, zstd, layer.clone()]).await.unwrap();
    assert_eq!(index.manifest.layers.len(), 2, "a layer that occurs twice is listed twice");
    let lines = std::mem::take(&mut *world.lines.0.lock().unwrap());
    let skipped: Vec<bool> = lines.iter().map(|line| line.starts_with("ztoc skipped - layer")).collect();
    assert_eq!(skipped, [true, false, true, true, false], "{lines:?}");
    assert!(lines[0].contains("cannot be described by a ztoc: layer is not gzip"), "{}", lines[0]);
    assert!(matches!(build(vec![encrypted]).await, Err(BuildError::Empty)));

    let absent = Descriptor::new(LAYER, Digest::of(b"absent"), 6);
    let error = build(vec![absent.clone(), layer.clone()]).await.unwrap_err().to_string();
    assert!(error.starts_with("errors encountered while building soci layers; layer sha256:"), "{error}");
    assert!(error.contains("not found in the content store"), "{error}");
    let mut wrong = layer.clone();
    wrong.size += 1;
    let error = build(vec![wrong]).await.unwrap_err().to_string();
    assert!(error.contains("the manifest says"), "{error}");
    let path = world.store.path(&layer.digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let error = build(vec![layer]).await.unwrap_err().to_string();
    assert!(error.contains("local content is damaged"), "{error}");
}
