//! The relay against a backend that is scripted: what it gets, and what the caller gets back.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use soci_auth::keychain::cri::CriStore;
use soci_auth::keychain::{Keychain, Rejected};
use soci_auth::{AuthBoard, CredentialScope, Origin, Scheme};
use soci_oci::ImageRef;
use tokio::net::UnixListener;
use tokio::sync::Barrier;

use super::backend::RelayBody;
use super::{Backend, Relay};
use crate::metrics::Metrics;

type Answer = Pin<Box<dyn Future<Output = Response<RelayBody>> + Send>>;
type Script = Arc<dyn Fn(Request<Incoming>) -> Answer + Send + Sync>;

struct FakeBackend(tokio::task::JoinHandle<()>);

impl FakeBackend {
    fn start<F>(path: &Path, script: impl Fn(Request<Incoming>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<RelayBody>> + Send + 'static,
    {
        let script: Script = Arc::new(move |request| Box::pin(script(request)));
        let listener = UnixListener::bind(path).unwrap();
        Self(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let script = script.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        let answer = script(request);
                        async move { Ok::<_, std::convert::Infallible>(answer.await) }
                    });
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        }))
    }

    /// Closes every connection and removes the socket.
    async fn stop(self, path: &Path) {
        self.0.abort();
        let _ = self.0.await;
        std::fs::remove_file(path).unwrap();
    }
}

struct Rig {
    _dir: tempfile::TempDir,
    path: PathBuf,
    store: Arc<CriStore>,
    relay: Relay,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("containerd.sock");
    let store = CriStore::new(Arc::new(AuthBoard::new()));
    let backend = Arc::new(Backend::new(&path));
    let relay = Relay::new(backend, store.clone(), Metrics::default());
    Rig { _dir: dir, path, store, relay }
}

fn frame(message: &[u8]) -> Bytes {
    let mut body = BytesMut::with_capacity(message.len() + 5);
    body.put_u8(0);
    body.put_u32(u32::try_from(message.len()).unwrap());
    body.put_slice(message);
    body.freeze()
}

/// Field `number` of wire type 2.
fn field(number: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut bytes);
    prost::encoding::encode_varint(value.len() as u64, &mut bytes);
    bytes.extend_from_slice(value);
    bytes
}

fn pull(image: &str, user: &str, password: &str) -> Bytes {
    let mut message = field(1, &field(1, image.as_bytes()));
    message.extend(field(2, &[field(1, user.as_bytes()), field(2, password.as_bytes())].concat()));
    frame(&message)
}

fn request(method: &str, body: Bytes) -> Request<Full<Bytes>> {
    Request::builder()
        .method("POST")
        .uri(format!("http://localhost/runtime.v1.ImageService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body))
        .unwrap()
}

fn trailers(status: &'static str) -> HeaderMap {
    HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static(status))])
}

