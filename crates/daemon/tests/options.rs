//! The three options as the daemon opens them, over a real file, real pulls and an API server: which one answers.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use soci_auth::explain::{HostReport, Standing, explain};
use soci_auth::keychain::cri::AuthConfig;
use soci_auth::{AuthBoard, Authenticator, CredentialScope, Origin, Scheme, Settings};
use soci_oci::ImageRef;
use soci_snapshotter_grpc::Config;
use soci_snapshotter_grpc::config::Raw;
use soci_snapshotter_grpc::keychains;
use soci_snapshotter_grpc::metrics::Metrics;
use soci_testkit::kube_api::KubeApi;

const IMAGE: &str = "reg.example/team/app:1";

/// What an option has for the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Has {
    Credential,
    Nothing,
    /// The option is off; Docker config cannot be.
    Off,
}

const NOTHING: &str = r#"{"auths":{"other.example":{"auth":"dXNlcjpwYXNz"}}}"#;
const CREDENTIAL: &str = r#"{"auths":{"reg.example":{"username":"docker","password":"p"}}}"#;

struct Node {
    home: tempfile::TempDir,
    auth: Arc<Authenticator>,
    keychains: keychains::Keychains,
    _api: KubeApi,
}

impl Node {
    async fn new(docker: Option<&str>, pulls: Has, secrets: Has, reversed: bool) -> Self {
        let home = tempfile::tempdir().unwrap();
        if let Some(text) = docker {
            write_docker_config(home.path(), text);
        }
        let api = KubeApi::start("t").await.unwrap();
        let kubeconfig = home.path().join("kubeconfig");
        std::fs::write(&kubeconfig, api.kubeconfig(&json!({ "token": "t" }))).unwrap();
        if secrets == Has::Credential {
            let auths =
                json!({ "auths": { "reg.example": { "username": "k", "password": "k" } } }).to_string();
            api.put("ns", "pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &auths)]);
        }
        let mut tables = [
            format!("[cri_keychain]\nenable_keychain = {}\n", pulls != Has::Off),
            format!(
                "[kubeconfig_keychain]\nenable_keychain = {}\nkubeconfig_path = {kubeconfig:?}\n",
                secrets != Has::Off
            ),
        ];
        if reversed {
            tables.reverse();
        }
        let raw: Raw = toml::from_str(&tables.concat()).unwrap();
        let board = Arc::new(AuthBoard::new());
        let keychains =
            keychains::open(&Config::check(&raw).unwrap(), &board, &Metrics::default(), &|name| {
                (name == "HOME").then(|| home.path().as_os_str().to_owned())
            });
        if pulls == Has::Credential {
            let empty = String::new;
            let login = AuthConfig::new("c".into(), "c".into(), empty(), empty(), empty(), empty());
            keychains.pulls.as_ref().unwrap().begin(IMAGE, Some(login), None).unwrap().confirm(None);
        }
        let auth = Authenticator::new(keychains.chain.clone(), board, Settings::default());
        Self { home, auth, keychains, _api: api }
    }

    async fn report(&self) -> HostReport {
        let image: ImageRef = IMAGE.parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        let mut report = explain(&self.auth, &scope).await;
        keychains::show_off(&mut report, &self.keychains.off);
        report
    }

    async fn uses(&self) -> Option<String> {
        self.report().await.uses
    }
}

fn write_docker_config(home: &Path, text: &str) {
    let directory = home.join(".docker");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("new"), text).unwrap();
    std::fs::rename(directory.join("new"), directory.join("config.json")).unwrap();
}

