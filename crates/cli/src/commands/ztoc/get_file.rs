//! `soci ztoc get-file`.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use soci_oci::{BlobSource, Digest, media_type};

use super::extract;
use crate::app::App;
use crate::cli::GetFile;
use crate::listing;

pub(crate) async fn run(app: &App, args: GetFile) -> anyhow::Result<()> {
    let (Some(digest), Some(name)) = (args.digest, args.file) else {
        bail!("please provide both a ztoc digest and a filename to extract");
    };
    let digest = super::super::digest(&digest)?;
    let store = app.artifacts()?;
    let ztoc = super::read(&*store, &digest).await?;
    let range = extract::find(&ztoc, name.as_bytes())?;
    let artifacts = listing::artifacts(&*store, media_type::ZTOC).await?;
    let layer = artifacts.iter().find(|artifact| artifact.info.digest == digest);
    let layer =
        layer.with_context(|| format!("ztoc {digest}: no index says which layer it belongs to"))?.layer;
    let source = layer_source(app, &layer).await?;
    match &args.output {
        Some(path) => {
            let mut file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
            extract::write(&ztoc, range, &*source, &mut |bytes| {
                file.write_all(bytes).with_context(|| format!("writing {}", path.display()))
            })
            .await?;
            file.sync_all().with_context(|| format!("writing {}", path.display()))
        }
        None => {
            let mut print = |bytes: &[u8]| match app.output.bytes(bytes) {
                true => Ok(()),
                false => bail!("standard output is closed"),
            };
            extract::write(&ztoc, range, &*source, &mut print).await
        }
    }
}

/// Returns the layer's bytes: from the chosen store, else from containerd, which has the layers of pulled images.
async fn layer_source(app: &App, layer: &Digest) -> anyhow::Result<Arc<dyn BlobSource>> {
    if let Some((source, _)) = app.artifacts()?.source(layer).await? {
        return Ok(source);
    }
    if let Some((source, _)) = app.containerd().content().source(layer).await? {
        return Ok(source);
    }
    bail!("layer {layer}: not found in the content store; it was pulled lazily or removed")
}
