//! The program against a real containerd and a registry that asks for credentials. Needs root and containerd.
#![allow(clippy::unwrap_used, reason = "in a test, what cannot be unwrapped is a failure")]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use soci_testkit::containerd::{Containerd, Options, Programs, trust};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_testkit::{Action, AuthMode, Fault, Matcher, Seen, TestRegistry};

const NAMESPACE: &str = "cli";
const USER: &str = "robot$ci";
const PASSWORD: &str = "s3cr:et/+= $x";

/// A containerd, a registry, and an image that is in both.
struct World {
    root: tempfile::TempDir,
    registry: TestRegistry,
    containerd: Containerd,
    image: Image,
    reference: String,
    _runtime: tokio::runtime::Runtime,
}

impl World {
    fn new() -> Self {
        assert!(rustix_is_root(), "these tests need root: containerd cannot run without it");
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let options = soci_testkit::Options { anonymous_pull: false, ..soci_testkit::Options::default() };
        let options = options.auth(AuthMode::Bearer, USER, PASSWORD);
        let registry = runtime.block_on(TestRegistry::start(options)).unwrap();
        let root = tempfile::Builder::new().prefix("soci-cli-").tempdir().unwrap();
        let hosts = root.path().join("certs.d");
        trust(&hosts, &registry.host(), registry.ca_pem()).unwrap();
        std::fs::write(root.path().join("ca.pem"), registry.ca_pem()).unwrap();
        let snapshotter = root.path().join("none.sock");
        let containerd = Containerd::start(
            Programs::installed().unwrap(),
            &root.path().join("ctd"),
            &Options { snapshotter, hosts: hosts.clone(), sandbox_image: None },
        )
        .unwrap();
        let image = image();
        for layer in &image.layers {
            registry.put_blob("app", layer.blob.clone());
        }
        registry.put_blob("app", image.config.clone());
        registry.put_manifest("app", "1", &image.media_type, image.manifest.clone());
        let reference = registry.image("app:1");
        let world = Self { root, registry, containerd, image, reference, _runtime: runtime };
        world.fetch(&world.reference, &[]);
        world
    }

    /// Has containerd fetch an image from the registry, without unpacking it.
    fn fetch(&self, reference: &str, flags: &[&str]) {
        let (hosts, user) = (self.path("certs.d"), format!("{USER}:{PASSWORD}"));
        let fetch = ["content", "fetch", "--hosts-dir", &hosts, "--user", &user];
        self.containerd.run(NAMESPACE, &[&fetch, flags, &[reference]].concat()).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.root.path().join(name).to_str().unwrap().to_owned()
    }

    /// The program with this containerd, and a Docker config that knows nothing.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_soci"));
        command
            .arg("--address")
            .arg(self.containerd.socket())
            .args(["--namespace", NAMESPACE, "--root", &self.path("root")])
            .args(arguments)
            .env("DOCKER_CONFIG", self.path("docker"))
            .env_remove("DOCKER_AUTH_CONFIG")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn stdout(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `soci push` of the image with more flags.
    fn push(&self, flags: &[&str]) -> Output {
        let ca = self.path("ca.pem");
        let mut arguments = vec!["push", "--tlscacert", &ca];
        arguments.extend(flags);
        arguments.push(&self.reference);
        self.run(&arguments)
    }

    fn docker_config(&self, config: &Value) {
        std::fs::create_dir_all(self.path("docker")).unwrap();
        std::fs::write(self.path("docker/config.json"), config.to_string()).unwrap();
    }

    /// Removes from the registry what was pushed, by forgetting it: a digest is pushed anew only if it is not there.
    fn new_index(&self, span_size: &str) -> String {
        self.stdout(&["create", "--min-layer-size=0", "--span-size", span_size, &self.reference]);
        self.stdout(&["index", "list", "-q", "--ref", &self.reference]).lines().next().unwrap().to_owned()
    }

    fn indexes_in_registry(&self) -> Vec<String> {
        let pushed = self.stdout(&["index", "list", "-q"]);
        let there = |digest: &&str| self.registry.manifest("app", digest).is_some();
        pushed.lines().filter(there).map(str::to_owned).collect()
    }
}

fn rustix_is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
}

