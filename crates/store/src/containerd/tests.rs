//! The client against a content service in this process that answers as containerd does.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use soci_oci::{Descriptor, Digest, FetchClass, FetchContext, FetchErrorKind};
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::proto::services::content::v1 as wire;
use crate::proto::services::content::v1::content_server::{Content as ContentService, ContentServer};
use crate::proto::services::leases::v1 as lease_wire;
use crate::proto::services::leases::v1::leases_server::{Leases, LeasesServer};

type Blob = (Vec<u8>, HashMap<String, String>);
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fake holds and what it was told.
#[derive(Debug, Default)]
struct State {
    blobs: BTreeMap<String, Blob>,
    writes: usize,
    aborted: Vec<String>,
    leases: Vec<String>,
    filters: Vec<String>,
    last_headers: (String, Option<String>),
    /// Cut each read short after this many bytes.
    cut: Option<usize>,
    /// Answer nothing at all.
    silent: bool,
}

#[derive(Debug, Clone, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn heard<T>(&self, request: &Request<T>) {
        let header = |name| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        self.state().last_headers =
            (header("containerd-namespace").unwrap_or_default(), header("containerd-lease"));
    }

    fn info(&self, digest: &str) -> Result<wire::Info, Status> {
        let state = self.state();
        let (bytes, labels) = state.blobs.get(digest).ok_or_else(|| Status::not_found("no such content"))?;
        Ok(wire::Info {
            digest: digest.to_owned(),
            size: bytes.len() as i64,
            labels: labels.clone(),
            created_at: Some(prost_types::Timestamp { seconds: 1_000, nanos: 0 }),
            ..wire::Info::default()
        })
    }
}

#[async_trait::async_trait]
impl ContentService for Fake {
    type ListStream = Answers<wire::ListContentResponse>;
    type ReadStream = Answers<wire::ReadContentResponse>;
    type WriteStream = Answers<wire::WriteContentResponse>;

