//! What the daemon makes of an image: which index it takes, what it does without one, and that the container starts in
//! every case.

use anyhow::{Context as _, Result};
use serde_json::Value;
use soci_e2e::publish::{BUILD, Published};
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, containerd2, images};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::Numbers;
use soci_testkit::snapshots::Snapshots;
use soci_testkit::{Action, AuthMode, Fault, Matcher};

fn options() -> Result<StageOptions> {
    StageOptions::new(AuthMode::Basic)
}

fn echoes(stage: &Stage, namespace: &str, published: &Published) -> Result<()> {
    assert_eq!(stage.probe(namespace, published, "echo", &["echo", "started"])?, "started\n");
    Ok(())
}

#[test]
fn an_image_without_an_index_is_left_to_containerd() -> Result<()> {
    let stage = Stage::start(options()?)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish(&image, "team/plain", "1");
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 0);
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    echoes(&stage, KUBELET, &published)
}

#[test]
fn a_v1_index_is_not_used_when_that_mode_is_off() -> Result<()> {
    let mut options = options()?;
    options.v1 = false;
    let stage = Stage::start(options)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/app", "1")?;
    stage.registry.clear_log();
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 0);
    let asked = stage.registry.log().iter().any(|seen| seen.request.path.contains("/referrers/"));
    assert!(!asked, "referrers were listed though nothing may come of it");
    echoes(&stage, KUBELET, &published)
}

#[test]
fn a_v2_index_is_not_used_when_that_mode_is_off() -> Result<()> {
    let mut options = options()?;
    options.config.push_str("[pull_modes.soci_v2]\nenable = false\n");
    let stage = Stage::start(options)?;
    let published = stage.publish_v2(&images::odd(Dialect::Oci), "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 0);
    echoes(&stage, KUBELET, &published)
}

#[test]
fn a_v2_annotation_that_points_to_nothing_falls_back() -> Result<()> {
    let stage = Stage::start(options()?)?;
    let published = stage.publish_v2(&images::odd(Dialect::Oci), "team/app", "1")?;
    // The index manifest is there under its own digest only; every request for it finds nothing.
    let index = annotated_index(&stage, &published)?;
    stage.registry.fault(Fault::new(Matcher::path(format!("/manifests/{index}")), Action::status(404)));
    // containerd needs it too, as a part of the image index; so the image's manifest is pulled by its digest.
    let by_digest = stage.registry.image(&format!("team/app@{}", image_manifest(&stage, &published)?));
    let published = Published { reference: by_digest, ..published };
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 0);
    echoes(&stage, KUBELET, &published)
}

fn image_manifest(stage: &Stage, published: &Published) -> Result<String> {
    let top =
        stage.registry.manifest(&published.repository, "1").context("the image is not in the registry")?;
    let top: Value = serde_json::from_slice(&top)?;
    let first = top["manifests"].get(0).context("the image index is empty")?;
    Ok(first["digest"].as_str().context("no digest")?.to_owned())
}

fn annotated_index(stage: &Stage, published: &Published) -> Result<String> {
    let digest = image_manifest(stage, published)?;
    let manifest = stage.registry.manifest(&published.repository, &digest).context("no manifest")?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let annotations = manifest["annotations"].as_object().context("no annotations")?;
    let index = annotations.iter().find(|(key, _)| key.contains("soci")).context("no index is named")?;
    Ok(index.1.as_str().context("not text")?.to_owned())
}

/// Builds a v1 index and returns its document, without pushing it.
fn index_of(stage: &Stage, published: &Published) -> Result<(String, Value)> {
    stage.fetch(&published.reference)?;
    stage.soci(BUILD, &["create", "--min-layer-size", images::MIN_LAYER, &published.reference])?;
    let listed = stage.soci(BUILD, &["index", "list", "--quiet", "--ref", &published.reference])?;
    let digest = listed.split_whitespace().next().context("soci index list shows nothing")?.to_owned();
    let document = serde_json::from_str(&stage.soci(BUILD, &["index", "info", &digest])?)?;
    Ok((digest, document))
}

