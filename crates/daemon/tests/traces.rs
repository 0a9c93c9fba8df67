//! Traces by OTLP: what a collector receives, and what one that is away or hangs costs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustix::process::Signal;
use soci_snapshotter_grpc::proto::snapshots as wire;
use support::image::publish;
use support::stage::{CONFIG, Stage, layers, registry};
use tokio::net::TcpListener;

const PATIENCE: Duration = Duration::from_secs(30);

/// What a collector was sent.
#[derive(Debug, Clone)]
struct Seen {
    path: String,
    kind: String,
    authorization: String,
    body: Bytes,
}

/// A collector that takes what it is sent.
struct Collector {
    endpoint: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Collector {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let sink = Arc::clone(&sink);
                let take = service_fn(move |request: Request<Incoming>| {
                    let sink = Arc::clone(&sink);
                    async move {
                        let header = |name: &str| {
                            let value = request.headers().get(name);
                            value.map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
                        };
                        let (path, kind) = (request.uri().path().to_owned(), header("content-type"));
                        let authorization = header("authorization");
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        sink.lock().unwrap().push(Seen { path, kind, authorization, body });
                        Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
                    }
                });
                let serving = hyper::server::conn::http1::Builder::new();
                tokio::spawn(serving.serve_connection(TokioIo::new(stream), take));
            }
        });
        Self { endpoint, seen }
    }

    /// Whether some request had `text` in its body.
    fn has(&self, text: &str) -> bool {
        let seen = self.seen.lock().unwrap();
        seen.iter().any(|seen| seen.body.windows(text.len()).any(|window| window == text.as_bytes()))
    }

    async fn wait_for(&self, text: &str) {
        until(text, || self.has(text)).await;
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn environment(endpoint: &str, delay: &str) -> Vec<(String, String)> {
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer collector-token-1"),
        ("OTEL_BSP_SCHEDULE_DELAY", delay),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_and_a_read_arrive_as_spans_without_secrets() {
    let registry = registry().await;
    let collector = Collector::start().await;
    let published = publish(&registry, "team/app", layers().0, |_| true);
    let mut stage = Stage::within(&registry, CONFIG, environment(&collector.endpoint, "50")).await;
    let top = stage.pull(&published).await;
    let merged = stage.run("container", &top).await;
    tokio::task::spawn_blocking(move || std::fs::read(merged.join("big")).unwrap()).await.unwrap();
    stage.unmount();
    let remove = wire::RemoveSnapshotRequest { key: "container".into(), ..Default::default() };
    stage.client.remove(remove).await.unwrap();
    for text in [
        "snapshot.prepare",
        "image.resolve",
        "layer.mount",
        "range.fetch",
        "snapshot.remove",
        "AlreadyExists",
        "service.name",
        "soci-snapshotter-grpc",
        "service.version",
        env!("CARGO_PKG_VERSION"),
        &published.reference,
        &published.image.layers[0].digest,
        &published.ztocs[0].to_string(),
    ] {
        collector.wait_for(text).await;
    }
    for seen in collector.seen.lock().unwrap().iter() {
        assert_eq!((seen.path.as_str(), seen.kind.as_str()), ("/v1/traces", "application/x-protobuf"));
        assert_eq!(seen.authorization, "Bearer collector-token-1");
    }
    assert!(!collector.has("pass-word-1") && !collector.has("reader"), "no login");
    assert!(!collector.has("fetching SOCI artifacts"), "no text of the log");
    let log = format!("{:?}", stage.log.lock().unwrap());
    assert!(!log.contains("collector-token-1") && log.contains("traces are exported"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_sent_yet_is_sent_at_the_end() {
    let registry = registry().await;
    let collector = Collector::start().await;
    let mut stage = Stage::within(&registry, CONFIG, environment(&collector.endpoint, "3600000")).await;
    stage.prepare("container", "", Default::default()).await.unwrap();
    assert!(collector.seen.lock().unwrap().is_empty(), "the next batch is due in an hour");
    stage.end(Signal::TERM);
    assert!(collector.has("snapshot.prepare"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_costs_one_warning() {
    let registry = registry().await;
    let published = publish(&registry, "team/app", layers().0, |_| true);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let refused = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refused);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut stage = Stage::within(&registry, CONFIG, environment(&endpoint, "20")).await;
    let top = stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 3);
    // A batch is tried four times.
    let deadline = Instant::now() + PATIENCE;
    while refused.load(Ordering::Relaxed) < 3 * 4 {
        assert!(Instant::now() < deadline, "{refused:?} requests");
        let mounts = wire::MountsRequest { key: top.clone(), ..Default::default() };
        // A committed snapshot has none, which is an answer.
        let _ = stage.client.mounts(mounts).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let warnings = stage.messages("spans cannot be exported");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0]["level"], "warning");
    stage.end(Signal::TERM);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_hangs_holds_neither_calls_nor_the_end_up() {
    let registry = registry().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let held = Arc::new(Mutex::new(Vec::new()));
    let holding = Arc::clone(&held);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            holding.lock().unwrap().push(stream);
        }
    });
    let mut environment = environment(&endpoint, "20");
    environment.push(("OTEL_EXPORTER_OTLP_TIMEOUT".to_owned(), "3600000".to_owned()));
    environment.push(("OTEL_BSP_MAX_QUEUE_SIZE".to_owned(), "4".to_owned()));
    let mut stage = Stage::within(&registry, CONFIG, environment).await;
    stage.prepare("first", "", Default::default()).await.unwrap();
    until("the first batch", || !held.lock().unwrap().is_empty()).await;
    for number in 0..32 {
        stage.prepare(&format!("more-{number}"), "", Default::default()).await.unwrap();
    }
    let ended = tokio::task::spawn_blocking(move || stage.end(Signal::TERM));
    // The request itself would last for a minute.
    tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_that_make_no_sense_cost_one_warning() {
    let registry = registry().await;
    let mut stage = Stage::within(&registry, CONFIG, environment("no url, secret-1", "20")).await;
    stage.prepare("container", "", Default::default()).await.unwrap();
    let warning = stage.wait_for("no traces are exported").await;
    let text = warning.to_string();
    assert!(text.contains("OTEL_EXPORTER_OTLP_ENDPOINT") && !text.contains("secret-1"), "{text}");
}
