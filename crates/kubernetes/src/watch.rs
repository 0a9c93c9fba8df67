//! Keeps the store equal to what the API server has.
//!
//! One task owns the connection and follows each selection over it (all namespaces or one, and one secret type, since the
//! field selector takes one). A 401, a TLS failure or a changed file ends the connection and the next one is built from
//! the files as they are then. Nothing here ends before the process does, and nothing waits for it: without an API server
//! this keychain is empty, and it becomes full whenever the server appears.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::Rng;
use tokio_util::sync::CancellationToken;

use crate::back_off::BackOff;
use crate::connect::Connection;
use crate::kubeconfig::{Location, locate, places};
use crate::secret::SecretType;
use crate::selection::{Follower, Selection};
use crate::settings::Settings;
use crate::synced::{Synced, told};

/// Syncs until `stop` is cancelled.
pub(crate) async fn run(synced: Arc<Synced>, settings: Settings, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = sync_for_ever(&synced, &settings) => {}
    }
}

async fn sync_for_ever(synced: &Synced, settings: &Settings) {
    let timing = &settings.timing;
    let selections = selections(settings);
    let mut back_off = BackOff::new(timing);
    let mut noticed = HashSet::new();
    loop {
        let Some(location) = locate(settings) else {
            synced.unconnected(format!(
                "no kubeconfig at {}; write one there, or set kubeconfig_path: it is used as soon as it is there",
                places(settings)
            ));
            let wait = timing.appear.mul_f64(rand::rng().random_range(1.0..5.0));
            tokio::time::sleep(wait).await;
            continue;
        };
        let connection = match Connection::open(&location, settings).await {
            Ok(connection) => connection,
            Err(error) => {
                synced.unconnected(told(&name(&location), &error, error.advice()));
                tokio::time::sleep(back_off.next()).await;
                continue;
            }
        };
        for notice in connection.notices.iter().filter(|notice| !noticed.contains(*notice)) {
            tracing::warn!("{notice}");
        }
        noticed.extend(connection.notices.iter().cloned());
        let since = Instant::now();
        synced.begin(&selections);
        tokio::select! {
            () = connection.outdated(timing) => {
                tracing::info!(server = connection.server, "connecting to the API server anew");
            }
            () = refused(&connection, &selections, synced, settings) => {
                back_off.lasted(since.elapsed());
                tokio::time::sleep(back_off.next()).await;
            }
        }
    }
}

fn name(location: &Location) -> String {
    match location {
        Location::Files(paths) => {
            paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(":")
        }
        Location::InCluster => "service account".to_owned(),
    }
}

fn selections(settings: &Settings) -> Vec<Selection> {
    let namespaces: Vec<Option<Arc<str>>> = match settings.namespaces.as_slice() {
        [] => vec![None],
        some => some.iter().map(|namespace| Some(namespace.as_str().into())).collect(),
    };
    let kinds: &[SecretType] = match settings.legacy_dockercfg {
        true => &[SecretType::DockerConfigJson, SecretType::DockerCfg],
        false => &[SecretType::DockerConfigJson],
    };
    let all = namespaces.iter().flat_map(|namespace| {
        kinds.iter().map(move |kind| Selection { namespace: namespace.clone(), kind: *kind })
    });
    all.collect()
}

/// Follows the selections until the server refuses the connection for one of them.
async fn refused(connection: &Connection, selections: &[Selection], synced: &Synced, settings: &Settings) {
    let follow = |selection: &Selection| {
        let follower = Follower {
            client: &connection.client,
            server: &connection.server,
            synced,
            timing: &settings.timing,
            selection: selection.clone(),
        };
        follower.follow()
    };
    let mut followed: FuturesUnordered<_> = selections.iter().map(follow).collect();
    followed.next().await;
}