fn answer(frames: Vec<Frame<Bytes>>) -> Response<RelayBody> {
    let frames = frames.into_iter().map(Ok::<_, Box<dyn std::error::Error + Send + Sync>>);
    let body = StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

fn ok(message: &[u8]) -> Response<RelayBody> {
    answer(vec![Frame::data(frame(message)), Frame::trailers(trailers("0"))])
}

async fn call(relay: &Relay, request: Request<Full<Bytes>>) -> (HeaderMap, Bytes, HeaderMap) {
    let (parts, body) = relay.clone().call(request).await.into_parts();
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned().unwrap_or_default();
    (parts.headers, collected.to_bytes(), trailers)
}

async fn candidates(store: &CriStore, image: &str) -> usize {
    let image: ImageRef = image.parse().unwrap();
    let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
    store.lookup(&scope, &Rejected::default()).await.unwrap().candidates.len()
}

#[tokio::test]
async fn t65_the_credential_is_there_while_containerd_works() {
    let rig = rig();
    let store = rig.store.clone();
    let _backend = FakeBackend::start(&rig.path, move |_| {
        let store = store.clone();
        async move {
            assert_eq!(candidates(&store, "docker.io/library/nginx:latest").await, 1);
            ok(&field(1, b"sha256:id"))
        }
    });
    let (_, body, trailers) = call(&rig.relay, request("PullImage", pull("nginx", "u", "p"))).await;
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(body, frame(&field(1, b"sha256:id")));
    assert_eq!(candidates(&rig.store, "docker.io/library/other").await, 1, "it was confirmed");
}

#[tokio::test]
async fn t76_t77_removal_by_id_counts_only_when_it_succeeded() {
    let rig = rig();
    let _backend = FakeBackend::start(&rig.path, |request| async move {
        match (request.uri().path(), request.headers().contains_key("x-fail")) {
            (_, true) => answer(vec![Frame::trailers(trailers("5"))]),
            ("/runtime.v1.ImageService/PullImage", _) => ok(&field(1, b"sha256:id")),
            _ => ok(b""),
        }
    });
    call(&rig.relay, request("PullImage", pull("reg.example/a", "u", "p"))).await;
    let removal = frame(&field(1, &field(1, b"sha256:id")));
    let mut failing = request("RemoveImage", removal.clone());
    failing.headers_mut().insert("x-fail", HeaderValue::from_static("1"));
    call(&rig.relay, failing).await;
    assert_eq!(rig.store.len(), 1);
    call(&rig.relay, request("RemoveImage", removal)).await;
    assert_eq!(rig.store.len(), 0);
}

#[tokio::test]
async fn t78_t87_bytes_reach_the_backend_unchanged() {
    let rig = rig();
    let _backend = FakeBackend::start(&rig.path, |request| async move {
        let got = request.into_body().collect().await.unwrap().to_bytes();
        ok(&got)
    });
    let mut message = field(1, &[field(1, b"not a reference:::"), field(999, b"new")].concat());
    message.extend(field(999, b"newer"));
    for (method, body) in
        [("PullImage", frame(&message)), ("ImageStatus", frame(&message)), ("Later", frame(b"\xff\xff"))]
    {
        let (_, got, _) = call(&rig.relay, request(method, body.clone())).await;
        assert_eq!(got, frame(&body), "{method}");
    }
}

#[tokio::test]
async fn t87_what_containerd_says_of_an_image_that_is_none_comes_back_as_it_is() {
    const SAID: &str = "failed to parse image reference %22not a reference:::%22: invalid reference format";
    let rig = rig();
    let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    // With and without a body: containerd answers a call that it refuses at once by headers alone.
    let _backend = FakeBackend::start(&rig.path, move |request| {
        let seen = seen.clone();
        async move {
            let early = request.headers().contains_key("x-early");
            seen.send(request.into_body().collect().await.unwrap().to_bytes()).unwrap();
            let mut refused = trailers("3");
            refused.insert("grpc-message", HeaderValue::from_static(SAID));
            refused.insert("grpc-status-details-bin", HeaderValue::from_static("CAMaAA"));
            if early {
                let mut response = answer(Vec::new());
                response.headers_mut().extend(refused);
                return response;
            }
            answer(vec![Frame::trailers(refused)])
        }
    });
    let body = pull("not a reference:::", "u", "p");
    for early in [false, true] {
        let mut call_of = request("PullImage", body.clone());
        if early {
            call_of.headers_mut().insert("x-early", HeaderValue::from_static("1"));
        }
        let (headers, answered, trailers) = call(&rig.relay, call_of).await;
        let said = if early { &headers } else { &trailers };
        assert_eq!(said["grpc-status"], "3", "early: {early}");
        assert_eq!(said["grpc-message"], SAID);
        assert_eq!(said["grpc-status-details-bin"], "CAMaAA");
        assert!(answered.is_empty());
        assert_eq!(arrived.recv().await.unwrap(), body, "it was forwarded as it came");
        assert!(rig.store.is_empty());
    }
}

#[tokio::test]
async fn t79_a_list_of_fifteen_mebibytes_is_delivered() {
    let rig = rig();
    let _backend = FakeBackend::start(&rig.path, |_| async { ok(&vec![7; 15 << 20]) });
    let (_, body, trailers) = call(&rig.relay, request("ListImages", frame(b""))).await;
    assert_eq!((body.len(), &trailers["grpc-status"]), ((15 << 20) + 5, &HeaderValue::from_static("0")));
}

#[tokio::test]
async fn a_caller_that_does_not_read_holds_up_nobody_else() {
    let rig = rig();
    let _backend = FakeBackend::start(&rig.path, |_| async { ok(&vec![7; 15 << 20]) });
    let mut stuck = Vec::new();
    for _ in 0..8 {
        stuck.push(rig.relay.clone().call(request("ListImages", frame(b""))).await);
    }
    for _ in 0..4 {
        let list = call(&rig.relay, request("ListImages", frame(b"")));
        let (_, body, _) = tokio::time::timeout(Duration::from_secs(30), list).await.expect("a list");
        assert_eq!(body.len(), (15 << 20) + 5);
    }
    // They have lost nothing by it.
    for held in stuck {
        assert_eq!(held.into_body().collect().await.unwrap().to_bytes().len(), (15 << 20) + 5);
    }
}

#[tokio::test]
async fn metadata_of_a_call_and_of_its_answer_pass_unchanged() {
    let rig = rig();
    let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    let metadata =
        [("x-multi", "1"), ("x-multi", "2"), ("x-raw-bin", "AAEC/w"), ("x-raw-bin", "/w"), ("x-free", "a b")];
    let metadata =
        metadata.map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_static(value)));
    let own = |headers: &HeaderMap| -> Vec<_> {
        let own = headers.iter().filter(|(name, _)| name.as_str().starts_with("x-"));
        own.map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    let answered = metadata.clone();
    let _backend = FakeBackend::start(&rig.path, move |request| {
        seen.send(request.headers().clone()).unwrap();
        let mut response = ok(b"");
        response.headers_mut().extend(answered.clone());
        async { response }
    });
    for (method, body) in [("ImageStatus", frame(b"")), ("PullImage", pull("reg.example/a", "u", "p"))] {
        let mut call_of = request(method, body);
        call_of.headers_mut().extend(metadata.clone());
        let (headers, ..) = call(&rig.relay, call_of).await;
        assert_eq!(own(&arrived.recv().await.unwrap()), metadata, "{method}");
        assert_eq!(own(&headers), metadata, "{method}");
    }
}

