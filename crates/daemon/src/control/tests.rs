//! The control socket as a stranger and as an operator meet it.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use soci_auth::explain::Standing;
use soci_auth::keychain::cri::{AuthConfig, CriStore};
use soci_auth::{AuthBoard, Authenticator, KeychainChain, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::keychains::OPTIONS;

struct Rig {
    _dir: tempfile::TempDir,
    path: PathBuf,
    _stop: tokio_util::sync::DropGuard,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    let board = Arc::new(AuthBoard::new());
    let store = CriStore::new(Arc::clone(&board));
    let empty = String::new;
    let login = AuthConfig::new("u".into(), "hunter2".into(), empty(), empty(), empty(), empty());
    store.begin("reg.example/a:1", Some(login), Some("team".into())).unwrap().confirm(None);
    let auth = Authenticator::new(KeychainChain::new(vec![store]), board, Settings::default());
    let registry =
        Registry::new(soci_registry::Settings::default(), auth, Arc::new(soci_registry::NoMeters)).unwrap();
    let off = [0, 2].map(|place| Off { place, name: OPTIONS[place].0, how: OPTIONS[place].1 });
    let stop = CancellationToken::new();
    serve(&path, Knowledge { registry, off: off.to_vec() }, stop.clone()).unwrap();
    Rig { _dir: dir, path, _stop: stop.drop_guard() }
}

/// Sends bytes and returns status and body of the answer.
async fn exchange(path: &Path, request: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(path).await.unwrap();
    // The daemon may answer and close before it has read everything.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let status = answer.split(' ').nth(1).map_or(0, |status| status.parse().unwrap());
    (status, answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

fn post(body: &str) -> Vec<u8> {
    format!("POST /v1/auth/explain HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .into()
}

#[tokio::test]
async fn the_options_of_the_daemon_are_explained_in_order_and_without_a_secret() {
    let rig = rig();
    let mode = std::fs::metadata(&rig.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (status, body) = exchange(&rig.path, &post(r#"{"image":"reg.example/a:1"}"#)).await;
    assert_eq!(status, 200, "{body}");
    assert!(!body.contains("hunter2"));
    let report: Report = serde_json::from_str(&body).unwrap();
    let [host] = report.hosts.as_slice() else { panic!("{report:?}") };
    assert_eq!((host.uses.as_deref(), host.namespace.as_deref()), (Some("cri"), Some("team")));
    let names: Vec<_> = host.options.iter().map(|option| (option.name.as_str(), option.standing)).collect();
    assert_eq!(
        names,
        [("docker-config", Standing::Off), ("cri", Standing::Used), ("kubernetes-secrets", Standing::Off)]
    );
    assert_eq!(host.options[1].candidates[0].entry, "pull of reg.example/a:1");
    assert!(host.options[1].candidates[0].age_seconds.is_some());
}

#[tokio::test]
async fn what_is_no_question_gets_an_answer_that_says_so() {
    let rig = rig();
    let large = format!(r#"{{"image":"{}"}}"#, "x".repeat(MAX_REQUEST));
    for (request, expected, words) in [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), 404, "no such request"),
        (b"GET /v1/auth/explain HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), 405, "only POST"),
        (post("{"), 400, "not understood"),
        (post(r#"{"image":"UPPER/Case:::"}"#), 400, "UPPER/Case"),
        (post(&large), 400, "larger than"),
    ] {
        let (status, body) = exchange(&rig.path, &request).await;
        assert!(status == expected && body.contains(words), "{status} {body} instead of {expected} {words}");
    }
    let (status, _) = exchange(&rig.path, b"\x16\x03\x01nonsense\r\n\r\n").await;
    assert!(status == 400 || status == 0, "{status}");
    let (status, _) = exchange(&rig.path, &post(r#"{"image":"reg.example/a:1"}"#)).await;
    assert_eq!(status, 200, "it still answers");
}

#[tokio::test]
async fn clients_that_hang_take_no_more_than_their_places() {
    let rig = rig();
    let mut hanging = Vec::new();
    for _ in 0..CONNECTIONS - 1 {
        hanging.push(UnixStream::connect(&rig.path).await.unwrap());
    }
    let (status, _) = exchange(&rig.path, &post(r#"{"image":"reg.example/a:1"}"#)).await;
    assert_eq!(status, 200);
    hanging.push(UnixStream::connect(&rig.path).await.unwrap());
    drop(hanging);
    let (status, _) = exchange(&rig.path, &post(r#"{"image":"reg.example/a:1"}"#)).await;
    assert_eq!(status, 200, "places come back");
}

#[tokio::test]
async fn a_process_without_root_is_told_to_become_root() {
    let rig = rig();
    let everybody = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    everybody(rig.path.parent().unwrap(), 0o755);
    everybody(&rig.path, 0o666);
    let path = rig.path.clone();
    // A thread of its own, which ends here: others of the process keep their rights.
    let stream = std::thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).expect("needs root");
        std::os::unix::net::UnixStream::connect(path).unwrap()
    });
    let stream = stream.join().unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = UnixStream::from_std(stream).unwrap();
    stream.write_all(&post(r#"{"image":"reg.example/a:1"}"#)).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("run the command as root"), "{answer}");
    assert!(!answer.contains("reg.example"));
}

#[test]
fn the_socket_is_beside_the_one_that_the_daemon_is_reached_at() {
    assert_eq!(beside(Path::new("/x/s.sock")), Path::new("/x/control.sock"));
    // As the service manager hands it over, wherever it has put it.
    let directory = tempfile::tempdir().unwrap();
    let handed_over = std::os::unix::net::UnixListener::bind(directory.path().join("s.sock")).unwrap();
    let socket = crate::serve::path_of(&crate::serve::Address::Inherited, &handed_over);
    assert_eq!(beside(&socket), directory.path().join(NAME));
}
