//! Secrets stay in the process: not in its log at the lowest level, not in its files, not with its children, not in a core.

mod broken;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use serde_json::json;
use soci_e2e::keyring::Keyring;
use soci_e2e::planted::{self, found, script};
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, images, scrape, state};
use soci_testkit::cri::{self, ImageService};
use soci_testkit::image::Dialect;
use soci_testkit::kube_api::KubeApi;
use soci_testkit::{AuthMode, wait};

/// Secrets that no registry accepts: they are only there to be lost.
const IN_ENVIRONMENT: &str = "pl4nted-In-Env-Kx";
const IN_HELPER: &str = "pl4nted-In-Helper-Kx";
const IN_SECRET: &str = "pl4nted-In-Secret-Kx";
const KUBE_TOKEN: &str = "pl4nted-Kube-Token-Kx";
const IN_KUBECONFIG: &str = "pl4nted-In-Kubeconfig-Kx";
/// What exec plugins speak.
const EXEC: &str = "client.authentication.k8s.io/v1";
/// Nothing here takes longer, on any machine.
const LONG: Duration = Duration::from_secs(120);

/// Turns all three options on, and everything by which the daemon shows itself.
fn all_on(options: &mut StageOptions, kubeconfig: &Path) {
    options.credentials = false;
    options.log_level = "trace".to_owned();
    options.config.push_str(&format!(
        "[cri_keychain]\nenable_keychain = true\nimage_service_path = \"{{containerd}}\"\n\
         [kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = {kubeconfig:?}\n"
    ));
    options.config_head.push_str("metrics_network = \"unix\"\nmetrics_address = \"{stage}/m.sock\"\n");
    options.config_head.push_str(state::SHOWN);
}

/// Adds a directory of helpers to what the daemon searches.
fn path_with(bin: &Path) -> (String, std::ffi::OsString) {
    let path = std::env::var("PATH").unwrap_or_default();
    ("PATH".to_owned(), format!("{}:{path}", bin.display()).into())
}

fn pair(user: &str, password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
}