#[tokio::test]
async fn a_pull_that_is_cut_off_or_compressed_is_told_and_says_what_to_do() {
    let (log, _guard) = soci_testkit::log::capture();
    let rig = rig();
    let _backend = FakeBackend::start(&rig.path, |_| async { ok(b"") });
    let whole = pull("reg.example/a", "u", "hunter2");
    let mut compressed = BytesMut::from(&whole[..]);
    compressed[0] = 1;
    for (body, told) in [(whole.slice(..whole.len() - 1), 0), (compressed.freeze(), 1)] {
        let (_, _, trailers) = call(&rig.relay, request("PullImage", body)).await;
        assert_eq!(trailers["grpc-status"], "0", "it is forwarded all the same");
        assert_eq!(log.warnings("send it uncompressed"), told, "{}", log.text());
    }
    assert!(log.text().contains("its request is cut off"), "{}", log.text());
    let broken = [Ok(Frame::data(whole.slice(..9))), Err("the stream was reset")];
    let broken =
        StreamBody::new(futures::stream::iter(broken.map(|frame| frame.map_err(std::io::Error::other))));
    let response = rig.relay.clone().call(request("PullImage", Bytes::new()).map(|_| broken)).await;
    let said = response.headers()["grpc-message"].to_str().unwrap();
    assert!(said.contains("the stream was reset; send it again"), "{said}");
    assert!(log.text().contains("an image call ended before its request was whole"), "{}", log.text());
    assert!(rig.store.is_empty() && !log.text().contains("hunter2"));
}

#[tokio::test]
async fn t80_t81_an_error_comes_back_as_it_was() {
    let rig = rig();
    let _backend = FakeBackend::start(&rig.path, |request| async move {
        if request.uri().path().ends_with("StreamImages") {
            let mut response = answer(Vec::new());
            response.headers_mut().insert("grpc-status", HeaderValue::from_static("12"));
            response
                .headers_mut()
                .insert("grpc-message", HeaderValue::from_static("unknown method StreamImages"));
            return response;
        }
        let mut trailers = trailers("2");
        trailers.insert("grpc-message", HeaderValue::from_static("rpc error: registry unavailable"));
        trailers.insert("grpc-status-details-bin", HeaderValue::from_static("CAIaAA"));
        trailers.append("x-multi", HeaderValue::from_static("1"));
        trailers.append("x-multi", HeaderValue::from_static("2"));
        answer(vec![Frame::trailers(trailers)])
    });
    let (headers, _, _) = call(&rig.relay, request("StreamImages", frame(b""))).await;
    assert_eq!(headers["grpc-status"], "12");
    assert_eq!(headers["grpc-message"], "unknown method StreamImages");
    let (_, _, trailers) = call(&rig.relay, request("PullImage", pull("reg.example/a", "u", "p"))).await;
    assert_eq!(trailers["grpc-status"], "2");
    assert_eq!(trailers["grpc-message"], "rpc error: registry unavailable");
    assert_eq!(trailers["grpc-status-details-bin"], "CAIaAA");
    assert_eq!(trailers.get_all("x-multi").iter().count(), 2);
    assert_eq!(candidates(&rig.store, "reg.example/b").await, 0, "a failed pull confirms nothing");
}

