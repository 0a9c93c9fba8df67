//! Whom a registry sees, with the three options opened and wired as the daemon does it: real files and helpers, real pulls, an
//! API server, and a registry that logs every request.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use serde_json::json;
use soci_auth::AuthBoard;
use soci_auth::keychain::cri::AuthConfig;
use soci_oci::{BlobSource, FetchClass, FetchContext, FetchError, FetchErrorKind, ImageRef};
use soci_snapshotter_grpc::Config;
use soci_snapshotter_grpc::config::Raw;
use soci_snapshotter_grpc::keychains::{self, Keychains};
use soci_snapshotter_grpc::metrics::Metrics;
use soci_snapshotter_grpc::registries;
use soci_testkit::kube_api::KubeApi;
use soci_testkit::{AuthMode, Listener, Options, TestRegistry};

const LONG: Duration = Duration::from_secs(20);
const CONTENT: &[u8] = b"what a layer has";

/// A registry that knows a user for each option, and the node of a daemon that may get its logins.
struct Node {
    home: tempfile::TempDir,
    registry: TestRegistry,
    api: KubeApi,
    blob: String,
    /// More of the configuration.
    config: String,
}

/// The daemon's part of a node.
struct Running {
    keychains: Keychains,
    blob: Arc<dyn BlobSource>,
}

impl Node {
    async fn new(auth: AuthMode) -> Self {
        let home = tempfile::tempdir().unwrap();
        let users = ["docker", "cri", "secrets"];
        let users = users.iter().fold(Options::default(), |options, user| options.auth(auth, user, "right"));
        let registry = TestRegistry::start(users).await.unwrap();
        let blob = registry.put_blob("team/app", CONTENT);
        let node =
            Self { api: KubeApi::start("t").await.unwrap(), home, registry, blob, config: String::new() };
        std::fs::write(node.home.path().join("ca.pem"), node.registry.ca_pem()).unwrap();
        std::fs::write(node.home.path().join("kubeconfig"), node.api.kubeconfig(&json!({ "token": "t" })))
            .unwrap();
        node.trust(&node.registry);
        node
    }

    fn trust(&self, registry: &TestRegistry) {
        let directory = self.home.path().join("certs.d").join(registry.host());
        std::fs::create_dir_all(&directory).unwrap();
        let authority = self.home.path().join("ca.pem");
        let url = registry.url(Listener::Registry);
        std::fs::write(directory.join("hosts.toml"), format!("server = {url:?}\nca = {authority:?}\n"))
            .unwrap();
    }

    fn image(&self) -> String {
        self.registry.image("team/app:1")
    }

    /// Opens the options and the registry client as the daemon does when it starts.
    fn start(&self) -> Running {
        let text = format!(
            "[cri_keychain]\nenable_keychain = true\n[kubeconfig_keychain]\nenable_keychain = true\n\
             kubeconfig_path = {:?}\n[resolver]\nconfig_path = {:?}\n{}",
            self.home.path().join("kubeconfig"),
            self.home.path().join("certs.d"),
            self.config,
        );
        let raw: Raw = toml::from_str(&text).unwrap();
        let config = Config::check(&raw).unwrap();
        let (board, metrics) = (Arc::new(AuthBoard::new()), Metrics::default());
        let keychains = keychains::open(&config, &board, &metrics, &|name| match name {
            "HOME" => Some(self.home.path().into()),
            "PATH" => Some(self.home.path().join("bin").into()),
            _ => None,
        });
        let client = registries::client(&config, keychains.chain.clone(), board, &metrics).unwrap();
        let image: ImageRef = self.image().parse().unwrap();
        let blob = client.repository(&image).blob(&self.blob.parse().unwrap(), CONTENT.len() as u64);
        Running { keychains, blob }
    }

    /// Replaces the Docker config, as a login does.
    fn docker_config(&self, text: &str) {
        let directory = self.home.path().join(".docker");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("new"), text.replace("HOST", &self.registry.host())).unwrap();
        std::fs::rename(directory.join("new"), directory.join("config.json")).unwrap();
    }

    /// Installs a credential helper. Another process writes it: a child that is forked meanwhile would keep it open.
    fn helper(&self, name: &str, body: &str) {
        let directory = self.home.path().join("bin");
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join(format!("docker-credential-{name}"));
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$0\" && chmod 755 \"$0\""])
            .arg(&file)
            .arg(body);
        assert!(shell.stdin(Stdio::null()).status().unwrap().success());
    }

    fn secret(&self, password: &str) {
        let auths =
            json!({ "auths": { self.registry.host(): { "username": "secrets", "password": password } } });
        let data = [(".dockerconfigjson", auths.to_string())];
        let data = data.each_ref().map(|(key, value)| (*key, value.as_str()));
        self.api.put("ns", "pull", "kubernetes.io/dockerconfigjson", &data);
    }

    /// The users that the registry and its token server saw, whatever they answered.
    fn seen(&self) -> BTreeSet<String> {
        self.registry.log().into_iter().filter_map(|seen| seen.user).collect()
    }
}

