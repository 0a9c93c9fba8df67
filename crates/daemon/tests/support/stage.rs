//! The program on a root directory of its own, spoken to as containerd does.

use std::ffi::CString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use soci_oci::labels;
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_testkit::layer_gen::{Attr, Layer, LayerBuilder, Numbers};
use soci_testkit::{AuthMode, Options, TestRegistry, mounts};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Request};

use super::image::Published;
use super::{Client, client};

/// Quick failures, no background, no containerd.
pub(crate) const CONFIG: &str = "[background_fetch]\ndisable = true\n[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n\
                      [blob]\nfetching_timeout_sec = 5\n[http]\nMaxRetries = 1\n";

/// What `Prepare` answered.
pub(crate) type Prepared = Result<Vec<soci_snapshotter_grpc::proto::types::Mount>, tonic::Status>;

async fn prepare(
    client: &mut Client,
    key: &str,
    parent: &str,
    labels: std::collections::HashMap<String, String>,
) -> Prepared {
    let request = wire::PrepareSnapshotRequest {
        snapshotter: "soci".into(),
        key: key.into(),
        parent: parent.into(),
        labels,
    };
    let mut request = Request::new(request);
    request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
    Ok(client.prepare(request).await?.into_inner().mounts)
}

/// Prepares one layer as containerd does; returns what `Prepare` answered and the chain id.
pub(crate) async fn pull_layer(
    client: &mut Client,
    published: &Published,
    number: usize,
) -> (Prepared, String) {
    let chains = chains(published);
    let target = chains[number].clone();
    let parent = number.checked_sub(1).map_or_else(String::new, |below| chains[below].clone());
    let labels = [
        (labels::TARGET, target.clone()),
        (labels::IMAGE_REF, published.reference.clone()),
        (labels::MANIFEST_DIGEST, published.manifest.to_string()),
        (labels::LAYER_DIGEST, published.image.layers[number].digest.clone()),
    ];
    let labels = labels.map(|(key, value)| (key.to_owned(), value)).into();
    (prepare(client, &format!("extract-{number}"), &parent, labels).await, target)
}

/// A daemon on a root directory of its own; mounts and process go when it is dropped.
pub(crate) struct Stage {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) child: Child,
    pub(crate) log: Arc<Mutex<Vec<Value>>>,
    pub(crate) client: Client,
    pub(crate) environment: Vec<(String, String)>,
}

impl Stage {
    /// Starts a daemon with this configuration.
    pub(crate) async fn new(registry: &TestRegistry, config: &str) -> Self {
        Self::on(registry, config, |_| {}).await
    }

    /// As [`Self::new`], after `set_up` was given the state directory, which does not exist yet.
    pub(crate) async fn on(registry: &TestRegistry, config: &str, set_up: impl FnOnce(&Path)) -> Self {
        Self::make(registry, config, set_up, Vec::new()).await
    }

    /// As [`Self::new`], with these variables in the daemon's environment.
    pub(crate) async fn within(
        registry: &TestRegistry,
        config: &str,
        environment: Vec<(String, String)>,
    ) -> Self {
        Self::make(registry, config, |_| {}, environment).await
    }

    async fn make(
        registry: &TestRegistry,
        config: &str,
        set_up: impl FnOnce(&Path),
        environment: Vec<(String, String)>,
    ) -> Self {
        assert!(rustix::process::geteuid().is_root(), "needs root: mounts FUSE and overlay");
        let dir = tempfile::tempdir().unwrap();
        set_up(&dir.path().join("state"));
        let login =
            json!({ "auths": { registry.host(): { "username": "reader", "password": "pass-word-1" } } });
        std::fs::write(dir.path().join("config.json"), login.to_string()).unwrap();
        std::fs::write(dir.path().join("ca.pem"), registry.ca_pem()).unwrap();
        let socket = |name: &str| dir.path().join(name).display().to_string();
        let metrics = format!(
            "metrics_network = 'unix'\nmetrics_address = '{}'\ndebug_address = '{}'\n",
            socket("m.sock"),
            socket("d.sock")
        );
        std::fs::write(dir.path().join("config.toml"), metrics + config).unwrap();
        let (child, log) = launched(dir.path(), &environment);
        let client = client(&dir.path().join("s.sock")).await;
        Self { dir, child, log, client, environment }
    }