    async fn info(
        &self,
        request: Request<wire::InfoRequest>,
    ) -> Result<Response<wire::InfoResponse>, Status> {
        self.heard(&request);
        if self.state().silent {
            std::future::pending::<()>().await;
        }
        let info = Fake::info(self, &request.into_inner().digest)?;
        Ok(Response::new(wire::InfoResponse { info: Some(info) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateRequest>,
    ) -> Result<Response<wire::UpdateResponse>, Status> {
        let wire::UpdateRequest { info, update_mask } = request.into_inner();
        let info = info.unwrap();
        {
            let mut state = self.state();
            let blob =
                state.blobs.get_mut(&info.digest).ok_or_else(|| Status::not_found("no such content"))?;
            for path in update_mask.unwrap().paths {
                let key = path.strip_prefix("labels.").unwrap().to_owned();
                blob.1.insert(key.clone(), info.labels[&key].clone());
            }
        }
        Ok(Response::new(wire::UpdateResponse { info: Some(Fake::info(self, &info.digest)?) }))
    }

    async fn list(
        &self,
        request: Request<wire::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        self.state().filters = request.into_inner().filters;
        let digests: Vec<String> = self.state().blobs.keys().cloned().collect();
        let mut info: Vec<wire::Info> =
            digests.iter().map(|digest| Fake::info(self, digest).unwrap()).collect();
        info.push(wire::Info { digest: "nonsense".into(), size: -1, ..wire::Info::default() });
        let messages: Vec<_> =
            info.chunks(2).map(|info| Ok(wire::ListContentResponse { info: info.to_vec() })).collect();
        Ok(Response::new(futures::stream::iter(messages).boxed()))
    }

    async fn delete(&self, request: Request<wire::DeleteContentRequest>) -> Result<Response<()>, Status> {
        let digest = request.into_inner().digest;
        self.state().blobs.remove(&digest).map(|_| Response::new(())).ok_or_else(|| Status::not_found("gone"))
    }

    async fn read(
        &self,
        request: Request<wire::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let wire::ReadContentRequest { digest, offset, size } = request.into_inner();
        let state = self.state();
        let (bytes, _) = state.blobs.get(&digest).ok_or_else(|| Status::not_found("no such content"))?;
        let (start, len) = (usize::try_from(offset).unwrap(), usize::try_from(size).unwrap());
        let range = bytes[start..start + len.min(state.cut.unwrap_or(len))].to_vec();
        let mut at = 0; // as containerd 1.6 counts: from the start of the range
        let messages: Vec<_> = range
            .chunks(100_000)
            .map(|data| {
                let message = wire::ReadContentResponse { offset: at, data: data.to_vec() };
                at += data.len() as i64;
                Ok(message)
            })
            .collect();
        Ok(Response::new(futures::stream::iter(messages).boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<wire::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        self.heard(&request);
        self.state().writes += 1;
        let (fake, requests) = (self.clone(), request.into_inner());
        let answers = requests.scan(Vec::new(), move |written: &mut Vec<u8>, message| {
            let answer = message.and_then(|message| fake.step(written, message));
            futures::future::ready(Some(answer))
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<()>, Status> {
        self.state().aborted.push(request.into_inner().r#ref);
        Ok(Response::new(()))
    }
}

impl Fake {
    fn step(
        &self,
        written: &mut Vec<u8>,
        message: wire::WriteContentRequest,
    ) -> Result<wire::WriteContentResponse, Status> {
        let mut state = self.state();
        if state.blobs.contains_key(&message.expected) {
            return Err(Status::already_exists("content exists"));
        }
        if message.offset != written.len() as i64 {
            return Err(Status::out_of_range("write at another offset"));
        }
        written.extend_from_slice(&message.data);
        if message.action() == wire::WriteAction::Commit {
            let digest = Digest::of(written).to_string();
            if digest != message.expected || message.total != written.len() as i64 {
                return Err(Status::failed_precondition(format!("unexpected commit digest {digest}")));
            }
            state.blobs.insert(digest, (std::mem::take(written), message.labels));
        }
        Ok(wire::WriteContentResponse {
            action: message.action,
            offset: message.offset + message.data.len() as i64,
            ..wire::WriteContentResponse::default()
        })
    }
}

#[async_trait::async_trait]
impl Leases for Fake {
    async fn create(
        &self,
        request: Request<lease_wire::CreateRequest>,
    ) -> Result<Response<lease_wire::CreateResponse>, Status> {
        let lease_wire::CreateRequest { id, labels } = request.into_inner();
        assert!(labels.contains_key("containerd.io/gc.expire"));
        self.state().leases.push(id.clone());
        let lease = lease_wire::Lease { id, ..lease_wire::Lease::default() };
        Ok(Response::new(lease_wire::CreateResponse { lease: Some(lease) }))
    }

    async fn delete(&self, request: Request<lease_wire::DeleteRequest>) -> Result<Response<()>, Status> {
        let id = request.into_inner().id;
        self.state().leases.retain(|lease| *lease != id);
        Ok(Response::new(()))
    }
}

/// Serves a fake at a socket; the directory must outlive the client.
fn serve() -> (tempfile::TempDir, Fake, Containerd) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("containerd.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let fake = Fake::default();
    let server = tonic::transport::Server::builder()
        .add_service(ContentServer::new(fake.clone()))
        .add_service(LeasesServer::new(fake.clone()));
    tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener)));
    let address = format!("unix://{}", path.display());
    let containerd = Containerd::connect(Path::new(&address), "k8s.io");
    (directory, fake, containerd)
}

fn big() -> (Descriptor, Bytes) {
    let bytes: Vec<u8> = (0..2_500_000_u32).map(|at| (at % 251) as u8).collect();
    (Descriptor::of("application/octet-stream", &bytes), bytes.into())
}

fn label(key: &str, value: &str) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

#[tokio::test]
async fn content_travels_there_and_back() {
    let (_directory, fake, containerd) = serve();
    let content = containerd.content();
    let (descriptor, bytes) = big();
    assert_eq!(content.read(&descriptor.digest, u64::MAX).await.unwrap(), None);
    content.put(&descriptor, bytes.clone(), &[label("a", "1")]).await.unwrap();
    assert_eq!(content.read(&descriptor.digest, u64::MAX).await.unwrap().unwrap(), bytes);
    let info = content.info(&descriptor.digest).await.unwrap().unwrap();
    assert_eq!((info.size, info.labels["a"].as_str()), (2_500_000, "1"));
    assert_eq!(info.created, Some(std::time::UNIX_EPOCH + Duration::from_secs(1_000)));
    assert_eq!(content.walk().await.unwrap(), [info]);
    assert_eq!(fake.state().last_headers, ("k8s.io".to_owned(), None));
    let (source, size) = content.source(&descriptor.digest).await.unwrap().unwrap();
    assert_eq!(size, 2_500_000);
    let context = FetchContext::new(Instant::now() + Duration::from_secs(10), FetchClass::OnDemand);
    let stream = source.open(99_999..1_234_567, &context).await.unwrap();
    let pieces: Vec<Bytes> = stream.map(|item| item.unwrap()).collect().await;
    assert_eq!(pieces.concat(), &bytes[99_999..1_234_567]);
    assert!(content.delete(&descriptor.digest).await.unwrap());
    assert!(!content.delete(&descriptor.digest).await.unwrap());
}

#[tokio::test]
async fn existing_content_is_only_labelled() {
    let (_directory, fake, containerd) = serve();
    let content = containerd.content();
    let (descriptor, bytes) = big();
    content.put(&descriptor, bytes.clone(), &[label("a", "1")]).await.unwrap();
    content.put(&descriptor, bytes, &[label("b", "2")]).await.unwrap();
    let labels = content.info(&descriptor.digest).await.unwrap().unwrap().labels;
    assert_eq!(labels, BTreeMap::from([label("a", "1"), label("b", "2")]));
    assert_eq!(fake.state().aborted, Vec::<String>::new());
    let absent = content.label(&Digest::of(b"absent"), &[label("a", "1")]).await.unwrap_err();
    assert!(absent.is_not_found(), "{absent}");
}

#[tokio::test]
async fn a_broken_source_aborts_the_write() {
    let (_directory, fake, containerd) = serve();
    let content = containerd.content();
    let (descriptor, bytes) = big();
    let error = soci_oci::FetchError::new(FetchErrorKind::Unavailable, "reset");
    let items = [Ok(bytes.slice(..1_000_000)), Err(error)];
    let failed = content.put_stream(&descriptor, futures::stream::iter(items).boxed(), &[]).await;
    assert!(matches!(failed, Err(StoreError::Source { .. })));
    let short = futures::stream::iter([Ok(bytes.slice(..1_000_000))]).boxed();
    let failed = content.put_stream(&descriptor, short, &[]).await;
    assert!(matches!(failed, Err(StoreError::Mismatch { .. })));
    let other = futures::stream::iter([Ok(Bytes::from(vec![7; 2_500_000]))]).boxed();
    let failed = content.put_stream(&descriptor, other, &[]).await;
    assert!(matches!(failed, Err(StoreError::Mismatch { .. })), "{failed:?}");
    let state = fake.state();
    assert_eq!((state.aborted.len(), state.writes, state.blobs.len()), (3, 3, 0));
}

#[tokio::test]
async fn a_read_that_ends_early_is_an_error() {
    let (_directory, fake, containerd) = serve();
    let content = containerd.content();
    let (descriptor, bytes) = big();
    content.put(&descriptor, bytes, &[]).await.unwrap();
    fake.state().cut = Some(1_000_000);
    let error = content.read(&descriptor.digest, u64::MAX).await.unwrap_err();
    assert!(matches!(&error, StoreError::Source { source, .. } if source.kind() == FetchErrorKind::Protocol));
}

#[tokio::test]
async fn damaged_content_is_never_returned() {
    let (_directory, fake, containerd) = serve();
    let digest = Digest::of(b"content");
    fake.state().blobs.insert(digest.to_string(), (b"c0ntent".to_vec(), HashMap::new()));
    let read = containerd.content().read(&digest, 100).await;
    assert!(matches!(read, Err(StoreError::Corrupt { .. })), "{read:?}");
    let limited = containerd.content().read(&digest, 6).await;
    assert!(matches!(limited, Err(StoreError::TooLarge { size: 7, limit: 6, .. })), "{limited:?}");
}

#[tokio::test]
async fn writes_run_under_the_lease_and_it_ends() {
    let (_directory, fake, containerd) = serve();
    let lease = containerd.lease().await.unwrap();
    let leased = containerd.with_lease(&lease);
    let (descriptor, bytes) = big();
    leased.content().put(&descriptor, bytes, &[]).await.unwrap();
    assert_eq!(fake.state().last_headers, ("k8s.io".to_owned(), Some(lease.id().to_owned())));
    assert_eq!(fake.state().leases, [lease.id().to_owned()]);
    lease.end().await.unwrap();
    assert_eq!(fake.state().leases, Vec::<String>::new());
    drop(containerd.lease().await.unwrap());
    while !fake.state().leases.is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn pinning_asks_to_write_and_writes_nothing() {
    let (_directory, fake, containerd) = serve();
    let lease = containerd.lease().await.unwrap();
    let content = containerd.with_lease(&lease).content();
    let (descriptor, bytes) = big();
    assert!(!content.pin(&descriptor).await.unwrap());
    assert_eq!(fake.state().aborted.len(), 1);
    assert!(fake.state().blobs.is_empty());
    content.put(&descriptor, bytes, &[]).await.unwrap();
    assert!(content.pin(&descriptor).await.unwrap());
    let state = fake.state();
    assert_eq!((state.aborted.len(), state.writes), (1, 3));
    assert_eq!(state.last_headers.1.as_deref(), Some(lease.id()));
}

#[tokio::test]
async fn candidates_are_asked_for_by_label() {
    let (_directory, fake, containerd) = serve();
    containerd.content().index_candidates().await.unwrap();
    let filters = fake.state().filters.clone();
    let empty = Digest::of(b"{}");
    assert_eq!(filters[0], format!("labels.\"containerd.io/gc.ref.content.config\"=={empty}"));
}

#[tokio::test]
async fn an_absent_containerd_is_named_with_its_socket() {
    let containerd = Containerd::connect(Path::new("/nonexistent/containerd.sock"), "default");
    let error = containerd.content().info(&Digest::of(b"")).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.starts_with("cannot reach containerd at /nonexistent/containerd.sock: No such file"),
        "{text}"
    );
    assert_eq!(error.fetch_kind(), FetchErrorKind::Unavailable);
}

#[tokio::test]
async fn a_silent_containerd_ends_by_deadline() {
    let (_directory, fake, containerd) = serve();
    fake.state().silent = true;
    let containerd = containerd.with_timeout(Duration::from_millis(50));
    let error = containerd.content().info(&Digest::of(b"")).await.unwrap_err();
    assert!(matches!(error, StoreError::Deadline { .. }), "{error}");
}

#[tokio::test]
async fn a_namespace_that_is_no_header_is_an_error() {
    let containerd = Containerd::connect(Path::new("/nonexistent/containerd.sock"), "a\nb");
    assert!(matches!(containerd.content().walk().await, Err(StoreError::Namespace(_))));
}
