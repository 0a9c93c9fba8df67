//! Leases: what keeps content alive until something refers to it.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, SystemTime};

use super::{Containerd, MAX_MESSAGE};
use crate::proto::services::leases::v1 as wire;
use crate::proto::services::leases::v1::leases_client::LeasesClient;
use crate::{StoreError, rfc3339};

/// After this a lease ends by itself, should its holder die. containerd's own tools use the same.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// A lease of containerd's garbage collector. It ends when this is dropped, at the latest.
#[derive(Debug)]
pub struct Lease {
    id: String,
    containerd: Option<Containerd>,
}

pub(super) async fn create(containerd: &Containerd) -> Result<Lease, StoreError> {
    let random = RandomState::new();
    let id = format!("soci-{}-{:016x}", std::process::id(), random.hash_one(SystemTime::now()));
    let expire = rfc3339(SystemTime::now() + LIFETIME);
    let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expire)]);
    let request = containerd.request(wire::CreateRequest { id: id.clone(), labels })?;
    let mut client = client(containerd);
    let answer = containerd.within("creating lease", &id, client.create(request)).await?;
    let id = answer.into_inner().lease.map(|lease| lease.id).filter(|id| !id.is_empty()).unwrap_or(id);
    Ok(Lease { id, containerd: Some(containerd.clone()) })
}

fn client(containerd: &Containerd) -> LeasesClient<tonic::transport::Channel> {
    LeasesClient::new(containerd.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
}

impl Lease {
    /// Returns its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Ends the lease and waits for it. Content that nothing refers to by now will be collected.
    ///
    /// # Errors
    /// When containerd cannot be told; the lease then ends by itself within a day.
    pub async fn end(mut self) -> Result<(), StoreError> {
        match self.containerd.take() {
            Some(containerd) => delete(&containerd, &self.id).await,
            None => Ok(()),
        }
    }
}

async fn delete(containerd: &Containerd, id: &str) -> Result<(), StoreError> {
    let request = containerd.request(wire::DeleteRequest { id: id.to_owned(), sync: false })?;
    let mut client = client(containerd);
    match containerd.within("ending lease", id, client.delete(request)).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(containerd) = self.containerd.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let id = std::mem::take(&mut self.id);
        // Bounded by the deadline of a call; if the runtime ends first, the lease expires by its label.
        runtime.spawn(async move {
            if let Err(error) = delete(&containerd, &id).await {
                tracing::debug!(lease = id, %error, "lease is left to expire");
            }
        });
    }
}
