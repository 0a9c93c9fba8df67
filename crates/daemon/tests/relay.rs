//! The whole daemon between a kubelet and a containerd that calls back, and between strangers and what is not theirs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::Full;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::TokioIo;
use soci_snapshotter::service::Unmount;
use soci_snapshotter_grpc::peers::REFUSAL;
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_snapshotter_grpc::proto::snapshots::snapshots_client::SnapshotsClient;
use soci_testkit::frames;
use support::kubelet::{LONG, Node, call_of, connect_as_nobody, ended, field, framed, http2, image_call};
use support::{client, labels};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Barrier;
use tokio::time::timeout;
use tonic::transport::Endpoint;
use tonic::{Code, Request as Call};

fn pull(image: &str) -> Bytes {
    let login = [field(1, b"user"), field(2, b"password")].concat();
    framed(&[field(1, &field(1, image.as_bytes())), field(2, &login)].concat())
}

/// Sends a call and returns its gRPC status, wherever that is.
async fn status(sender: &mut SendRequest<Full<Bytes>>, request: Request<Full<Bytes>>) -> Option<String> {
    Some(ended(sender, request).await?.0)
}

#[tokio::test]
async fn t14_a_daemon_without_the_option_has_no_image_service() {
    let node = Node::of_defaults().await;
    let mut kubelet = node.kubelet().await;
    for service in ["runtime.v1.ImageService", "runtime.v1alpha2.ImageService", "runtime.v1.RuntimeService"] {
        for method in ["ImageFsInfo", "PullImage", "Version"] {
            let call = call_of(&format!("{service}/{method}"), pull("reg.example/a:1"));
            assert_eq!(status(&mut kubelet, call).await.as_deref(), Some("12"), "{service}/{method}");
        }
    }
    assert!(node.store.is_empty());
    node.daemon.stop(Unmount::No).await;
}

