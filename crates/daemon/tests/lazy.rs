//! The program with a real registry, a Docker config file, FUSE and overlay: pull, read, restart, remove.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::ffi::CString;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use soci_oci::{Digest, labels};
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_testkit::layer_gen::{Attr, Layer, LayerBuilder, Numbers};
use soci_testkit::{AuthMode, Listener, Options, TestRegistry, mounts};
use support::image::{Published, publish};
use support::{Client, client};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Request};

const CONFIG: &str = "[background_fetch]\ndisable = true\n[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n\
                      [blob]\nfetching_timeout_sec = 5\n[http]\nMaxRetries = 1\n";

/// A daemon on a root directory of its own; mounts and process go when it is dropped.
struct Stage {
    dir: tempfile::TempDir,
    child: Child,
    log: Arc<Mutex<Vec<Value>>>,
    client: Client,
}

impl Stage {
    async fn new(registry: &TestRegistry, config: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "needs root: mounts FUSE and overlay");
        let dir = tempfile::tempdir().unwrap();
        let login =
            json!({ "auths": { registry.host(): { "username": "reader", "password": "pass-word-1" } } });
        std::fs::write(dir.path().join("config.json"), login.to_string()).unwrap();
        std::fs::write(dir.path().join("ca.pem"), registry.ca_pem()).unwrap();
        let metrics = dir.path().join("m.sock");
        let metrics = format!("metrics_network = 'unix'\nmetrics_address = '{}'\n", metrics.display());
        std::fs::write(dir.path().join("config.toml"), metrics + config).unwrap();
        let (child, log) = launch(dir.path());
        let client = client(&dir.path().join("s.sock")).await;
        Self { dir, child, log, client }
    }

    async fn start_again(&mut self) {
        let (child, log) = launch(self.dir.path());
        (self.child, self.log) = (child, log);
        self.client = client(&self.dir.path().join("s.sock")).await;
    }

    fn end(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    async fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        labels: std::collections::HashMap<String, String>,
    ) -> Result<Vec<soci_snapshotter_grpc::proto::types::Mount>, tonic::Status> {
        let request = wire::PrepareSnapshotRequest {
            snapshotter: "soci".into(),
            key: key.into(),
            parent: parent.into(),
            labels,
        };
        let mut request = Request::new(request);
        request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
        Ok(self.client.prepare(request).await?.into_inner().mounts)
    }

    /// Prepares one layer as containerd does; returns what `Prepare` answered and the chain id.
    async fn pull_layer(&mut self, published: &Published, number: usize) -> (Option<Code>, String) {
        let chain = |count: usize| {
            soci_testkit::image::Image {
                layers: published.image.layers[..count].to_vec(),
                ..published.image.clone()
            }
            .chain_id()
        };
        let target = chain(number + 1);
        let parent = if number == 0 { String::new() } else { chain(number) };
        let labels = [
            (labels::TARGET, target.clone()),
            (labels::IMAGE_REF, published.reference.clone()),
            (labels::MANIFEST_DIGEST, published.manifest.to_string()),
            (labels::LAYER_DIGEST, published.image.layers[number].digest.clone()),
        ];
        let labels = labels.map(|(key, value)| (key.to_owned(), value)).into();
        let answer = self.prepare(&format!("extract-{number}"), &parent, labels).await;
        (answer.err().map(|status| status.code()), target)
    }

    async fn pull(&mut self, published: &Published) -> String {
        let mut top = String::new();
        for number in 0..published.image.layers.len() {
            let (code, target) = self.pull_layer(published, number).await;
            assert_eq!(code, Some(Code::AlreadyExists), "layer {number}: {:#?}", self.log.lock().unwrap());
            top = target;
        }
        top
    }

    async fn label(&mut self, name: &str, label: &str) -> String {
        let stat = wire::StatSnapshotRequest { key: name.to_owned(), ..Default::default() };
        let info = self.client.stat(stat).await.unwrap().into_inner().info.unwrap();
        info.labels.get(label).cloned().unwrap_or_default()
    }

    /// Mounts what the snapshotter answered, as containerd would, and returns where.
    fn mount(&self, answer: &[soci_snapshotter_grpc::proto::types::Mount]) -> PathBuf {
        let at = self.dir.path().join("merged");
        std::fs::create_dir_all(&at).unwrap();
        assert_eq!(answer.len(), 1);
        assert_eq!(answer[0].r#type, "overlay");
        let options = CString::new(answer[0].options.join(",")).unwrap();
        rustix::mount::mount("overlay", &at, "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
        at
    }

    fn unmount(&self) {
        rustix::mount::unmount(self.dir.path().join("merged"), UnmountFlags::DETACH).unwrap();
    }

    async fn metrics(&self) -> String {
        let mut stream = tokio::net::UnixStream::connect(self.dir.path().join("m.sock")).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        text
    }

    fn fuse_mounts(&self) -> usize {
        mounts::fuse(self.dir.path()).unwrap().len()
    }

    fn messages(&self, text: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|line| line["msg"].as_str().unwrap_or_default().contains(text)).cloned().collect()
    }

    /// Waits for a line of the log.
    async fn wait_for(&self, text: &str) -> Value {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(line) = self.messages(text).pop() {
                return line;
            }
            assert!(Instant::now() < deadline, "no line {text:?} in {:#?}", self.log.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        mounts::detach(self.dir.path());
    }
}

fn launch(dir: &Path) -> (Child, Arc<Mutex<Vec<Value>>>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_soci-snapshotter-grpc"))
        .args(["--log-level", "debug"])
        .env_clear()
        .env("DOCKER_CONFIG", dir)
        .env("SSL_CERT_FILE", dir.join("ca.pem"))
        .env("SOCI_SNAPSHOTTER_ADDRESS", dir.join("s.sock"))
        .env("SOCI_SNAPSHOTTER_CONFIG", dir.join("config.toml"))
        .env("SOCI_SNAPSHOTTER_ROOT", dir.join("state"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let log = Arc::new(Mutex::new(Vec::new()));
    let (sink, (started, ready)) = (Arc::clone(&log), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        for line in stderr.lines() {
            let Ok(line) = line else { return };
            let value: Value = serde_json::from_str(&line).unwrap_or_else(|_| json!({ "msg": line }));
            let done = value["msg"].as_str().is_some_and(|msg| msg.contains("successfully started"));
            sink.lock().unwrap().push(value);
            if done {
                let _ = started.send(());
            }
        }
    });
    if ready.recv_timeout(Duration::from_secs(30)).is_err() {
        let _ = child.kill();
        panic!("the daemon does not start: {:#?}", log.lock().unwrap());
    }
    (child, log)
}

async fn registry() -> TestRegistry {
    TestRegistry::start(Options::default().auth(AuthMode::Bearer, "reader", "pass-word-1")).await.unwrap()
}

/// A base with a private directory and a large file, a layer that only implies that directory, and a third one.
fn layers() -> (Vec<Layer>, Vec<u8>) {
    let big = Numbers::new(7).bytes(5 << 20);
    let base = LayerBuilder::new()
        .dir("etc/", &Attr::mode(0o700).owned(5, 6))
        .file("etc/keep", &Attr::default(), b"kept\n")
        .file("etc/gone", &Attr::default(), b"gone\n")
        .file("big", &Attr::default(), &big)
        .gzip();
    let middle = LayerBuilder::new()
        .file("etc/added", &Attr::mode(0o640).owned(1, 2), b"added\n")
        .whiteout("etc/gone")
        .gzip();
    let top = LayerBuilder::new().file("etc/top", &Attr::default(), b"top\n").gzip();
    (vec![base, middle, top], big)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_image_is_pulled_read_and_read_again_without_the_registry() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::new(&registry, CONFIG).await;
    let top = stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 2, "two lazy layers");
    assert_eq!(stage.label(&top, labels::REMOTE).await, "remote snapshot");
    let verdict = stage.wait_for("because of no-ztoc").await;
    assert_eq!(
        (verdict["verdict"].as_str(), verdict["level"].as_str()),
        (Some("lazy"), Some("info")),
        "{verdict}"
    );
    let answer = stage.prepare("container", &top, Default::default()).await.unwrap();
    let merged = stage.mount(&answer);
    let read = move |merged: PathBuf| {
        let text = |path: &str| std::fs::read_to_string(merged.join(path)).unwrap();
        assert_eq!(text("etc/keep") + &text("etc/added") + &text("etc/top"), "kept\nadded\ntop\n");
        assert!(!merged.join("etc/gone").exists());
        let etc = std::fs::metadata(merged.join("etc")).unwrap();
        assert_eq!((etc.mode() & 0o7777, etc.uid(), etc.gid()), (0o700, 5, 6), "as the layer below has it");
        assert!(std::fs::read(merged.join("big")).unwrap() == big, "the large file differs");
    };
    let read = Arc::new(read);
    let reader = Arc::clone(&read);
    tokio::task::spawn_blocking(move || reader(merged)).await.unwrap();
    stage.unmount();
    let metrics = stage.metrics().await;
    let layer = &published.image.layers[0].digest;
    for part in [
        format!("soci_fs_layer_size_bytes{{digest=\"{layer}\",mountpoint=\""),
        format!("soci_fs_operation_count{{layer=\"{layer}\",operation_type=\"synchronous_read_count\"}}"),
        format!(
            "soci_fs_operation_duration_milliseconds_count{{layer=\"{layer}\",operation_type=\"mount\"}} 1"
        ),
        "soci_pull_verdicts_total{verdict=\"lazy\",reason=\"no-ztoc\"} 1".to_owned(),
        "soci_auth_lookups_total{option=\"docker-config\",outcome=\"found\"}".to_owned(),
        "soci_mounted_layers 2".to_owned(),
    ] {
        assert!(metrics.contains(&part), "{part} in\n{metrics}");
    }
    for line in stage.log.lock().unwrap().iter() {
        assert!(!line.to_string().contains("pass-word-1"), "{line}");
    }

    // Killed; the registry is gone; everything that was read is read again.
    stage.end(Signal::KILL);
    registry.shutdown().await;
    let started = Instant::now();
    stage.start_again().await;
    let mounts = wire::MountsRequest { key: "container".into(), ..Default::default() };
    let answer = stage.client.mounts(mounts).await.unwrap().into_inner().mounts;
    let elapsed = started.elapsed();
    let merged = stage.mount(&answer);
    tokio::task::spawn_blocking(move || read(merged)).await.unwrap();
    stage.unmount();
    println!("ready and mounted {} ms after the start", elapsed.as_millis());
    assert_eq!(stage.wait_for("mounted again").await["degraded"], "0");
    assert_eq!(stage.fuse_mounts(), 2, "dead mounts were replaced");

    // SIGINT takes the mounts away and keeps the layers for the next start.
    stage.end(Signal::INT);
    assert_eq!(stage.fuse_mounts(), 0);
    stage.start_again().await;
    let mounts = wire::MountsRequest { key: "container".into(), ..Default::default() };
    assert_eq!(stage.client.mounts(mounts).await.unwrap().into_inner().mounts, answer);

    // Removed: no mounts, no directories, no zTOCs, no spans.
    for name in ["container".to_owned(), top]
        .iter()
        .chain(&chains(&published)[..2].iter().rev().cloned().collect::<Vec<_>>())
    {
        let remove = wire::RemoveSnapshotRequest { key: name.clone(), ..Default::default() };
        stage.client.remove(remove).await.unwrap();
    }
    stage.client.cleanup(wire::CleanupRequest::default()).await.unwrap();
    assert_eq!(stage.fuse_mounts(), 0);
    for gone in ["snapshotter/snapshots", "ztocs/sha256", "soci/spans/sha256"] {
        let left: Vec<_> = std::fs::read_dir(stage.state().join(gone)).unwrap().collect();
        assert!(left.is_empty(), "{gone}: {left:?}");
    }
}

fn chains(published: &Published) -> Vec<String> {
    (1..=published.image.layers.len())
        .map(|count| {
            let layers = published.image.layers[..count].to_vec();
            soci_testkit::image::Image { layers, ..published.image.clone() }.chain_id()
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn later_layers_need_no_network() {
    let registry = registry().await;
    let (layers, _) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let mut stage = Stage::new(&registry, CONFIG).await;
    assert_eq!(stage.pull_layer(&published, 0).await.0, Some(Code::AlreadyExists));
    let arrived = || stage.state().join("ztocs/sha256").read_dir().unwrap().count();
    let deadline = Instant::now() + Duration::from_secs(20);
    while arrived() < published.ztocs.len() {
        assert!(Instant::now() < deadline, "the other zTOCs do not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    registry.clear_log();
    for number in 1..3 {
        assert_eq!(stage.pull_layer(&published, number).await.0, Some(Code::AlreadyExists));
    }
    let asked: Vec<_> = registry.log().iter().map(|seen| seen.request.path.clone()).collect();
    assert_eq!(asked, Vec::<String>::new());
    assert_eq!(stage.fuse_mounts(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_ztoc_costs_its_layer_only() {
    let registry = registry().await;
    let (layers, _) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    registry.delete_blob("team/app", &published.ztocs[1].to_string());
    let mut stage = Stage::new(&registry, CONFIG).await;
    let top = stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 2);
    assert_eq!(
        stage.label(&chains(&published)[1], "containerd.io/snapshot/soci.verdict").await,
        "unpacked: mount-failed"
    );
    assert_eq!(stage.label(&top, "containerd.io/snapshot/soci.verdict").await, "lazy");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_index_or_login_is_left_to_containerd() {
    let registry = registry().await;
    let (layers, _) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let plain = Published {
        manifest: published.image.digest.parse::<Digest>().unwrap(),
        image: published.image.clone(),
        reference: published.reference.clone(),
        ztocs: Vec::new(),
    };
    registry.put_manifest("team/app", "plain", &plain.image.media_type, plain.image.manifest.clone());
    let mut stage = Stage::new(&registry, CONFIG).await;
    let (code, _) = stage.pull_layer(&plain, 0).await;
    assert_eq!(code, None, "mounts for containerd to unpack to");
    assert_eq!(
        stage.label("extract-0", "containerd.io/snapshot/soci.verdict").await,
        "left to containerd: no-index"
    );
    let line = stage.wait_for("image ").await;
    assert_eq!(line["reasons"], "no-index", "{line}");
    assert_eq!(stage.fuse_mounts(), 0);

    registry.rotate_password("reader", "another");
    let mut refused = Stage::new(&registry, CONFIG).await;
    let (code, _) = refused.pull_layer(&published, 0).await;
    assert_eq!(code, None);
    let verdict = refused.label("extract-0", "containerd.io/snapshot/soci.verdict").await;
    assert_eq!(verdict, "left to containerd: index-denied");
    let line = refused.wait_for("deferring to container runtime").await;
    for part in [registry.host().as_str(), "team/app", "docker-config"] {
        assert!(line["error"].as_str().unwrap().contains(part), "{part} in {line}");
    }
    assert!(registry.log_of(Listener::Token).len() < 20, "no storm of attempts");
}
