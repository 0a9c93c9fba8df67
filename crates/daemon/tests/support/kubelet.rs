//! A daemon with the image service on, and both of its neighbours: a kubelet that calls, a containerd that answers.

use std::convert::Infallible;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use soci_auth::AuthBoard;
use soci_auth::keychain::cri::CriStore;
use soci_snapshotter_grpc::config::Raw;
use soci_snapshotter_grpc::daemon::Wiring;
use soci_snapshotter_grpc::{Config, Daemon, Options};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::Script;

/// Nothing here takes longer, on any machine.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// A daemon whose every layer mounts.
pub(crate) struct Node {
    pub(crate) root: tempfile::TempDir,
    pub(crate) daemon: Daemon,
    pub(crate) store: Arc<CriStore>,
}

impl Node {
    pub(crate) async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let backend = root.path().join("containerd.sock");
        Self::with(root, Some(backend)).await
    }

    /// A node whose configuration says nothing.
    pub(crate) async fn of_defaults() -> Self {
        Self::with(tempfile::tempdir().unwrap(), None).await
    }

    pub(crate) async fn with(root: tempfile::TempDir, cri: Option<PathBuf>) -> Self {
        let config = Config { check_overlay: false, ..Config::check(&Raw::default()).unwrap() };
        assert_eq!(config.cri, None, "it is off where nothing is said");
        let has_cri = cri.is_some();
        let config = Config { cri, ..config };
        let options = Options {
            address: root.path().join("run/s.sock").display().to_string().parse().unwrap(),
            root: root.path().join("state"),
            metrics: Default::default(),
            config,
        };
        let store = CriStore::new(Arc::new(AuthBoard::new()));
        let pulls = has_cri.then(|| Arc::clone(&store));
        let daemon =
            Daemon::start(options, |_| Ok(Wiring { provider: Script::default().shared(), pulls })).await;
        Self { root, daemon: daemon.unwrap(), store }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.root.path().join("run/s.sock")
    }

    /// Plays containerd: answers every image call with what `answer` makes of its bytes.
    pub(crate) fn containerd<F>(&self, answer: impl Fn(Bytes) -> F + Clone + Send + Sync + 'static)
    where
        F: Future<Output = Bytes> + Send + 'static,
    {
        let listener = UnixListener::bind(self.root.path().join("containerd.sock")).unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let answer = answer.clone();
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let answer = answer.clone();
                    async move {
                        let asked = request.into_body().collect().await.map(|body| body.to_bytes());
                        Ok::<_, Infallible>(answered(answer(asked.unwrap_or_default()).await))
                    }
                });
                tokio::spawn(async move {
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .max_concurrent_streams(4096)
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
    }

    pub(crate) async fn kubelet(&self) -> SendRequest<Full<Bytes>> {
        http2(UnixStream::connect(self.socket()).await.unwrap()).await
    }
}

pub(crate) async fn http2(stream: UnixStream) -> SendRequest<Full<Bytes>> {
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

pub(crate) fn answered(message: Bytes) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))]);
    let frames = [Frame::data(framed(&message)), Frame::trailers(trailers)].map(Ok::<_, Infallible>);
    let body = StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

pub(crate) fn framed(message: &[u8]) -> Bytes {
    let mut body = BytesMut::new();
    body.put_u8(0);
    body.put_u32(u32::try_from(message.len()).unwrap());
    body.put_slice(message);
    body.freeze()
}

pub(crate) fn field(number: u8, value: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(value.len()).unwrap()], value].concat()
}

pub(crate) fn image_call(method: &str, body: Bytes) -> Request<Full<Bytes>> {
    call_of(&format!("runtime.v1.ImageService/{method}"), body)
}

pub(crate) fn call_of(method: &str, body: Bytes) -> Request<Full<Bytes>> {
    Request::post(format!("http://localhost/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body))
        .unwrap()
}

/// Sends a call and returns its gRPC status and message, wherever they are.
pub(crate) async fn ended(
    sender: &mut SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> Option<(String, String)> {
    let text = |headers: &HeaderMap, name: &str| Some(headers.get(name)?.to_str().unwrap().to_owned());
    let both = |headers: &HeaderMap| {
        Some((text(headers, "grpc-status")?, text(headers, "grpc-message").unwrap_or_default()))
    };
    let answer = timeout(LONG, sender.send_request(request)).await.unwrap().ok()?;
    let early = both(answer.headers());
    let body = timeout(LONG, answer.into_body().collect()).await.unwrap().ok()?;
    early.or_else(|| both(body.trailers()?))
}

/// Connects as a user without rights, as the kernel sees it: the thread that connects gives its rights up.
pub(crate) async fn connect_as_nobody(socket: &Path) -> UnixStream {
    use rustix::thread::set_thread_res_uid;
    let nobody = rustix::process::Uid::from_raw(65534);
    let socket = socket.to_owned();
    let connect = move || {
        set_thread_res_uid(nobody, nobody, nobody).expect("needs root");
        std::os::unix::net::UnixStream::connect(socket).unwrap()
    };
    // A thread of its own, which ends here: others of the process keep their rights.
    let stream = std::thread::spawn(connect).join().unwrap();
    stream.set_nonblocking(true).unwrap();
    UnixStream::from_std(stream).unwrap()
}
