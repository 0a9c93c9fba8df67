//! `soci index remove`.

use anyhow::{anyhow, bail};
use soci_index::SociIndex;
use soci_oci::Digest;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_store::ContentStore;

use crate::app::App;
use crate::cli::IndexRemove;
use crate::listing::{self, ImageFacts};

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
    // All are tried: one that is gone does not keep the others.
    let mut failed = Vec::new();
    for digest in digests {
        if let Err(error) = remove(&*store, &digest).await {
            failed.push(format!("{error:#}"));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(anyhow!(failed.join("; "))) }
}

async fn remove(store: &dyn ContentStore, digest: &Digest) -> anyhow::Result<()> {
    let Some(info) = store.info(digest).await? else {
        bail!("the index of the digest {digest} doesn't exist");
    };
    let index = match info.size {
        0..=MAX_MANIFEST_SIZE => match store.read(digest, MAX_MANIFEST_SIZE).await {
            Ok(Some(bytes)) => SociIndex::decode(digest, bytes).is_ok(),
            Ok(None) => false,
            // What is damaged is no use to anybody, but what it was cannot be told.
            Err(error) => return Err(error.into()),
        },
        _ => false,
    };
    if !index {
        bail!("the digest {digest} does not correspond to an index");
    }
    store.delete(digest).await?;
    Ok(())
}
