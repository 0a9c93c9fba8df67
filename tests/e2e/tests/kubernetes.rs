//! Credentials from Kubernetes, with no Docker config anywhere: those that the kubelet's pulls carry, and pull secrets.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use soci_e2e::planted::script;
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::scrape::scrape;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, containerd2, images};
use soci_testkit::containerd::Programs;
use soci_testkit::cri::runtime::RuntimeService;
use soci_testkit::cri::{self, ImageService};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::kube_api::KubeApi;
use soci_testkit::{AuthMode, wait};

const NEXT: &str = "n9-Rotated-Qz41";
/// Name and password that credential helpers answer.
const HELPED: &str = "helped";
const LONG: Duration = Duration::from_secs(60);

fn options(auth: AuthMode) -> Result<StageOptions> {
    let mut options = StageOptions::new(auth)?;
    options.credentials = false;
    options.registry.tokens.ttl = Duration::from_secs(1);
    options
        .config
        .push_str("[cri_keychain]\nenable_keychain = true\nimage_service_path = \"{containerd}\"\n");
    Ok(options)
}

fn through_the_daemon(auth: AuthMode) -> Result<Stage> {
    Stage::start(options(auth)?)
}

fn pull(stage: &Stage, published: &Published, password: &str) -> Result<String> {
    let service = ImageService::connect(&stage.snapshotter.socket())?;
    let login = Some(cri::basic(USER, password));
    service.pull(&published.reference, login, "default").context("PullImage through the daemon")
}

/// Waits until a file can be read, and returns its length.
fn heals(stage: &Stage, file: &Path) -> Result<usize> {
    match wait::until(LONG, || std::fs::read(file).ok()) {
        Some(content) => Ok(content.len()),
        None => bail!("{} did not heal; end of the log:\n{}", file.display(), stage.log_tail()),
    }
}

#[test]
fn a_pull_through_the_daemon_brings_its_own_login() -> Result<()> {
    let stage = through_the_daemon(AuthMode::Bearer)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/odd", "1")?;
    pull(&stage, &published, PASSWORD)?;
    assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "lazy on the left, unpacked on the right:\n{}", differences.join("\n"));
    assert_eq!(stage.probe(KUBELET, &published, "echo", &["echo", "hello"])?, "hello\n");
    let log = stage.snapshotter.log_text();
    assert!(
        log.lines().any(|line| line.contains("\"keychain\":\"cri\"")),
        "the option that answered is named"
    );
    assert!(!log.contains(PASSWORD));
    Ok(())
}

/// With containerd 1.x where `programs` is none: the login comes with the pull alone, everything is read through lazy
/// mounts, a pod runs on a private pause image, and removal by id leaves no credential behind.
fn a_node(programs: Option<Programs>) -> Result<()> {
    let mut options = options(AuthMode::Bearer)?;
    if let Some(programs) = programs {
        options.containerd = programs;
    }
    options.sandbox_image = Some("team/pause:1".to_owned());
    options.config_head.push_str("metrics_network = \"unix\"\nmetrics_address = \"{stage}/m.sock\"\n");
    let stage = Stage::start(options)?;
    let pause = stage.publish(&images::pause(), "team/pause", "1");
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/odd", "1")?;
    assert!(!stage.path().join("docker/config.json").exists(), "no Docker config anywhere");

    let pause_id = pull(&stage, &pause, PASSWORD)?;
    let id = pull(&stage, &published, PASSWORD)?;
    assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "lazy on the left, unpacked on the right:\n{}", differences.join("\n"));
    let said = stage.explain(&published.reference)?;
    let host = &said["hosts"][0];
    assert_eq!(host["uses"], "cri", "{said:#}");
    let used = &host["options"][1]["candidates"][0];
    assert_eq!((&used["kind"], &used["username"]), (&json!("user name and password"), &json!(USER)));
    assert!(used["accepted"]["status"].is_u64(), "{said:#}");
    assert_eq!(host["options"][0]["standing"], "empty");
    assert_eq!(host["options"][2]["standing"], "off");
    assert!(!said.to_string().contains(PASSWORD));

    let logs = stage.path().join("pods");
    std::fs::create_dir_all(&logs)?;
    let runtime = RuntimeService::connect(&stage.containerd.socket())?;
    let pod = runtime.run_pod("soci-pod", &logs).context("RunPodSandbox")?;
    let (code, printed) = pod.run("c", &published.reference, &["/probe", "echo", "from a pod"])?;
    assert_eq!((code, printed.as_str()), (0, "from a pod\n"));
    drop(pod);

    let service = ImageService::connect(&stage.snapshotter.socket())?;
    for id in [&id, &pause_id] {
        service.remove(id)?;
    }
    let said = stage.explain(&published.reference)?;
    assert_eq!(said["hosts"][0]["uses"], Value::Null, "{said:#}");
    let metrics = scrape(&stage.path().join("m.sock"))?;
    for line in [
        "soci_cri_credential_references 0",
        "soci_cri_calls_total{method=\"PullImage\",code=\"ok\"} 2",
        "soci_cri_calls_total{method=\"RemoveImage\",code=\"ok\"} 2",
        "soci_cri_calls_in_flight 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} in\n{metrics}");
    }
    Ok(())
}