/// Returns what was planted, the logins that are made of it, and what the registry was sent as credentials: the tokens that
/// it gave are among them.
fn secrets(stage: &Stage, planted: &[&str]) -> Vec<String> {
    let log = stage.registry.log();
    let sent = log.iter().filter_map(|seen| seen.header("authorization")?.split_once(' '));
    let sent = sent.map(|(_, token)| token.to_owned());
    let logins = [pair(USER, PASSWORD), pair("u", IN_ENVIRONMENT)];
    let all = planted.iter().map(|&secret| secret.to_owned()).chain(logins).chain(sent);
    all.collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn r27_t86_planted_secrets_are_found_nowhere() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let api = runtime.block_on(KubeApi::start(KUBE_TOKEN))?;
    let auths = json!({ "auths": { "other.example": { "username": "u", "password": IN_SECRET } } });
    api.put("team", "pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &auths.to_string())]);
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    // Both children keep what they are given: the plugin that has the token of the API server, and the helper, which has an
    // answer for a registry that is not asked for.
    let (plugin, plugin_told) = (directory.path().join("plugin"), directory.path().join("plugin-told"));
    script(
        &plugin,
        &format!(
            "#!/bin/sh\ncat /proc/self/environ /proc/self/cmdline >> {}\n\
             echo '{{\"apiVersion\":\"{EXEC}\",\"status\":{{\"token\":\"{KUBE_TOKEN}\"}}}}'\n",
            plugin_told.display()
        ),
    )?;
    let exec = json!({ "exec": { "apiVersion": EXEC, "command": plugin } });
    std::fs::write(&kubeconfig, api.kubeconfig(&exec))?;
    let told = directory.path().join("told");
    let helper = directory.path().join("bin/docker-credential-planted");
    script(
        &helper,
        &format!(
            "#!/bin/sh\n{{ cat /proc/self/environ /proc/self/cmdline; ulimit -c; ls /proc/self/fd; }} >> {told}\n\
             read -r server || true\n\
             case \"$server\" in helped.example) echo '{{\"Username\":\"u\",\"Secret\":\"{IN_HELPER}\"}}';; \
             *) echo 'credentials not found in native keychain'; exit 1;; esac\n",
            told = told.display()
        ),
    )?;
    let mut options = StageOptions::new(AuthMode::Bearer)?;
    let environment = json!({ "auths": { "third.example": { "auth": pair("u", IN_ENVIRONMENT) } } });
    options.env = vec![
        ("DOCKER_AUTH_CONFIG".to_owned(), environment.to_string().into()),
        path_with(&directory.path().join("bin")),
    ];
    all_on(&mut options, &kubeconfig);
    let mut stage = Stage::start(options)?;
    let docker = stage.path().join("docker");
    std::fs::create_dir_all(&docker)?;
    std::fs::write(docker.join("config.json"), r#"{"credsStore":"planted"}"#)?;
    stage.wait_log("pull secrets are synced", Duration::from_secs(60))?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/private", "1")?;
    let service = ImageService::connect(&stage.snapshotter.socket())?;
    service.pull(&published.reference, Some(cri::basic(USER, PASSWORD)), "default").context("PullImage")?;
    assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
    stage.probe(KUBELET, &published, "sum", &["sum", "/large"])?;

    // Every option shows what it has, and nothing of it.
    let mut shown = String::new();
    for (image, option) in [
        (published.reference.as_str(), "cri"),
        ("helped.example/a:1", "docker-config"),
        ("third.example/a:1", "docker-config"),
        ("other.example/a:1", "kubernetes-secrets"),
    ] {
        let said = stage.explain(image)?;
        assert_eq!(said["hosts"][0]["uses"], option, "{said:#}");
        shown.push_str(&said.to_string());
    }

    // A kubeconfig with a fault beside its token is told of, and the token is not.
    let faulty = format!("users:\n- name: u\n  user: {{token: {IN_KUBECONFIG}\n  other: [\n");
    std::fs::write(&kubeconfig, faulty)?;
    api.set_token("another");
    api.cut_watches();
    stage.wait_log("not the YAML of a kubeconfig at line", Duration::from_secs(60))?;
    let said = stage.explain("other.example/a:1")?.to_string();
    assert!(said.contains("not the YAML of a kubeconfig at line"), "{said}");
    shown.push_str(&said);

    shown.push_str(&scrape::scrape(&stage.path().join("m.sock"))?);
    assert!(shown.contains("soci_kubernetes_secrets"), "the metrics of the sync are there");
    shown.push_str(&scrape::state(&stage.path().join("d.sock"))?.to_string());

    let planted = [PASSWORD, IN_ENVIRONMENT, IN_HELPER, IN_SECRET, KUBE_TOKEN, IN_KUBECONFIG];
    let secrets = secrets(&stage, &planted);
    let told = std::fs::read(&told).context("the helper did not run")?;
    let plugin_told = std::fs::read(&plugin_told).context("the plugin did not run")?;
    let log = stage.snapshotter.log_text();
    assert!(log.contains("\"level\":\"debug\""), "the level was not applied");
    assert_eq!(found(log.as_bytes(), &secrets), None, "in the log");
    assert_eq!(found(shown.as_bytes(), &secrets), None, "in what is shown");
    assert_eq!(found(&told, &secrets), None, "in a helper's environment or arguments");
    assert_eq!(found(&plugin_told, &secrets), None, "in a plugin's environment or arguments");
    planted::in_no_file(&stage.snapshotter.root(), &secrets)?;
    planted::in_no_core(stage.snapshotter.daemon().id())?;
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(told.lines().any(|line| line == "0"), "the helper inherits the limit for cores:\n{told}");
    // Its own input and outputs, the shell's, and what this test was started with; nothing that the daemon opened.
    let ours = soci_testkit::process::output(Command::new("sh").args(["-c", "ls /proc/self/fd"]))?;
    let ours: Vec<&str> = ours.lines().collect();
    let open = told.lines().filter(|line| line.parse::<u32>().is_ok_and(|number| number > 10));
    let leaked: Vec<&str> = open.filter(|line| !ours.contains(line)).collect();
    assert!(leaked.is_empty(), "descriptors of the daemon are open in the helper: {leaked:?}");

    // Nothing is left of the credentials after a restart.
    stage.snapshotter.daemon().stop();
    stage.start_snapshotter_again()?;
    let said = stage.explain(&published.reference)?;
    assert_eq!(said["hosts"][0]["options"][1]["standing"], "empty", "{said:#}");
    Ok(())
}

#[test]
fn t51_debians_pass_helper_serves_a_pull() -> Result<()> {
    let home = tempfile::Builder::new().prefix("soci-pass-").tempdir()?;
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700))?;
    let keyring = Keyring::new(home.path())?;
    let mut options = StageOptions::new(AuthMode::Bearer)?;
    options.credentials = false;
    options.env = keyring.environment();
    let stage = Stage::start(options)?;
    let docker = stage.path().join("docker");
    std::fs::create_dir_all(&docker)?;
    std::fs::write(docker.join("config.json"), r#"{"credsStore":"pass"}"#)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/private", "1")?;
    let before = stage.explain(&published.reference)?;
    assert_eq!(before["hosts"][0]["options"][0]["standing"], "empty", "{before:#}");
    keyring.store(&stage.registry.host(), USER, PASSWORD)?;
    // The answer "not found" is remembered for some seconds.
    let used = wait::until(Duration::from_secs(90), || {
        let said = stage.explain(&published.reference).ok()?;
        (said["hosts"][0]["uses"] == "docker-config").then_some(said)
    });
    let said = used.context("the helper's login was not found")?;
    assert_eq!(said["hosts"][0]["options"][0]["candidates"][0]["entry"], "docker-credential-pass");
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
    assert!(!stage.snapshotter.log_text().contains(PASSWORD));
    Ok(())
}
