//! `soci ztoc list`.

use anyhow::bail;
use serde::Serialize;
use soci_oci::media_type;

use crate::app::App;
use crate::cli::ZtocList;
use crate::listing::{self, ImageFacts};

#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    size: u64,
    layer_digest: String,
}

pub(crate) async fn run(app: &App, args: ZtocList) -> anyhow::Result<()> {
    let store = app.artifacts()?;
    let mut ztocs = listing::artifacts(&*store, media_type::ZTOC).await?;
    if let Some(name) = &args.image_ref {
        let image = app.image(name).await?;
        let facts = ImageFacts::new(&image.name, &app.load(&image).await?);
        let indexes = listing::indexes(&*store).await?;
        let own = indexes.iter().filter(|listed| facts.holds(&listed.index).is_some());
        let named: std::collections::HashSet<_> =
            own.flat_map(|listed| &listed.index.manifest.layers).map(|layer| layer.digest).collect();
        ztocs.retain(|ztoc| named.contains(&ztoc.info.digest));
    }
    if let Some(digest) = &args.ztoc_digest {
        ztocs.retain(|ztoc| ztoc.info.digest.to_string() == *digest);
        if ztocs.is_empty() && args.image_ref.is_some() {
            bail!("the specified ztoc doesn't exist or is not associated with the specified image");
        }
    }
    let rows = ztocs.into_iter().map(|ztoc| Row {
        digest: ztoc.info.digest.to_string(),
        size: ztoc.info.size,
        layer_digest: ztoc.layer.to_string(),
    });
    let rows: Vec<Row> = rows.collect();
    if args.quiet {
        rows.iter().for_each(|row| app.output.line(&row.digest));
        return Ok(());
    }
    if args.json {
        return app.output.json(&rows);
    }
    let cells = rows.into_iter().map(|row| vec![row.digest, row.size.to_string(), row.layer_digest]);
    app.output.table(&["DIGEST", "SIZE", "LAYER DIGEST"], &cells.collect::<Vec<_>>());
    Ok(())
}
