//! What this crate writes equals what the Go tools write, byte for byte.
#![allow(clippy::unwrap_used, reason = "in a test, what cannot be unwrapped is a failure")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use soci_index::build::{BuildOptions, Observer, Stores, Work};
use soci_index::image::{Image, Platforms};
use soci_index::standalone::{Format, convert_layout};
use soci_oci::{Descriptor, Digest};
use soci_store::{ContentStore, LocalStore};

/// Lines, warnings, and of each layout that was written: its size in bytes, what of it was reported, whether it ended.
#[derive(Default)]
struct Lines(Mutex<(Vec<String>, Vec<String>)>, Mutex<Vec<(Digest, u64, u64, bool)>>);

impl Observer for Lines {
    fn line(&self, text: &str) {
        self.0.lock().unwrap().0.push(text.to_owned());
    }
    fn warn(&self, text: &str) {
        self.0.lock().unwrap().1.push(text.to_owned());
    }
    fn begins(&self, work: Work, blob: &Descriptor) {
        if work == Work::Write {
            self.1.lock().unwrap().push((blob.digest, blob.size, 0, false));
        }
    }
    fn advances(&self, blob: &Digest, bytes: u64) {
        for (digest, _, written, ended) in self.1.lock().unwrap().iter_mut() {
            *written += if digest == blob && !*ended { bytes } else { 0 };
        }
    }
    fn ends(&self, blob: &Digest) {
        for (digest, _, _, ended) in self.1.lock().unwrap().iter_mut() {
            *ended |= digest == blob;
        }
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn expected(case: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(case.join("expected.json")).unwrap()).unwrap()
}

/// Copies `<case>/in` and the layers it names to `to`.
fn layout(case: &Path, expected: &Value, to: &Path) {
    let blobs = to.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    for name in ["index.json", "oci-layout"] {
        std::fs::copy(case.join("in").join(name), to.join(name)).unwrap();
    }
    for entry in std::fs::read_dir(case.join("in/blobs/sha256")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), blobs.join(entry.file_name())).unwrap();
    }
    let layers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ztoc/tests/fixtures/layers");
    for layer in expected["layers"].as_array().unwrap() {
        let bytes = std::fs::read(layers.join(layer.as_str().unwrap())).unwrap();
        std::fs::write(blobs.join(Digest::of(&bytes).hex()), bytes).unwrap();
    }
}

fn options(expected: &Value) -> BuildOptions {
    let arguments: Vec<&str> =
        expected["args"].as_array().unwrap().iter().map(|value| value.as_str().unwrap()).collect();
    let mut options = BuildOptions::default();
    for pair in arguments.chunks(2) {
        match pair {
            ["--span-size", size] => options.span_size = size.parse().unwrap(),
            ["--min-layer-size", size] => options.min_layer_size = size.parse().unwrap(),
            ["--prefetch-file", path] => options.prefetch.push((*path).to_owned()),
            ["--optimizations", "xattr"] => options.xattr = true,
            other => panic!("{other:?}"),
        }
    }
    options
}