    pub(crate) async fn start_again(&mut self) {
        let (child, log) = launched(self.dir.path(), &self.environment);
        (self.child, self.log) = (child, log);
        self.client = client(&self.dir.path().join("s.sock")).await;
    }

    /// As [`Self::start_again`]; `false` when the daemon ends before it is ready.
    pub(crate) async fn start_if_it_lives(&mut self) -> bool {
        let (child, log, started) = launch(self.dir.path(), &self.environment);
        (self.child, self.log) = (child, log);
        if started {
            self.client = client(&self.dir.path().join("s.sock")).await;
        }
        started
    }

    pub(crate) fn end(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) async fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        labels: std::collections::HashMap<String, String>,
    ) -> Prepared {
        prepare(&mut self.client, key, parent, labels).await
    }

    /// Prepares one layer as containerd does; returns what `Prepare` answered and the chain id.
    pub(crate) async fn pull_layer(
        &mut self,
        published: &Published,
        number: usize,
    ) -> (Option<Code>, String) {
        let (answer, target) = self.try_pull_layer(published, number).await;
        (answer.err().map(|status| status.code()), target)
    }

    /// As [`Self::pull_layer`], with the whole answer.
    pub(crate) async fn try_pull_layer(
        &mut self,
        published: &Published,
        number: usize,
    ) -> (Prepared, String) {
        pull_layer(&mut self.client, published, number).await
    }

    pub(crate) async fn pull(&mut self, published: &Published) -> String {
        let mut top = String::new();
        for number in 0..published.image.layers.len() {
            let (code, target) = self.pull_layer(published, number).await;
            assert_eq!(code, Some(Code::AlreadyExists), "layer {number}: {:#?}", self.log.lock().unwrap());
            top = target;
        }
        top
    }

    pub(crate) async fn label(&mut self, name: &str, label: &str) -> String {
        let stat = wire::StatSnapshotRequest { key: name.to_owned(), ..Default::default() };
        let info = self.client.stat(stat).await.unwrap().into_inner().info.unwrap();
        info.labels.get(label).cloned().unwrap_or_default()
    }

    /// Mounts what the snapshotter answered, as containerd would, and returns where.
    pub(crate) fn mount(&self, answer: &[soci_snapshotter_grpc::proto::types::Mount]) -> PathBuf {
        let at = self.dir.path().join("merged");
        std::fs::create_dir_all(&at).unwrap();
        assert_eq!(answer.len(), 1);
        assert_eq!(answer[0].r#type, "overlay");
        let options = CString::new(answer[0].options.join(",")).unwrap();
        rustix::mount::mount("overlay", &at, "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
        at
    }

    pub(crate) fn unmount(&self) {
        rustix::mount::unmount(self.dir.path().join("merged"), UnmountFlags::DETACH).unwrap();
    }

    pub(crate) async fn metrics(&self) -> String {
        self.page("m.sock", "/metrics").await
    }

    /// Returns the value of one series.
    pub(crate) async fn metric(&self, series: &str) -> Option<u64> {
        let text = self.metrics().await;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
        line.trim().parse().ok()
    }

    /// Returns the state that the debug socket shows.
    pub(crate) async fn inspect(&self) -> Value {
        let answer = self.page("d.sock", "/debug/state").await;
        let mut state: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(state["pid"], self.child.id());
        state["live"].take()
    }

    async fn page(&self, socket: &str, path: &str) -> String {
        let mut stream = tokio::net::UnixStream::connect(self.dir.path().join(socket)).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        text
    }

    /// Removes snapshots, the topmost first, and waits until their directories are gone.
    pub(crate) async fn remove(&mut self, names: &[String]) {
        for name in names {
            let remove = wire::RemoveSnapshotRequest { key: name.clone(), ..Default::default() };
            self.client.remove(remove).await.unwrap();
        }
        self.client.cleanup(wire::CleanupRequest::default()).await.unwrap();
    }

    /// Mounts the container snapshot `key` on `parent` and returns where.
    pub(crate) async fn run(&mut self, key: &str, parent: &str) -> PathBuf {
        let answer = self.prepare(key, parent, Default::default()).await.unwrap();
        self.mount(&answer)
    }

    /// Returns the files beneath the state directory that hold content, relative to it, with their sizes.
    pub(crate) fn files(&self) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        let mut dirs = vec![self.state()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                // Layers are mounted on directories of this name; what is in them is not ours to list.
                let Ok(data) = entry.metadata() else { continue };
                if data.is_dir() && entry.file_name() != "fs" {
                    dirs.push(entry.path());
                // The lock holds the number of a process.
                } else if data.is_file() && entry.file_name() != "lock" {
                    let path = entry.path().strip_prefix(self.state()).unwrap().to_owned();
                    found.push((path, data.len()));
                }
            }
        }
        found.sort();
        found
    }

    /// Waits until the files are those of `before`.
    pub(crate) async fn wait_for_files(&self, before: &[(PathBuf, u64)]) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let now = self.files();
            if now == before {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "files {now:#?}\nare not {before:#?}\n{:#?}",
                self.log.lock().unwrap()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn fuse_mounts(&self) -> usize {
        mounts::fuse(self.dir.path()).unwrap().len()
    }

    pub(crate) fn messages(&self, text: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|line| line["msg"].as_str().unwrap_or_default().contains(text)).cloned().collect()
    }

    /// Waits for a line of the log.
    pub(crate) async fn wait_for(&self, text: &str) -> Value {
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

/// Starts a daemon on the same directory that is expected to refuse, and returns its last line.
pub(crate) fn refused(dir: &Path) -> Value {
    let output = command(dir).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{log}");
    serde_json::from_str(log.lines().last().unwrap_or_default()).unwrap_or_else(|_| panic!("{log}"))
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soci-snapshotter-grpc"));
    command
        .args(["--log-level", "debug"])
        .env_clear()
        .env("DOCKER_CONFIG", dir)
        .env("SSL_CERT_FILE", dir.join("ca.pem"))
        .env("SOCI_SNAPSHOTTER_ADDRESS", dir.join("s.sock"))
        .env("SOCI_SNAPSHOTTER_CONFIG", dir.join("config.toml"))
        .env("SOCI_SNAPSHOTTER_ROOT", dir.join("state"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn launched(dir: &Path, environment: &[(String, String)]) -> (Child, Arc<Mutex<Vec<Value>>>) {
    let (mut child, log, started) = launch(dir, environment);
    if !started {
        let _ = child.kill();
        panic!("the daemon does not start: {:#?}", log.lock().unwrap());
    }
    (child, log)
}

/// Starts a daemon; returns whether it became ready.
fn launch(dir: &Path, environment: &[(String, String)]) -> (Child, Arc<Mutex<Vec<Value>>>, bool) {
    let mut child = command(dir).envs(environment.iter().cloned()).spawn().unwrap();
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
    // Nobody is left to say so when its log ends.
    let started = ready.recv_timeout(Duration::from_secs(30)).is_ok();
    (child, log, started)
}

pub(crate) async fn registry() -> TestRegistry {
    TestRegistry::start(Options::default().auth(AuthMode::Bearer, "reader", "pass-word-1")).await.unwrap()
}

/// A base with a private directory and a large file, a layer that only implies that directory, and a third one.
pub(crate) fn layers() -> (Vec<Layer>, Vec<u8>) {
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

/// Returns the names of the snapshots of an image, the lowest first.
pub(crate) fn chains(published: &Published) -> Vec<String> {
    published.image.chain_ids()
}
