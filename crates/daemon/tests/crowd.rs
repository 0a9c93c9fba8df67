//! Many pulls at once: given up half way, repeated, removed under each other's feet. No span is fetched twice, nobody waits
//! for ever, and nothing is left behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use soci_auth::AuthBoard;
use soci_layer::Gauges;
use soci_oci::labels;
use soci_snapshotter_grpc::daemon::Wiring;
use soci_snapshotter_grpc::keychains::{self, Keychains};
use soci_snapshotter_grpc::live::Live;
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_snapshotter_grpc::{Daemon, Options, config, registries};
use soci_testkit::image::Image;
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers, digest};
use soci_testkit::{AuthMode, TestRegistry, mounts};
use support::image::{Published, publish};
use support::{Client, client};
use tonic::{Code, Request};

const CONFIG: &str = "[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n";
/// Only what readers ask for is fetched.
const NO_BACKGROUND: &str = "[background_fetch]\ndisable = true\n";
/// How long all of a test may take: a deadlock is a failure, not a hanging test.
const LIMIT: Duration = Duration::from_secs(150);

/// A daemon within this process, with real layers and a real registry.
struct Crowd {
    dir: tempfile::TempDir,
    daemon: Option<Daemon>,
    live: Arc<Live>,
    registry: TestRegistry,
}

impl Crowd {
    /// With layers completed in the background, as by default, or not.
    async fn new(background: bool) -> Self {
        assert!(rustix::process::geteuid().is_root(), "needs root: mounts FUSE");
        let options = soci_testkit::Options::plain().auth(AuthMode::Bearer, "reader", "pass-word-1");
        let registry = TestRegistry::start(options).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let login =
            json!({ "auths": { registry.host(): { "username": "reader", "password": "pass-word-1" } } });
        std::fs::write(dir.path().join("config.json"), login.to_string()).unwrap();
        let text = format!("{}{CONFIG}", if background { "" } else { NO_BACKGROUND });
        std::fs::write(dir.path().join("config.toml"), text).unwrap();
        let config = config::load(&dir.path().join("config.toml")).unwrap().config;
        let options = Options {
            address: dir.path().join("s.sock").display().to_string().parse().unwrap(),
            root: dir.path().join("state"),
            metrics: Default::default(),
            config,
        };
        let mut opened = None;
        let docker = dir.path().as_os_str().to_owned();
        let wire = |options: &Options| {
            let Options { config, metrics, root, .. } = options;
            let board = Arc::new(AuthBoard::new());
            let variable = |name: &str| (name == "DOCKER_CONFIG").then(|| docker.clone());
            let Keychains { chain, pulls, .. } = keychains::open(config, &board, metrics, &variable);
            let registry = registries::client(config, chain, Arc::clone(&board), metrics)?;
            let live = Live::open(root, config, false, registry, board, metrics.clone())?;
            opened = Some(Arc::clone(&live));
            Ok(Wiring { provider: live, pulls })
        };
        let daemon = Daemon::start(options, wire).await.unwrap();
        Self { dir, daemon: Some(daemon), live: opened.unwrap(), registry }
    }

    async fn client(&self) -> Client {
        client(&self.dir.path().join("s.sock")).await
    }

    fn fuse_mounts(&self) -> usize {
        mounts::fuse(self.dir.path()).unwrap().len()
    }

    /// Returns how many FUSE devices and cached files this process has open.
    fn open_files(&self) -> usize {
        let spans = self.dir.path().join("state/soci/spans");
        let opened = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links = opened.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.filter(|to| to == Path::new("/dev/fuse") || to.starts_with(&spans)).count()
    }