/// The reference's lines, sorted: their order is not fixed there.
fn sorted_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn blobs(layout: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(layout.join("blobs/sha256")).unwrap();
    entries
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

fn assert_same_blobs(found: &BTreeMap<String, Vec<u8>>, expected: &Value) {
    let expected = expected["blobs"].as_object().unwrap();
    let strip = |name: &String| name.trim_start_matches("sha256:").to_owned();
    assert_eq!(found.keys().cloned().collect::<Vec<_>>(), expected.keys().map(strip).collect::<Vec<_>>());
    for (name, content) in expected {
        let bytes = &found[&strip(name)];
        match content {
            Value::String(text) => assert_eq!(&String::from_utf8_lossy(bytes), text, "{name}"),
            other => assert_eq!(Some(bytes.len() as u64), other["size"].as_u64(), "{name}"),
        }
    }
}

#[tokio::test]
async fn converted_layouts_equal_the_references() {
    for case in ["docker-types", "oci-plain", "prefetch-xattr"] {
        let case = fixtures().join("convert").join(case);
        let expected = expected(&case);
        let root = tempfile::tempdir().unwrap();
        let (input, output) = (root.path().join("in"), root.path().join("out"));
        layout(&case, &expected, &input);
        let lines = Lines::default();
        let options = options(&expected);
        let run = |input: PathBuf, output: PathBuf, format| {
            let (options, lines, work) = (&options, &lines, root.path());
            async move {
                convert_layout(&input, &output, format, &Platforms::Own, work, options, lines).await.unwrap()
            }
        };
        let converted = run(input.clone(), output.clone(), Format::OciDir).await;
        assert_eq!(std::fs::read_to_string(output.join("index.json")).unwrap(), expected["index.json"]);
        assert_eq!(std::fs::read_to_string(output.join("oci-layout")).unwrap(), expected["oci-layout"]);
        assert_same_blobs(&blobs(&output), &expected);
        let mut names: Vec<_> =
            std::fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["blobs", "index.json", "oci-layout"]);
        {
            let mut lines = lines.0.lock().unwrap();
            let mut printed = std::mem::take(&mut lines.0);
            printed.sort();
            assert_eq!(printed, sorted_lines(expected["stdout"].as_str().unwrap()));
            let warned = expected["args"].as_array().unwrap().iter().any(|arg| arg == "/no/such");
            assert_eq!(lines.1.len(), usize::from(warned), "{:?}", lines.1);
        }

        // A tar of the same content, and the result converted again, in place.
        let archive = root.path().join("out.tar");
        run(input.clone(), archive.clone(), Format::OciArchive).await;
        let again = run(archive.clone(), archive.clone(), Format::OciArchive).await;
        assert_eq!(again.target, converted.target);
        let unpacked = root.path().join("unpacked");
        tar::Archive::new(std::fs::File::open(&archive).unwrap()).unpack(&unpacked).unwrap();
        assert_same_blobs(&blobs(&unpacked), &expected);
        assert_eq!(std::fs::read_to_string(unpacked.join("index.json")).unwrap(), expected["index.json"]);
        let again = run(output.clone(), output.clone(), Format::OciDir).await;
        assert_eq!(again.target, converted.target);
        assert_same_blobs(&blobs(&output), &expected);

        // Each was shown while it was written: an archive whole, of a directory what is copied.
        let shown = lines.1.into_inner().unwrap();
        assert_eq!(shown.len(), 4);
        assert!(shown.iter().all(|(_, size, written, ended)| written == size && *ended), "{shown:?}");
        let all: u64 = blobs(&output).values().map(|bytes| bytes.len() as u64).sum();
        assert_eq!((shown[1].1, shown[2].1), (all, all));
        assert!(0 < shown[0].1 && shown[0].1 < all);

        // Nothing is left beside the outputs.
        let mut left: Vec<_> =
            std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["in", "out", "out.tar", "unpacked"]);
    }
}

#[tokio::test]
async fn an_index_v1_equals_the_references() {
    let case = fixtures().join("index-v1");
    let expected = expected(&case);
    let root = tempfile::tempdir().unwrap();
    layout(&case, &expected, &root.path().join("image"));
    let image: Arc<dyn ContentStore> = Arc::new(LocalStore::at(&root.path().join("image")).unwrap());
    let artifacts = Arc::new(LocalStore::at(&root.path().join("artifacts")).unwrap());
    let listed: Value =
        serde_json::from_slice(&std::fs::read(root.path().join("image/index.json")).unwrap()).unwrap();
    let target: Descriptor = serde_json::from_value(listed["manifests"][0].clone()).unwrap();
    let loaded = Image::load(&target, &*image).await.unwrap();
    let selected = loaded.select(&Platforms::Own).unwrap();
    assert_eq!(selected[0].0.to_string(), "linux/amd64");
    let manifest = soci_oci::Manifest::decode(
        &image.read(&selected[0].1.descriptor.digest, 1 << 20).await.unwrap().unwrap(),
    )
    .unwrap();
    let stores = Stores { image, artifacts: Arc::<LocalStore>::clone(&artifacts) };
    let build = |options: BuildOptions| {
        let (manifest, stores, subject) = (&manifest, &stores, &selected[0].1.descriptor);
        async move {
            let lines = Lines::default();
            let index = soci_index::build(manifest, Some(subject), stores, &options, &lines).await.unwrap();
            (index, lines.0.into_inner().unwrap().0)
        }
    };
    let (index, lines) = build(options(&expected)).await;
    let mut sorted = lines.clone();
    sorted.sort();
    assert_eq!(sorted, sorted_lines(expected["stdout"].as_str().unwrap()));
    let order: Vec<&str> = lines.iter().map(|line| &line[..10]).collect();
    assert_eq!(order, ["layer sha2", "layer sha2", "ztoc skipp", "Created pr"], "lines come in layer order");
    let mut found = blobs(artifacts.layout());
    assert_eq!(found.remove(&Digest::of(b"{}").hex()).unwrap(), b"{}");
    assert_same_blobs(&found, &expected);

    let (again, lines) = build(options(&expected)).await;
    assert_eq!(again.digest, index.digest);
    assert!(lines[0].ends_with("(already exists)") && lines[1].ends_with("(already exists)"), "{lines:?}");
    let (again, lines) = build(BuildOptions { force: true, ..options(&expected) }).await;
    assert_eq!(again.digest, index.digest);
    assert!(!lines[0].ends_with("(already exists)"), "{lines:?}");
    let (other, lines) = build(BuildOptions { span_size: 65537, ..options(&expected) }).await;
    assert_ne!(other.digest, index.digest);
    assert!(!lines[0].ends_with("(already exists)"), "{lines:?}");
}
