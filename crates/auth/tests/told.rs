//! What goes wrong with a Docker config and its helpers: the error says what, and what to do about it; no secret is in it or in
//! a line of the log; and nothing stays open, alive or at work behind it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use soci_auth::keychain::docker_config::{DockerConfigKeychain, Environment, Settings};
use soci_auth::{AuthBoard, CredentialScope, Keychain as _, Origin, Rejected, Scheme};
use soci_oci::ImageRef;

/// What every helper prints and every file holds.
const PLANTED: &str = "pl4nted-Kx-71";
const LONG: Duration = Duration::from_secs(60);
const HELPER: &str = r#"{"credsStore":"x"}"#;
const BY_HAND: &str = "/docker-credential-x get` with the registry on its standard input to see why";
const FILE: &str = "correct it, or log in again";

/// A trouble: its name, the file, the helper where there is one, what names it, and what says what to do.
type Trouble = (&'static str, String, Option<String>, &'static str, &'static str);

fn troubles() -> Vec<Trouble> {
    let helper =
        |name, script: &str, what, next| (name, HELPER.to_owned(), Some(script.to_owned()), what, next);
    let file = |name, text: &str, what, next| (name, text.replace("PLANTED", PLANTED), None, what, next);
    vec![
        file(
            "no JSON",
            r#"{"auths":{"reg.example":{"password":"PLANTED"}"#,
            "config.json: not JSON at line 1",
            FILE,
        ),
        file(
            "an entry that is none",
            r#"{"auths":{"reg.example":{"auth":"PLANTED"}}}"#,
            "auths key reg.example: auth is not base64",
            FILE,
        ),
        file(
            "a name that is none",
            r#"{"credsStore":"../x"}"#,
            "not a name for a helper",
            "correct it in config.json",
        ),
        file("no helper", HELPER, "not found in PATH", "install it or remove it from config.json"),
        helper("a crash", &format!("echo {PLANTED}; echo {PLANTED} >&2; exit 2"), "exit status: 2", BY_HAND),
        helper("nothing", "exit 0", "prints nothing", BY_HAND),
        helper("something else", &format!("echo {PLANTED}"), "does not print a JSON object", BY_HAND),
        helper("a flood", &format!("yes {PLANTED}"), "prints more than 262144 bytes, killed", BY_HAND),
        helper("a hang", "sleep 600 & sleep 600", "no answer within 1s, killed", BY_HAND),
        helper(
            "children that are left behind",
            "for at in 1 2 3; do sleep 600 & done; exit 0",
            "no answer within 1s, killed",
            BY_HAND,
        ),
    ]
}

/// What this process holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    tasks: usize,
    /// Processes that work in the directory of the helpers.
    helpers: usize,
}

impl Held {
    fn now(directory: &Path) -> Self {
        let works_there = |process: &std::fs::DirEntry| {
            std::fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == directory)
        };
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            helpers: std::fs::read_dir("/proc").unwrap().flatten().filter(works_there).count(),
        }
    }
}

/// Writes by another process, so that no child of this one inherits a descriptor that is open for writing.
fn install(directory: &Path, script: &str) {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "cat > \"$0\" && chmod 755 \"$0\""]).arg(directory.join("docker-credential-x"));
    let mut child = shell.stdin(Stdio::piped()).spawn().unwrap();
    let text = format!("#!/bin/sh\ncd '{}'\n{script}\n", directory.display());
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Looks a credential up, and returns the error.
async fn provoked(directory: &Path, file: &str, helper: Option<&str>) -> String {
    std::fs::write(directory.join("config.json"), file).unwrap();
    let _ = std::fs::remove_file(directory.join("docker-credential-x"));
    if let Some(script) = helper {
        install(directory, script);
    }
    let environment = Environment {
        home: Some(PathBuf::from("/nonexistent")),
        docker_config: Some(directory.to_owned()),
        path: Some(format!("{}:/usr/bin:/bin", directory.display()).into()),
        docker_auth_config: None,
    };
    let settings = Settings { helper_deadline: Duration::from_secs(1), ..Settings::default() };
    let keychain = DockerConfigKeychain::new(environment, Arc::new(AuthBoard::new()), settings);
    let image: ImageRef = "reg.example/team/app:1".parse().unwrap();
    let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
    let looked = keychain.lookup(&scope, &Rejected::default()).await;
    looked.expect_err("a trouble").to_string()
}

/// One test, so that nothing else is open or at work in its process.
#[tokio::test]
async fn every_trouble_says_what_to_do_and_leaves_nothing_behind() {
    let (log, _guard) = soci_testkit::log::capture();
    let home = tempfile::tempdir().unwrap();
    let directory = home.path();
    // What a process has from its first child on.
    provoked(directory, HELPER, Some("exit 1")).await;
    let before = Held::now(directory);
    assert_eq!((before.tasks, before.helpers), (0, 0));
    for (name, file, helper, what, next) in troubles() {
        let told = provoked(directory, &file, helper.as_deref()).await;
        assert!(told.contains(what) && told.contains(next), "{name}: {told}");
        assert!(!told.contains(PLANTED), "{name}: {told}");
        let deadline = Instant::now() + LONG;
        while Held::now(directory) != before {
            assert!(Instant::now() < deadline, "{name}: {:?} instead of {before:?}", Held::now(directory));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    assert!(!log.text().contains(PLANTED), "{}", log.text());
}