fn image() -> Image {
    let mut numbers = Numbers::new(7);
    let big = numbers.bytes(300_000);
    let base = LayerBuilder::new().file("etc/hello", &Attr::default(), b"hello\n").gzip();
    let top =
        LayerBuilder::new().dir("opt/", &Attr::mode(0o755)).file("opt/big", &Attr::default(), &big).gzip();
    Image::new(vec![base, top], Dialect::Oci, &["/bin/true"])
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn an_image_is_indexed_listed_converted_and_kept() {
    let world = World::new();
    let created =
        world.stdout(&["create", "--min-layer-size", "0", "--prefetch-file", "/opt/big", &world.reference]);
    let lines: Vec<&str> = created.lines().collect();
    assert_eq!(lines.len(), 3, "{created}");
    assert!(lines[0].starts_with(&format!("layer {} -> ztoc sha256:", world.image.layers[0].digest)));
    assert!(lines[2].starts_with("Created prefetch artifact for layer "));
    let again = world.stdout(&["create", "--min-layer-size", "0", &world.reference]);
    assert_eq!(again.matches("(already exists)").count(), 2, "{again}");

    let listing = world.stdout(&["index", "list", "--ref", &world.reference]);
    let row = listing.lines().nth(1).unwrap_or_else(|| panic!("{listing}"));
    let row: Vec<&str> = row.split_whitespace().collect();
    assert_eq!((row[2], row[3], row[5]), (world.reference.as_str(), host().as_str(), "v1"), "{listing}");
    let index = row[0].to_owned();
    let labels =
        world.containerd.run(NAMESPACE, &["images", "ls", &format!("name=={}", world.reference)]).unwrap();
    assert!(labels.contains(&format!("containerd.io/gc.ref.content.soci-index={index}")), "{labels}");

    let converted = world.registry.image("app:soci");
    let lines =
        world.stdout(&["convert", "--min-layer-size", "0", "--all-platforms", &world.reference, &converted]);
    assert_eq!(lines.matches("(already exists)").count(), 2, "{lines}");
    let listing = world.stdout(&["index", "list", "--ref", &converted]);
    assert!(listing.contains(" v2 ") && listing.contains(&converted), "{listing}");
    let v2 = world.stdout(&["index", "list", "-q", "--ref", &converted]).trim().to_owned();
    let json: Value =
        serde_json::from_str(&world.stdout(&["index", "list", "--json", "-p", &host()])).unwrap();
    assert!(json.as_array().unwrap().iter().any(|row| row["digest"] == v2.as_str()));

    // What the commands wrote outlives their leases: a collection removes none of it.
    let leases = world.containerd.run(NAMESPACE, &["leases", "ls", "-q"]).unwrap();
    assert_eq!(leases.trim(), "");
    let scratch = world.registry.image("app:scratch");
    world.containerd.run(NAMESPACE, &["images", "tag", &converted, &scratch]).unwrap();
    world.containerd.run(NAMESPACE, &["images", "rm", "--sync", &scratch]).unwrap();
    assert!(world.stdout(&["rebuild-db"]).contains(" 0 are not"));
    let ztocs = world.stdout(&["ztoc", "list", "--image-ref", &converted, "-q"]);
    assert_eq!(ztocs.lines().count(), 2);
    assert!(world.stdout(&["index", "list", "-q"]).contains(&index));

    let outputs: Vec<Output> =
        ztocs.lines().map(|ztoc| world.run(&["ztoc", "get-file", ztoc, "etc/hello"])).collect();
    let said: Vec<String> = outputs.iter().map(text).collect();
    assert!(said.iter().any(|said| said == "hello\n"), "{said:?}");

    // Without the converted image nothing holds its index.
    world.containerd.run(NAMESPACE, &["images", "rm", "--sync", &converted]).unwrap();
    assert!(!world.stdout(&["index", "list", "-q"]).contains(&v2));
    world.stdout(&["index", "rm", "--ref", &world.reference]);
    assert!(!world.stdout(&["index", "list", "-q"]).contains(&index));

    // Into the soci store, with the image in containerd's.
    let soci = ["--content-store", "soci"];
    let created = world.stdout(&[&soci[..], &["create", "--min-layer-size", "0", &world.reference]].concat());
    assert!(!created.contains("already exists"), "{created}");
    assert_eq!(world.stdout(&[&soci[..], &["ztoc", "list", "-q"]].concat()).lines().count(), 2);
    world.stdout(&[&soci[..], &["convert", "--min-layer-size", "0", &world.reference, &converted]].concat());
    let listing = world.stdout(&[&soci[..], &["index", "list", "--ref", &converted]].concat());
    assert!(listing.contains(" v2 "), "{listing}");

    let absent = world.run(&["create", "-p", "linux/s390x", &world.reference]);
    assert!(text(&absent).starts_with("soci: image manifest for linux/s390x: "), "{}", text(&absent));
    let absent = world.run(&["create", "reg.example/absent:1"]);
    assert!(text(&absent).contains("not found"), "{}", text(&absent));
    assert_eq!(absent.status.code(), Some(1));
}

fn host() -> String {
    soci_oci::Platform::host().to_string()
}

/// Puts an image for amd64 and arm64 into the registry and has containerd fetch both.
fn two_platforms(world: &World) -> String {
    let mut entries = Vec::new();
    for (architecture, seed) in [("amd64", 1), ("arm64", 2)] {
        let content = Numbers::new(seed).bytes(200_000);
        let layer = LayerBuilder::new().file("bin/sh", &Attr::default(), &content).gzip();
        let image = Image::new(vec![layer], Dialect::Oci, &["/bin/true"]);
        world.registry.put_blob("two", image.layers[0].blob.clone());
        world.registry.put_blob("two", image.config.clone());
        world.registry.put_manifest("two", &image.digest, &image.media_type, image.manifest.clone());
        entries.push(json!({
            "mediaType": image.media_type,
            "digest": image.digest,
            "size": image.manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        }));
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries});
    world.registry.put_manifest("two", "1", media_type, index.to_string());
    let reference = world.registry.image("two:1");
    world.fetch(&reference, &["--all-platforms"]);
    reference
}

