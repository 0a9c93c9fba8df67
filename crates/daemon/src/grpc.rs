//! containerd's snapshot service over [`Snapshotter`]: messages in, messages out, and errors as status codes.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::SystemTime;

use futures::Stream;
use soci_oci::with_causes;
use soci_snapshotter::{Code, Commit, Error, Info, Kind, Mount, Prepare, Snapshotter, Update};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::proto::snapshots as wire;
use crate::proto::snapshots::snapshots_server::Snapshots;
use crate::proto::types;
use crate::traces::{self, snapshot_span};

/// Request header that carries containerd's namespace.
pub const NAMESPACE_HEADER: &str = "containerd-namespace";
/// Snapshots per message of a list.
const PAGE: usize = 100;

/// The service.
#[derive(Debug, Clone)]
pub struct Service(pub Snapshotter);

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let namespace = namespace(request.metadata());
        let wire::PrepareSnapshotRequest { snapshotter: _, key, parent, labels } = request.into_inner();
        tracing::debug!(key, parent, "prepare");
        let span = snapshot_span!("snapshot.prepare");
        traces::label(&span, &labels);
        let work = self.0.prepare(Prepare { namespace, key, parent, labels });
        let mounts = call(span, work).await?;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts: mounts_out(mounts) }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let namespace = namespace(request.metadata());
        let wire::ViewSnapshotRequest { snapshotter: _, key, parent, labels } = request.into_inner();
        tracing::debug!(key, parent, "view");
        let span = snapshot_span!("snapshot.view");
        traces::label(&span, &labels);
        let mounts = call(span, self.0.view(Prepare { namespace, key, parent, labels })).await?;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts: mounts_out(mounts) }))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        let mounts = call(snapshot_span!("snapshot.mounts"), self.0.mounts(&request.get_ref().key)).await?;
        Ok(Response::new(wire::MountsResponse { mounts: mounts_out(mounts) }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let wire::CommitSnapshotRequest { snapshotter: _, name, key, labels, parent } = request.into_inner();
        tracing::debug!(key, name, "commit");
        let span = snapshot_span!("snapshot.commit");
        traces::label(&span, &labels);
        call(span, self.0.commit(Commit { key, name, parent, labels })).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        tracing::debug!(key = request.get_ref().key, "remove");
        call(snapshot_span!("snapshot.remove"), self.0.remove(&request.get_ref().key)).await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let info = self.0.stat(&request.get_ref().key).map_err(status)?;
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(info_out(info)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let wire::UpdateSnapshotRequest { snapshotter: _, info, update_mask } = request.into_inner();
        let wire::Info { name, labels, .. } = info.unwrap_or_default();
        let fields = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let info =
            call(snapshot_span!("snapshot.update"), self.0.update(Update { name, labels, fields })).await?;
        Ok(Response::new(wire::UpdateSnapshotResponse { info: Some(info_out(info)) }))
    }

    type ListStream = Pin<Box<dyn Stream<Item = Result<wire::ListSnapshotsResponse, Status>> + Send>>;

    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let found = self.0.list(&request.get_ref().filters).map_err(status)?;
        let mut found = found.into_iter().map(info_out);
        let pages = std::iter::from_fn(move || {
            let info: Vec<_> = found.by_ref().take(PAGE).collect();
            (!info.is_empty()).then_some(Ok(wire::ListSnapshotsResponse { info }))
        });
        Ok(Response::new(Box::pin(futures::stream::iter(pages))))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let usage = self.0.usage(&request.get_ref().key).await.map_err(status)?;
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        Ok(Response::new(wire::UsageResponse { size: number(usage.size), inodes: number(usage.inodes) }))
    }

    async fn cleanup(&self, _: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        let work = async {
            self.0.cleanup().await;
            Ok(())
        };
        call(snapshot_span!("snapshot.cleanup"), work).await?;
        Ok(Response::new(()))
    }
}

/// Does `work` within its span, which says what containerd is answered.
async fn call<T>(span: tracing::Span, work: impl Future<Output = Result<T, Error>>) -> Result<T, Status> {
    let told = |status: &Status| (status.code(), traces::is_fault(status.code()));
    traces::within(span, async { work.await.map_err(status) }, told).await
}

fn namespace(metadata: &MetadataMap) -> Option<String> {
    let value = metadata.get(NAMESPACE_HEADER)?.to_str().ok()?;
    (!value.is_empty()).then(|| value.to_owned())
}

fn mounts_out(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let mount = |mount: Mount| types::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    };
    mounts.into_iter().map(mount).collect()
}

fn info_out(info: Info) -> wire::Info {
    let kind = match info.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    let time = |time: SystemTime| Some(prost_types::Timestamp::from(time));
    wire::Info {
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: time(info.created),
        updated_at: time(info.updated),
        labels: info.labels.into_iter().collect::<HashMap<_, _>>(),
    }
}

/// One status code per class, as containerd's clients map them back.
#[deny(clippy::wildcard_enum_match_arm)]
fn status(error: Error) -> Status {
    let message = with_causes(&error);
    match error.code() {
        Code::NotFound => Status::not_found(message),
        Code::AlreadyExists => Status::already_exists(message),
        Code::InvalidArgument => Status::invalid_argument(message),
        Code::FailedPrecondition => Status::failed_precondition(message),
        Code::Unavailable => {
            // The outage behind it is one line of the log, however many calls meet it.
            tracing::debug!(error = message, "call failed");
            Status::unavailable(message)
        }
        Code::Unimplemented => Status::unimplemented(message),
        Code::Internal => {
            tracing::error!(error = message, "call failed");
            Status::unknown(message)
        }
    }
}