#[test]
fn a_node_with_containerd_1_needs_nothing_but_the_pulls_login() -> Result<()> {
    a_node(None)
}

#[test]
fn a_node_with_containerd_2_needs_nothing_but_the_pulls_login() -> Result<()> {
    a_node(Some(containerd2::programs()?))
}

#[test]
fn every_image_call_is_answered_by_containerd() -> Result<()> {
    let stage = through_the_daemon(AuthMode::Basic)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/odd", "1")?;
    let id = pull(&stage, &published, PASSWORD)?;
    let service = ImageService::connect(&stage.snapshotter.socket())?;
    assert!(service.status(&published.reference)?.is_some());
    service.remove(&id)?;
    assert!(service.status(&published.reference)?.is_none());
    let refused = service.pull(&published.reference, Some(cri::basic(USER, "wrong")), "default").unwrap_err();
    let direct = stage.containerd.image_service()?;
    let expected = direct.pull(&published.reference, Some(cri::basic(USER, "wrong")), "default").unwrap_err();
    assert_eq!((refused.code(), refused.message()), (expected.code(), expected.message()));
    Ok(())
}

#[test]
fn t71_a_pull_of_another_image_heals_what_expired_also_after_a_restart() -> Result<()> {
    let mut stage = through_the_daemon(AuthMode::Basic)?;
    let first = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&first, "team/first", "1")?;
    let second = stage.publish_v1(&images::single(7), "team/second", "1")?;
    let third = stage.publish_v1(&images::single(8), "team/third", "1")?;
    pull(&stage, &published, PASSWORD)?;
    assert_eq!(stage.lazy_layers()?, 2);
    let mounted = stage.containerd.mount(KUBELET, "soci", &first.chain_id(), "m")?;

    stage.registry.rotate_password(USER, NEXT);
    stage.registry.revoke_tokens();
    assert!(std::fs::read(mounted.path().join("random")).is_err(), "what expired reads nothing new");
    pull(&stage, &second, NEXT)?;
    assert_eq!(heals(&stage, &mounted.path().join("random"))?, 5 * 1024 * 1024 + 17);
    drop(mounted);

    // Credentials are in memory only: after a restart what was fetched is read, and another pull brings them back.
    stage.snapshotter.daemon().kill();
    stage.start_snapshotter_again()?;
    let again = stage.containerd.mount(KUBELET, "soci", &first.chain_id(), "again")?;
    assert_eq!(heals(&stage, &again.path().join("random"))?, 5 * 1024 * 1024 + 17);
    assert!(std::fs::read(again.path().join("large")).is_err(), "what was never read waits for a login");
    pull(&stage, &third, NEXT)?;
    heals(&stage, &again.path().join("large"))?;
    assert_eq!(stage.probe(KUBELET, &third, "third", &["echo", "third"])?, "third\n");
    Ok(())
}

/// An API server, and a kubeconfig that leads to it.
struct Cluster {
    runtime: tokio::runtime::Runtime,
    api: KubeApi,
    directory: tempfile::TempDir,
}

impl Cluster {
    fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let api = runtime.block_on(KubeApi::start("sync"))?;
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("kubeconfig"), api.kubeconfig(&json!({ "token": "sync" })))?;
        Ok(Self { runtime, api, directory })
    }

    /// The daemon's configuration that makes it follow this cluster.
    fn config(&self) -> String {
        let kubeconfig = self.directory.path().join("kubeconfig");
        format!("[kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = {kubeconfig:?}\n")
    }

    /// Sets the pull secret of a namespace to a login at the stage's registry.
    fn put(&self, stage: &Stage, namespace: &str, user: &str, password: &str) {
        let auths = json!({ "auths": { stage.registry.host(): { "username": user, "password": password } } });
        self.put_payload(namespace, &auths);
    }

    /// Sets the pull secret of a namespace.
    fn put_payload(&self, namespace: &str, payload: &Value) {
        let data = [(".dockerconfigjson", &*payload.to_string())];
        self.api.put(namespace, "pull", "kubernetes.io/dockerconfigjson", &data);
    }

    /// Starts a stage whose only login is a pull secret, and pulls an image by it: the image's layers are lazy.
    fn pulls_lazily(&self, mut options: StageOptions) -> Result<(Stage, Image, Published)> {
        options.credentials = false;
        let stage = Stage::start(options)?;
        self.put(&stage, "team", USER, PASSWORD);
        stage.wait_log("pull secrets are synced", LONG)?;
        let image = images::odd(Dialect::Oci);
        let published = stage.publish_v1(&image, "team/odd", "1")?;
        stage.pull_as_kubelet(&published)?;
        assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
        Ok((stage, image, published))
    }

    /// Gives the user another password, and the secret too: what is mounted reads on.
    fn rotates(&self, stage: &Stage, mounted: &Path) -> Result<()> {
        stage.registry.rotate_password(USER, NEXT);
        stage.registry.revoke_tokens();
        self.put(stage, "team", USER, NEXT);
        assert_eq!(heals(stage, &mounted.join("random"))?, 5 * 1024 * 1024 + 17);
        Ok(())
    }
}