    /// Removes every snapshot there is, children first, and waits until nothing of them is left.
    async fn remove_all(&self) {
        let mut client = self.client().await;
        loop {
            let mut names = Vec::new();
            let mut list = client.list(wire::ListSnapshotsRequest::default()).await.unwrap().into_inner();
            while let Some(page) = list.message().await.unwrap() {
                names.extend(page.info.into_iter().map(|info| info.name));
            }
            if names.is_empty() {
                break;
            }
            for name in names {
                match remove(&mut client, &name).await {
                    Ok(()) | Err(Code::FailedPrecondition | Code::NotFound) => {}
                    Err(code) => panic!("removing {name}: {code:?}"),
                }
            }
        }
        until("the mounts are gone", || self.fuse_mounts() == 0).await;
        until("nothing is in flight", || self.live.pool().gauges() == Gauges::default()).await;
        self.live.pool().trim();
        until("devices and files are closed", || self.open_files() == 0).await;
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        drop(self.daemon.take());
        mounts::detach(self.dir.path());
    }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn prepare(
    client: &mut Client,
    key: &str,
    parent: &str,
    labels: HashMap<String, String>,
) -> Result<Vec<soci_snapshotter_grpc::proto::types::Mount>, Code> {
    let (key, parent) = (key.to_owned(), parent.to_owned());
    let mut request =
        Request::new(wire::PrepareSnapshotRequest { snapshotter: "soci".into(), key, parent, labels });
    request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
    let answer = client.prepare(request).await.map_err(|status| status.code())?;
    Ok(answer.into_inner().mounts)
}

async fn remove(client: &mut Client, key: &str) -> Result<(), Code> {
    let request = wire::RemoveSnapshotRequest { snapshotter: "soci".into(), key: key.to_owned() };
    client.remove(request).await.map(drop).map_err(|status| status.code())
}

/// Returns the chain ids of an image's layers, lowest first.
fn chain(image: &Image) -> Vec<String> {
    let upto = |count: usize| Image { layers: image.layers[..count].to_vec(), ..image.clone() }.chain_id();
    (1..=image.layers.len()).map(upto).collect()
}

/// Pulls as containerd does, one layer after another; every other call is given up after some milliseconds and made again.
/// Returns the topmost snapshot, or `NotFound` when somebody removed a layer meanwhile.
async fn pull(
    client: &mut Client,
    published: &Published,
    who: &str,
    numbers: &mut Numbers,
) -> Result<String, Code> {
    let mut parent = String::new();
    for (layer, target) in published.image.layers.iter().zip(chain(&published.image)) {
        let labels = [
            (labels::TARGET, target.clone()),
            (labels::IMAGE_REF, published.reference.clone()),
            (labels::MANIFEST_DIGEST, published.manifest.to_string()),
            (labels::LAYER_DIGEST, layer.digest.clone()),
        ];
        let labels: HashMap<_, _> = labels.map(|(key, value)| (key.to_owned(), value)).into();
        if numbers.next_u64().is_multiple_of(2) {
            let patience = Duration::from_millis(numbers.next_u64() % 25);
            let key = format!("{who}-given-up-{}", numbers.next_u64());
            let _given_up =
                tokio::time::timeout(patience, prepare(client, &key, &parent, labels.clone())).await;
        }
        let key = format!("{who}-{}", numbers.next_u64());
        match prepare(client, &key, &parent, labels).await {
            Err(Code::AlreadyExists) => parent = target,
            Err(Code::NotFound) => return Err(Code::NotFound),
            other => panic!("{who}: Prepare of a layer answered {other:?}"),
        }
    }
    Ok(parent)
}

/// Starts a container on `top` as far as a snapshotter sees it, and returns the digest of the file `big` in it.
async fn run(client: &mut Client, top: &str, key: &str) -> Result<String, Code> {
    let answer = prepare(client, key, top, HashMap::new()).await?;
    let lower = answer[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap();
    let files: Vec<PathBuf> = lower.split(':').map(|dir| Path::new(dir).join("big")).collect();
    let read = tokio::task::spawn_blocking(move || {
        let bytes = files.iter().find_map(|file| std::fs::read(file).ok());
        digest(&bytes.expect("no layer has the file"))
    });
    let found = read.await.unwrap();
    remove(client, key).await?;
    Ok(found)
}

/// Returns the ranges of a blob that the registry sent, half open, in order.
fn fetched(registry: &TestRegistry, blob: &str) -> Vec<(u64, u64)> {
    let log = registry.log();
    let sent = log.iter().filter(|seen| seen.status == 206 && seen.request.path.ends_with(blob));
    let mut ranges: Vec<_> = sent
        .map(|seen| {
            let (first, last) = seen.request.range.unwrap();
            (first, last.unwrap() + 1)
        })
        .collect();
    ranges.sort_unstable();
    ranges
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hundred_pulls_of_one_image_resolve_it_once_and_fetch_each_span_once() {
    for background in [false, true] {
        a_hundred_pulls(background).await;
    }
}

async fn a_hundred_pulls(background: bool) {
    let crowd = Crowd::new(background).await;
    let big = Numbers::new(3).bytes(6 << 20);
    let base = LayerBuilder::new().file("big", &Attr::default(), &big).gzip();
    let upper = LayerBuilder::new().file("small", &Attr::default(), b"small\n").gzip();
    let published = Arc::new(publish(&crowd.registry, "crowd/one", vec![base, upper], |_| true));
    let expected = digest(&big);
    let pulls = (0..100).map(|number| {
        let (published, expected) = (Arc::clone(&published), expected.clone());
        let client = crowd.client();
        async move {
            let mut client = client.await;
            let who = format!("puller-{number}");
            let top = pull(&mut client, &published, &who, &mut Numbers::new(number)).await.unwrap();
            assert_eq!(run(&mut client, &top, &format!("{who}-run")).await, Ok(expected));
        }
    });
    tokio::time::timeout(LIMIT, futures::future::join_all(pulls)).await.expect("a deadlock");
    assert_eq!(crowd.fuse_mounts(), 2);
    for layer in &published.image.layers {
        let ranges = fetched(&crowd.registry, &layer.digest);
        // Neighbouring spans share the byte that the border between them is in.
        assert!(ranges.windows(2).all(|pair| pair[1].0 + 1 >= pair[0].1), "fetched twice: {ranges:?}");
    }
    let log = crowd.registry.log();
    for ztoc in &published.ztocs {
        let ok = |status| status == 200 || status == 206;
        let path = format!("/blobs/{ztoc}");
        let times = log.iter().filter(|seen| seen.request.path.ends_with(&path) && ok(seen.status)).count();
        assert_eq!(times, 1, "zTOC {ztoc}");
    }
    crowd.remove_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn twenty_images_pulled_and_removed_at_random_leave_nothing_behind() {
    for background in [false, true] {
        twenty_images(background).await;
    }
}

async fn twenty_images(background: bool) {
    let crowd = Arc::new(Crowd::new(background).await);
    let shared =
        LayerBuilder::new().file("etc/base", &Attr::default(), &Numbers::new(1).bytes(300_000)).gzip();
    let images: Vec<_> = (0..20_u64)
        .map(|number| {
            let big = Numbers::new(100 + number).bytes(1_500_000);
            let own = LayerBuilder::new().file("big", &Attr::default(), &big).gzip();
            let name = format!("crowd/image-{number}");
            let published = publish(&crowd.registry, &name, vec![shared.clone(), own], |_| true);
            Arc::new((published, digest(&big)))
        })
        .collect();
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = alive();
    let pulls = (0..100_usize).map(|number| {
        let (crowd, image) = (Arc::clone(&crowd), Arc::clone(&images[number % images.len()]));
        async move {
            let (published, expected) = &*image;
            let mut client = crowd.client().await;
            let mut numbers = Numbers::new(number as u64 + 1000);
            for round in 0..4 {
                let who = format!("puller-{number}-{round}");
                // Another may remove a layer before the next one stands on it, and the image before it runs.
                let Ok(top) = pull(&mut client, published, &who, &mut numbers).await else { continue };
                match run(&mut client, &top, &format!("{who}-run")).await {
                    Ok(found) => assert_eq!(found, *expected),
                    Err(code) => assert_eq!(code, Code::NotFound),
                }
                for name in chain(&published.image).iter().rev() {
                    match remove(&mut client, name).await {
                        Ok(()) | Err(Code::NotFound | Code::FailedPrecondition) => {}
                        Err(code) => panic!("{who}: removing a layer: {code:?}"),
                    }
                }
            }
        }
    });
    tokio::time::timeout(LIMIT, futures::future::join_all(pulls)).await.expect("a deadlock");
    crowd.remove_all().await;
    // What is left are connections that are kept for the next request; a task per pull would be 400.
    until("tasks have ended", || alive() < before + 64).await;
}
