//! The service over its socket: a daemon within this process, its layers scripted, and containerd's client.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use soci_snapshotter::service::Unmount;
use soci_snapshotter_grpc::config::Raw;
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_snapshotter_grpc::{Config, Daemon, Options};
use support::{Client, Script, client};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tonic::{Code, Request};

struct Bench {
    root: tempfile::TempDir,
    daemon: Daemon,
    client: Client,
}

fn options(root: &std::path::Path) -> Options {
    Options {
        address: root.join("run/s.sock").display().to_string().parse().unwrap(),
        root: root.join("state"),
        metrics: Default::default(),
        config: Config { check_overlay: false, ..Config::check(&Raw::default()).unwrap() },
    }
}

impl Bench {
    async fn new(script: Script) -> Self {
        Self::reopen(tempfile::tempdir().unwrap(), script).await
    }

    async fn reopen(root: tempfile::TempDir, script: Script) -> Self {
        let daemon = Daemon::start(options(root.path()), |_| Ok(script.shared().into())).await.unwrap();
        let client = client(&root.path().join("run/s.sock")).await;
        Self { root, daemon, client }
    }

    async fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        target: Option<&str>,
    ) -> Result<Vec<String>, tonic::Status> {
        let request = wire::PrepareSnapshotRequest {
            snapshotter: "soci".into(),
            key: key.into(),
            parent: parent.into(),
            labels: target.map(support::labels).unwrap_or_default(),
        };
        let mut request = Request::new(request);
        request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
        let mounts = self.client.prepare(request).await?.into_inner().mounts;
        Ok(mounts
            .into_iter()
            .map(|mount| format!("{} {} {}", mount.r#type, mount.source, mount.options.join(",")))
            .collect())
    }

    async fn list(&mut self, filters: &[&str]) -> Vec<Vec<wire::Info>> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = wire::ListSnapshotsRequest { snapshotter: String::new(), filters };
        let mut stream = self.client.list(request).await.unwrap().into_inner();
        let mut pages = Vec::new();
        while let Some(page) = stream.message().await.unwrap() {
            pages.push(page.info);
        }
        pages
    }
}

