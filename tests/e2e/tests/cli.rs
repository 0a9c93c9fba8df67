//! The command line against a real containerd and registry: what scripts and operators rely on.

use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use soci_e2e::publish::{BUILD, Published};
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, images, layout};
use soci_testkit::AuthMode;
use soci_testkit::image::Dialect;
use soci_testkit::process::output;

/// A stage, and an image whose content is in containerd's store in the namespace where indexes are built.
fn stage() -> Result<(Stage, Published)> {
    let stage = Stage::start(StageOptions::new(AuthMode::Basic)?)?;
    let published = stage.publish(&images::odd(Dialect::Oci), "team/app", "1");
    stage.fetch(&published.reference)?;
    Ok((stage, published))
}

fn create(stage: &Stage, published: &Published, more: &[&str]) -> Result<String> {
    let words = [&["create", "--min-layer-size", images::MIN_LAYER], more, &[&published.reference]].concat();
    stage.soci(BUILD, &words)
}

fn indexes(stage: &Stage, published: &Published) -> Result<Vec<String>> {
    let listed = stage.soci(BUILD, &["index", "list", "--quiet", "--ref", &published.reference])?;
    Ok(listed.split_whitespace().map(str::to_owned).collect())
}

/// Runs `soci`, which must fail with status 1, and returns what it wrote to stderr.
fn refused(stage: &Stage, words: &[&str]) -> Result<String> {
    let output = stage.soci_command(BUILD, words).stdin(Stdio::null()).output()?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "soci {words:?}: {told}");
    assert!(told.contains("soci: "), "soci {words:?}: {told}");
    Ok(told)
}

#[test]
fn bad_arguments_are_refused_with_what_is_wrong() -> Result<()> {
    let (stage, published) = stage()?;
    let image = published.reference.as_str();
    for (words, said) in [
        (vec!["create"], "source image needs to be specified"),
        (vec!["create", "--span-size", "-1", image], "span size must be >= 0"),
        (vec!["create", "--min-layer-size", "-5", image], "min layer size must be >= 0"),
        (vec!["create", "--optimizations", "speed", image], "is not a valid optimization [xattr]"),
        (vec!["create", "--platform", "no/such/plat/form", image], "could not parse platform"),
        (vec!["create", "reg.example/not/there:1"], "not found"),
        (vec!["convert", image], "destination needs to be specified"),
        (vec!["convert", image, "short"], "must be a tagged ref"),
        (vec!["convert", "--format", "zip", image, image], "unsupported output format"),
        (vec!["push"], "please provide an image reference to push"),
        (vec!["push", "--existing-index", "maybe", image], "unexpected value for flag existing-index"),
        (vec!["push", image], "could not find any soci index manifest v1 to push"),
        (vec!["index", "info", "not-a-digest"], "digest"),
        (vec!["ztoc", "get-file", "only-one"], "please provide both a ztoc digest and a filename to extract"),
        (vec!["--content-store", "tape", "create", image], "unknown content store type"),
    ] {
        let told = refused(&stage, &words)?;
        assert!(told.contains(said), "soci {words:?}: {told}");
    }
    Ok(())
}

#[test]
fn create_says_what_it_did_with_each_layer_and_skips_what_exists() -> Result<()> {
    let (stage, published) = stage()?;
    let first = create(&stage, &published, &[])?;
    assert_eq!(first.matches(" -> ztoc sha256:").count(), 2, "{first}");
    assert_eq!(first.matches("is less than min-layer-size 1000000").count(), 1, "{first}");
    let second = create(&stage, &published, &[])?;
    assert_eq!(second.matches("(already exists)").count(), 2, "{second}");
    let forced = create(&stage, &published, &["--force"])?;
    assert_eq!(forced.matches("(already exists)").count(), 0, "{forced}");
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&first), sorted(&forced), "the same bytes give the same zTOCs");
    Ok(())
}

