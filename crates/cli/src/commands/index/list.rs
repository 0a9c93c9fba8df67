//! `soci index list`.

use serde::Serialize;
use soci_index::SociIndex;
use soci_oci::Platform;
use soci_store::rfc3339;

use crate::app::{App, StoreKind};
use crate::cli::IndexList;
use crate::listing::{self, ImageFacts, Index};
use crate::output::ago;

/// One row: an index and an image it belongs to.
#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    size: usize,
    image_ref: String,
    platform: String,
    media_type: String,
    manifest_version: &'static str,
    created_at: Option<String>,
    #[serde(skip)]
    created: String,
}

pub(crate) async fn run(app: &App, args: IndexList) -> anyhow::Result<()> {
    let store = app.artifacts()?;
    let mut indexes = listing::indexes(&*store).await?;
    let facts = match &args.reference {
        Some(reference) => {
            let image = app.image(reference).await?;
            let loaded = app.load(&image).await?;
            for platform in args.platform.iter().filter(|_| loaded.index.is_some()) {
                // Says which platform the image lacks, instead of listing nothing.
                loaded.select(&soci_index::Platforms::These(vec![platform.clone()]))?;
            }
            let facts = ImageFacts::new(&image.name, &loaded);
            indexes.retain(|listed| facts.holds(&listed.index).is_some());
            // An index may belong to other images as well; they are shown as the reference shows them.
            if args.quiet { vec![facts] } else { all_images(app).await? }
        }
        None if args.quiet && args.platform.is_empty() => Vec::new(),
        None => all_images(app).await?,
    };
    let mut rows = Vec::new();
    for listed in &indexes {
        let found = rows_of(listed, &facts, &args.platform);
        if args.quiet && (!found.is_empty() || args.platform.is_empty()) {
            app.output.line(&listed.index.digest.to_string());
        }
        rows.extend(found);
    }
    if args.quiet {
        return Ok(());
    }
    if args.json {
        return app.output.json(&rows);
    }
    let header = ["DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED"];
    let cells = |row: Row| {
        let Row { digest, size, image_ref, platform, media_type, manifest_version, created, .. } = row;
        vec![digest, size.to_string(), image_ref, platform, media_type, manifest_version.to_owned(), created]
    };
    app.output.table(&header, &rows.into_iter().map(cells).collect::<Vec<_>>());
    Ok(())
}

/// Returns all images. Where artifacts are in the soci store a listing does not need containerd: rows then name no image.
async fn all_images(app: &App) -> anyhow::Result<Vec<ImageFacts>> {
    match listing::images(app).await {
        Err(error) if app.kind()? == StoreKind::Soci => {
            app.output.warn(&format!("images are not shown: {error:#}"));
            Ok(Vec::new())
        }
        other => other,
    }
}

/// Returns a row for each image that `listed` belongs to, or one without image; none if `wanted` has other platforms only.
fn rows_of(listed: &Index, facts: &[ImageFacts], wanted: &[Platform]) -> Vec<Row> {
    let index = &listed.index;
    let mut owners: Vec<(String, Option<Platform>)> =
        facts.iter().filter_map(|image| Some((image.name.clone(), image.holds(index)?))).collect();
    if owners.is_empty() {
        owners.push((String::new(), None));
    }
    let fits = |platform: &Option<Platform>| {
        wanted.is_empty()
            || platform.as_ref().is_some_and(|of| wanted.iter().any(|wanted| of.matches(wanted)))
    };
    owners.retain(|(_, platform)| fits(platform));
    owners.into_iter().map(|(name, platform)| row(listed, index, name, platform)).collect()
}

fn row(listed: &Index, index: &SociIndex, image_ref: String, platform: Option<Platform>) -> Row {
    Row {
        digest: index.digest.to_string(),
        size: index.bytes.len(),
        image_ref,
        platform: platform.map(|platform| platform.to_string()).unwrap_or_default(),
        media_type: index.manifest.media_type.clone(),
        manifest_version: index.version.as_str(),
        created_at: listed.created.map(rfc3339),
        created: ago(listed.created),
    }
}
