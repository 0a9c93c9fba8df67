//! `soci rebuild-db`: there is no database; checks what the listings are derived from and says what it found.

use soci_index::{SociIndex, resolve};
use soci_oci::{Descriptor, media_type};
use soci_store::ContentStore;
use soci_ztoc::{DecodeLimits, Ztoc};

use crate::app::{App, StoreKind};
use crate::listing;

pub(crate) async fn run(app: &App) -> anyhow::Result<()> {
    let store = app.artifacts()?;
    let name = match app.kind()? {
        StoreKind::Containerd => format!("containerd's, namespace {}", app.containerd().namespace()),
        StoreKind::Soci => app.soci_store()?.layout().display().to_string(),
    };
    app.output.line(&format!("content store: {name}"));
    let indexes = listing::indexes(&*store).await?;
    let mut good: usize = 0;
    let mut faults = Vec::new();
    for listing::Index { index, .. } in &indexes {
        for artifact in &index.manifest.layers {
            match check(index, artifact, &*store).await? {
                None => good += 1,
                Some(fault) => faults.push(format!("index {}: {}: {fault}", index.digest, artifact.digest)),
            }
        }
    }
    for fault in &faults {
        app.output.line(fault);
    }
    app.output.line(&format!(
        "{} indexes, {good} artifacts are sound, {} are not; listings are read from the content store, nothing is \
         to be rebuilt",
        indexes.len(),
        faults.len()
    ));
    Ok(())
}

/// Returns what is wrong with an artifact of an index, if anything is.
async fn check(
    index: &SociIndex,
    artifact: &Descriptor,
    store: &dyn ContentStore,
) -> anyhow::Result<Option<String>> {
    let bytes = match store.read(&artifact.digest, resolve::MAX_ZTOC_SIZE).await {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(Some("missing; it is fetched again when it is needed".to_owned())),
        Err(error @ (soci_store::StoreError::Corrupt { .. } | soci_store::StoreError::TooLarge { .. })) => {
            return Ok(Some(error.to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    let fault = match artifact.media_type.as_str() {
        media_type::ZTOC => {
            Ztoc::decode(bytes, &DecodeLimits::default()).err().map(|error| error.to_string())
        }
        media_type::SOCI_PREFETCH => {
            soci_index::prefetch::Prefetch::decode(&bytes).err().map(|error| error.to_string())
        }
        _ => None,
    };
    Ok(fault.or_else(|| {
        let bound = SociIndex::layer(artifact).is_some();
        (!bound).then(|| format!("index {} does not say to which layer it belongs", index.digest))
    }))
}