#[test]
fn t89_a_pull_secret_of_the_cluster_is_used_and_followed() -> Result<()> {
    let cluster = Cluster::start()?;
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config.push_str(&cluster.config());
    let (stage, image, _) = cluster.pulls_lazily(options)?;
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    cluster.rotates(&stage, mounted.path())?;
    assert!(!stage.snapshotter.log_text().contains(NEXT));
    Ok(())
}

#[test]
fn t92_helpers_that_a_pull_secret_names_are_never_run_and_its_entry_is_used() -> Result<()> {
    let cluster = Cluster::start()?;
    let ran = cluster.directory.path().join("ran");
    let helpers = cluster.directory.path().join("bin");
    // They have a login that the registry takes: one that ran would be used as well.
    let answer = json!({ "Username": HELPED, "Secret": HELPED });
    for name in ["store", "one-host"] {
        let text = format!("#!/bin/sh\necho \"$0 $*\" >>{}\necho '{answer}'\n", ran.display());
        script(&helpers.join(format!("docker-credential-{name}")), &text)?;
    }
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.credentials = false;
    options.registry.users.push((HELPED.to_owned(), HELPED.to_owned()));
    options.config.push_str(&cluster.config());
    let path = std::env::var("PATH").unwrap_or_default();
    options.env.push(("PATH".to_owned(), format!("{}:{path}", helpers.display()).into()));
    let stage = Stage::start(options)?;
    let mut payload = json!({
        "auths": { stage.registry.host(): { "username": USER, "password": PASSWORD } },
        "credsStore": "store",
        "credHelpers": { stage.registry.host(): "one-host", "helped.example": "one-host" },
    });
    cluster.put_payload("team", &payload);
    stage.wait_log("pull secrets are synced", LONG)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/odd", "1")?;
    stage.registry.clear_log();
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
    let log = stage.registry.log();
    let users: BTreeSet<&str> = log.iter().filter_map(|seen| seen.user.as_deref()).collect();
    assert_eq!(users, BTreeSet::from([USER]), "the entry beside the helpers is used");

    // Nor are they asked for a host that has no entry, or for one whose entry is refused or went.
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    stage.registry.rotate_password(USER, NEXT);
    assert!(std::fs::read(mounted.path().join("random")).is_err(), "what expired reads nothing new");
    payload["auths"] = json!({});
    cluster.put_payload("team", &payload);
    for image in ["helped.example/a:1", published.reference.as_str()] {
        let unused = || (stage.explain(image).ok()?["hosts"][0]["uses"].is_null()).then_some(());
        wait::until(LONG, unused).with_context(|| format!("{image} has a credential"))?;
    }
    assert!(!ran.exists(), "{}", std::fs::read_to_string(&ran)?);

    // They would have run: the same payload as a Docker config, which an operator has written, names them rightly.
    let docker = stage.path().join("docker");
    std::fs::create_dir_all(&docker)?;
    std::fs::write(docker.join("config.json"), payload.to_string())?;
    let read = heals(&stage, &mounted.path().join("random"))?;
    assert_eq!(read, 5 * 1024 * 1024 + 17);
    let ran = std::fs::read_to_string(&ran).context("a helper that an operator names does not run")?;
    assert!(ran.contains("docker-credential-one-host get"), "{ran}");
    Ok(())
}

/// A service account as the kubelet mounts it into a pod, at the path that is the same in all pods.
struct ServiceAccount;

impl ServiceAccount {
    const PATH: &str = "/var/run/secrets/kubernetes.io";

