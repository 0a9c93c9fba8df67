//! `soci push`: the newest index v1 of each platform, with what it names.

use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use soci_index::push::{ExistingIndex, PushOptions, newest};
use soci_index::{Platforms, Stores};
use soci_oci::{ImageRef, annotation};
use soci_registry::{NoMeters, Registry};

use crate::app::App;
use crate::cli::Push;
use crate::credentials;

/// Uploads at a time where no other number is given.
const UPLOADS: NonZeroUsize = NonZeroUsize::new(3).unwrap();
/// More than this many uploads at a time are refused, as a number that cannot be meant.
const MAX_UPLOADS: u64 = 1024;

pub(crate) async fn run(app: &App, mut args: Push) -> anyhow::Result<()> {
    let name = args.image.take().filter(|name| !name.is_empty());
    let name = name.context("please provide an image reference to push")?;
    let options = options(app, &args)?;
    let reference: ImageRef = name.parse()?;
    let auth = credentials::authenticator(&args.registry, reference.registry()).await?;
    let registry = Registry::new(args.registry.settings(), auth, Arc::new(NoMeters))?;
    let repository = registry.repository(&reference);

    let image = app.image(&name).await?;
    let loaded = app.load(&image).await?;
    let stores = Stores { image: app.containerd().content(), artifacts: app.artifacts()? };
    let mut indexes = Vec::new();
    for (platform, entry) in loaded.select(&args.platforms.platforms(Platforms::Own))? {
        let digest = entry.descriptor.digest;
        let bytes = stores.image.read(&digest, soci_oci::manifest::MAX_MANIFEST_SIZE).await?;
        let manifest = bytes.and_then(|bytes| soci_oci::Manifest::decode(&bytes).ok());
        let bound =
            manifest.and_then(|manifest| manifest.annotations.get(annotation::INDEX_DIGEST)?.parse().ok());
        let (index, v2) = newest(&digest, bound.as_ref(), &stores.artifacts).await?;
        if v2 {
            app.output.line(
                "[WARN] Skippping SOCI index manifest v2. You should push the whole image with higher level tools \
                 like finch or nerdctl.",
            );
        }
        match index {
            Some(index) => indexes.push(index),
            None => bail!("could not find any soci index manifest v1 to push for platform {platform}"),
        }
    }
    for index in indexes {
        soci_index::push(&index, &stores, &repository, &options, &app.context(), &*app.output).await?;
    }
    Ok(())
}

fn options(app: &App, args: &Push) -> anyhow::Result<PushOptions> {
    let existing = match args.existing_index.as_str() {
        "warn" => ExistingIndex::Warn,
        "skip" => ExistingIndex::Skip,
        "allow" => ExistingIndex::Allow,
        other => bail!("unexpected value for flag existing-index: {other}, expected types [warn skip allow]"),
    };
    let parallel = match args.max_concurrent_uploads {
        0 => UPLOADS,
        uploads if uploads > MAX_UPLOADS => {
            if !args.quiet {
                app.output.warn(&format!(
                    "--max-concurrent-uploads={uploads} is over the limit of {MAX_UPLOADS}; using {UPLOADS}"
                ));
            }
            UPLOADS
        }
        uploads => usize::try_from(uploads).ok().and_then(NonZeroUsize::new).unwrap_or(UPLOADS),
    };
    Ok(PushOptions { existing, parallel, quiet: args.quiet })
}
