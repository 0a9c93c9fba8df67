//! What breaks, in the process as it is on a node: afterwards nothing is open or runs that was not before, no secret has got
//! out, and what is good works.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use soci_e2e::children::Children;
use soci_e2e::planted::{self, found, script};
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, images, scrape};
use soci_testkit::cri::cut::{self, Cut};
use soci_testkit::cri::{self, ImageService};
use soci_testkit::image::Dialect;
use soci_testkit::kube_api::KubeApi;
use soci_testkit::{AuthMode, wait};

use super::{
    EXEC, IN_ENVIRONMENT, IN_KUBECONFIG, IN_SECRET, KUBE_TOKEN, LONG, all_on, pair, path_with, secrets,
};

const IN_FLOOD: &str = "pl4nted-In-Flood-Kx";
const IN_HANG: &str = "pl4nted-In-Hang-Kx";
const IN_FORK: &str = "pl4nted-In-Fork-Kx";
const IN_PLUGIN: &str = "pl4nted-In-Plugin-Kx";
const IN_METADATA: &str = "pl4nted-In-Metadata-Kx";
const IN_HALF: &str = "pl4nted-In-Half-Kx";
/// What programs and callers that break have.
const BROKEN: [&str; 6] = [IN_FLOOD, IN_HANG, IN_FORK, IN_PLUGIN, IN_METADATA, IN_HALF];
/// A line of a script that keeps what the program was given.
const KEEPS: &str = "cat /proc/$$/environ /proc/$$/cmdline >> \"$0-told\"";

/// The cluster of the broken cases: its API server, and a kubeconfig with a plugin.
struct Cluster {
    api: KubeApi,
    _runtime: tokio::runtime::Runtime,
    directory: tempfile::TempDir,
}

impl Cluster {
    fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let api = runtime.block_on(KubeApi::start(KUBE_TOKEN))?;
        let cluster = Self { api, _runtime: runtime, directory: tempfile::tempdir()? };
        cluster.mend()?;
        Ok(cluster)
    }

    fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    fn plugin_path(&self) -> PathBuf {
        self.directory.path().join("plugin")
    }

    /// Puts a kubeconfig there that works, and its plugin.
    fn mend(&self) -> Result<()> {
        self.plugin(&format!(
            "echo '{{\"apiVersion\":\"{EXEC}\",\"status\":{{\"token\":\"{KUBE_TOKEN}\"}}}}'"
        ))?;
        let exec = json!({ "exec": { "apiVersion": EXEC, "command": self.plugin_path() } });
        std::fs::write(self.kubeconfig(), self.api.kubeconfig(&exec))?;
        self.api.set_token(KUBE_TOKEN);
        Ok(())
    }

    fn plugin(&self, text: &str) -> Result<()> {
        script(&self.plugin_path(), &format!("#!/bin/sh\n{KEEPS}\n{text}\n"))
    }

    /// Ends the connection: what the kubeconfig says now is looked at.
    fn cut(&self) {
        self.api.set_token("another");
        self.api.cut_watches();
    }

    fn put(&self, name: &str, payload: &str) {
        self.api.put("team", name, "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", payload)]);
    }

    /// Puts a secret for a host, and waits until the daemon has it.
    fn synced(&self, stage: &Stage, name: &str, host: &str, password: &str) -> Result<()> {
        let auths = json!({ "auths": { host: { "username": USER, "password": password } } });
        self.put(name, &auths.to_string());
        let image = format!("{host}/synced/{name}:1");
        let used = || (uses(stage, &image).ok()? == "kubernetes-secrets").then_some(());
        wait::until(LONG, used).with_context(|| format!("{name} is not synced:\n{}", stage.log_tail()))
    }

    /// What goes wrong with a cluster, and is mended.
    fn breaks(&self, stage: &Stage) -> Result<()> {
        let garbage = format!("users:\n- name: u\n  user: {{token: {IN_KUBECONFIG}\n  other: [\n");
        std::fs::write(self.kubeconfig(), garbage)?;
        self.cut();
        stage.wait_log("not the YAML of a kubeconfig at line", LONG)?;
        self.mend()?;
        self.synced(stage, "after-garbage", "garbage.example", IN_SECRET)?;

        self.plugin(&format!("while echo {IN_PLUGIN}; do :; done"))?;
        self.cut();
        stage.wait_log("more than 1 MiB of output", LONG)?;
        self.mend()?;
        self.synced(stage, "after-flood", "flooded.example", IN_SECRET)?;

        self.put("after-flood", &format!("{{\"auths\":{{\"flooded.example\":{{\"password\":\"{IN_SECRET}\""));
        stage.wait_log("pull secret cannot be used", LONG)?;
        assert_eq!(uses(stage, "flooded.example/synced/after-flood:1")?, Value::Null);
        Ok(())
    }
}