    fn mount(api: &KubeApi, token: &str) -> Result<Self> {
        if Path::new(Self::PATH).exists() {
            bail!("{} exists: this test makes it, and does not touch a real one", Self::PATH);
        }
        let directory = Path::new(Self::PATH).join("serviceaccount");
        std::fs::create_dir_all(&directory)?;
        let account = Self;
        std::fs::write(directory.join("ca.crt"), api.ca_pem())?;
        std::fs::write(directory.join("namespace"), "kube-system")?;
        account.rotate(token)?;
        Ok(account)
    }

    fn rotate(&self, token: &str) -> Result<()> {
        Ok(std::fs::write(Path::new(Self::PATH).join("serviceaccount/token"), token)?)
    }
}

impl Drop for ServiceAccount {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(Self::PATH);
    }
}

#[test]
fn r47_a_daemon_in_a_pod_uses_its_service_account_also_when_its_token_is_rotated() -> Result<()> {
    let cluster = Cluster::start()?;
    let account = ServiceAccount::mount(&cluster.api, "sync")?;
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config.push_str("[kubeconfig_keychain]\nenable_keychain = true\n");
    options.env = vec![
        ("KUBERNETES_SERVICE_HOST".to_owned(), "127.0.0.1".into()),
        ("KUBERNETES_SERVICE_PORT".to_owned(), cluster.api.address().port().to_string().into()),
    ];
    let (stage, image, _) = cluster.pulls_lazily(options)?;
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;

    cluster.api.set_token("rotated");
    account.rotate("rotated")?;
    cluster.api.cut_watches();
    cluster.rotates(&stage, mounted.path())?;
    Ok(())
}

#[test]
fn t103_a_restart_without_the_api_server_keeps_the_mounts_and_the_sync_brings_the_rest() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let mut options = StageOptions::new(AuthMode::Bearer)?;
    options.config.push_str(&cluster.config());
    let (mut stage, image, published) = cluster.pulls_lazily(options)?;
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    let kept = std::fs::read(mounted.path().join("home/user/kept"))?;
    drop(mounted);
    stage.wait_stored()?;

    cluster.runtime.block_on(cluster.api.close());
    stage.snapshotter.daemon().kill();
    stage.start_snapshotter_again()?;
    assert_eq!(stage.lazy_layers()?, 2, "the mounts are back: {}", stage.log_tail());
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "again")?;
    assert_eq!(std::fs::read(mounted.path().join("home/user/kept"))?, kept, "what was fetched is there");
    assert!(std::fs::read(mounted.path().join("random")).is_err(), "what was not is not, and does not hang");
    let said = stage.explain(&published.reference)?;
    let secrets = &said["hosts"][0]["options"][2];
    assert_eq!(said["hosts"][0]["uses"], Value::Null, "{said:#}");
    assert!(secrets.to_string().contains(&cluster.api.address().to_string()), "it is said why: {said:#}");

    cluster.runtime.block_on(cluster.api.reopen())?;
    assert_eq!(heals(&stage, &mounted.path().join("random"))?, 5 * 1024 * 1024 + 17);
    assert_eq!(stage.explain(&published.reference)?["hosts"][0]["uses"], "kubernetes-secrets");
    Ok(())
}

#[test]
fn the_namespace_of_the_pod_that_pulls_chooses_among_secrets() -> Result<()> {
    let cluster = Cluster::start()?;
    let mut options = options(AuthMode::Basic)?;
    options.config.push_str(&cluster.config());
    let stage = Stage::start(options)?;
    // The pulls bring no login: containerd has one of its own, and the daemon has the secrets.
    for user in ["node", "older", "newer"] {
        stage.registry.rotate_password(user, PASSWORD);
    }
    stage.containerd_login("node", PASSWORD)?;
    cluster.put(&stage, "team", "older", PASSWORD);
    cluster.put(&stage, "other", "newer", PASSWORD);
    stage.wait_log("pull secrets are synced", LONG)?;
    let service = ImageService::connect(&stage.snapshotter.socket())?;
    for (at, (namespace, expected)) in
        [("team", "older"), ("other", "newer"), ("neither", "newer")].into_iter().enumerate()
    {
        let image = images::single(20 + u64::try_from(at)?);
        let published = stage.publish_v1(&image, &format!("team/app{at}"), "1")?;
        stage.registry.clear_log();
        service.pull(&published.reference, None, namespace).context("PullImage without a login")?;
        assert_eq!(stage.lazy_layers()?, at + 1, "{}", stage.log_tail());
        let log = stage.registry.log();
        let users: BTreeSet<&str> = log.iter().filter_map(|seen| seen.user.as_deref()).collect();
        assert_eq!(users, BTreeSet::from([expected, "node"]), "for a pod in {namespace}");
        let said = stage.explain(&published.reference)?;
        assert_eq!(said["hosts"][0]["uses"], "kubernetes-secrets", "{said:#}");
    }
    Ok(())
}