#[test]
fn an_index_outlives_one_that_another_run_makes_for_another_platform() {
    let world = World::new();
    let image = two_platforms(&world);
    let create = |platform: &str, span_size: &str| {
        world.stdout(&["create", "--min-layer-size=0", "--span-size", span_size, "-p", platform, &image]);
        let listed = world.stdout(&["index", "list", "-q", "--ref", &image, "-p", platform]);
        listed.lines().next().unwrap().to_owned()
    };
    let kept = || {
        // Removing any image makes containerd collect.
        let scratch = world.registry.image("two:scratch");
        world.containerd.run(NAMESPACE, &["images", "tag", &image, &scratch]).unwrap();
        world.containerd.run(NAMESPACE, &["images", "rm", "--sync", &scratch]).unwrap();
        let listed = world.stdout(&["index", "list", "-q", "--ref", &image]);
        let mut kept: Vec<String> = listed.lines().map(str::to_owned).collect();
        kept.sort();
        kept
    };
    let sorted = |one: &String, other: &String| {
        let mut both = vec![one.clone(), other.clone()];
        both.sort();
        both
    };
    let amd64 = create("linux/amd64", "65536");
    let arm64 = create("linux/arm64", "65536");
    assert_eq!(kept(), sorted(&amd64, &arm64));
    // The reference's label names what was made last, as there.
    let labels = world.containerd.run(NAMESPACE, &["images", "ls", &format!("name=={image}")]).unwrap();
    assert!(labels.contains(&format!("containerd.io/gc.ref.content.soci-index={arm64}")), "{labels}");
    // A newer one of the same platform takes the place of the older.
    let newer = create("linux/arm64", "131072");
    assert_eq!(kept(), sorted(&amd64, &newer));

    // As the Go tool leaves it: one label, and a second platform displaces the first from it.
    for platform in ["linux-amd64", "linux-arm64"] {
        let label = format!("containerd.io/gc.ref.content.soci-index.{platform}=");
        world.containerd.run(NAMESPACE, &["images", "label", &image, &label]).unwrap();
    }
    assert_eq!(kept(), std::slice::from_ref(&newer));
    let amd64 = create("linux/amd64", "65536");
    assert_eq!(kept(), sorted(&amd64, &newer));
}