fn uses(stage: &Stage, image: &str) -> Result<Value> {
    Ok(stage.explain(image)?["hosts"][0]["uses"].take())
}

/// Writes the helpers that break, each of which keeps what it is given, and one that is good.
fn broken_helpers(bin: &Path) -> Result<()> {
    let answer = |password: &str| format!("echo '{{\"Username\":\"{USER}\",\"Secret\":\"{password}\"}}'");
    for (name, text) in [
        ("good", answer(PASSWORD)),
        ("flood", format!("while echo {IN_FLOOD}; do :; done")),
        ("hang", format!("printf '{{\"Secret\":\"{IN_HANG}'; sleep 600 & sleep 600")),
        ("fork", format!("{}; echo {IN_FORK} >&2; sleep 600 & exit 0", answer(IN_FORK))),
    ] {
        let file = bin.join(format!("docker-credential-{name}"));
        script(&file, &format!("#!/bin/sh\n{KEEPS}\nread -r server\n{text}\n"))?;
    }
    Ok(())
}

/// Has the daemon run each helper that breaks, the slow ones at once.
fn helpers_break(stage: &Stage) -> Result<String> {
    let broken = [
        ("flood", "prints more than 262144 bytes, killed"),
        ("hang", "no answer within 15s, killed"),
        ("fork", "no answer within 15s, killed"),
    ];
    std::thread::scope(|scope| {
        let asked =
            broken.map(|(name, _)| scope.spawn(move || stage.explain(&format!("{name}.example/a:1"))));
        let mut shown = String::new();
        for (asked, (name, trouble)) in asked.into_iter().zip(broken) {
            let said = asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?.to_string();
            assert!(said.contains(trouble), "{name}: {said}");
            shown.push_str(&said);
        }
        Ok(shown)
    })
}

/// Pulls with a mebibyte of metadata, and twice not to the end.
fn pulls_break(stage: &Stage, service: &ImageService) -> Result<String> {
    let value = IN_METADATA.repeat((16 << 10) / IN_METADATA.len());
    let metadata: Vec<_> = (0..64).map(|at| (format!("x-filler-{at}"), value.clone())).collect();
    let login = || cri::basic(USER, IN_HALF);
    let refused = service.pull_with("metadata.example/a:1", Some(login()), &metadata);
    let refused = refused.err().context("a mebibyte of metadata was taken")?;
    assert!(refused.message().contains("metadata of"), "{refused}");
    for cut in [Cut::Frame, Cut::Message] {
        cut::pull(&stage.snapshotter.socket(), cut, "half.example/a:1", login())?;
    }
    let half = stage.explain("half.example/a:1")?;
    assert_eq!(half["hosts"][0]["uses"], Value::Null, "nothing is learnt of half a pull: {half:#}");
    Ok(format!("{refused:?} {half}"))
}

/// How many descriptors the daemon has, and how many programs it runs.
fn held(daemon: u32, children: &mut Children) -> Result<(usize, usize)> {
    Ok((std::fs::read_dir(format!("/proc/{daemon}/fd"))?.count(), children.look()))
}

