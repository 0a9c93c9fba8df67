//! The program on layouts on disk and on the soci store: neither containerd nor root is needed.
#![allow(clippy::unwrap_used, reason = "in a test, what cannot be unwrapped is a failure")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::Value;
use soci_oci::{Descriptor, Digest, media_type};
use soci_store::{ContentStore as _, LocalStore};
use soci_testkit::wait::until;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../index/tests/fixtures")
}

fn soci(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soci"));
    command.args(arguments).stdin(Stdio::null()).env("CONTAINERD_ADDRESS", "/nonexistent/containerd.sock");
    command
}

fn run(arguments: &[&str]) -> Output {
    soci(arguments).output().unwrap()
}

fn stdout(arguments: &[&str]) -> String {
    let output = run(arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Runs what must fail with exit code 1, and returns its message.
fn failure(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Writes the input layout of a case below `root`.
fn layout(case: &str, root: &Path) -> (PathBuf, Value) {
    let case = fixtures().join(case);
    let expected: Value =
        serde_json::from_slice(&std::fs::read(case.join("expected.json")).unwrap()).unwrap();
    let to = root.join("in");
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
    (to, expected)
}

#[test]
fn layouts_are_converted_as_the_reference_does() {
    for case in ["docker-types", "oci-plain", "prefetch-xattr"] {
        let root = tempfile::tempdir().unwrap();
        let (input, expected) = layout(&format!("convert/{case}"), root.path());
        let output = root.path().join("out");
        let mut arguments = vec!["convert", "--standalone", "--format", "oci-dir"];
        arguments.extend(expected["args"].as_array().unwrap().iter().map(|value| value.as_str().unwrap()));
        arguments.extend([input.to_str().unwrap(), output.to_str().unwrap()]);
        let mut printed: Vec<String> = stdout(&arguments).lines().map(str::to_owned).collect();
        let mut wanted: Vec<&str> = expected["stdout"].as_str().unwrap().lines().collect();
        printed.sort();
        wanted.sort_unstable();
        assert_eq!(printed, wanted);
        assert_eq!(std::fs::read_to_string(output.join("index.json")).unwrap(), expected["index.json"]);
        for (hex, content) in expected["blobs"].as_object().unwrap() {
            let bytes = std::fs::read(output.join("blobs/sha256").join(hex)).unwrap();
            assert_eq!(Digest::of(&bytes).hex(), *hex);
            if let Some(text) = content.as_str() {
                assert_eq!(bytes, text.as_bytes());
            }
        }
    }
}

/// Returns the two ends of a new terminal: a person's, and a program's.
fn terminal() -> (File, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
    // Not to become the terminal of the test itself.
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let theirs = rustix::fs::open(name, flags, Mode::empty()).unwrap();
    (ours.into(), theirs.into())
}

/// Runs the program with a terminal as its standard error; returns what appeared there.
fn on_a_terminal(arguments: &[&str]) -> String {
    let (mut ours, theirs) = terminal();
    let mut command = soci(arguments);
    command.env("TERM", "xterm").env_remove("NO_COLOR").stdout(Stdio::null()).stderr(theirs);
    let mut child = command.spawn().unwrap();
    // The command holds the other end of the terminal too; without it reading ends with the child.
    drop(command);
    let mut shown = Vec::new();
    // The end of a terminal is an error, EIO.
    let _ = ours.read_to_end(&mut shown);
    assert!(child.wait().unwrap().success(), "{}", String::from_utf8_lossy(&shown));
    String::from_utf8(shown).unwrap()
}

#[test]
fn a_terminal_shows_bars_and_nothing_else_does() {
    let root = tempfile::tempdir().unwrap();
    let (input, _) = layout("convert/oci-plain", root.path());
    for format in ["oci-archive", "oci-dir"] {
        let output = root.path().join(format);
        let (input, output) = (input.to_str().unwrap(), output.to_str().unwrap());
        let arguments = ["convert", "--standalone", "--min-layer-size=0", "--format", format, input, output];
        let shown = on_a_terminal(&arguments);
        for bar in ["layer ", "write "] {
            assert!(shown.contains(bar), "{format}: {shown:?}");
        }
        let plain = run(&arguments);
        assert_eq!(String::from_utf8_lossy(&plain.stderr), "", "{format}");
    }
}

/// Starts a command that asks for a password, and waits until it does.
fn asked_for_a_password() -> (Child, File) {
    let (ours, theirs) = terminal();
    let mut command = Command::new("setsid");
    // Whoever runs the tests may have signals ignored, by `nohup` for one, which the command would inherit.
    command.args(["--ctty", "env", "--default-signal=HUP,INT,TERM", env!("CARGO_BIN_EXE_soci")]);
    command.args(["push", "--user", "name", "127.0.0.1:1/team/app:1"]);
    command.env("CONTAINERD_ADDRESS", "/nonexistent/containerd.sock");
    command.stdin(theirs.try_clone().unwrap()).stdout(theirs.try_clone().unwrap()).stderr(theirs);
    let child = command.spawn().unwrap();
    drop(command);
    let mut shown = Vec::new();
    let mut byte = [0];
    while !shown.ends_with(b"Password: ") {
        (&ours).read_exact(&mut byte).unwrap();
        shown.push(byte[0]);
    }
    // It is quiet before it reads.
    until(PATIENCE, || (!echoes(&ours)).then_some(())).unwrap();
    (child, ours)
}

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn echoes(terminal: &File) -> bool {
    tcgetattr(terminal).unwrap().local_modes.contains(LocalModes::ECHO)
}

/// Waits for the end of a command and returns its exit code and what it said since.
fn ended(mut child: Child, mut terminal: File) -> (Option<i32>, String) {
    let Some(status) = until(PATIENCE, || child.try_wait().unwrap()) else {
        child.kill().unwrap();
        panic!("the command waits for more than a person gave it");
    };
    assert!(echoes(&terminal), "the terminal is left as it was");
    let mut shown = Vec::new();
    let _ = terminal.read_to_end(&mut shown);
    (status.code(), String::from_utf8(shown).unwrap())
}

#[test]
fn a_password_prompt_is_ended_by_ctrl_c_at_once_and_leaves_the_terminal_as_it_was() {
    let (child, mut terminal) = asked_for_a_password();
    terminal.write_all(b"hunt\x03").unwrap();
    let (code, shown) = ended(child, terminal);
    assert_eq!(code, Some(1), "{shown}");
    assert!(shown.contains("soci: interrupted"), "{shown}");
    assert!(!shown.contains("hunt"), "{shown}");
}

#[test]
fn a_password_prompt_is_ended_by_a_signal_at_once_and_leaves_the_terminal_as_it_was() {
    use rustix::process::{Pid, Signal, kill_process};
    for (signal, expected) in [
        (Signal::TERM, "soci: terminated"),
        (Signal::HUP, "soci: hung up"),
        (Signal::INT, "soci: interrupted"),
    ] {
        let (child, terminal) = asked_for_a_password();
        kill_process(Pid::from_child(&child), signal).unwrap();
        let (code, shown) = ended(child, terminal);
        assert_eq!(code, Some(1), "{shown}");
        assert!(shown.contains(expected), "{shown}");
    }
}

#[test]
fn a_password_is_read_from_the_terminal_without_being_shown() {
    let (child, mut terminal) = asked_for_a_password();
    terminal.write_all(b"hunter2\n").unwrap();
    let (code, shown) = ended(child, terminal);
    assert_eq!(code, Some(1), "{shown}");
    assert!(shown.contains("/nonexistent/containerd.sock"), "it went on: {shown}");
    assert!(!shown.contains("hunter2"), "{shown}");
}

/// Sends signals to a command that waits for its standard input, and returns its exit code and what it said.
fn signalled(mut command: Command, signals: &[rustix::process::Signal]) -> (Option<i32>, String) {
    let (theirs, _ours) = std::io::pipe().unwrap();
    let mut child = command.stdin(theirs).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    // Those that it catches are caught as soon as it has begun.
    let caught = 1 << (rustix::process::Signal::TERM.as_raw() - 1);
    until(PATIENCE, || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:\t")).unwrap();
        (u64::from_str_radix(mask, 16).unwrap() & caught != 0).then_some(())
    })
    .unwrap();
    for signal in signals {
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), *signal).unwrap();
    }
    let Some(status) = until(PATIENCE, || child.try_wait().unwrap()) else {
        child.kill().unwrap();
        panic!("the command waits for standard input");
    };
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

const FROM_STDIN: [&str; 5] = ["push", "--user", "name", "--password-stdin", "127.0.0.1:1/team/app:1"];

#[test]
fn a_password_that_does_not_come_by_standard_input_is_not_waited_for_after_ctrl_c() {
    let ended = signalled(soci(&FROM_STDIN), &[rustix::process::Signal::INT]);
    assert_eq!(ended, (Some(1), "soci: interrupted\n".to_owned()));
}

#[test]
fn a_signal_that_nohup_has_ignored_is_ignored() {
    use rustix::process::Signal;
    let mut nohup = Command::new("sh");
    nohup.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_soci")]).args(FROM_STDIN);
    let ended = signalled(nohup, &[Signal::HUP, Signal::TERM]);
    assert_eq!(ended, (Some(1), "soci: terminated\n".to_owned()));
}

#[test]
fn standalone_mistakes_are_named() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let convert = |input: &str| failure(&["convert", "--standalone", input, &path("out")]);
    assert!(
        convert(&path("absent")).starts_with(&format!("soci: failed to access input {}", path("absent")))
    );
    std::fs::create_dir(path("empty")).unwrap();
    assert!(convert(&path("empty")).starts_with("soci: failed to read index.json from "));
    std::fs::write(path("empty/index.json"), "{\"schemaVersion\":2,\"manifests\":[]}").unwrap();
    assert_eq!(convert(&path("empty")), "soci: index.json contains no manifests\n");
    let absent = Descriptor::of(media_type::OCI_MANIFEST, b"absent");
    let list = serde_json::json!({"schemaVersion": 2, "manifests": [absent, absent]});
    std::fs::write(path("empty/index.json"), list.to_string()).unwrap();
    assert_eq!(convert(&path("empty")), "soci: manifest list contains no entries with available blobs\n");
    std::fs::write(path("not.tar"), vec![b'x'; 2048]).unwrap();
    assert!(convert(&path("not.tar")).starts_with("soci: failed to extract OCI tar "));
    std::fs::write(path("archive.tar.gz"), [0x1f, 0x8b, 8, 0, 0]).unwrap();
    assert!(convert(&path("archive.tar.gz")).contains("compressed; decompress it first"));
    assert_eq!(failure(&["convert", "--standalone"]), "soci: source image needs to be specified\n");
    assert_eq!(failure(&["convert", "--standalone", "a"]), "soci: destination needs to be specified\n");
    let (input, _) = layout("convert/oci-plain", root.path());
    let output = run(&["convert", "--standalone", input.to_str().unwrap(), &path("out")]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "soci: no ztocs created, all layers either skipped or produced errors\n"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).matches("is less than min-layer-size 10485760").count(),
        3
    );
    assert!(!Path::new(&path("out")).exists());
}