#[test]
fn a_ztoc_of_arbitrary_bytes_costs_its_layer_only() -> Result<()> {
    let stage = Stage::start(options()?)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish(&image, "team/bad", "1");
    let (_, mut index) = index_of(&stage, &published)?;
    let ztocs = index["layers"].as_array_mut().context("the index has no layers")?;
    assert_eq!(ztocs.len(), 2, "two layers are worth indexing");
    for ztoc in ztocs.iter().skip(1) {
        copy_blob(&stage, &published, ztoc)?;
    }
    let garbage = Numbers::new(77).bytes(5000);
    ztocs[0]["size"] = garbage.len().into();
    ztocs[0]["digest"] = stage.registry.put_blob(&published.repository, garbage).into();
    push_index(&stage, &published, &index);
    stage.forget(&published.reference)?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 1, "the layer with a good zTOC is lazy, the other is not");
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    echoes(&stage, KUBELET, &published)
}

/// Puts a blob of containerd's content store into the registry.
fn copy_blob(stage: &Stage, published: &Published, descriptor: &Value) -> Result<()> {
    let digest = descriptor["digest"].as_str().context("no digest")?;
    let path =
        stage.path().join("c/root/io.containerd.content.v1.content/blobs").join(digest.replacen(':', "/", 1));
    stage.registry.put_blob(&published.repository, std::fs::read(&path).context("read a blob")?);
    Ok(())
}

fn push_index(stage: &Stage, published: &Published, index: &Value) -> String {
    stage.registry.put_blob(&published.repository, "{}");
    let media_type = index["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json");
    let bytes = index.to_string();
    let digest = soci_testkit::layer_gen::digest(bytes.as_bytes());
    stage.registry.put_manifest(&published.repository, &digest, media_type, bytes);
    digest
}

/// The labels by which nerdctl names an index; sent to the snapshotter itself.
fn prepare(stage: &Stage, published: &Published, image: &Image, index: &str) -> Result<Outcome> {
    let layer = &image.layers[0];
    let size = layer.blob.len().to_string();
    let labels = [
        ("containerd.io/snapshot.ref", layer.diff_id.as_str()),
        ("containerd.io/snapshot/cri.image-ref", published.reference.as_str()),
        ("containerd.io/snapshot/cri.manifest-digest", image.digest.as_str()),
        ("containerd.io/snapshot/cri.layer-digest", layer.digest.as_str()),
        ("containerd.io/snapshot/cri.image-layers", layer.digest.as_str()),
        ("containerd.io/snapshot/remote/soci.size", size.as_str()),
        ("containerd.io/snapshot/remote/soci.index.digest", index),
    ];
    let snapshots = Snapshots::connect(&stage.snapshotter.socket())?;
    Ok(match snapshots.prepare("default", "default/1/extract-1", "", &labels) {
        Ok(_) => Outcome::Left,
        Err(status) => Outcome::Said(status.to_string()),
    })
}

/// What Prepare came to.
#[derive(Debug)]
enum Outcome {
    /// Mounts: containerd unpacks.
    Left,
    /// A status; *already exists* is a lazy mount.
    Said(String),
}

#[test]
fn an_explicit_index_is_used_even_where_v1_is_off() -> Result<()> {
    let mut options = options()?;
    options.v1 = false;
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish(&image, "team/explicit", "1");
    let (_, index) = index_of(&stage, &published)?;
    for ztoc in index["layers"].as_array().into_iter().flatten() {
        copy_blob(&stage, &published, ztoc)?;
    }
    let digest = push_index(&stage, &published, &index);
    let outcome = prepare(&stage, &published, &image, &digest)?;
    assert!(matches!(&outcome, Outcome::Said(text) if text.contains("already exists")), "{outcome:?}");
    assert_eq!(stage.lazy_layers()?, 1);
    Ok(())
}

#[test]
fn a_wrong_explicit_index_leaves_the_layer_to_containerd() -> Result<()> {
    let stage = Stage::start(options()?)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish(&image, "team/explicit", "1");
    let nowhere = soci_testkit::layer_gen::digest(b"no such index");
    let outcome = prepare(&stage, &published, &image, &nowhere)?;
    assert!(matches!(outcome, Outcome::Left), "{outcome:?}");
    assert_eq!(stage.lazy_layers()?, 0);
    Ok(())
}

