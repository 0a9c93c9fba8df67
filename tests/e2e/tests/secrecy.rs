//! Secrets stay in the process: not in its log at the lowest level, not in its files, not with its children, not in a core.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use serde_json::json;
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

/// Writes an executable script.
fn script(path: &Path, text: &str) -> Result<()> {
    std::fs::create_dir_all(path.parent().context("no directory")?)?;
    std::fs::write(path, text)?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
}

/// Calls `look` with every regular file beneath `directory`, mounts left out.
fn files(directory: &Path, look: &mut dyn FnMut(&Path, &[u8])) -> Result<()> {
    let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(directory)?);
    for entry in std::fs::read_dir(directory)?.flatten() {
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            let same = std::fs::metadata(&path)
                .is_ok_and(|found| std::os::unix::fs::MetadataExt::dev(&found) == device);
            if same {
                files(&path, look)?;
            }
        } else if kind.is_file() {
            look(&path, &std::fs::read(&path)?);
        }
    }
    Ok(())
}

fn holds(bytes: &[u8], secret: &str) -> bool {
    bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
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
    options.credentials = false;
    options.log_level = "trace".to_owned();
    let environment = json!({ "auths": { "third.example": { "auth": base64::engine::general_purpose::STANDARD
        .encode(format!("u:{IN_ENVIRONMENT}")) } } });
    let path = std::env::var("PATH").unwrap_or_default();
    options.env = vec![
        ("DOCKER_AUTH_CONFIG".to_owned(), environment.to_string().into()),
        ("PATH".to_owned(), format!("{}:{path}", directory.path().join("bin").display()).into()),
    ];
    options.config.push_str(&format!(
        "[cri_keychain]\nenable_keychain = true\nimage_service_path = \"{{containerd}}\"\n\
         [kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = {kubeconfig:?}\n"
    ));
    options.config_head.push_str("metrics_network = \"unix\"\nmetrics_address = \"{stage}/m.sock\"\n");
    options.config_head.push_str(state::SHOWN);
    let mut stage = Stage::start(options)?;
    let docker = stage.path().join("docker");
    std::fs::create_dir_all(&docker)?;
    std::fs::write(docker.join("config.json"), r#"{"credsStore":"planted"}"#)?;
    stage.wait_log("pull secrets are synced", std::time::Duration::from_secs(60))?;
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
    stage.wait_log("not the YAML of a kubeconfig at line", std::time::Duration::from_secs(60))?;
    let said = stage.explain("other.example/a:1")?.to_string();
    assert!(said.contains("not the YAML of a kubeconfig at line"), "{said}");
    shown.push_str(&said);

    shown.push_str(&scrape::scrape(&stage.path().join("m.sock"))?);
    assert!(shown.contains("soci_kubernetes_secrets"), "the metrics of the sync are there");
    shown.push_str(&scrape::state(&stage.path().join("d.sock"))?.to_string());

    let pair = |user: &str, password: &str| {
        base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
    };
    let mut secrets: Vec<String> =
        [PASSWORD, IN_ENVIRONMENT, IN_HELPER, IN_SECRET, KUBE_TOKEN, IN_KUBECONFIG].map(str::to_owned).into();
    secrets.push(pair(USER, PASSWORD));
    secrets.push(pair("u", IN_ENVIRONMENT));
    for seen in stage.registry.log() {
        let sent = seen.header("authorization").and_then(|value| value.split_once(' '));
        secrets.extend(sent.map(|(_, token)| token.to_owned()));
    }
    secrets.sort();
    secrets.dedup();
    let told = std::fs::read(&told).context("the helper did not run")?;
    let plugin_told = std::fs::read(&plugin_told).context("the plugin did not run")?;
    let log = stage.snapshotter.log_text();
    assert!(log.contains("\"level\":\"debug\""), "the level was not applied");
    for secret in &secrets {
        assert!(!holds(log.as_bytes(), secret), "a secret is in the log");
        assert!(!holds(shown.as_bytes(), secret), "a secret is shown");
        assert!(!holds(&told, secret), "a secret is in a helper's environment or arguments");
        assert!(!holds(&plugin_told, secret), "a secret is in a plugin's environment or arguments");
    }
    files(&stage.snapshotter.root(), &mut |path, bytes| {
        for secret in &secrets {
            assert!(!holds(bytes, secret), "a secret is in {}", path.display());
        }
    })?;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", stage.snapshotter.daemon().id()))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
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
    let used = wait::until(std::time::Duration::from_secs(90), || {
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

/// A password store with a key of its own.
struct Keyring<'a>(&'a Path);

impl<'a> Keyring<'a> {
    fn new(home: &'a Path) -> Result<Self> {
        let keyring = Self(home);
        keyring.run(
            "gpg",
            &[
                "--batch",
                "--passphrase",
                "",
                "--quick-generate-key",
                "stage@soci.example",
                "default",
                "default",
                "never",
            ],
            None,
        )?;
        keyring.run("pass", &["init", "stage@soci.example"], None)?;
        Ok(keyring)
    }

    fn environment(&self) -> Vec<(String, std::ffi::OsString)> {
        vec![("HOME".to_owned(), self.0.into()), ("GNUPGHOME".to_owned(), self.0.join(".gnupg").into())]
    }

    fn store(&self, server: &str, user: &str, secret: &str) -> Result<()> {
        let entry = json!({ "ServerURL": server, "Username": user, "Secret": secret }).to_string();
        self.run("docker-credential-pass", &["store"], Some(&entry))
    }

    fn run(&self, program: &str, words: &[&str], input: Option<&str>) -> Result<()> {
        use std::io::Write as _;
        std::fs::create_dir_all(self.0.join(".gnupg"))?;
        std::fs::set_permissions(self.0.join(".gnupg"), std::fs::Permissions::from_mode(0o700))?;
        let mut command = Command::new(program);
        command
            .args(words)
            .envs(self.environment())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let package = "install the packages gpg, gpg-agent, pass and golang-docker-credential-helpers";
        let mut child = command.spawn().with_context(|| format!("{program} does not run: {package}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that does not read its input is no failure.
            let _ = stdin.write_all(input.unwrap_or_default().as_bytes());
        }
        let done = child.wait_with_output()?;
        if !done.status.success() {
            bail!("{program}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Keyring<'_> {
    fn drop(&mut self) {
        // Its agent stays otherwise.
        let _ = self.run("gpgconf", &["--kill", "all"], None);
    }
}
