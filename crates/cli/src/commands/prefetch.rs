//! `soci prefetch`.

mod info;
mod list;

use crate::app::App;
use crate::cli::Prefetch;

/// What is there instead of a number of spans that cannot be told.
const UNREADABLE: i64 = -1;

pub(crate) async fn run(app: &App, command: Prefetch) -> anyhow::Result<()> {
    match command {
        Prefetch::List(args) => list::run(app, args).await,
        Prefetch::Info(args) => info::run(app, args).await,
    }
}

/// Returns how many spans an artifact names, those named twice counted twice.
fn total(prefetch: &soci_index::prefetch::Prefetch) -> i64 {
    let total: u64 = prefetch.prefetch_spans.iter().map(|range| range.len()).sum();
    i64::try_from(total).unwrap_or(i64::MAX)
}