#[test]
fn an_index_of_another_image_does_not_mount() -> Result<()> {
    let stage = Stage::start(options()?)?;
    let other = stage.publish(&images::odd(Dialect::Oci), "team/explicit", "other");
    let (_, index) = index_of(&stage, &other)?;
    for ztoc in index["layers"].as_array().into_iter().flatten() {
        copy_blob(&stage, &other, ztoc)?;
    }
    let digest = push_index(&stage, &other, &index);
    let image = images::single(21);
    let published = stage.publish(&image, "team/explicit", "mine");
    let outcome = prepare(&stage, &published, &image, &digest)?;
    assert!(matches!(outcome, Outcome::Left), "{outcome:?}");
    assert_eq!(stage.lazy_layers()?, 0, "another image's index says nothing about this layer");
    Ok(())
}

#[test]
fn several_containers_of_one_image_at_once_fetch_it_once() -> Result<()> {
    let stage = Stage::start(options()?)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    stage.registry.clear_log();
    let said: Vec<Result<String>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..4)
            .map(|number| {
                let (stage, published) = (&stage, &published);
                scope.spawn(move || {
                    stage.probe(KUBELET, published, &format!("c{number}"), &["sum", "/large", "/random"])
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().expect("a container's thread panicked")).collect()
    });
    let said: Vec<String> = said.into_iter().collect::<Result<_>>()?;
    assert!(said[0].contains(&images::LARGE.to_string()), "{said:?}");
    assert!(said.iter().all(|text| *text == said[0]), "all read the same: {said:?}");
    let fetched = stage.blob_bytes();
    assert!(fetched <= published.size + published.size / 10, "{fetched} bytes of {}", published.size);
    Ok(())
}

#[test]
fn two_namespaces_pull_the_same_image_lazily() -> Result<()> {
    let mut options = options()?;
    options.containerd = containerd2::programs()?;
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/app", "1")?;
    for namespace in ["one", "two"] {
        stage.pull_by_ctr(namespace, "soci", &published)?;
        echoes(&stage, namespace, &published)?;
        let words = ["snapshots", "--snapshotter", "soci", "info", &image.chain_id()];
        let shown: serde_json::Value = serde_json::from_str(&stage.containerd.run(namespace, &words)?)?;
        let verdict = &shown["Labels"]["containerd.io/snapshot/soci.verdict"];
        // Its topmost layer is too small for a zTOC. Had the image been left to containerd, this would say so.
        assert_eq!(verdict, "unpacked: no-ztoc", "namespace {namespace}: {shown}");
    }
    // Namespaces may share what is mounted for one of them.
    assert!(stage.lazy_layers()? >= 2, "both large layers are lazy");
    Ok(())
}

/// Where the artifacts of an image are; the registry has them in no case.
#[derive(Debug, Clone, Copy)]
enum Kept {
    Nowhere,
    UnderTheRoot,
    InContainerd,
}

/// Returns the digests of an image's index and zTOCs with their bytes, as they are in the registry.
fn artifacts(stage: &Stage, published: &Published) -> Result<Vec<(String, Vec<u8>)>> {
    let manifest = |reference: &str| -> Result<(Vec<u8>, Value)> {
        let bytes = stage.registry.manifest(&published.repository, reference).context("no manifest")?;
        Ok((bytes.to_vec(), serde_json::from_slice(&bytes)?))
    };
    let (_, top) = manifest("1")?;
    let (_, image) = manifest(top["manifests"][0]["digest"].as_str().context("no digest")?)?;
    let digest = image["annotations"]["com.amazon.soci.index-digest"].as_str().context("no index")?;
    let (bytes, index) = manifest(digest)?;
    let mut found = vec![(digest.to_owned(), bytes)];
    for ztoc in index["layers"].as_array().context("no zTOCs")? {
        let digest = ztoc["digest"].as_str().context("no digest")?;
        let bytes = stage.registry.blob(&published.repository, digest).context("no zTOC")?;
        found.push((digest.to_owned(), bytes.to_vec()));
    }
    Ok(found)
}

