//! What breaks at the socket: nothing of it stays open or under way, and no secret of it is in the log of any thread and any
//! library, at any level, or in the state directory.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use soci_snapshotter::service::Unmount;
use soci_testkit::{frames, log};
use support::kubelet::{LONG, Node, connect_as_nobody, ended, field, framed, http2, image_call};
use support::until;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// In every password, and in what should have been none.
const PLANTED: &str = "pl4nted-Kx-71";

/// What is held, and what is under way.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    tasks: usize,
    /// Calls that containerd works on.
    calls: usize,
}

impl Held {
    fn now(calls: &AtomicUsize) -> Self {
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            calls: calls.load(Ordering::SeqCst),
        }
    }
}

/// Waits until nothing else is held.
async fn only(before: &Held, calls: &AtomicUsize, turn: usize) {
    let deadline = Instant::now() + LONG;
    while Held::now(calls) != *before {
        assert!(Instant::now() < deadline, "{turn}: {:?} instead of {before:?}", Held::now(calls));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Counts a call until it is answered or cancelled.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(calls: &Arc<AtomicUsize>) -> Self {
        calls.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(calls))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn pull(image: &str) -> Bytes {
    let login = [field(1, b"user"), field(2, PLANTED.as_bytes())].concat();
    framed(&[field(1, &field(1, image.as_bytes())), field(2, &login)].concat())
}

async fn a_mebibyte_of_metadata(node: &Node) {
    let mut kubelet = node.kubelet().await;
    let mut large = image_call("PullImage", pull("reg.example/metadata:1"));
    for at in 0..64 {
        let name: http::HeaderName = format!("x-filler-{at}").parse().unwrap();
        let value = HeaderValue::from_str(&PLANTED.repeat((16 << 10) / PLANTED.len())).unwrap();
        large.headers_mut().insert(name, value);
    }
    let (code, message) = ended(&mut kubelet, large).await.expect("a status");
    assert_eq!(code, "8");
    assert!(message.contains("metadata of") && message.contains("send less"), "{message}");
}

async fn half_a_frame(node: &Node) {
    let mut stream = UnixStream::connect(node.socket()).await.unwrap();
    let mut bytes = frames::opening("PullImage", "localhost");
    let whole = frames::frame(0, 1, 1, &pull("reg.example/half:1"));
    bytes.extend(&whole[..whole.len() - 3]);
    stream.write_all(&bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(LONG, stream.read_to_end(&mut rest)).await.expect("the connection is closed");
}

async fn half_a_message(node: &Node) {
    let half = pull("reg.example/cut:1");
    let half = half.slice(..half.len() - 3);
    let answer = ended(&mut node.kubelet().await, image_call("PullImage", half)).await;
    assert_eq!(answer.unwrap().0, "0", "it is containerd's to judge");
}

async fn another_protocol(node: &Node) {
    let mut stream = UnixStream::connect(node.socket()).await.unwrap();
    let request = format!("GET / HTTP/1.1\r\nauthorization: Bearer {PLANTED}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(LONG, stream.read_to_end(&mut rest)).await.expect("the connection is closed");
}

async fn a_stranger(node: &Node) {
    let mut stranger = http2(connect_as_nobody(&node.socket()).await).await;
    let (code, message) =
        ended(&mut stranger, image_call("PullImage", pull("reg.example/a:1"))).await.unwrap();
    assert_eq!((code.as_str(), message.ends_with("run the command as root")), ("7", true), "{message}");
}

/// A kubelet that goes while containerd works.
async fn half_a_pull(node: &Node, calls: &AtomicUsize) {
    let mut kubelet = node.kubelet().await;
    let call = kubelet.send_request(image_call("PullImage", pull("reg.example/hangs:1")));
    let call = tokio::spawn(call);
    until("containerd works on it", async || calls.load(Ordering::SeqCst) == 1).await;
    call.abort();
}

fn holds_planted(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().flatten().any(|entry| {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        let found = |bytes: Vec<u8>| bytes.windows(PLANTED.len()).any(|window| window == PLANTED.as_bytes());
        (kind.is_dir() && holds_planted(&path)) || (kind.is_file() && found(std::fs::read(path).unwrap()))
    })
}

/// One test, so that nothing else is open or at work in its process.
#[tokio::test]
async fn what_breaks_at_the_socket_leaves_nothing_behind() {
    use std::os::unix::fs::PermissionsExt as _;
    let log = log::capture_everywhere();
    let node = Node::new().await;
    for (path, mode) in [("", 0o755), ("run", 0o755), ("run/s.sock", 0o666)] {
        let path = node.root.path().join(path);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    node.containerd(move |asked| {
        let counted = Counted::new(&counted);
        async move {
            if asked.windows(5).any(|window| window == b"hangs") {
                std::future::pending::<()>().await;
            }
            drop(counted);
            Bytes::from(field(1, b"sha256:id"))
        }
    });
    let mut kubelet = node.kubelet().await;
    let answer = ended(&mut kubelet, image_call("PullImage", pull("reg.example/good:1"))).await;
    assert_eq!((answer.unwrap().0.as_str(), node.store.len()), ("0", 1));
    // Without this kubelet: both ends of its connection, and its two tasks, ours and the library's.
    let Held { descriptors, tasks, calls: _ } = Held::now(&calls);
    let before = Held { descriptors: descriptors - 2, tasks: tasks - 2, calls: 0 };
    drop(kubelet);
    for turn in 0..6 {
        match turn {
            0 => {}
            1 => a_mebibyte_of_metadata(&node).await,
            2 => half_a_frame(&node).await,
            3 => half_a_message(&node).await,
            4 => another_protocol(&node).await,
            5 => a_stranger(&node).await,
            _ => unreachable!(),
        }
        only(&before, &calls, turn).await;
        assert_eq!(node.store.len(), 1, "{turn}: nothing is learnt from what broke");
    }
    half_a_pull(&node, &calls).await;
    only(&before, &calls, 6).await;

    assert!(log.text().contains("TRACE h2::server"), "the log is of all threads, and of libraries");
    let shown: Vec<String> =
        log.text().lines().filter(|line| line.contains(PLANTED)).map(str::to_owned).collect();
    assert!(shown.is_empty(), "{shown:?}");
    assert!(!holds_planted(&node.root.path().join("state")));
    node.daemon.stop(Unmount::No).await;
    assert!(!log.text().contains(PLANTED), "nor when it ends");
}
