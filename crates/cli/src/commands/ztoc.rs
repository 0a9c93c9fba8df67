//! `soci ztoc`.

mod extract;
mod get_file;
mod info;
mod list;

use anyhow::{Context as _, bail};
use soci_index::SociIndex;
use soci_index::resolve::MAX_ZTOC_SIZE;
use soci_oci::Digest;
use soci_store::ContentStore;
use soci_ztoc::{DecodeLimits, Ztoc};

use crate::app::App;
use crate::cli::Ztoc as Command;

pub(crate) async fn run(app: &App, command: Command) -> anyhow::Result<()> {
    match command {
        Command::List(args) => list::run(app, args).await,
        Command::Info(args) => info::run(app, &args.digest).await,
        Command::GetFile(args) => get_file::run(app, args).await,
    }
}

/// Reads and decodes a zTOC.
///
/// # Errors
/// When it is not in the store, or something else; an index is told apart.
async fn read(store: &dyn ContentStore, digest: &Digest) -> anyhow::Result<Ztoc> {
    let bytes = store.read(digest, MAX_ZTOC_SIZE).await?;
    let bytes = bytes.with_context(|| format!("ztoc {digest}: not found in the content store"))?;
    if SociIndex::decode(digest, bytes.clone()).is_ok() {
        bail!(
            "the provided digest belongs to a SOCI index. Use `soci index info` to get the detailed information about it"
        );
    }
    Ztoc::decode(bytes, &DecodeLimits::default()).with_context(|| format!("ztoc {digest}"))
}

/// Whether `digest` is a zTOC.
pub(crate) async fn is_ztoc(store: &dyn ContentStore, digest: &Digest) -> bool {
    read(store, digest).await.is_ok()
}
