//! Decoder windows, read from the stored zTOC when a span needs one.
//!
//! Keeping them in memory would cost 32 KiB per span of every mounted layer. The file is opened per read: a window
//! precedes megabytes of inflation. What is read is checked against what was validated when the zTOC was decoded.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use soci_ztoc::{SpanId, SpanTable, Window};

use crate::{ReadError, ReadErrorKind};

/// Returns the window that span `id` starts from. Blocks on the local disk.
pub(crate) fn load(file: &Path, spans: &SpanTable, id: SpanId) -> Result<Window, ReadError> {
    let window = spans.window(id);
    let what = || format!("reading the start of span {} from {}", id.0, file.display());
    let len = usize::try_from(window.range.end.saturating_sub(window.range.start))
        .map_err(|_| ReadError::new(ReadErrorKind::Local, what()))?;
    let mut bytes = vec![0; len];
    if len > 0 {
        File::open(file)
            .and_then(|opened| opened.read_exact_at(&mut bytes, window.range.start))
            .map_err(|error| ReadError::because(ReadErrorKind::Local, what(), error))?;
    }
    window.check(&bytes).map_err(|error| ReadError::because(ReadErrorKind::Integrity, what(), error))
}