impl Running {
    fn pull(&self, node: &Node, password: &str) {
        let empty = String::new;
        let login = AuthConfig::new("cri".into(), password.into(), empty(), empty(), empty(), empty());
        let pulls = self.keychains.pulls.as_ref().unwrap();
        pulls.begin(&node.image(), Some(login), None).unwrap().confirm(None);
    }

    /// Waits until the secret has arrived.
    async fn synced(&self) {
        let secrets = self.keychains.secrets.as_ref().unwrap();
        let arrived = async {
            while secrets.is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LONG, arrived).await.expect("the secret is synced");
    }

    async fn read(&self) -> Result<Vec<u8>, FetchError> {
        let context = FetchContext::new(Instant::now() + LONG, FetchClass::OnDemand).impatient();
        let mut stream = self.blob.open(0..CONTENT.len() as u64, &context).await?;
        let mut all = Vec::new();
        while let Some(chunk) = stream.next().await {
            all.extend_from_slice(&chunk?);
        }
        Ok(all)
    }
}

/// What comes to a node, in some order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Start,
    Login,
    Pull,
    Secret,
}

/// All orders of events, but that a pull goes through a daemon that runs.
fn orders(events: &[Event]) -> Vec<Vec<Event>> {
    if events.is_empty() {
        return vec![Vec::new()];
    }
    let first = |at: usize| {
        let rest: Vec<Event> = [&events[..at], &events[at + 1..]].concat();
        orders(&rest).into_iter().map(move |rest| [&[events[at]], &rest[..]].concat())
    };
    let place = |order: &[Event], event| order.iter().position(|found| *found == event);
    (0..events.len())
        .flat_map(first)
        .filter(|order| {
            let (start, pull) = (place(order, Event::Start), place(order, Event::Pull));
            start.is_none() || pull.is_none() || start < pull
        })
        .collect()
}

