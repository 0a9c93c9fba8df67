//! `soci create`: indexes v1 for an image that containerd has.

use std::sync::Arc;

use anyhow::Context as _;
use soci_index::{Platforms, Stores};
use soci_oci::{Platform, labels};
use soci_store::ContentStore;

use crate::app::{App, StoreKind};
use crate::cli::Create;

/// The label by which the image record keeps its index.
const LABEL: &str = "soci-index";

pub(crate) async fn run(app: &App, args: Create) -> anyhow::Result<()> {
    let name = args.image.filter(|name| !name.is_empty()).context("source image needs to be specified")?;
    let options = args.ztoc.options()?;
    let kind = app.kind()?;
    let image = app.image(&name).await?;
    let loaded = app.load(&image).await?;
    let selected = loaded.select(&args.platforms.platforms(Platforms::Host))?;
    let leased = app.leased().await?;
    let artifacts: Arc<dyn ContentStore> = match kind {
        StoreKind::Containerd => leased.content(),
        StoreKind::Soci => Arc::new(app.soci_store()?),
    };
    let stores = Stores { image: leased.content(), artifacts };
    let several = selected.len() > 1;
    for (platform, entry) in selected {
        let digest = entry.descriptor.digest;
        let bytes = stores.image.read(&digest, soci_oci::manifest::MAX_MANIFEST_SIZE).await?;
        let bytes = bytes.with_context(|| format!("image manifest for {platform}: {digest}: not found"))?;
        let manifest = soci_oci::Manifest::decode(&bytes)
            .with_context(|| format!("image manifest for {platform}: {digest}"))?;
        let index =
            soci_index::build(&manifest, Some(&entry.descriptor), &stores, &options, &*app.output).await?;
        if kind == StoreKind::Containerd {
            let labels = image_labels(&platform, several, &index.digest.to_string());
            leased.images().label(&image.name, &labels).await?;
        }
    }
    Ok(())
}

/// Returns the labels that keep an index as long as the image. One of several platforms has one of its own, so that none
/// displaces another's.
fn image_labels(platform: &Platform, several: bool, digest: &str) -> Vec<(String, String)> {
    let prefix = labels::GC_REF_CONTENT;
    let mut all = vec![(format!("{prefix}.{LABEL}"), digest.to_owned())];
    if several {
        let platform = platform.to_string().replace('/', "-");
        all.push((format!("{prefix}.{LABEL}.{platform}"), digest.to_owned()));
    }
    all
}
