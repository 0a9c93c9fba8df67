//! `soci create`: indexes v1 for an image that containerd has.

use std::sync::Arc;

use anyhow::Context as _;
use soci_index::{Image, Platforms, SociIndex, Stores};
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{Digest, Platform, labels};
use soci_store::ContentStore;

use crate::app::{App, StoreKind};
use crate::cli::Create;

/// The label by which the image record keeps its index. The Go tool knows this one alone.
const LABEL: &str = "soci-index";

pub(crate) async fn run(app: &App, args: Create) -> anyhow::Result<()> {
    let name = args.image.filter(|name| !name.is_empty()).context("source image needs to be specified")?;
    let options = args.ztoc.options()?;
    let kind = app.kind()?;
    let image = app.image(&name).await?;
    let loaded = app.load(&image).await?;
    let selected = loaded.select(&args.platforms.platforms(Platforms::Own))?;
    let leased = app.leased().await?;
    let artifacts: Arc<dyn ContentStore> = match kind {
        StoreKind::Containerd => leased.content(),
        StoreKind::Soci => Arc::new(app.soci_store()?.for_writing()?),
    };
    let stores = Stores { image: leased.content(), artifacts };
    if kind == StoreKind::Containerd
        && let Some(label) = displaced(&image, &loaded, &*stores.artifacts).await
    {
        leased.images().label(&image.name, &[label]).await?;
    }
    for (platform, entry) in selected {
        let digest = entry.descriptor.digest;
        let bytes = stores.image.read(&digest, MAX_MANIFEST_SIZE).await?;
        let bytes = bytes.with_context(|| format!("image manifest for {platform}: {digest}: not found"))?;
        let manifest = soci_oci::Manifest::decode(&bytes)
            .with_context(|| format!("image manifest for {platform}: {digest}"))?;
        let index =
            soci_index::build(&manifest, Some(&entry.descriptor), &stores, &options, &*app.output).await?;
        if kind == StoreKind::Containerd {
            let mut labels = vec![(common_label(), index.digest.to_string())];
            if loaded.index.is_some() {
                labels.push((own_label(&entry.platform), index.digest.to_string()));
            }
            leased.images().label(&image.name, &labels).await?;
        }
    }
    Ok(())
}

/// Returns the label that names the index made last, as the Go tool sets it.
fn common_label() -> String {
    format!("{}.{LABEL}", labels::GC_REF_CONTENT)
}

/// Returns the label that one platform of an image of several has beside it. The next platform's index displaces the one
/// before it from the common label, in this run or in a later one; from here only a newer one of the same platform does.
fn own_label(platform: &Platform) -> String {
    let mut label = format!("{}.{}", common_label(), platform.to_string().replace('/', "-"));
    // Images for Windows have the same platform in several versions.
    if let Some(version) = &platform.os_version {
        label.push('-');
        label.push_str(version);
    }
    label
}

/// Returns what keeps the index that only the common label keeps: one by a tool that knows no other label, and of a
/// platform that need not be the one whose index displaces it.
async fn displaced(
    image: &soci_store::Image,
    loaded: &Image,
    store: &dyn ContentStore,
) -> Option<(String, String)> {
    loaded.index.as_ref()?;
    let common = common_label();
    let digest: Digest = image.labels.get(&common)?.parse().ok()?;
    let text = digest.to_string();
    if image.labels.iter().any(|(label, value)| *label != common && *value == text) {
        return None;
    }
    // What is gone or damaged need not be kept.
    let bytes = store.read(&digest, MAX_MANIFEST_SIZE).await.ok().flatten()?;
    let subject = SociIndex::decode(&digest, bytes).ok()?.manifest.subject?;
    let entry = loaded.entries.iter().find(|entry| entry.descriptor.digest == subject.digest)?;
    Some((own_label(&entry.platform), text))
}
