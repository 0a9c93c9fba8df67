//! `soci ztoc info`.

use serde::Serialize;
use soci_ztoc::{UncompressedOffset, Ztoc};

use crate::app::App;

#[derive(Debug, Serialize)]
struct Info {
    version: String,
    build_tool: String,
    size: usize,
    span_size: u64,
    num_spans: u32,
    num_files: usize,
    num_multi_span_files: usize,
    /// `null` if there are none.
    files: Option<Vec<FileInfo>>,
}

#[derive(Debug, Serialize)]
struct FileInfo {
    filename: String,
    offset: u64,
    size: u64,
    r#type: &'static str,
    start_span: u32,
    end_span: u32,
}

pub(crate) async fn run(app: &App, digest: &str) -> anyhow::Result<()> {
    let digest = super::super::digest(digest)?;
    let ztoc = super::read(&*app.artifacts()?, &digest).await?;
    app.output.json(&info(&ztoc))
}

fn info(ztoc: &Ztoc) -> Info {
    let spans = ztoc.spans();
    let files: Vec<FileInfo> = ztoc
        .entries()
        .map(|entry| FileInfo {
            filename: String::from_utf8_lossy(entry.name).into_owned(),
            offset: entry.data.0,
            size: entry.size,
            r#type: entry.kind.as_str(),
            start_span: spans.at(entry.data).0,
            // Of the byte after the last one: what the reference prints, and scripts compare.
            end_span: spans.at(UncompressedOffset(entry.data.0.saturating_add(entry.size))).0,
        })
        .collect();
    Info {
        version: ztoc.version().to_owned(),
        build_tool: ztoc.build_tool().to_owned(),
        size: ztoc.bytes().len(),
        span_size: spans.span_size(),
        num_spans: spans.len(),
        num_files: files.len(),
        num_multi_span_files: files.iter().filter(|file| file.start_span != file.end_span).count(),
        files: (!files.is_empty()).then_some(files),
    }
}