fn keep(stage: &Stage, kept: Kept, digest: &str, bytes: &[u8]) -> Result<()> {
    match kept {
        Kept::Nowhere => {}
        Kept::UnderTheRoot => {
            let blob = digest.replace(':', "/");
            std::fs::write(stage.snapshotter.root().join("content/blobs").join(blob), bytes)?;
        }
        Kept::InContainerd => {
            let file = stage.path().join("artifact");
            std::fs::write(&file, bytes)?;
            let mut ingest = stage.containerd.ctr(KUBELET);
            ingest.args(["content", "ingest", "--expected-digest", digest, digest]);
            let ingested = ingest.stdin(std::fs::File::open(&file)?).output()?;
            assert!(ingested.status.success(), "{ingested:?}");
            stage.containerd.run(KUBELET, &["content", "label", digest, "containerd.io/gc.root=test"])?;
        }
    }
    Ok(())
}

#[test]
fn artifacts_are_taken_from_either_content_store_whatever_the_type_says() -> Result<()> {
    for (kind, kept, lazy) in [
        ("soci", Kept::Nowhere, 0),
        ("soci", Kept::UnderTheRoot, 2),
        ("soci", Kept::InContainerd, 2),
        ("containerd", Kept::UnderTheRoot, 2),
        ("containerd", Kept::InContainerd, 2),
    ] {
        let mut options = options()?;
        options.content_store = kind.to_owned();
        let stage = Stage::start(options)?;
        let published = stage.publish_v2(&images::odd(Dialect::Oci), "team/app", "1")?;
        for (digest, bytes) in artifacts(&stage, &published)? {
            keep(&stage, kept, &digest, &bytes)?;
            stage.registry.fault(Fault::new(Matcher::path(digest), Action::status(404)));
        }
        stage.pull_as_kubelet(&published)?;
        assert_eq!(stage.lazy_layers()?, lazy, "{kind}: {kept:?}");
        echoes(&stage, KUBELET, &published)?;
    }
    Ok(())
}

#[test]
fn a_flaky_registry_is_tried_again() -> Result<()> {
    let mut options = options()?;
    options.config.push_str("[blob]\nmax_retries = 8\nmin_wait_msec = 5\nmax_wait_msec = 50\n");
    options.config.push_str("[http]\nMaxRetries = 8\nMinWaitMsec = 5\nMaxWaitMsec = 50\n");
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    stage.registry.fault(Fault::new(Matcher::blobs(), Action::status(503)).times(2));
    stage.registry.fault(Fault::new(Matcher::blobs(), Action::Reset(1000)).skip(3).times(2));
    stage.registry.fault(Fault::new(Matcher::blobs(), Action::ShortBody(2000)).skip(6).times(1));
    let said = stage.probe(KUBELET, &published, "sum", &["sum", "/large", "/random"])?;
    assert!(said.contains(&images::LARGE.to_string()), "{said}");
    stage.registry.clear_faults();
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

#[test]
fn mirrors_are_asked_in_order_and_a_dead_one_is_passed_over() -> Result<()> {
    let mut options = options()?;
    let mirror_backstage = soci_e2e::stage::Backstage::start(options.registry.clone())?;
    let mirror = &mirror_backstage.registry;
    options.more_trust.push(mirror.ca_pem().to_owned());
    options.more_logins.push(mirror.host());
    options.mirrors = vec!["https://127.0.0.1:1".to_owned(), format!("https://{}", mirror.host())];
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/app", "1")?;
    for layer in &image.layers {
        mirror.put_blob("team/app", layer.blob.clone());
    }
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    mirror.clear_log();
    stage.probe(KUBELET, &published, "sum", &["sum", "/large"])?;
    let served = mirror.log().iter().filter(|seen| seen.status == 206).count();
    assert!(served > 0, "the living mirror served no range");
    Ok(())
}

#[test]
fn containerds_own_credentials_are_not_needed_by_the_daemon() -> Result<()> {
    // The registry's log names who asked: every ranged read came with the Docker config's user.
    let stage = Stage::start(options()?)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    stage.registry.clear_log();
    stage.probe(KUBELET, &published, "sum", &["sum", "/large"])?;
    let log = stage.registry.log();
    let ranged: Vec<_> = log.iter().filter(|seen| seen.status == 206).collect();
    assert!(!ranged.is_empty(), "nothing was read lazily");
    assert!(ranged.iter().all(|seen| seen.user.as_deref() == Some(USER)), "{ranged:?}");
    assert!(!stage.snapshotter.log_text().contains(PASSWORD));
    Ok(())
}