#[tokio::test]
async fn a_lazy_pull_and_a_container_as_containerd_does_it() {
    let mut bench = Bench::new(Script::default()).await;
    let status = bench.prepare("k8s.io/1/extract", "", Some("sha256:one")).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert!(
        status.message().contains("target snapshot \"sha256:one\": already exists"),
        "{}",
        status.message()
    );
    let found = bench.list(&[r#"labels."containerd.io/snapshot.ref"==sha256:one,parent=="""#]).await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0][0].name, "sha256:one");
    assert_eq!(found[0][0].kind(), wire::Kind::Committed);
    assert!(found[0][0].created_at.is_some());
    let mounts = bench.prepare("k8s.io/2/container", "sha256:one", None).await.unwrap();
    let state = bench.root.path().join("state/snapshotter/snapshots");
    let state = state.display();
    assert_eq!(
        mounts,
        [format!("overlay overlay workdir={state}/2/work,upperdir={state}/2/fs,lowerdir={state}/1/fs")]
    );
    let request = wire::MountsRequest { key: "k8s.io/2/container".into(), ..Default::default() };
    assert_eq!(bench.client.mounts(request).await.unwrap().into_inner().mounts.len(), 1);
    bench.daemon.stop(Unmount::Yes).await;
}

/// Listens at `at` and passes one connection on to `to`. Returns what comes back, as far as it has.
fn overhear(at: &Path, to: PathBuf) -> Arc<Mutex<Vec<u8>>> {
    let listener = UnixListener::bind(at).unwrap();
    let heard = Arc::<Mutex<Vec<u8>>>::default();
    let answers = Arc::clone(&heard);
    tokio::spawn(async move {
        let (near, _) = listener.accept().await.unwrap();
        let (mut from_client, mut to_client) = near.into_split();
        let (mut from_server, mut to_server) = UnixStream::connect(to).await.unwrap().into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
        let mut buffer = vec![0; 4096];
        while let Ok(len @ 1..) = from_server.read(&mut buffer).await {
            answers.lock().unwrap().extend_from_slice(&buffer[..len]);
            to_client.write_all(&buffer[..len]).await.unwrap();
        }
    });
    heard
}

#[tokio::test]
async fn the_time_of_an_answer_is_not_kept_in_the_table_of_headers() {
    let mut bench = Bench::new(Script::default()).await;
    let (run, near) = (bench.root.path().join("run/s.sock"), bench.root.path().join("near.sock"));
    let heard = overhear(&near, run);
    bench.client = client(&near).await;
    bench.prepare("extract", "", Some("sha256:one")).await.unwrap_err();
    let request = wire::StatSnapshotRequest { key: "sha256:one".into(), ..Default::default() };
    let answered = bench.client.stat(request).await.unwrap().metadata().clone().into_headers();
    let date = httpdate::parse_http_date(answered["date"].to_str().unwrap()).unwrap();
    assert!(date.elapsed().unwrap().as_secs() < 60);
    // RFC 7541, 6.2.3: a literal never indexed begins with 0001; the name is number 33 of the static table, 15 and 18.
    let never_indexed = heard.lock().unwrap().windows(2).filter(|pair| *pair == [0x1f, 0x12]).count();
    assert_eq!(never_indexed, 2, "one in each answer");
    bench.daemon.stop(Unmount::Yes).await;
}

#[tokio::test]
async fn every_call_of_the_service() {
    let mut bench = Bench::new(Script::default()).await;
    bench.prepare("a", "", None).await.unwrap();
    let commit = wire::CommitSnapshotRequest {
        key: "a".into(),
        name: "layer".into(),
        labels: HashMap::from([("l".into(), "1".into())]),
        ..Default::default()
    };
    bench.client.commit(commit).await.unwrap();
    let view = wire::ViewSnapshotRequest { key: "v".into(), parent: "layer".into(), ..Default::default() };
    let mounts = bench.client.view(view).await.unwrap().into_inner().mounts;
    assert_eq!((mounts[0].r#type.as_str(), mounts[0].options.join(",")), ("bind", "ro,rbind".to_owned()));
    let update = wire::UpdateSnapshotRequest {
        info: Some(wire::Info {
            name: "layer".into(),
            labels: HashMap::from([("m".into(), "2".into())]),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["labels.m".into()] }),
        ..Default::default()
    };
    let info = bench.client.update(update).await.unwrap().into_inner().info.unwrap();
    assert_eq!(info.labels.len(), 2);
    let stat = wire::StatSnapshotRequest { key: "layer".into(), ..Default::default() };
    assert_eq!(bench.client.stat(stat).await.unwrap().into_inner().info.unwrap(), info);
    let usage = wire::UsageRequest { key: "layer".into(), ..Default::default() };
    assert_eq!(bench.client.usage(usage).await.unwrap().into_inner().inodes, 1);
    let remove = |key: &str| wire::RemoveSnapshotRequest { key: key.into(), ..Default::default() };
    assert_eq!(bench.client.remove(remove("layer")).await.unwrap_err().code(), Code::FailedPrecondition);
    bench.client.remove(remove("v")).await.unwrap();
    bench.client.remove(remove("layer")).await.unwrap();
    assert_eq!(bench.client.remove(remove("layer")).await.unwrap_err().code(), Code::NotFound);
    bench.client.cleanup(wire::CleanupRequest::default()).await.unwrap();
    let filters = wire::ListSnapshotsRequest { filters: vec!["==".into()], ..Default::default() };
    assert_eq!(bench.client.list(filters).await.unwrap_err().code(), Code::InvalidArgument);
    bench.daemon.stop(Unmount::Yes).await;
}

#[tokio::test]
async fn a_list_comes_in_pages_of_a_hundred() {
    let mut bench = Bench::new(Script::default()).await;
    for number in 0..205 {
        bench.prepare(&format!("k{number:03}"), "", None).await.unwrap();
    }
    let pages: Vec<usize> = bench.list(&[]).await.iter().map(Vec::len).collect();
    assert_eq!(pages, [100, 100, 5]);
    assert_eq!(bench.list(&["name==k007"]).await[0].len(), 1);
    bench.daemon.stop(Unmount::No).await;
}

#[tokio::test]
async fn a_restart_finds_everything_and_a_second_daemon_is_refused() {
    let mut bench = Bench::new(Script::default()).await;
    let status = bench.prepare("x", "", Some("sha256:one")).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    bench.prepare("container", "sha256:one", None).await.unwrap();
    let before = bench.list(&[]).await;
    let second = Options {
        address: bench.root.path().join("b.sock").display().to_string().parse().unwrap(),
        ..options(bench.root.path())
    };
    let error =
        Daemon::start(second, |_| Ok(Script::default().shared().into())).await.unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    bench.daemon.stop(Unmount::No).await;
    let mut bench = Bench::reopen(bench.root, Script::default()).await;
    assert_eq!(bench.list(&[]).await, before);
    let restored = bench.daemon.restored().await;
    assert_eq!((restored.total, restored.degraded), (1, 0));
    bench.daemon.stop(Unmount::No).await;
}

#[tokio::test]
async fn the_socket_and_the_state_are_private() {
    let bench = Bench::new(Script::default()).await;
    let mode =
        |path: &str| std::fs::metadata(bench.root.path().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("run/s.sock"), 0o600);
    for dir in ["run", "state", "state/snapshotter", "state/snapshotter/snapshots"] {
        assert_eq!(mode(dir), 0o700, "{dir}");
    }
    bench.daemon.stop(Unmount::No).await;
}