#[tokio::test]
async fn both_versions_of_the_image_service_are_relayed_and_no_runtime_service() {
    let node = Node::new().await;
    node.containerd(|_| async { Bytes::from(field(1, b"sha256:id")) });
    let mut kubelet = node.kubelet().await;
    for (at, version) in ["v1", "v1alpha2"].into_iter().enumerate() {
        let call = call_of(
            &format!("runtime.{version}.ImageService/PullImage"),
            pull(&format!("reg.example/{version}:1")),
        );
        assert_eq!(status(&mut kubelet, call).await.as_deref(), Some("0"), "{version}");
        assert_eq!(node.store.len(), at + 1, "the login of {version} is learnt");
    }
    let (code, message) =
        ended(&mut kubelet, call_of("runtime.v1.RuntimeService/Version", framed(b""))).await.unwrap();
    assert_eq!(code, "12");
    assert!(message.contains("--container-runtime-endpoint"), "{message}");
    node.daemon.stop(Unmount::No).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t85_two_hundred_pulls_at_once_each_call_prepare_back() {
    const PULLS: usize = 200;
    let node = Node::new().await;
    let (socket, all) = (node.socket(), Arc::new(Barrier::new(PULLS)));
    let snapshots = client(&socket).await;
    node.containerd(move |asked| {
        let (mut snapshots, all) = (snapshots.clone(), Arc::clone(&all));
        async move {
            // Every pull is under way before the first of them asks for its snapshot.
            all.wait().await;
            let target =
                format!("sha256:{}", soci_oci::Digest::of(&asked).to_string().rsplit(':').next().unwrap());
            let request = wire::PrepareSnapshotRequest {
                snapshotter: "soci".into(),
                key: format!("extract {target}"),
                parent: String::new(),
                labels: labels(&target),
            };
            let mut request = Call::new(request);
            request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
            let prepared = snapshots.prepare(request).await.unwrap_err();
            assert_eq!(prepared.code(), Code::AlreadyExists, "the layer is there: {prepared}");
            Bytes::from(field(1, b"sha256:id"))
        }
    });
    let kubelet = node.kubelet().await;
    let pulls =
        (0..PULLS).map(|at| {
            let mut kubelet = kubelet.clone();
            async move {
                status(&mut kubelet, image_call("PullImage", pull(&format!("reg.example/a:{at}")))).await
            }
        });
    let ended = timeout(LONG, futures::future::join_all(pulls)).await.expect("no deadlock");
    assert!(ended.iter().all(|code| code.as_deref() == Some("0")), "{ended:?}");
    assert_eq!(node.store.len(), PULLS);
    node.daemon.stop(Unmount::No).await;
}

#[tokio::test]
async fn a_mebibyte_of_metadata_and_half_a_frame_cost_their_call_only() {
    let node = Node::new().await;
    node.containerd(|_| async { Bytes::from_static(b"\x08\x01") });
    let mut kubelet = node.kubelet().await;
    let mut large = image_call("ImageStatus", framed(b""));
    for at in 0..64 {
        let name: http::HeaderName = format!("x-filler-{at}").parse().unwrap();
        large.headers_mut().insert(name, HeaderValue::from_str(&"x".repeat(16 << 10)).unwrap());
    }
    let (code, message) = ended(&mut kubelet, large).await.expect("a status");
    assert_eq!(code, "8", "RESOURCE_EXHAUSTED: {message}");
    assert!(message.contains("is over the limit of 65536; send less"), "{message}");
    let answer = status(&mut kubelet, image_call("ImageStatus", framed(b""))).await;
    assert_eq!(answer.as_deref(), Some("0"), "its connection goes on");

    // A message that announces more than it brings is containerd's to judge; nothing is learnt from it.
    let mut kubelet = node.kubelet().await;
    let half = pull("reg.example/a:1");
    let half = half.slice(..half.len() - 3);
    assert_eq!(status(&mut kubelet, image_call("PullImage", half)).await.as_deref(), Some("0"));
    assert!(node.store.is_empty());

    // A connection that breaks off within a frame, and one that speaks another protocol.
    for bytes in [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x10\x04"[..], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = UnixStream::connect(node.socket()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(LONG, stream.read_to_end(&mut rest)).await.expect("the connection is closed");
    }
    let answer = status(&mut node.kubelet().await, image_call("ImageStatus", framed(b""))).await;
    assert_eq!(answer.as_deref(), Some("0"), "everybody else is served");
    node.daemon.stop(Unmount::No).await;
}

#[tokio::test]
async fn a_backend_that_hangs_or_is_away_hurts_no_snapshot_call() {
    let node = Node::new().await;
    let mut snapshots = client(&node.socket()).await;
    let mut stat = async || {
        let request = wire::StatSnapshotRequest { snapshotter: "soci".into(), key: "x".into() };
        let answer = timeout(LONG, snapshots.stat(Call::new(request))).await.expect("an answer");
        assert_eq!(answer.unwrap_err().code(), Code::NotFound);
    };
    let mut waiting = Vec::new();
    for _ in 0..300 {
        let mut kubelet = node.kubelet().await;
        let call = image_call("PullImage", pull("reg.example/a:1"));
        waiting.push(tokio::spawn(async move { kubelet.send_request(call).await.map(drop) }));
    }
    stat().await;
    let (arrived, mut arrivals) = tokio::sync::mpsc::unbounded_channel();
    node.containerd(move |_| {
        let arrived = arrived.clone();
        async move {
            let _ = arrived.send(());
            std::future::pending().await
        }
    });
    for _ in 0..waiting.len() {
        timeout(LONG, arrivals.recv()).await.expect("the backend is found when it comes");
    }
    stat().await;
    assert!(waiting.iter().all(|call| !call.is_finished()));
    waiting.iter().for_each(|call| call.abort());
    node.daemon.stop(Unmount::No).await;
}

/// What becomes of a call whose `:authority` has these bytes: its gRPC status, or nothing when HTTP/2 refuses it.
async fn with_authority(socket: &Path, authority: &str) -> Option<String> {
    let mut bytes = frames::opening("ImageStatus", authority);
    bytes.extend(frames::frame(0, 1, 1, &framed(b"")));
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    let mut answered = false;
    loop {
        let mut head = [0; 9];
        timeout(LONG, stream.read_exact(&mut head)).await.unwrap().ok()?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        timeout(LONG, stream.read_exact(&mut payload)).await.unwrap().ok()?;
        match (head[3], head[8]) {
            (1, 1) if answered || head[4] & 1 == 1 => return Some("0".to_owned()),
            (1, 1) => answered = true,
            (3, 1) | (7, _) => return None,
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_host_as_authority_is_served_and_the_path_of_a_socket_is_not() {
    let node = Node::new().await;
    node.containerd(|_| async { Bytes::from_static(b"\x08\x01") });
    for authority in ["localhost", "localhost:80", "soci-snapshotter-grpc.sock"] {
        assert!(with_authority(&node.socket(), authority).await.is_some(), "{authority}");
    }
    // The HTTP/2 library refuses what is no host; `docs/auth.md` says so.
    for authority in ["/run/soci-snapshotter-grpc.sock", "%2Frun%2Fsoci-snapshotter-grpc.sock"] {
        assert_eq!(with_authority(&node.socket(), authority).await, None, "{authority}");
    }
    let answer = status(&mut node.kubelet().await, image_call("ImageStatus", framed(b""))).await;
    assert_eq!(answer.as_deref(), Some("0"), "everybody else is served");
    node.daemon.stop(Unmount::No).await;
}

#[tokio::test]
async fn a_process_without_root_is_refused_on_a_socket_that_lets_it_connect() {
    let node = Node::new().await;
    node.containerd(|_| async { Bytes::new() });
    // As a service manager's unit might have it.
    for (path, mode) in [("", 0o755), ("run", 0o755), ("run/s.sock", 0o666)] {
        let path = node.root.path().join(path);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let stream = connect_as_nobody(&node.socket()).await;
    let mut kubelet = http2(stream).await;
    let refused = status(&mut kubelet, image_call("PullImage", pull("reg.example/a:1"))).await;
    assert_eq!(refused.as_deref(), Some("7"), "PERMISSION_DENIED");
    assert!(node.store.is_empty(), "a stranger plants no credential");

    let stream = std::sync::Mutex::new(Some(connect_as_nobody(&node.socket()).await));
    let connect = tower::service_fn(move |_| {
        let stream = stream.lock().unwrap().take();
        async move {
            stream.map(TokioIo::new).ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))
        }
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap();
    let request = wire::StatSnapshotRequest { snapshotter: "soci".into(), key: "x".into() };
    let refused = SnapshotsClient::new(channel).stat(Call::new(request)).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::PermissionDenied, REFUSAL));
    node.daemon.stop(Unmount::No).await;
}