/// A soci store with what `create` makes of the v1 fixture.
struct Store {
    root: tempfile::TempDir,
    expected: Value,
}

const INDEX: &str = "sha256:6b8111fce84035e87d1258e03b03c7c4d6576bf27791f64204178376b5dbb897";
const ZTOC: &str = "sha256:cfef9b2a107bd92bdb16aa34b67733cc62d42108138ef40a60ef47f8928b3d75";
const PREFETCH: &str = "sha256:6c489b6c93346ad5f5a47923dd5fd4d7bd5f3ba593bc08e5bc6e9248ca9ba700";

impl Store {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let (input, expected) = layout("index-v1", root.path());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let store = LocalStore::open(&root.path().join("root")).unwrap();
        let put = |bytes: Vec<u8>| {
            runtime.block_on(store.put(&Descriptor::of("", &bytes), bytes.into(), &[])).unwrap();
        };
        let ztocs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ztoc/tests/fixtures");
        for layer in ["ordinary.tar.gz", "odd-entries.tar.gz"] {
            put(std::fs::read(ztocs.join("ztoc").join(format!("{layer}.ztoc"))).unwrap());
            put(std::fs::read(ztocs.join("layers").join(layer)).unwrap());
        }
        for text in expected["blobs"].as_object().unwrap().values().filter_map(Value::as_str) {
            put(text.as_bytes().to_vec());
        }
        drop(input);
        Self { root, expected }
    }

    fn arguments<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["--content-store", "soci", "--root", self.root().to_str().unwrap()];
        all.extend(arguments);
        all
    }

    fn root(&self) -> &'static Path {
        Box::leak(self.root.path().join("root").into_boxed_path())
    }

    fn stdout(&self, arguments: &[&str]) -> String {
        stdout(&self.arguments(arguments))
    }

    fn failure(&self, arguments: &[&str]) -> String {
        failure(&self.arguments(arguments))
    }
}

