//! `soci prefetch list`.

use serde::Serialize;
use soci_index::prefetch::Prefetch;
use soci_index::resolve::MAX_PREFETCH_SIZE;
use soci_oci::media_type;
use soci_store::rfc3339;

use super::{UNREADABLE, total};
use crate::app::App;
use crate::cli::PrefetchList;
use crate::listing;
use crate::output::ago;

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    digest: String,
    layer_digest: String,
    total_spans: i64,
    created_at: String,
    #[serde(skip)]
    created: String,
}

pub(crate) async fn run(app: &App, args: PrefetchList) -> anyhow::Result<()> {
    let store = app.artifacts()?;
    let mut rows = Vec::new();
    for artifact in listing::artifacts(&*store, media_type::SOCI_PREFETCH).await? {
        let bytes = store.read(&artifact.info.digest, MAX_PREFETCH_SIZE).await.ok().flatten();
        let prefetch = bytes.and_then(|bytes| Prefetch::decode(&bytes).ok());
        rows.push(Row {
            digest: artifact.info.digest.to_string(),
            layer_digest: artifact.layer.to_string(),
            total_spans: prefetch.as_ref().map_or(UNREADABLE, total),
            created_at: rfc3339(artifact.info.created.unwrap_or(std::time::UNIX_EPOCH)),
            created: ago(artifact.info.created),
        });
    }
    if args.json {
        // Without rows the reference prints null.
        return app.output.json(&(!rows.is_empty()).then_some(rows));
    }
    let cells = |row: Row| {
        let spans =
            if row.total_spans == UNREADABLE { "N/A".to_owned() } else { row.total_spans.to_string() };
        vec![row.digest, row.layer_digest, spans, row.created]
    };
    let rows: Vec<Vec<String>> = rows.into_iter().map(cells).collect();
    app.output.table(&["DIGEST", "LAYER DIGEST", "SPANS", "CREATED"], &rows);
    Ok(())
}
