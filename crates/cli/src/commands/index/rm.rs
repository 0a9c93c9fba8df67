//! `soci index remove`.
//!
//! In containerd's store its garbage collector removes what only the removed indexes named. The soci store has none, so that
//! is done here: what any other document of the store names stays, and nothing is removed while somebody makes an index.
//! The daemon keeps copies of its own of what mounted layers need.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use serde_json::Value;
use soci_index::SociIndex;
use soci_oci::Digest;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_store::{Collecting, ContentStore, LocalStore};

use crate::app::{App, StoreKind};
use crate::cli::IndexRemove;
use crate::listing::{self, ImageFacts};

/// How long another command may go on making an index.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks whether it still does.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) async fn run(app: &App, args: IndexRemove) -> anyhow::Result<()> {
    let store = app.artifacts()?;
    let digests: Vec<Digest> = match (&args.reference, args.digests.as_slice()) {
        (Some(_), [_, ..]) => bail!("please provide either index digests or image ref, but not both"),
        (Some(reference), []) => {
            let image = app.image(reference).await?;
            let facts = ImageFacts::new(&image.name, &app.load(&image).await?);
            let indexes = listing::indexes(&*store).await?;
            let own = indexes.into_iter().filter(|listed| facts.holds(&listed.index).is_some());
            own.map(|listed| listed.index.digest).collect()
        }
        (None, []) => {
            app.output.warn("nothing to remove: give digests of indexes, or an image with --ref");
            return Ok(());
        }
        (None, digests) => {
            digests.iter().map(|digest| super::super::digest(digest)).collect::<Result<_, _>>()?
        }
    };
    let soci = match app.kind()? {
        StoreKind::Containerd => None,
        StoreKind::Soci => Some(app.soci_store()?),
    };
    let _alone = match &soci {
        Some(soci) => Some(alone(soci).await?),
        None => None,
    };
    // All are tried: one that is gone does not keep the others.
    let mut failed = Vec::new();
    let mut named = BTreeSet::new();
    for digest in digests {
        match remove(&*store, &digest).await {
            Ok(index) => {
                let SociIndex { manifest, .. } = index;
                named.extend(manifest.layers.iter().chain([&manifest.config]).map(|blob| blob.digest));
            }
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    if let Some(soci) = &soci
        && let Err(error) = collect(soci, named).await
    {
        failed.push(format!("what the removed indexes named stays: {error:#}"));
    }
    if failed.is_empty() { Ok(()) } else { Err(anyhow!(failed.join("; "))) }
}

/// Waits for those who make indexes.
async fn alone(store: &LocalStore) -> anyhow::Result<Collecting> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(collecting) = store.try_collect()? {
            return Ok(collecting);
        }
        if Instant::now() >= end {
            bail!(
                "another soci makes an index in {}: nothing is removed, try again when it is done",
                store.layout().display()
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Removes what is in `named` and not named by any document of the store.
async fn collect(store: &LocalStore, mut named: BTreeSet<Digest>) -> anyhow::Result<()> {
    for candidate in store.index_candidates().await? {
        let bytes = store.read(&candidate.digest, MAX_MANIFEST_SIZE).await?;
        // What is no JSON names nothing.
        let document = bytes.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        document.iter().for_each(|document| keep(document, &mut named));
    }
    for digest in named {
        store.delete(&digest).await.with_context(|| digest.to_string())?;
    }
    Ok(())
}

/// Takes every digest that a document holds out of `named`, wherever it stands.
fn keep(document: &Value, named: &mut BTreeSet<Digest>) {
    match document {
        Value::String(text) => {
            if let Ok(digest) = text.parse() {
                named.remove(&digest);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| keep(value, named)),
        Value::Object(fields) => fields.values().for_each(|value| keep(value, named)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Removes an index and returns what it was.
async fn remove(store: &dyn ContentStore, digest: &Digest) -> anyhow::Result<SociIndex> {
    let Some(info) = store.info(digest).await? else {
        bail!("the index of the digest {digest} doesn't exist");
    };
    let index = match info.size {
        0..=MAX_MANIFEST_SIZE => match store.read(digest, MAX_MANIFEST_SIZE).await {
            Ok(bytes) => bytes.and_then(|bytes| SociIndex::decode(digest, bytes).ok()),
            // What is damaged is no use to anybody, but what it was cannot be told.
            Err(error) => return Err(error.into()),
        },
        _ => None,
    };
    let Some(index) = index else {
        bail!("the digest {digest} does not correspond to an index");
    };
    store.delete(digest).await?;
    Ok(index)
}