#[tokio::test]
async fn t80_the_messages_of_a_stream_are_passed_on_as_they_come() {
    let rig = rig();
    let (send, frames) = tokio::sync::mpsc::unbounded_channel();
    let frames = Arc::new(std::sync::Mutex::new(Some(frames)));
    let _backend = FakeBackend::start(&rig.path, move |request| {
        assert_eq!(request.uri().path(), "/runtime.v1.ImageService/StreamImages");
        let frames = frames.lock().unwrap().take().unwrap();
        let frames = futures::stream::unfold(frames, |mut frames| async move {
            let frame: Frame<Bytes> = frames.recv().await?;
            Some((Ok::<_, Box<dyn std::error::Error + Send + Sync>>(frame), frames))
        });
        let body = StreamBody::new(frames).boxed_unsync();
        async { Response::builder().header("content-type", "application/grpc").body(body).unwrap() }
    });
    let response = rig.relay.clone().call(request("StreamImages", frame(b""))).await;
    let mut body = response.into_body();
    for message in [&b"first"[..], b"", &[7; 70_000], b"last"] {
        // The next one is not sent before this one has come through.
        send.send(Frame::data(frame(message))).unwrap();
        let mut got = BytesMut::new();
        while got.len() < message.len() + 5 {
            let next = tokio::time::timeout(Duration::from_secs(30), body.frame()).await.expect("a frame");
            got.extend_from_slice(&next.unwrap().unwrap().into_data().unwrap());
        }
        assert_eq!(got, frame(message));
    }
    send.send(Frame::trailers(trailers("0"))).unwrap();
    let last = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(last["grpc-status"], "0");
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn calls_of_the_older_version_go_to_the_older_version() {
    let rig = rig();
    let _backend = FakeBackend::start(&rig.path, |request| async move {
        let path = request.uri().path().to_owned();
        ok(&field(1, path.as_bytes()))
    });
    let mut older = request("PullImage", pull("reg.example/a", "u", "p"));
    *older.uri_mut() = "http://localhost/runtime.v1alpha2.ImageService/PullImage".parse().unwrap();
    let (_, body, trailers) = call(&rig.relay, older).await;
    assert_eq!(body, frame(&field(1, b"/runtime.v1alpha2.ImageService/PullImage")));
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(candidates(&rig.store, "reg.example/b").await, 1, "it was confirmed");
}

#[tokio::test]
async fn t82_the_deadline_and_the_cancellation_of_the_caller_reach_the_backend() {
    let rig = rig();
    let (seen, mut deadlines) = tokio::sync::mpsc::unbounded_channel();
    let (ended, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let _backend = FakeBackend::start(&rig.path, move |request| {
        seen.send(request.headers().get("grpc-timeout").cloned()).unwrap();
        let told = TellsWhenDropped(ended.clone());
        async move {
            let _told = told;
            std::future::pending::<()>().await;
            ok(b"")
        }
    });
    let mut slow = request("ImageStatus", frame(b""));
    slow.headers_mut().insert("grpc-timeout", HeaderValue::from_static("3S"));
    let relay = rig.relay.clone();
    let call = tokio::spawn(async move { relay.call(slow).await });
    let deadline = deadlines.recv().await.unwrap().unwrap();
    let millis: u64 = deadline.to_str().unwrap().trim_end_matches('m').parse().unwrap();
    assert!(millis <= 3000 && millis > 0, "{millis}");
    call.abort();
    tokio::time::timeout(Duration::from_secs(30), ends.recv())
        .await
        .expect("the backend's call is cancelled");
}

struct TellsWhenDropped(tokio::sync::mpsc::UnboundedSender<()>);

impl Drop for TellsWhenDropped {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

#[tokio::test]
async fn t83_a_backend_that_comes_late_is_waited_for() {
    let rig = rig();
    let relay = rig.relay.clone();
    let call_early = tokio::spawn(async move { call(&relay, request("ImageFsInfo", frame(b""))).await });
    tokio::task::yield_now().await;
    let _backend = FakeBackend::start(&rig.path, |_| async { ok(b"here") });
    let (_, body, _) = call_early.await.unwrap();
    assert_eq!(body, frame(b"here"));
}

#[tokio::test(start_paused = true)]
async fn a_call_with_a_short_deadline_waits_for_the_backend_too() {
    for limit in ["900m", "1S"] {
        let rig = rig();
        let mut short = request("ImageStatus", frame(b""));
        short.headers_mut().insert("grpc-timeout", HeaderValue::from_static(limit));
        let relay = rig.relay.clone();
        let call_early = tokio::spawn(async move { call(&relay, short).await });
        tokio::task::yield_now().await;
        let _backend = FakeBackend::start(&rig.path, |_| async { ok(b"here") });
        let (headers, body, _) = call_early.await.unwrap();
        assert_eq!(body, frame(b"here"), "{limit}: {headers:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_absent_backend_is_unavailable_and_named() {
    let rig = rig();
    let (headers, _, _) = call(&rig.relay, request("ImageFsInfo", frame(b""))).await;
    assert_eq!(headers["grpc-status"], "14");
    let message = headers["grpc-message"].to_str().unwrap();
    assert!(
        message.contains("containerd image service not reachable at") && message.contains("containerd.sock"),
        "{message}"
    );
    assert!(message.ends_with("start containerd, or correct image_service_path"), "{message}");
}

#[tokio::test]
async fn t84_a_restart_of_the_backend_costs_the_calls_under_way_only() {
    let rig = rig();
    let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    let backend = FakeBackend::start(&rig.path, move |_| {
        seen.send(()).unwrap();
        async {
            std::future::pending::<()>().await;
            ok(b"")
        }
    });
    let relay = rig.relay.clone();
    let broken =
        tokio::spawn(
            async move { call(&relay, request("PullImage", pull("reg.example/a", "u", "p"))).await },
        );
    arrived.recv().await.unwrap();
    backend.stop(&rig.path).await;
    let (headers, _, _) = broken.await.unwrap();
    assert_eq!(headers["grpc-status"], "14");
    let message = headers["grpc-message"].to_str().unwrap();
    assert!(
        message.contains("containerd.sock: ") && message.contains("look at containerd's log"),
        "{message}"
    );
    let _backend = FakeBackend::start(&rig.path, |_| async { ok(b"back") });
    let (_, body, _) = call(&rig.relay, request("ImageStatus", frame(b""))).await;
    assert_eq!(body, frame(b"back"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_did_not_get_onto_a_connection_goes_onto_the_next() {
    let rig = rig();
    let listener = UnixListener::bind(&rig.path).unwrap();
    let backend = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (answered, end) = tokio::sync::oneshot::channel::<()>();
            let answered = Arc::new(std::sync::Mutex::new(Some(answered)));
            let service = service_fn(move |_| {
                drop(answered.lock().unwrap().take());
                async { Ok::<_, std::convert::Infallible>(ok(b"here")) }
            });
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                _ = &mut connection => continue,
                _ = end => connection.as_mut().graceful_shutdown(),
            }
            let _ = connection.await;
        }
    });
    let mut answered = 0;
    for turn in 0..2000 {
        let (headers, body, trailers) = call(&rig.relay, request("ImageStatus", frame(b""))).await;
        if trailers.contains_key("grpc-status") {
            assert_eq!(body, frame(b"here"));
            answered += 1;
            continue;
        }
        // It was on its way when the backend ended, with or without saying so: the backend may have done it.
        let said = headers["grpc-message"].to_str().unwrap().to_lowercase();
        let on_its_way = ["connection error received", "broken pipe", "connection reset"];
        assert!(on_its_way.iter().any(|what| said.contains(what)), "{turn}: {said}");
    }
    assert!(answered > 1900, "{answered}");
    backend.abort();
}

#[tokio::test]
async fn t85_two_hundred_pulls_at_once_that_all_wait_for_each_other() {
    const PULLS: usize = 200;
    let rig = rig();
    let barrier = Arc::new(Barrier::new(PULLS));
    let _backend = FakeBackend::start(&rig.path, move |_| {
        let barrier = barrier.clone();
        async move {
            barrier.wait().await;
            ok(&field(1, b"sha256:id"))
        }
    });
    let pulls = (0..PULLS).map(|at| {
        let relay = rig.relay.clone();
        tokio::spawn(async move {
            call(&relay, request("PullImage", pull(&format!("reg.example/a:{at}"), "u", "p"))).await
        })
    });
    for pulled in futures::future::join_all(pulls).await {
        assert_eq!(pulled.unwrap().2["grpc-status"], "0");
    }
    assert_eq!(rig.store.len(), PULLS);
}

#[tokio::test]
async fn a_request_beyond_the_limit_is_refused() {
    let rig = rig();
    let (headers, _, _) = call(&rig.relay, request("PullImage", Bytes::from(vec![0; 17 << 20]))).await;
    assert_eq!(headers["grpc-status"], "8");
    let message = headers["grpc-message"].to_str().unwrap();
    assert!(message.contains("larger than 16777216 bytes") && message.contains("look at who"), "{message}");
}
