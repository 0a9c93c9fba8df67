//! A client of the snapshot service, a snapshotter's own or containerd's: for what a pull sends, one call at a time.

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
pub use tonic::Code;

use api::snapshots_client::SnapshotsClient;

/// A connection to a snapshotter. Calls block; not for use on an async thread.
#[derive(Debug)]
pub struct Snapshots {
    connection: Connection,
    /// What containerd keeps all that is made from its collector by.
    lease: Option<String>,
}

impl Snapshots {
    /// Connects to a socket when the first call is made.
    ///
    /// # Errors
    /// Where no runtime can be made for the calls.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self { connection: connect(socket)?, lease: None })
    }

    /// Makes what follows belong to a lease of containerd's.
    #[must_use]
    pub fn leased(self, lease: &str) -> Self {
        Self { lease: Some(lease.to_owned()), ..self }
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
        let request = self.within(namespace, message)?;
        let mut client = self.client();
        Ok(self.connection.runtime.block_on(client.prepare(request))?.into_inner().mounts)
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
        let request = self.within(namespace, message)?;
        let mut client = self.client();
        Ok(self.connection.runtime.block_on(client.view(request))?.into_inner().mounts)
    }

    /// Returns the mounts of an active snapshot.
    ///
    /// # Errors
    /// What the service answers.
    pub fn mounts(&self, namespace: &str, key: &str) -> Result<Vec<Mount>, tonic::Status> {
        let message = api::MountsRequest { snapshotter: "soci".to_owned(), key: key.to_owned() };
        let request = self.within(namespace, message)?;
        let mut client = self.client();
        Ok(self.connection.runtime.block_on(client.mounts(request))?.into_inner().mounts)
    }

    /// Commits an active snapshot under a name.
    ///
    /// # Errors
    /// What the service answers.
    pub fn commit(&self, namespace: &str, name: &str, key: &str) -> Result<(), tonic::Status> {
        let message = api::CommitSnapshotRequest {
            snapshotter: "soci".to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
        };
        let request = self.within(namespace, message)?;
        let mut client = self.client();
        self.connection.runtime.block_on(client.commit(request))?;
        Ok(())
    }

    /// Returns whether a snapshot is a committed one.
    ///
    /// # Errors
    /// What the service answers; *not found* where there is none.
    pub fn is_committed(&self, namespace: &str, key: &str) -> Result<bool, tonic::Status> {
        let message = api::StatSnapshotRequest { snapshotter: "soci".to_owned(), key: key.to_owned() };
        let request = self.within(namespace, message)?;
        let mut client = self.client();
        let info = self.connection.runtime.block_on(client.stat(request))?.into_inner().info;
        Ok(info.is_some_and(|info| info.kind() == api::Kind::Committed))
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// What the service answers.
    pub fn remove(&self, namespace: &str, key: &str) -> Result<(), tonic::Status> {
        let message = api::RemoveSnapshotRequest { snapshotter: "soci".to_owned(), key: key.to_owned() };
        let request = self.within(namespace, message)?;
        let mut client = self.client();
        self.connection.runtime.block_on(client.remove(request))?;
        Ok(())
    }

    /// Has the service delete what removed snapshots left.
    ///
    /// # Errors
    /// What the service answers.
    pub fn cleanup(&self, namespace: &str) -> Result<(), tonic::Status> {
        let request = self.within(namespace, api::CleanupRequest { snapshotter: "soci".to_owned() })?;
        let mut client = self.client();
        self.connection.runtime.block_on(client.cleanup(request))?;
        Ok(())
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.connection.channel.clone())
    }

    fn within<T>(&self, namespace: &str, message: T) -> Result<Request<T>, tonic::Status> {
        let mut request = Request::new(message);
        let mut set = |name: &'static str, value: &str| {
            let value = value.parse().map_err(|_| tonic::Status::invalid_argument(name))?;
            request.metadata_mut().insert(name, value);
            Ok::<_, tonic::Status>(())
        };
        set("containerd-namespace", namespace)?;
        if let Some(lease) = &self.lease {
            set("containerd-lease", lease)?;
        }
        Ok(request)
    }
}