#[test]
fn t119_t120_t121_t123_an_index_is_pushed_with_the_credentials_that_are_meant() {
    let world = World::new();
    let host = world.registry.host();

    // T122: a push that has no index says so, whatever the credentials are.
    let none = world.push(&["--user", "a:b"]);
    assert!(
        text(&none).contains("could not find any soci index manifest v1 to push for platform"),
        "{}",
        text(&none)
    );

    // T119: the value is split at the first colon, the rest is taken byte for byte.
    let first = world.new_index("65536");
    let output = world.push(&["--user", &format!("{USER}:{PASSWORD}")]);
    assert!(output.status.success(), "{}", text(&output));
    let lines = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(
        lines.starts_with("checking if a soci index already exists in remote repository...\n"),
        "{lines}"
    );
    assert!(lines.contains(&format!("pushing soci index with digest: {first}\n")), "{lines}");
    assert!(lines.ends_with(&format!("successfully pushed artifact with digest: {first}\n")), "{lines}");
    assert_eq!(world.indexes_in_registry(), std::slice::from_ref(&first));
    let aws = "x".repeat(2500);
    for (user, password) in [("AWS", aws.as_str()), ("user", "pa:ss")] {
        world.registry.rotate_password(user, password);
        let output = world.push(&["-u", &format!("{user}:{password}"), "--existing-index", "allow", "-q"]);
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{first}\n"));
    }

    // An index that is there is skipped or warned about.
    let user = format!("{USER}:{PASSWORD}");
    let skipped = text(&world.push(&["-u", &user, "--existing-index=skip"]));
    let found = format!("soci index found in remote repository with digest: {first}");
    assert!(
        skipped.contains(&format!("{found}: skipping pushing artifacts for image manifest: ")),
        "{skipped}"
    );
    let warned = text(&world.push(&["-u", &user, "--quiet"]));
    assert_eq!(warned, format!("[WARN] {found}: pushing index anyway\n{first}\n"));

    // The password from standard input.
    let ca = world.path("ca.pem");
    let mut child = world
        .command(&[
            "push",
            "-q",
            "--tlscacert",
            &ca,
            "-u",
            USER,
            "--password-stdin",
            "--existing-index=allow",
        ])
        .arg(&world.reference)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(child.stdin.take().unwrap(), "{PASSWORD}").unwrap();
    assert!(child.wait_with_output().unwrap().status.success());

    // T120: a wrong --user fails; the Docker config, which is right, is not asked.
    world.docker_config(&json!({"auths": {&host: {"username": USER, "password": PASSWORD}}}));
    world.registry.clear_log();
    let second = world.new_index("131072");
    let refused = world.push(&["--user", &format!("{USER}:wrong")]);
    assert_eq!(refused.status.code(), Some(1));
    let message = text(&refused);
    assert!(message.contains(&host) && message.contains("--user"), "{message}");
    assert!(!message.contains("wrong"), "{message}");
    assert!(!world.indexes_in_registry().contains(&second));
    // Whatever was presented was refused: the right password of the Docker config never was.
    assert!(world.registry.log().iter().all(|seen| seen.status == 401), "{:?}", world.registry.log());

    // R55: without --user the Docker config is used.
    let output = world.push(&["--existing-index", "allow"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(world.indexes_in_registry().contains(&second));

    // T121: an identity token of the Docker config.
    world.registry.add_identity_token("identity-t0ken", USER);
    world.docker_config(&json!({"auths": {&host: {"auth": "", "identitytoken": "identity-t0ken"}}}));
    let third = world.new_index("262144");
    let output = world.push(&["--existing-index", "allow"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(world.indexes_in_registry().contains(&third));

    // T123: logs of requests hold no secret.
    world.docker_config(&json!({"auths": {}}));
    world.new_index("32768");
    let output = world.push(&["--debug", "--http-dump", "--http-trace", "-u", &user]);
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    // What is logged goes where no script reads.
    let lines = String::from_utf8_lossy(&output.stderr);
    let manifest =
        lines.lines().find(|line| line.contains("method=PUT") && line.contains("/v2/app/manifests/"));
    assert!(manifest.is_some_and(|line| line.contains("status=201")), "{lines}");
    assert!(!lines.contains('?'), "no query is shown: {lines}");
    for secret in [PASSWORD, "s3cr", "Bearer ", "Basic ", "uthorization"] {
        assert!(!said.contains(secret), "{secret} is in: {said}");
    }

    // No credentials at all; and trust that is not there.
    let anonymous = text(&world.push(&["--existing-index", "allow"]));
    assert!(anonymous.contains("refuses anonymous access to app (status 401)"), "{anonymous}");
    let untrusted = world.run(&["push", "-u", &user, "--existing-index=allow", &world.reference]);
    assert_eq!(untrusted.status.code(), Some(1));
    assert!(!text(&untrusted).contains("s3cr"), "{}", text(&untrusted));
    let fourth = world.new_index("16384");
    let output = world.run(&["push", "-k", "-u", &user, "--existing-index=allow", &world.reference]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(world.indexes_in_registry().contains(&fourth));
    let hosts: PathBuf = world.root.path().join("certs.d");
    let fifth = world.new_index("8192");
    let hosts = format!("/nonexistent,{}", hosts.display());
    let output =
        world.run(&["push", "--hosts-dir", &hosts, "-u", &user, "--existing-index=allow", &world.reference]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(world.indexes_in_registry().contains(&fifth));
}

#[test]
fn t124_what_another_repository_has_is_mounted_and_where_that_is_denied_uploaded() {
    let world = World::new();
    let flags = ["--tlscacert", &world.path("ca.pem"), "--user", &format!("{USER}:{PASSWORD}")];
    let layers: Vec<&str> = world.image.layers.iter().map(|layer| layer.digest.as_str()).collect();
    // The image under another name: its layers came from `app`, which containerd has noted.
    let push_as = |repository: &str| {
        let copy = world.registry.image(&format!("{repository}:1"));
        world.containerd.run(NAMESPACE, &["images", "tag", &world.reference, &copy]).unwrap();
        world.stdout(&["create", "--min-layer-size=0", &copy]);
        world.registry.clear_log();
        let output = world.run(&[&["push"], &flags[..], &[&copy]].concat());
        assert!(output.status.success(), "{}", text(&output));
        for layer in &layers {
            assert!(world.registry.blob(repository, layer).is_some(), "{layer}: {}", text(&output));
        }
        world.registry.log()
    };
    let asked = |log: &[Seen], layer: &str, status: u16| {
        let (mount, from) = (format!("mount={}", layer.replace(':', "%3A")), "from=app");
        let is = |seen: &&Seen| seen.request.query.contains(&mount) && seen.request.query.contains(from);
        log.iter().filter(is).filter(|seen| seen.status == status).count()
    };
    let uploads = |log: &[Seen]| {
        let digest = |layer: &&str| format!("digest={}", layer.replace(':', "%3A"));
        let ended = |layer: &&&str| log.iter().any(|seen| seen.request.query.contains(&digest(layer)));
        layers.iter().filter(ended).count()
    };
    let log = push_as("copy");
    assert!(layers.iter().all(|layer| asked(&log, layer, 201) == 1), "{log:?}");
    assert_eq!(uploads(&log), 0, "no byte of a layer is sent");

    let mounts = Matcher::new(|request| request.query.contains("mount="));
    world.registry.fault(Fault::new(mounts, Action::status(403)));
    let log = push_as("denied");
    assert!(layers.iter().all(|layer| asked(&log, layer, 403) >= 1), "{log:?}");
    assert_eq!(uploads(&log), layers.len());
}
