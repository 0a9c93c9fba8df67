//! What a reader's range takes along of what lies behind it.
//!
//! A program that loads jumps about in a layer, but mostly to places next to where it was, and it asks for one after the
//! other: with each miss the line stands still for a round trip. Where a layer is to be completed anyway, the range
//! therefore goes on behind the span that is waited for, over spans that are missing, as far as the line carries in the
//! time that an answer takes. The next miss is often among them, and if not, its answer is on its way while they arrive.
//!
//! In all else they are background work's: stored as they came, within its share of the budget and of the cache. There
//! are none while others wait for bytes too, since the line does not stand still then, and none under a
//! bandwidth limit.

use soci_oci::FetchClass;
use soci_ztoc::SpanId;

use crate::core::LayerCore;
use crate::slot::{FetchPermit, SpanForm};

/// Returns the permits for the spans behind `last` that its range takes along, in order; none for most ranges.
pub(crate) fn behind(core: &LayerCore, last: &FetchPermit) -> Vec<FetchPermit> {
    let wanted =
        last.priority().class() == FetchClass::OnDemand && core.is_hurried() && !core.shared.line.is_asked();
    let most = core.shared.line.idle().min(core.shared.settings.background.max_range);
    if !wanted || most == 0 {
        return Vec::new();
    }
    let (mut spans, mut bytes) = (Vec::new(), 0);
    for span in (last.id().0.saturating_add(1)..core.spans.len()).map(SpanId) {
        let len = core.compressed_len(span);
        // One of which more than half fits is taken whole.
        if bytes + len / 2 > most || !core.lacks(span, SpanForm::Compressed) {
            break;
        }
        spans.push(span);
        bytes += len;
    }
    if spans.is_empty() || !core.shared.cache.has_room(bytes, FetchClass::Background) {
        return Vec::new();
    }
    spans
        .into_iter()
        .map_while(|span| core.bring(span, SpanForm::Compressed, FetchClass::Background))
        .collect()
}