#[test]
fn no_index_is_made_when_no_layer_qualifies() -> Result<()> {
    let (stage, published) = stage()?;
    let told = refused(&stage, &["create", "--min-layer-size", "99999999999", &published.reference])?;
    assert!(told.contains("no ztocs created, all layers either skipped or produced errors"), "{told}");
    assert_eq!(indexes(&stage, &published)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn an_index_lives_and_dies_with_its_image() -> Result<()> {
    let (stage, published) = stage()?;
    create(&stage, &published, &[])?;
    let digest = indexes(&stage, &published)?.pop().context("no index")?;
    let listed = stage.containerd.run(BUILD, &["images", "list"])?;
    assert!(listed.contains(&format!("containerd.io/gc.ref.content.soci-index={digest}")), "{listed}");
    stage.containerd.run(BUILD, &["content", "prune", "references"])?;
    let content = stage.containerd.run(BUILD, &["content", "list", "--quiet"])?;
    assert!(content.contains(&digest), "the index is kept while its image is there");
    let index: Value = serde_json::from_str(&stage.soci(BUILD, &["index", "info", &digest])?)?;
    for ztoc in index["layers"].as_array().into_iter().flatten() {
        assert!(content.contains(ztoc["digest"].as_str().context("no digest")?), "and its zTOCs");
    }
    stage.forget(&published.reference)?;
    let content = stage.containerd.run(BUILD, &["content", "list", "--quiet"])?;
    assert!(!content.contains(&digest), "and goes with it:\n{content}");
    Ok(())
}

#[test]
fn indexes_are_listed_shown_and_removed() -> Result<()> {
    let (stage, published) = stage()?;
    create(&stage, &published, &[])?;
    let table = stage.soci(BUILD, &["index", "list"])?;
    let head: Vec<&str> = table.lines().next().unwrap_or_default().split("  ").map(str::trim).collect();
    let head: Vec<&str> = head.into_iter().filter(|cell| !cell.is_empty()).collect();
    let columns = ["DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED"];
    assert_eq!(head, columns);
    assert!(table.contains(&published.reference) && table.contains(" ago"), "{table}");
    let digest = indexes(&stage, &published)?.pop().context("no index")?;
    let index: Value = serde_json::from_str(&stage.soci(BUILD, &["index", "info", &digest])?)?;
    assert_eq!(index["subject"]["digest"], images::odd(Dialect::Oci).digest.as_str());
    let both = refused(&stage, &["index", "rm", "--ref", &published.reference, &digest])?;
    assert!(both.contains("either index digests or image ref, but not both"), "{both}");
    assert_eq!(stage.soci(BUILD, &["index", "rm", &digest])?, "");
    assert_eq!(indexes(&stage, &published)?, Vec::<String>::new());
    refused(&stage, &["index", "rm", &digest])?;
    Ok(())
}

#[test]
fn ztocs_are_listed_and_shown_and_give_files_back() -> Result<()> {
    let (stage, published) = stage()?;
    let made = create(&stage, &published, &[])?;
    let listed = stage.soci(BUILD, &["ztoc", "list", "--quiet", "--image-ref", &published.reference])?;
    assert_eq!(listed.split_whitespace().count(), 2, "{listed}");
    let bottom = images::odd(Dialect::Oci).layers[0].digest.clone();
    let line = made.lines().find(|line| line.contains(&bottom)).context("the lowest layer has no zTOC")?;
    let ztoc = line.rsplit_once("ztoc ").context("no zTOC is named")?.1.split(' ').next().unwrap_or_default();
    let info: Value = serde_json::from_str(&stage.soci(BUILD, &["ztoc", "info", ztoc])?)?;
    assert_eq!(info["span_size"], 4 << 20);
    assert_eq!(info["num_spans"], 4);
    let files = info["files"].as_array().context("no files")?;
    let large = files.iter().find(|file| file["filename"] == "large").context("no file named large")?;
    assert_eq!(large["size"], images::LARGE);
    let out = stage.path().join("out");
    let to = out.to_str().context("a path is not UTF-8")?;
    stage.soci(BUILD, &["ztoc", "get-file", "--output", to, ztoc, "large"])?;
    assert_eq!(std::fs::read(&out)?.len(), images::LARGE, "a file of several spans");
    stage.soci(BUILD, &["ztoc", "get-file", "--output", to, ztoc, "home/user/kept"])?;
    assert_eq!(std::fs::read(&out)?, b"from the lowest layer");
    let told = refused(&stage, &["ztoc", "get-file", ztoc, "no/such/file"])?;
    assert!(told.contains("does not exist"), "{told}");
    Ok(())
}

#[test]
fn optimizations_give_the_same_bytes_each_time() -> Result<()> {
    let (stage, published) = stage()?;
    let plain = create(&stage, &published, &["--force"])?;
    let plain = (plain, indexes(&stage, &published)?);
    let one =
        (create(&stage, &published, &["--force", "--optimizations", "xattr"])?, newest(&stage, &published)?);
    let two =
        (create(&stage, &published, &["--force", "--optimizations", "xattr"])?, newest(&stage, &published)?);
    assert_eq!(one.1, two.1);
    // Every layer worth indexing has xattrs or not; that stands in the index, not in the zTOC.
    assert_eq!(plain.0.matches("-> ztoc").count(), one.0.matches("-> ztoc").count());
    Ok(())
}

fn newest(stage: &Stage, published: &Published) -> Result<String> {
    indexes(stage, published)?.first().cloned().context("no index")
}

#[test]
fn prefetch_artifacts_are_made_listed_and_shown() -> Result<()> {
    let (stage, published) = stage()?;
    let made = create(&stage, &published, &["--prefetch-file", "/large", "--prefetch-file", "probe"])?;
    assert_eq!(made.matches("Created prefetch artifact for layer").count(), 1, "{made}");
    let listed: Value = serde_json::from_str(&stage.soci(BUILD, &["prefetch", "list", "--json"])?)?;
    let entry = listed.get(0).context("nothing is listed")?;
    assert_eq!(entry["LayerDigest"], images::odd(Dialect::Oci).layers[0].digest.as_str());
    let digest = entry["Digest"].as_str().context("no digest")?;
    let shown = stage.soci(BUILD, &["prefetch", "info", digest])?;
    assert!(shown.contains("Prefetch Spans:") && shown.contains("Total spans to prefetch: 4"), "{shown}");
    Ok(())
}

#[test]
fn push_warns_skips_or_allows_where_an_index_is_there_already() -> Result<()> {
    let (stage, published) = stage()?;
    create(&stage, &published, &[])?;
    let digest = newest(&stage, &published)?;
    let login = format!("{USER}:{PASSWORD}");
    let push = |more: &[&str]| {
        stage.soci(
            BUILD,
            &[&["push", "--user", login.as_str()], more, &[published.reference.as_str()]].concat(),
        )
    };
    let first = push(&[])?;
    assert!(first.contains(&format!("pushing soci index with digest: {digest}")), "{first}");
    let again = push(&[])?;
    assert!(again.contains("[WARN]") && again.contains("pushing index anyway"), "{again}");
    let skipped = push(&["--existing-index", "skip"])?;
    assert!(skipped.contains("skipping pushing artifacts for image manifest"), "{skipped}");
    let allowed = push(&["--existing-index", "allow"])?;
    assert!(!allowed.contains("checking if a soci index already exists"), "{allowed}");
    let quiet = push(&["--existing-index", "allow", "--quiet"])?;
    assert_eq!(quiet.trim(), digest);
    Ok(())
}

#[test]
fn push_takes_the_newest_index_and_the_docker_config() -> Result<()> {
    let (stage, published) = stage()?;
    create(&stage, &published, &[])?;
    let old = newest(&stage, &published)?;
    create(&stage, &published, &["--force", "--span-size", "1048576"])?;
    let new = newest(&stage, &published)?;
    assert_ne!(old, new);
    let quiet = stage.soci(BUILD, &["push", "--quiet", &published.reference])?;
    assert_eq!(quiet.trim(), new);
    assert!(stage.registry.manifest(&published.repository, &new).is_some());
    assert!(stage.registry.manifest(&published.repository, &old).is_none());
    Ok(())
}

#[test]
fn a_wrong_user_is_refused_with_host_and_status_and_without_the_password() -> Result<()> {
    let (stage, published) = stage()?;
    create(&stage, &published, &[])?;
    let told = refused(&stage, &["push", "--user", "puller:wrong-0ne", &published.reference])?;
    assert!(told.contains(&stage.registry.host()) && told.contains("401"), "{told}");
    assert!(!told.contains("wrong-0ne"), "{told}");
    Ok(())
}

#[test]
fn a_converted_image_is_pushed_by_an_image_tool_and_runs_lazily() -> Result<()> {
    let (stage, published) = stage()?;
    let to = stage.registry.image("team/app:v2");
    stage.soci(BUILD, &["convert", "--min-layer-size", images::MIN_LAYER, &published.reference, &to])?;
    let hosts = stage.path().join("certs.d");
    let hosts = hosts.to_str().context("a path is not UTF-8")?;
    let login = format!("{USER}:{PASSWORD}");
    stage.containerd.run(BUILD, &["images", "push", "--hosts-dir", hosts, "--user", &login, &to])?;
    stage.forget(&to)?;
    stage.forget(&published.reference)?;
    let converted = Published { reference: to, ..published };
    stage.pull_as_kubelet(&converted)?;
    assert_eq!(stage.lazy_layers()?, 2);
    assert_eq!(stage.probe(KUBELET, &converted, "echo", &["echo", "v2"])?, "v2\n");
    Ok(())
}

#[test]
fn standalone_conversion_is_the_same_each_time_and_refuses_what_is_no_layout() -> Result<()> {
    let (stage, _) = stage()?;
    let at = |name: &str| stage.path().join(name);
    layout::write(&images::odd(Dialect::Oci), &at("layout"))?;
    let convert = |to: &str| {
        let mut command = std::process::Command::new(stage.binaries.path("soci"));
        command.args(["convert", "--standalone", "--min-layer-size", images::MIN_LAYER]);
        output(command.arg(at("layout")).arg(at(to)))
    };
    convert("one.tar")?;
    convert("two.tar")?;
    assert!(std::fs::read(at("one.tar"))? == std::fs::read(at("two.tar"))?, "two conversions differ");
    std::fs::create_dir(at("empty"))?;
    for from in ["empty", "nowhere"] {
        let mut command = std::process::Command::new(stage.binaries.path("soci"));
        command.args(["convert", "--standalone"]).arg(at(from)).arg(at("out.tar"));
        if output(&mut command).is_ok() {
            bail!("{from} was converted");
        }
    }
    Ok(())
}

#[test]
fn removing_one_of_two_images_that_share_layers_leaves_the_other() -> Result<()> {
    let (stage, published) = stage()?;
    let image = images::odd(Dialect::Oci);
    let smaller = soci_testkit::image::Image::new(image.layers[..2].to_vec(), Dialect::Oci, &["/probe"]);
    let other = stage.publish(&smaller, "team/other", "1");
    stage.fetch(&other.reference)?;
    create(&stage, &published, &[])?;
    create(&stage, &other, &[])?;
    let kept = newest(&stage, &other)?;
    stage.forget(&published.reference)?;
    stage.soci(BUILD, &["rebuild-db"])?;
    assert_eq!(indexes(&stage, &other)?, [kept]);
    let ztocs = stage.soci(BUILD, &["ztoc", "list", "--quiet", "--image-ref", &other.reference])?;
    assert_eq!(ztocs.split_whitespace().count(), 2);
    let again = create(&stage, &other, &[])?;
    assert_eq!(again.matches("(already exists)").count(), 2, "{again}");
    Ok(())
}
