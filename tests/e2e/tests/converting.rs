//! Which platforms of an image are converted, into what, and what is refused; and layers that other tools made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use soci_e2e::binaries::Binaries;
use soci_e2e::publish::{BUILD, Published};
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, StageDir, USER};
use soci_e2e::{Stage, StageOptions, images, layout};
use soci_testkit::AuthMode;
use soci_testkit::image::Image;
use soci_testkit::process::output;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const AMD64: &str = "linux/amd64";
const ARM64: &str = "linux/arm64";

/// Two images for two platforms, and the image index of both.
fn both() -> (Vec<(Image, &'static str)>, Vec<u8>) {
    let images = vec![(images::single(41), "amd64"), (images::single(42), "arm64")];
    let manifests: Vec<Value> = images
        .iter()
        .map(|(image, architecture)| {
            json!({
                "mediaType": image.media_type, "digest": image.digest, "size": image.manifest.len(),
                "platform": {"os": "linux", "architecture": architecture},
            })
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    (images, index.to_string().into_bytes())
}

/// Returns for each platform of an image index whether its manifest names a SOCI index; `read` returns content by digest.
fn indexed(top: &Value, read: &dyn Fn(&str) -> Result<Value>) -> Result<BTreeMap<String, bool>> {
    let mut found = BTreeMap::new();
    for entry in top["manifests"].as_array().context("no image index")? {
        let platform = &entry["platform"];
        let (Some(os), Some(architecture)) = (platform["os"].as_str(), platform["architecture"].as_str())
        else {
            continue;
        };
        if entry["artifactType"].is_string() {
            continue;
        }
        let manifest = read(entry["digest"].as_str().unwrap_or_default())?;
        let named =
            manifest["annotations"].as_object().is_some_and(|all| all.keys().any(|key| key.contains("soci")));
        found.insert(format!("{os}/{architecture}"), named);
    }
    Ok(found)
}

fn expected(amd64: bool, arm64: bool) -> BTreeMap<String, bool> {
    BTreeMap::from([(AMD64.to_owned(), amd64), (ARM64.to_owned(), arm64)])
}

fn host_is_arm() -> bool {
    std::env::consts::ARCH == "aarch64"
}

#[test]
fn containerds_images_are_converted_for_the_platforms_that_are_named() -> Result<()> {
    let stage = Stage::start(StageOptions::new(AuthMode::Basic)?)?;
    let (images, index) = both();
    for (image, architecture) in &images {
        stage.publish(image, "team/both", architecture);
        stage.registry.put_manifest("team/both", &image.digest, &image.media_type, image.manifest.clone());
    }
    stage.registry.put_manifest("team/both", "1", INDEX, index);
    let from = stage.registry.image("team/both:1");
    let hosts = stage.path().join("certs.d");
    let hosts = hosts.to_str().context("a path is not UTF-8")?;
    let login = format!("{USER}:{PASSWORD}");
    let fetch = ["content", "fetch", "--all-platforms", "--hosts-dir", hosts, "--user", &login, &from];
    stage.containerd.run(BUILD, &fetch)?;

    let to = |tag: &str| stage.registry.image(&format!("team/both:{tag}"));
    let read = |digest: &str| -> Result<Value> {
        Ok(serde_json::from_str(&stage.containerd.run(BUILD, &["content", "get", digest])?)?)
    };
    let target = |reference: &str| -> Result<String> {
        let listed = stage.containerd.run(BUILD, &["images", "list", &format!("name=={reference}")])?;
        let digest = listed.split_whitespace().find(|word| word.starts_with("sha256:"));
        Ok(digest.with_context(|| format!("{reference} is not an image: {listed}"))?.to_owned())
    };
    let convert = |words: &[&str], tag: &str| -> Result<(String, BTreeMap<String, bool>)> {
        let to = to(tag);
        let words = [&["convert", "--min-layer-size", images::MIN_LAYER], words, &[&from, &to]].concat();
        stage.soci(BUILD, &words)?;
        let digest = target(&to)?;
        let found = indexed(&read(&digest)?, &read)?;
        Ok((digest, found))
    };
    let (all, found) = convert(&["--all-platforms"], "all")?;
    assert_eq!(found, expected(true, true));
    // What a manifest names is there: two indexes, by two artifacts of the image index.
    let artifacts = read(&all)?["manifests"].as_array().map_or(0, Vec::len);
    assert_eq!(artifacts, 4, "two images and two SOCI indexes");
    assert_eq!(convert(&["--platform", ARM64], "arm")?.1, expected(false, true));
    assert_eq!(convert(&["--platform", AMD64, "--platform", ARM64], "each")?.0, all, "as all of them");
    assert_eq!(convert(&[], "own")?.1, expected(!host_is_arm(), host_is_arm()));
    // Again, and onto itself: the same image.
    assert_eq!(convert(&["--all-platforms"], "all")?.0, all);
    let onto = to("all");
    stage
        .soci(BUILD, &["convert", "--all-platforms", "--min-layer-size", images::MIN_LAYER, &onto, &onto])?;
    assert_eq!(target(&onto)?, all);

    let digested = format!("{}@{}", to("x"), all);
    let untagged = stage.registry.image("team/both");
    let absent = stage.registry.image("team/absent:1");
    for (words, told) in [
        (vec![&from, &digested], "must not contain a digest"),
        (vec![&from, &untagged], "must be tagged"),
        (vec![&absent, &onto], "not found"),
        (vec![&from], "destination needs to be specified"),
        (vec![], "source image needs to be specified"),
    ] {
        let words: Vec<&str> = ["convert"].into_iter().chain(words.into_iter().map(String::as_str)).collect();
        refused(&mut stage.soci_command(BUILD, &words), told)?;
    }
    let missing = ["convert", "--platform", "linux/s390x", &from, &onto];
    refused(&mut stage.soci_command(BUILD, &missing), "not found")?;
    assert_eq!(target(&onto)?, all, "a refused conversion changes nothing");
    Ok(())
}

/// Runs a command that must fail with status 1 and say `told`.
fn refused(command: &mut Command, told: &str) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() != Some(1) || !said.contains(told) {
        bail!("{told:?} is expected: {}: {said}", output.status);
    }
    Ok(())
}

/// Writes a layout of two platforms.
fn write_both(at: &Path) -> Result<()> {
    let (images, index) = both();
    for (image, _) in &images {
        layout::write(image, at)?;
    }
    let digest = soci_testkit::layer_gen::digest(&index);
    std::fs::write(blob(at, &digest), &index)?;
    let top = json!({"schemaVersion": 2, "mediaType": INDEX,
        "manifests": [{"mediaType": INDEX, "digest": digest, "size": index.len()}]});
    Ok(std::fs::write(at.join("index.json"), top.to_string())?)
}

fn blob(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs").join(digest.replacen(':', "/", 1))
}

#[test]
fn layouts_are_converted_for_the_platforms_that_are_named() -> Result<()> {
    let directory = StageDir::new()?;
    let at = |name: &str| directory.path().join(name);
    write_both(&at("from"))?;
    let soci = Binaries::ours()?.path("soci");
    let command = |words: &[&str], from: &str, to: &str| {
        let mut command = Command::new(&soci);
        command.args(["convert", "--standalone", "--min-layer-size", images::MIN_LAYER]).args(words);
        command.arg(at(from)).arg(at(to));
        command
    };
    let convert = |words: &[&str], from: &str, to: &str| -> Result<(String, BTreeMap<String, bool>)> {
        output(&mut command(&[&["--format", "oci-dir"], words].concat(), from, to))?;
        let read = |digest: &str| -> Result<Value> {
            Ok(serde_json::from_slice(&std::fs::read(blob(&at(to), digest)).context("read a blob")?)?)
        };
        let top: Value = serde_json::from_slice(&std::fs::read(at(to).join("index.json"))?)?;
        let digest = top["manifests"][0]["digest"].as_str().context("the layout is empty")?.to_owned();
        // A layout's index may be the image index itself, or name it.
        let nested = read(&digest)?;
        let found = indexed(if nested["manifests"].is_array() { &nested } else { &top }, &read)?;
        Ok((digest, found))
    };
    let (all, found) = convert(&["--all-platforms"], "from", "all")?;
    assert_eq!(found, expected(true, true));
    assert_eq!(convert(&["--platform", ARM64], "from", "arm")?.1, expected(false, true));
    assert_eq!(convert(&[], "from", "own")?.1, expected(!host_is_arm(), host_is_arm()));
    assert_eq!(convert(&["--all-platforms"], "from", "again")?.0, all, "twice the same");
    assert_eq!(convert(&["--all-platforms"], "all", "onto")?.0, all, "what is converted stays as it is");

    refused(&mut command(&["--platform", "linux/s390x"], "from", "none"), "not found")?;
    refused(&mut command(&["--format", "zip"], "from", "none"), "unsupported output format")?;
    refused(&mut command(&["--span-size", "-1"], "from", "none"), "span size must be >= 0")?;
    std::fs::create_dir(at("empty"))?;
    refused(&mut command(&[], "empty", "none"), "index.json")?;
    std::fs::write(at("text.tar"), "no archive")?;
    refused(&mut command(&[], "text.tar", "none"), "text.tar")?;
    refused(&mut command(&[], "nowhere", "none"), "nowhere")?;
    // A blob that is not what its digest says.
    write_both(&at("damaged"))?;
    let (images, _) = both();
    for (image, _) in &images {
        std::fs::write(blob(&at("damaged"), &image.layers[0].digest), "something else")?;
    }
    refused(&mut command(&["--all-platforms"], "damaged", "none"), "sha256:")?;
    assert!(!at("none").exists(), "a refused conversion writes nothing");
    Ok(())
}

#[test]
fn a_layer_of_estargz_is_indexed_and_read_lazily() -> Result<()> {
    let stage = Stage::start(StageOptions::new(AuthMode::Basic)?)?;
    let image = images::estargz(43);
    let published: Published = stage.publish_v1(&image, "team/estargz", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 1);
    let differences =
        stage.differences(KUBELET, &published, &image, &std::iter::once(Vec::new()).collect())?;
    assert!(differences.is_empty(), "lazy on the left, unpacked on the right:\n{}", differences.join("\n"));
    Ok(())
}
