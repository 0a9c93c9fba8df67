//! `soci prefetch info`.

use std::fmt::Write as _;
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use soci_index::SociIndex;
use soci_index::prefetch::Prefetch;
use soci_index::resolve::MAX_ZTOC_SIZE;
use soci_oci::media_type;

use super::total;
use crate::app::App;
use crate::cli::PrefetchInfo;
use crate::listing;
use crate::output::indent;

pub(crate) async fn run(app: &App, args: PrefetchInfo) -> anyhow::Result<()> {
    let digest = super::super::digest(&args.digest.digest)?;
    let store = app.artifacts()?;
    let bytes = store.read(&digest, MAX_ZTOC_SIZE).await?;
    let bytes =
        bytes.with_context(|| format!("prefetch artifact {digest}: not found in the content store"))?;
    let prefetch = match Prefetch::decode(&bytes) {
        Ok(prefetch) => prefetch,
        Err(_) if SociIndex::decode(&digest, bytes.clone()).is_ok() => {
            bail!("the provided digest is not a prefetch artifact (type: soci_index)")
        }
        Err(_) if super::super::ztoc::is_ztoc(&*store, &digest).await => {
            bail!("the provided digest is not a prefetch artifact (type: soci_layer)")
        }
        Err(error) => return Err(error).with_context(|| format!("prefetch artifact {digest}")),
    };
    let all = listing::artifacts(&*store, media_type::SOCI_PREFETCH).await?;
    let artifact = all.into_iter().find(|artifact| artifact.info.digest == digest);
    let mut text = format!("Digest:        {digest}\n");
    writeln!(text, "Version:       {}", prefetch.version)?;
    writeln!(text, "Span Ranges:   {}", prefetch.prefetch_spans.len())?;
    match artifact {
        Some(artifact) => {
            writeln!(text, "Layer Digest:  {}", artifact.layer)?;
            writeln!(text, "Size:          {} bytes", artifact.info.size)?;
            writeln!(text, "Created:       {}", artifact.info.created.map_or("n/a".to_owned(), calendar))?;
        }
        None => text.push_str("\nWarning: no index in the content store names this artifact.\n"),
    }
    text.push_str("\nPrefetch Spans:\n");
    for (at, range) in prefetch.prefetch_spans.iter().enumerate() {
        let (start, end) = (range.start_span, range.end_span);
        writeln!(text, "  [{at}] StartSpan: {start}, EndSpan: {end} (covers {} spans)", range.len())?;
        if range.priority != 0 {
            writeln!(text, "      Priority: {}", range.priority)?;
        }
    }
    writeln!(text, "\nTotal spans to prefetch: {}", total(&prefetch))?;
    if args.json {
        writeln!(text, "\nRaw JSON:\n{}", indent(&String::from_utf8_lossy(&prefetch.encode())))?;
    }
    app.output.text(&text);
    Ok(())
}

/// Returns a time as `2025-11-26 18:01:26`, in UTC.
fn calendar(at: SystemTime) -> String {
    let at = time::OffsetDateTime::from(at);
    let (date, hour, minute, second) = (at.date(), at.hour(), at.minute(), at.second());
    format!("{date} {hour:02}:{minute:02}:{second:02}")
}