#[tokio::test]
async fn t01_t02_t03_t04_t15_r3_the_first_that_has_one_answers_in_every_combination() {
    let names = ["docker-config", "cri", "kubernetes-secrets"];
    for docker in [Some(CREDENTIAL), Some(NOTHING), None] {
        for pulls in [Has::Credential, Has::Nothing, Has::Off] {
            for secrets in [Has::Credential, Has::Nothing, Has::Off] {
                let has = [docker == Some(CREDENTIAL), pulls == Has::Credential, secrets == Has::Credential];
                let expected = has.iter().position(|has| *has).map(|at| names[at]);
                let reversed = docker.is_none();
                let node = Node::new(docker, pulls, secrets, reversed).await;
                let report = node.report().await;
                let told = format!("{docker:?} {pulls:?} {secrets:?}: {report:?}");
                assert_eq!(report.uses.as_deref(), expected, "{told}");
                let shown: Vec<&str> = report.options.iter().map(|option| option.name.as_str()).collect();
                assert_eq!(shown, names, "{told}");
                for (at, set) in [(1, pulls), (2, secrets)] {
                    assert_eq!(report.options[at].standing == Standing::Off, set == Has::Off, "{told}");
                }
            }
        }
    }
}

#[tokio::test]
async fn t07_t08_t12_t13_what_the_docker_config_holds_decides_who_is_asked_next() {
    use Has::Credential as Yes;
    for (docker, expected) in [
        (r#"{"auths":{"reg.example":{}}}"#, "cri"),
        ("{", "cri"),
        (r#"{"auths":{"reg.example":{"auth":"dXNlcjo="}}}"#, "docker-config"),
        (r#"{"credsStore":"missing"}"#, "cri"),
        (r#"{"credsStore":"../evil","auths":{"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#, "cri"),
    ] {
        let node = Node::new(Some(docker), Yes, Yes, false).await;
        assert_eq!(node.uses().await.as_deref(), Some(expected), "{docker}");
    }
    // A login that comes and goes takes effect at once.
    let node = Node::new(None, Yes, Yes, false).await;
    for (docker, expected) in [(CREDENTIAL, "docker-config"), (NOTHING, "cri"), (CREDENTIAL, "docker-config")]
    {
        write_docker_config(node.home.path(), docker);
        assert_eq!(node.uses().await.as_deref(), Some(expected), "{docker}");
    }
}

/// Opens the options that `table` asks for, with a kubeconfig at every usual place, and returns how often those files were
/// opened until `enough`.
async fn opened(table: &str, enough: impl Fn(usize) -> bool) -> usize {
    use rustix::fs::inotify;
    let home = tempfile::tempdir().unwrap();
    let api = KubeApi::start("t").await.unwrap();
    let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
    let watch = inotify::init(flags).unwrap();
    for place in [".kube/config", "kube/config", "listed"] {
        let path = home.path().join(place);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, api.kubeconfig(&json!({ "token": "t" }))).unwrap();
        inotify::add_watch(&watch, &path, inotify::WatchFlags::OPEN).unwrap();
    }
    let config = Config::check(&toml::from_str(table).unwrap()).unwrap();
    let (board, metrics) = (Arc::new(AuthBoard::new()), Metrics::default());
    let keychains = keychains::open(&config, &board, &metrics, &|name| match name {
        "HOME" => Some(home.path().as_os_str().to_owned()),
        "KUBECONFIG" => Some(home.path().join("listed").into_os_string()),
        "KUBERNETES_SERVICE_HOST" => Some("127.0.0.1".into()),
        _ => None,
    });
    let auth = Authenticator::new(keychains.chain.clone(), board, Settings::default());
    let image: ImageRef = IMAGE.parse().unwrap();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let mut opened = 0;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image.clone());
        explain(&auth, &scope).await;
        while events.next().is_ok() {
            opened += 1;
        }
        if enough(opened) {
            assert!(opened > 0 || api.log().is_empty(), "nor is the server asked");
            return opened;
        }
        assert!(std::time::Instant::now() < deadline, "{opened} times");
    }
}

#[tokio::test]
async fn t14_no_kubeconfig_is_opened_unless_the_option_is_on() {
    assert_eq!(opened("", |_| true).await, 0);
    assert_eq!(opened("[kubeconfig_keychain]\nenable_keychain = false\n", |_| true).await, 0);
    assert!(opened("[kubeconfig_keychain]\nenable_keychain = true\n", |times| times > 0).await > 0);
}