#[test]
fn listings_have_the_references_columns() {
    let store = Store::new();
    let fixture = |name: &str| std::fs::read_to_string(fixtures().join("index-v1").join(name)).unwrap();
    assert_eq!(store.stdout(&["ztoc", "list"]), fixture("cli-ztoc-list.txt"));
    assert_eq!(store.stdout(&["ztoc", "info", ZTOC]), fixture("cli-ztoc-info.txt"));
    assert_eq!(store.stdout(&["index", "info", INDEX]), fixture("cli-index-info.txt"));
    let listing = store.stdout(&["index", "ls"]);
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let (ours, theirs) = (listing.lines(), fixture("cli-index-list.txt"));
    let ours: Vec<&str> = ours.collect();
    assert_eq!(words(ours[0]), words(theirs.lines().next().unwrap()));
    assert!(ours[1].starts_with(&format!("{INDEX}    1540 ")), "{}", ours[1]);
    assert!(ours[1].trim_end().ends_with(" ago"));
    assert_eq!(store.stdout(&["index", "list", "-q"]), format!("{INDEX}\n"));
    assert_eq!(store.stdout(&["ztoc", "ls", "-quiet", "--ztoc-digest", ZTOC]), format!("{ZTOC}\n"));
    let json: Value = serde_json::from_str(&store.stdout(&["index", "list", "--json"])).unwrap();
    assert_eq!((json[0]["digest"].as_str(), json[0]["manifest_version"].as_str()), (Some(INDEX), Some("v1")));
    let json: Value = serde_json::from_str(&store.stdout(&["ztoc", "list", "--json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 2);
    assert_eq!(json[1]["size"], 236_848);
}

#[test]
fn prefetch_artifacts_are_shown() {
    let store = Store::new();
    let layer = "sha256:6ccb9eb049dd759b943ec4238a4c4d3807c4d6a63f0115f1a89b594c8d985083";
    let listing = store.stdout(&["prefetch", "list"]);
    assert!(listing.starts_with("DIGEST    "));
    assert!(listing.contains(&format!("{PREFETCH}    {layer}    4        ")), "{listing}");
    let json: Value = serde_json::from_str(&store.stdout(&["prefetch", "ls", "--json"])).unwrap();
    assert_eq!((json[0]["LayerDigest"].as_str(), json[0]["TotalSpans"].as_i64()), (Some(layer), Some(4)));
    let text = store.stdout(&["prefetch", "info", "--json", PREFETCH]);
    assert!(text.starts_with(&format!(
        "Digest:        {PREFETCH}\nVersion:       1.0\nSpan Ranges:   1\nLayer Digest:  {layer}\nSize:          66 bytes\n"
    )));
    assert!(text.contains("  [0] StartSpan: 2, EndSpan: 5 (covers 4 spans)\n\nTotal spans to prefetch: 4\n"));
    assert!(text.ends_with("\nRaw JSON:\n{\n  \"version\": \"1.0\",\n  \"prefetch_spans\": [\n    {\n      \"start_span\": 2,\n      \"end_span\": 5\n    }\n  ]\n}\n"));
    for (digest, kind) in [(ZTOC, "soci_layer"), (INDEX, "soci_index")] {
        let message = store.failure(&["prefetch", "info", digest]);
        assert_eq!(message, format!("soci: the provided digest is not a prefetch artifact (type: {kind})\n"));
    }
}

#[test]
fn files_are_extracted_from_layers() {
    let store = Store::new();
    let layers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ztoc/tests/fixtures/layers");
    let tar =
        Command::new("tar").arg("-xzOf").arg(layers.join("ordinary.tar.gz")).arg("bin/big").output().unwrap();
    assert_eq!(tar.stdout.len(), 400_000);
    let found = run(&store.arguments(&["ztoc", "get-file", ZTOC, "bin/big"]));
    assert!(found.status.success() && found.stdout == tar.stdout);
    let output = store.root.path().join("file");
    let text = store.stdout(&["ztoc", "get-file", "-o", output.to_str().unwrap(), ZTOC, "/bin/big"]);
    assert_eq!((text.as_str(), std::fs::read(&output).unwrap()), ("", tar.stdout));
    assert_eq!(store.stdout(&["ztoc", "get-file", ZTOC, "empty"]), "");
    let message = |arguments: &[&str]| store.failure(arguments);
    assert_eq!(
        message(&["ztoc", "get-file", ZTOC, "no/such"]),
        "soci: file no/such does not exist in metadata\n"
    );
    assert_eq!(
        message(&["ztoc", "get-file", ZTOC]),
        "soci: please provide both a ztoc digest and a filename to extract\n"
    );
    assert!(message(&["ztoc", "get-file", ZTOC, "bin/"]).contains("no regular file"));
}

#[test]
fn mistakes_about_digests_are_named() {
    let store = Store::new();
    let absent = Digest::of(b"absent").to_string();
    assert!(
        store.failure(&["index", "info", "nonsense"]).starts_with("soci: invalid checksum digest format")
    );
    assert!(store.failure(&["index", "info"]).starts_with("soci: invalid checksum digest format"));
    assert!(
        store
            .failure(&["index", "info", &absent])
            .starts_with("soci: couldn't retrieve artifact for sha256:")
    );
    assert!(
        store.failure(&["index", "info", ZTOC]).contains("the provided digest is of ztoc not SOCI index")
    );
    assert!(store.failure(&["ztoc", "info", INDEX]).contains("the provided digest belongs to a SOCI index"));
    let unknown = ["--content-store", "other", "index", "list"];
    assert_eq!(
        failure(&unknown),
        "soci: unknown content store type: other; must be one of [soci containerd]\n"
    );
}

#[test]
fn indexes_are_removed_and_the_rest_is_named() {
    let store = Store::new();
    let absent = Digest::of(b"absent").to_string();
    let message = store.failure(&["index", "rm", &absent, ZTOC, INDEX]);
    assert!(message.contains(&format!("the index of the digest {absent} doesn't exist")), "{message}");
    assert!(message.contains(&format!("the digest {ZTOC} does not correspond to an index")), "{message}");
    assert_eq!(store.stdout(&["index", "list", "-q"]), "", "one that fails does not keep the others");
    assert_eq!(
        store.failure(&["index", "rm", "--ref", "x", INDEX]),
        "soci: please provide either index digests or image ref, but not both\n"
    );
    assert_eq!(store.stdout(&["index", "rm"]), "");
}

#[test]
fn what_only_a_removed_index_named_goes_with_it() {
    let store = Store::new();
    let content = LocalStore::open(store.root()).unwrap();
    let has = |text: &str| content.path(&text.parse().unwrap()).exists();
    let blobs = || std::fs::read_dir(store.root().join("content/blobs/sha256")).unwrap().count();
    // Another index, of the first zTOC alone.
    let path = content.path(&INDEX.parse().unwrap());
    let mut other: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let layers = other["layers"].as_array().unwrap().clone();
    let named = |layer: &Value| layer["digest"].as_str().unwrap().to_owned();
    let config = named(&other["config"]);
    other["layers"] = layers.iter().filter(|layer| named(layer) == ZTOC).cloned().collect();
    let other = serde_json::to_vec(&other).unwrap();
    let descriptor = Descriptor::of(media_type::OCI_MANIFEST, &other);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for bytes in [other, b"{}".to_vec()] {
        let descriptor = Descriptor::of("", &bytes);
        runtime.block_on(content.put(&descriptor, bytes.into(), &[])).unwrap();
    }
    let all = blobs();

    let making = content.clone().for_writing().unwrap();
    let message = store.failure(&["index", "rm", INDEX]);
    assert!(message.contains("another soci makes an index"), "{message}");
    assert_eq!(blobs(), all, "who makes an index may be about to name what is there");
    drop(making);

    assert_eq!(store.stdout(&["index", "rm", INDEX]), "");
    for layer in &layers {
        let layer = named(layer);
        assert_eq!(has(&layer), layer == ZTOC, "{layer}");
    }
    assert!(has(&config), "the other index has the same configuration");
    assert_eq!(blobs(), all - layers.len(), "an index, and all of its artifacts but one");
    assert_eq!(store.stdout(&["index", "rm", &descriptor.digest.to_string()]), "");
    assert!(!has(ZTOC) && !has(&config));
    assert_eq!(blobs(), all - layers.len() - 3);
}

#[test]
fn rebuild_db_checks_the_store() {
    let store = Store::new();
    let text = store.stdout(&["rebuild-db"]);
    assert!(text.contains("1 indexes, 3 artifacts are sound, 0 are not"), "{text}");
    let path = store.root().join("content/blobs/sha256").join(ZTOC.trim_start_matches("sha256:"));
    std::fs::remove_file(&path).unwrap();
    let text = store.stdout(&["rebuild-db"]);
    assert!(text.contains(&format!("index {INDEX}: {ZTOC}: missing")), "{text}");
    assert!(text.contains("2 artifacts are sound, 1 are not"), "{text}");
    assert_eq!(store.expected["case"], "v1");
}

#[test]
fn an_absent_containerd_is_named() {
    let message = failure(&["create", "reg.example/app:1"]);
    assert!(
        message.starts_with("soci: cannot reach containerd at /nonexistent/containerd.sock: "),
        "{message}"
    );
    assert_eq!(failure(&["create"]), "soci: source image needs to be specified\n");
    assert_eq!(failure(&["create", "--span-size=-1", "x"]), "soci: span size must be >= 0\n");
    assert_eq!(failure(&["create", "--min-layer-size", "-1", "x"]), "soci: min layer size must be >= 0\n");
    assert_eq!(
        failure(&["create", "--optimizations", "yattr", "x"]),
        "soci: optimization yattr is not a valid optimization [xattr]\n"
    );
    let message = failure(&["create", "--prefetch-files-json", "/nonexistent", "x"]);
    assert!(
        message
            .starts_with("soci: failed to parse prefetch files: failed to load prefetch files from JSON: ")
    );
    assert_eq!(failure(&["push"]), "soci: please provide an image reference to push\n");
    let message = failure(&["convert", "a", "nginx"]);
    assert!(message.starts_with("soci: the destination image must be a tagged ref of the form"), "{message}");
}

#[test]
fn both_options_of_the_command_line_are_explained_whichever_is_used() {
    let home = tempfile::tempdir().unwrap();
    let docker = home.path().join(".docker");
    std::fs::create_dir(&docker).unwrap();
    let config = r#"{"auths":{"reg.example":{"username":"d","password":"hunter2"}}}"#;
    std::fs::write(docker.join("config.json"), config).unwrap();
    let explain = |more: &[&str]| {
        let words = [&["auth", "explain"], more, &["reg.example/a:1"]].concat();
        let output = soci(&words).env("HOME", home.path()).env_remove("DOCKER_CONFIG").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!text.contains("hunter"), "{text}");
        text
    };
    let standings = |more: &[&str]| {
        let report: Value = serde_json::from_str(&explain(&[more, &["--json"]].concat())).unwrap();
        let host = &report["hosts"][0];
        let options = host["options"].as_array().unwrap().iter();
        let options =
            options.map(|option| format!("{} {}", option["name"], option["standing"]).replace('"', ""));
        (host["uses"].as_str().unwrap().to_owned(), options.collect::<Vec<_>>())
    };
    assert_eq!(
        standings(&[]),
        ("docker-config".into(), vec!["--user off".into(), "docker-config used".into()])
    );
    let given = ["--user", "u:hunter3"];
    let expected = ("--user".into(), vec!["--user used".into(), "docker-config outranked".into()]);
    assert_eq!(standings(&given), expected);
    assert!(explain(&[]).contains("1. --user               off: it is not given\n"));
    let text = explain(&given);
    for line in ["2. docker-config        not used: --user is given", "user d,", "=> --user\n"] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
    std::fs::remove_dir_all(docker).unwrap();
    assert_eq!(standings(&given).1, ["--user used", "docker-config empty"]);
}

#[test]
fn t122_a_useless_user_is_a_usage_error_before_anything_is_asked() {
    for user in [":p", "", "name"] {
        let message = failure(&["push", "--user", user, "reg.example/app:1"]);
        assert!(message.starts_with("soci: --user: "), "{user:?}: {message}");
        assert!(!message.contains("containerd"), "{message}");
    }
    let message = failure(&["push", "--existing-index", "maybe", "reg.example/app:1"]);
    assert!(message.starts_with("soci: unexpected value for flag existing-index: maybe"), "{message}");
}