#[tokio::test]
async fn t01_t02_t03_t05_r4_the_order_in_which_options_get_their_logins_changes_nothing() {
    use Event::{Login, Pull, Secret, Start};
    const LOGIN: &str = r#"{"auths":{"HOST":{"username":"docker","password":"PASSWORD"}}}"#;
    for events in [&[Start, Login, Pull, Secret][..], &[Start, Pull, Secret], &[Start, Secret]] {
        for order in orders(events) {
            for password in ["right", "wrong"] {
                let node = Node::new(AuthMode::Basic).await;
                let mut running = None;
                // Only the first option in use has the password in question; those after it have the right one.
                let of = |event| if events[1] == event { password } else { "right" };
                for event in &order {
                    match event {
                        Start => running = Some(node.start()),
                        Login => node.docker_config(&LOGIN.replace("PASSWORD", of(Login))),
                        Pull => running.as_ref().unwrap().pull(&node, of(Pull)),
                        Secret => node.secret(of(Secret)),
                    }
                }
                let running = running.unwrap();
                running.synced().await;
                let expected = match events[1] {
                    Login => "docker",
                    Pull => "cri",
                    Secret | Start => "secrets",
                };
                let read = running.read().await;
                let told = format!("{order:?} {password}: {read:?}");
                assert_eq!(node.seen(), BTreeSet::from([expected.to_owned()]), "{told}");
                match password {
                    "right" => assert_eq!(read.unwrap(), CONTENT, "{told}"),
                    _ => assert_eq!(read.unwrap_err().kind(), FetchErrorKind::Denied, "{told}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn t05_to_t13_what_the_docker_config_holds_decides_whom_the_registry_sees() {
    const HELPER: &str = r#"{"credHelpers":{"HOST":"test"}}"#;
    const MISSING: &str = "echo credentials not found in native keychain; exit 1";
    const CRASH: &str = "echo garbage; exit 2";
    let login =
        |password: &str| format!(r#"{{"auths":{{"HOST":{{"username":"docker","password":"{password}"}}}}}}"#);
    let empty = r#"{"auths":{"HOST":{}}}"#.to_owned();
    // `docker:` without a password.
    let half = r#"{"auths":{"HOST":{"auth":"ZG9ja2VyOg=="}}}"#.to_owned();
    let helper = HELPER.to_owned();
    let basic = &[AuthMode::Basic, AuthMode::Bearer][..];
    // Name, modes, Docker config, helper, whether a pull and a secret came, whom the registry sees, what the error says.
    let table = [
        ("T05", basic, login("wrong"), "", true, true, Some("docker"), Some("docker-config")),
        ("T06", &[AuthMode::Ecr], login("right"), "", false, true, Some("docker"), Some("status 403")),
        ("T07", basic, empty, "", true, true, Some("cri"), None),
        ("T08", basic, half, "", true, true, None, Some("incomplete credential from docker-config")),
        ("T09", basic, helper.clone(), MISSING, false, true, Some("secrets"), None),
        ("T10", basic, helper.clone(), CRASH, true, false, Some("cri"), None),
        ("T10", basic, helper.clone(), CRASH, false, true, Some("secrets"), None),
        ("T11", basic, helper, CRASH, false, false, None, Some("docker-credential-test: exit status: 2")),
        ("T12", basic, "{".to_owned(), "", false, true, Some("secrets"), None),
    ];
    for (name, modes, docker, helper, pull, secret, sees, fails) in table {
        for mode in modes {
            let node = Node::new(*mode).await;
            node.docker_config(&docker);
            if !helper.is_empty() {
                node.helper("test", helper);
            }
            if *mode == AuthMode::Ecr {
                node.registry.expire_password("docker");
            }
            let running = node.start();
            if pull {
                running.pull(&node, "right");
            }
            if secret {
                node.secret("right");
                running.synced().await;
            }
            let read = running.read().await;
            let told = format!("{name} {mode:?}: {read:?}");
            assert_eq!(node.seen(), sees.map(str::to_owned).into_iter().collect(), "{told}");
            match fails {
                None => assert_eq!(read.unwrap(), CONTENT, "{told}"),
                Some(part) => {
                    let error = read.unwrap_err();
                    assert_eq!(error.kind(), FetchErrorKind::Denied, "{told}");
                    assert!(error.to_string().contains(part), "{told}");
                }
            }
        }
    }
}

#[tokio::test]
async fn t13_a_login_that_goes_between_two_reads_lets_the_next_option_answer() {
    for mode in [AuthMode::Basic, AuthMode::Bearer] {
        let node = Node::new(mode).await;
        node.docker_config(r#"{"auths":{"HOST":{"username":"docker","password":"right"}}}"#);
        let running = node.start();
        running.pull(&node, "right");
        assert_eq!(running.read().await.unwrap(), CONTENT);
        assert_eq!(node.seen(), BTreeSet::from(["docker".to_owned()]));
        node.docker_config("{}");
        node.registry.rotate_password("docker", "another");
        node.registry.revoke_tokens();
        assert_eq!(running.read().await.unwrap(), CONTENT);
        assert_eq!(node.seen(), BTreeSet::from(["cri".to_owned(), "docker".to_owned()]), "{mode:?}");
    }
}

#[tokio::test]
async fn t94_the_second_secret_is_used_where_the_first_is_refused_and_is_tried_first_from_then_on() {
    for mode in [AuthMode::Basic, AuthMode::Bearer] {
        let node = Node::new(mode).await;
        // The newer one comes first, and nobody knows its user.
        for (name, user) in [("older", "secrets"), ("newer", "stranger")] {
            let auths =
                json!({ "auths": { node.registry.host(): { "username": user, "password": "right" } } });
            let auths = auths.to_string();
            node.api.put("ns", name, "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &auths)]);
        }
        let running = node.start();
        running.synced().await;
        let users = || {
            let seen = node.registry.log().into_iter().filter_map(|seen| seen.user);
            let mut seen: Vec<String> = seen.collect();
            seen.dedup();
            seen
        };
        assert_eq!(running.read().await.unwrap(), CONTENT, "{mode:?}");
        assert_eq!(users(), ["stranger", "secrets"], "{mode:?}");
        for _ in 0..3 {
            node.registry.clear_log();
            // A token of before is worth nothing, so somebody has to log in anew.
            node.registry.revoke_tokens();
            assert_eq!(running.read().await.unwrap(), CONTENT, "{mode:?}");
            assert_eq!(users(), ["secrets"], "{mode:?}");
        }
    }
}

#[tokio::test]
async fn t118_a_mirror_gets_a_pulls_login_only_where_the_configuration_says_so() {
    for (key, expected) in
        [("", None), ("forward_credentials = false", None), ("forward_credentials = true", Some("cri"))]
    {
        let mut node = Node::new(AuthMode::Basic).await;
        let options = Options::plain().auth(AuthMode::Basic, "cri", "right");
        let mirror = TestRegistry::start(options).await.unwrap();
        mirror.put_blob("team/app", CONTENT);
        node.config = format!(
            "[[resolver.host.{:?}.mirrors]]\nhost = {:?}\n{key}\n",
            node.registry.host(),
            mirror.url(Listener::Registry),
        );
        let running = node.start();
        running.pull(&node, "right");
        // Whatever the key says, a login of the registry in the other options is not the mirror's.
        node.secret("right");
        running.synced().await;
        assert_eq!(running.read().await.unwrap(), CONTENT, "{key}");
        let seen: BTreeSet<String> = mirror.log().into_iter().filter_map(|seen| seen.user).collect();
        assert_eq!(seen, expected.map(str::to_owned).into_iter().collect(), "{key}");
        assert_eq!(node.registry.log().is_empty(), expected.is_some(), "{key}");
    }
}
