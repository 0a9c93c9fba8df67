//! `soci convert`: an image that loads lazily, with indexes v2.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use soci_index::standalone::convert_layout;
use soci_index::{Converted, Platforms, SociIndex, Stores};
use soci_oci::ImageRef;
use soci_store::ContentStore;

use crate::app::{App, StoreKind};
use crate::cli::Convert;

pub(crate) async fn run(app: &App, args: Convert) -> anyhow::Result<()> {
    let given = |text: Option<OsString>| text.filter(|text| !text.is_empty());
    let source = given(args.source).context("source image needs to be specified")?;
    let destination = given(args.destination).context("destination needs to be specified")?;
    let platforms = args.platforms.platforms(Platforms::Own);
    let options = args.ztoc.options()?;
    if args.standalone {
        let (source, destination) = (Path::new(&source), Path::new(&destination));
        let work = std::env::temp_dir();
        let beside = destination.parent().filter(|parent| !parent.as_os_str().is_empty());
        let work = if work.is_dir() { &work } else { beside.unwrap_or(Path::new(".")) };
        convert_layout(source, destination, args.format, &platforms, work, &options, &*app.output).await?;
        return Ok(());
    }
    let text = |text: OsString| text.into_string().map_err(|_| anyhow!("an image reference is text"));
    let (source, destination) = (text(source)?, text(destination)?);
    check_destination(&destination)
        .context("the destination image must be a tagged ref of the form \"registry/repository:tag\"")?;
    let kind = app.kind()?;
    let image = app.image(&source).await?;
    let leased = app.leased().await?;
    // Everything the new image is made of goes where its image record is, so that it can be pushed from there.
    let stores = Stores { image: leased.content(), artifacts: leased.content() };
    let converted = soci_index::convert(&image.target, &platforms, &stores, &options, &*app.output).await?;
    leased.images().set(&destination, &converted.target).await?;
    if kind == StoreKind::Soci {
        copy_artifacts(&converted, &*stores.artifacts, &app.soci_store()?.for_writing()?).await?;
    }
    Ok(())
}

/// Checks that `text` is a full reference with a tag and without a digest.
fn check_destination(text: &str) -> anyhow::Result<()> {
    let reference: ImageRef = text.parse().context("could not parse reference")?;
    if !text.starts_with(&reference.name()) {
        bail!("could not parse reference: repository name must be canonical, as in {reference}");
    }
    if text[reference.name().len()..].split('@').next().is_none_or(str::is_empty) {
        bail!("reference must be tagged");
    }
    if reference.digest().is_some() {
        bail!("reference must not contain a digest");
    }
    Ok(())
}

/// Copies the new indexes with what they name, so that the snapshotter finds them in its own store.
async fn copy_artifacts(
    converted: &Converted,
    from: &dyn ContentStore,
    to: &dyn ContentStore,
) -> anyhow::Result<()> {
    for (_, index) in &converted.indexes {
        let SociIndex { manifest, bytes, .. } = index;
        for artifact in manifest.layers.iter().chain([&manifest.config]) {
            let max = soci_index::resolve::MAX_ZTOC_SIZE;
            let content: Option<Bytes> = from.read(&artifact.digest, max).await?;
            let content = content.with_context(|| format!("{}: not found", artifact.digest))?;
            to.put(artifact, content, &[]).await?;
        }
        to.put(&index.descriptor(), bytes.clone(), &[]).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_full_tagged_references() {
        let check = |text: &str| check_destination(text).map_err(|error| format!("{error:#}"));
        assert_eq!(check("reg.example:5000/team/app:v1"), Ok(()));
        assert_eq!(check("docker.io/library/nginx:1"), Ok(()));
        assert_eq!(check("reg.example/app"), Err("reference must be tagged".into()));
        let digest = soci_oci::Digest::of(b"");
        assert_eq!(
            check(&format!("reg.example/app:1@{digest}")),
            Err("reference must not contain a digest".into())
        );
        assert_eq!(check(&format!("reg.example/app@{digest}")), Err("reference must be tagged".into()));
        assert!(check("nginx:1").is_err_and(|text| text.starts_with("could not parse reference")));
        assert!(check("Reg.example/A b").is_err_and(|text| text.starts_with("could not parse reference")));
    }
}
