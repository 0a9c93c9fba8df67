//! A client of a snapshotter's own socket, for what containerd's clients other than ours send: labels above all.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use tonic::Request;
use tonic::transport::Channel;

use crate::cri::{Connection, connect};

#[allow(
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    clippy::pedantic,
    clippy::all,
    reason = "generated from proto/snapshots.proto"
)]
mod api {
    tonic::include_proto!("containerd.services.snapshots.v1");
}

pub mod answering;

pub use api::Mount;
use api::snapshots_client::SnapshotsClient;

/// A connection to a snapshotter. Calls block; not for use on an async thread.
#[derive(Debug)]
pub struct Snapshots(Connection);

impl Snapshots {
    /// Connects to a socket when the first call is made.
    ///
    /// # Errors
    /// Where no runtime can be made for the calls.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self(connect(socket)?))
    }

    /// Prepares a snapshot in a namespace. A layer that is mounted lazily is answered by *already exists*.
    ///
    /// # Errors
    /// What the service answers.
    pub fn prepare(
        &self,
        namespace: &str,
        key: &str,
        parent: &str,
        labels: &[(&str, &str)],
    ) -> Result<Vec<Mount>, tonic::Status> {
        let labels: HashMap<String, String> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let message = api::PrepareSnapshotRequest {
            snapshotter: "soci".to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let request = within(namespace, message)?;
        let mut client = self.client();
        Ok(self.0.runtime.block_on(client.prepare(request))?.into_inner().mounts)
    }

    /// Makes a view of a committed snapshot.
    ///
    /// # Errors
    /// What the service answers.
    pub fn view(&self, namespace: &str, key: &str, parent: &str) -> Result<Vec<Mount>, tonic::Status> {
        let message = api::ViewSnapshotRequest {
            snapshotter: "soci".to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
        };
        let request = within(namespace, message)?;
        let mut client = self.client();
        Ok(self.0.runtime.block_on(client.view(request))?.into_inner().mounts)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// What the service answers.
    pub fn remove(&self, namespace: &str, key: &str) -> Result<(), tonic::Status> {
        let message = api::RemoveSnapshotRequest { snapshotter: "soci".to_owned(), key: key.to_owned() };
        let request = within(namespace, message)?;
        let mut client = self.client();
        self.0.runtime.block_on(client.remove(request))?;
        Ok(())
    }

    /// Has the service delete what removed snapshots left.
    ///
    /// # Errors
    /// What the service answers.
    pub fn cleanup(&self, namespace: &str) -> Result<(), tonic::Status> {
        let request = within(namespace, api::CleanupRequest { snapshotter: "soci".to_owned() })?;
        let mut client = self.client();
        self.0.runtime.block_on(client.cleanup(request))?;
        Ok(())
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.0.channel.clone())
    }
}

fn within<T>(namespace: &str, message: T) -> Result<Request<T>, tonic::Status> {
    let mut request = Request::new(message);
    let value = namespace.parse().map_err(|_| tonic::Status::invalid_argument("namespace"))?;
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}
