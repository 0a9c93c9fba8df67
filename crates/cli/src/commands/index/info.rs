//! `soci index info`.

use anyhow::{Context as _, bail};
use soci_index::SociIndex;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_store::StoreError;

use crate::app::App;
use crate::output::indent;

pub(crate) async fn run(app: &App, digest: &str) -> anyhow::Result<()> {
    let digest = super::super::digest(digest)?;
    let store = app.artifacts()?;
    let bytes = match store.read(&digest, MAX_MANIFEST_SIZE).await {
        Err(StoreError::TooLarge { .. }) => None,
        other => Some(other?.with_context(|| format!("couldn't retrieve artifact for {digest}: not found"))?),
    };
    match bytes.map(|bytes| SociIndex::decode(&digest, bytes)) {
        Some(Ok(index)) => {
            app.output.line(&indent(&String::from_utf8_lossy(&index.bytes)));
            Ok(())
        }
        _ if super::super::ztoc::is_ztoc(&*store, &digest).await => bail!(
            "the provided digest is of ztoc not SOCI index. Use \"soci ztoc info\" command to get detailed info of ztoc"
        ),
        Some(Err(error)) => Err(error.into()),
        None => bail!("the digest {digest} does not correspond to an index"),
    }
}