#[test]
fn what_breaks_leaves_no_secret_descriptor_or_program_behind() -> Result<()> {
    let cluster = Cluster::start()?;
    let bin = cluster.directory.path().join("bin");
    broken_helpers(&bin)?;
    let mut options = StageOptions::new(AuthMode::Bearer)?;
    let environment = json!({ "auths": { "third.example": { "auth": pair("u", IN_ENVIRONMENT) } } });
    options.env = vec![("DOCKER_AUTH_CONFIG".to_owned(), environment.to_string().into()), path_with(&bin)];
    all_on(&mut options, &cluster.kubeconfig());
    let mut stage = Stage::start(options)?;
    let docker = stage.path().join("docker");
    std::fs::create_dir_all(&docker)?;
    let mut helpers = json!({ "flood.example": "flood", "hang.example": "hang", "fork.example": "fork" });
    std::fs::write(docker.join("config.json"), json!({ "credHelpers": helpers }).to_string())?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/private", "1")?;

    // What the daemon has open for good is open: the watch, and the connections of containerd and of a kubelet. The last one
    // stays until the end.
    stage.wait_log("pull secrets are synced", LONG)?;
    let watched = || cluster.api.log().iter().any(|asked| asked.verb == "watch").then_some(());
    wait::until(LONG, watched).context("the secrets are not watched")?;
    stage.containerd.run("reach", &["snapshots", "--snapshotter", "soci", "list"])?;
    let service = ImageService::connect(&stage.snapshotter.socket())?;
    assert_eq!(service.status(&published.reference)?, None);
    let daemon = stage.snapshotter.daemon().id();
    let mark = format!("DOCKER_CONFIG={}", docker.display());
    let mut children = Children::of(daemon, &mark)?;
    wait::until(LONG, || (children.look() == 0).then_some(())).context("the plugin does not end")?;
    let before = held(daemon, &mut children)?;

    let mut shown = children.during(|| -> Result<String> {
        cluster.breaks(&stage)?;
        Ok(helpers_break(&stage)? + &pulls_break(&stage, &service)?)
    })?;
    let mut after = held(daemon, &mut children)?;
    let released = || {
        after = held(daemon, &mut children).ok()?;
        (after.0 <= before.0 && after.1 <= before.1).then_some(())
    };
    let released = wait::until(LONG, released);
    released.with_context(|| format!("descriptors and programs: {before:?} before, {after:?} after"))?;

    // Each option is as good as before, one before the other.
    cluster.synced(&stage, "good", &stage.registry.host(), PASSWORD)?;
    shown.push_str(&served(&stage, &published.reference, "kubernetes-secrets")?);
    service.pull(&published.reference, Some(cri::basic(USER, PASSWORD)), "default").context("PullImage")?;
    assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
    shown.push_str(&served(&stage, &published.reference, "cri")?);
    helpers[stage.registry.host()] = "good".into();
    std::fs::write(docker.join("config.json"), json!({ "credHelpers": helpers }).to_string())?;
    shown.push_str(&served(&stage, &published.reference, "docker-config")?);

    shown.push_str(&scrape::scrape(&stage.path().join("m.sock"))?);
    shown.push_str(&scrape::state(&stage.path().join("d.sock"))?.to_string());
    let planted = [PASSWORD, KUBE_TOKEN, IN_ENVIRONMENT, IN_SECRET, IN_KUBECONFIG];
    let secrets = secrets(&stage, &[&planted[..], &BROKEN[..]].concat());
    // Log, state, configuration and sockets are all beneath one directory.
    let run = stage.snapshotter.socket().with_file_name("");
    assert!(stage.snapshotter.log().starts_with(&run) && stage.snapshotter.root().starts_with(&run));
    planted::in_no_file(&run, &secrets)?;
    planted::in_no_core(daemon)?;
    let programs =
        ["good", "flood", "hang", "fork"].map(|name| bin.join(format!("docker-credential-{name}")));
    for program in programs.iter().chain([&cluster.plugin_path()]) {
        let told = std::fs::read(format!("{}-told", program.display()))?;
        assert_eq!(found(&told, &secrets), None, "{} was given it", program.display());
    }
    // Of the others it depends on the moment whether they are seen.
    let hanging = ["docker-credential-hang\0get".to_owned()];
    assert!(
        children.told().any(|told| found(told, &hanging).is_some()),
        "nobody looked at the right processes"
    );
    for told in children.told() {
        assert_eq!(found(told, &secrets), None, "a program was given it");
    }
    assert_eq!(found(shown.as_bytes(), &secrets), None, "in what is shown");
    Ok(())
}

/// Asks the registry for an image with what the daemon has for it, which is of `option`.
fn served(stage: &Stage, image: &str, option: &str) -> Result<String> {
    let control = stage.snapshotter.socket().with_file_name("control.sock");
    let control = control.to_str().context("a path is not UTF-8")?;
    let words = ["auth", "explain", "--daemon", "--json", "--check", "--control", control, image];
    let said: Value = serde_json::from_str(&stage.soci("default", &words)?)?;
    let found = (&said["hosts"][0]["uses"], &said["check"]["served"]);
    assert_eq!(found, (&json!(option), &json!(true)), "{said:#}");
    Ok(said.to_string())
}
