//! A snapshotter that only answers: each layer of a pull is there as soon as it is asked for. Nothing is mounted or
//! written, so that what containerd itself takes for a pull can be measured.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use futures::stream::{self, once};
use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::api::snapshots_server::{Snapshots, SnapshotsServer};
use super::api::{
    CleanupRequest, CommitSnapshotRequest, Empty, Info, Kind, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest,
    StatSnapshotRequest, StatSnapshotResponse, ViewSnapshotRequest,
};

/// containerd's label of the snapshot that a pull wants to have in the end.
const TARGET: &str = "containerd.io/snapshot.ref";

/// A running service; ends when dropped.
#[derive(Debug)]
pub struct Answering(JoinHandle<()>);

impl Answering {
    /// Listens at `socket`. The first layer is answered after `first`, which stands for what a snapshotter must ask a
    /// registry. Must be called inside a runtime.
    ///
    /// # Errors
    /// Where the socket cannot be bound.
    pub fn start(socket: &Path, first: Duration) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let service = Service { first, asked: OnceCell::new(), known: Mutex::default() };
        let incoming = stream::unfold(listener, async |listener| {
            let stream = listener.accept().await.map(|(stream, _)| stream);
            Some((stream, listener))
        });
        let server = Server::builder().add_service(SnapshotsServer::new(service));
        Ok(Self(tokio::spawn(async move {
            // It ends when it is dropped; a caller that goes away is no trouble here.
            let _ = server.serve_with_incoming(incoming).await;
        })))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Service {
    first: Duration,
    asked: OnceCell<()>,
    /// By name.
    known: Mutex<HashMap<String, Info>>,
}

#[tonic::async_trait]
impl Snapshots for Service {
    type ListStream = Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send>>;

    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { parent, labels, .. } = request.into_inner();
        let Some(name) = labels.get(TARGET).cloned() else { return Err(only_pulls()) };
        self.asked.get_or_init(|| tokio::time::sleep(self.first)).await;
        let info = Info { name: name.clone(), parent, kind: Kind::Committed.into(), labels };
        self.known.lock().insert(name.clone(), info);
        Err(Status::already_exists(name))
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let info = self.known.lock().get(&key).cloned();
        let info = info.ok_or_else(|| Status::not_found(key))?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info) }))
    }

    /// Answers the filters that containerd sends after a Prepare: a target, then its parent.
    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        let names = |filter: &String, info: &Info| {
            filter.split(",parent").next().is_some_and(|target| target.contains(&info.name))
        };
        let wanted = |info: &&Info| filters.is_empty() || filters.iter().any(|filter| names(filter, info));
        let info = self.known.lock().values().filter(wanted).cloned().collect();
        Ok(Response::new(Box::pin(once(async { Ok(ListSnapshotsResponse { info }) }))))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<Empty>, Status> {
        self.known.lock().remove(&request.into_inner().key);
        Ok(Response::new(Empty {}))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<Empty>, Status> {
        Ok(Response::new(Empty {}))
    }

    async fn view(
        &self,
        _: Request<ViewSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        Err(only_pulls())
    }

    async fn mounts(&self, _: Request<MountsRequest>) -> Result<Response<PrepareSnapshotResponse>, Status> {
        Err(only_pulls())
    }

    async fn commit(&self, _: Request<CommitSnapshotRequest>) -> Result<Response<Empty>, Status> {
        Err(only_pulls())
    }
}

fn only_pulls() -> Status {
    Status::unimplemented("this snapshotter answers pulls only")
}
