//! What becomes of a span whose bytes have arrived: verified, inflated, served, stored. Runs on the workers.
//!
//! Nothing is served before its digest was checked, so every byte that a waiter gets is verified. Parts are served as
//! inflation reaches them, which may have begun while the span arrived; storing comes after all are served. A span that
//! nobody waits for in the background is stored as it came, which costs a third of the disk and none of the inflation.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use soci_oci::FetchClass;
use soci_ztoc::SpanId;

use crate::budget::Grant;
use crate::core::LayerCore;
use crate::inflating::Inflating;
use crate::meters::Event;
use crate::slot::{FetchPermit, SpanForm};
use crate::sources::SourceId;
use crate::span_cache::Stored;
use crate::{ReadError, ReadErrorKind, fetch, mend, verify};

/// Where bytes came from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    /// From a source.
    Source(SourceId),
    /// From a source, after another answer was wrong.
    Fresh(SourceId),
    /// From the cache, where they are compressed. They were verified before they were stored.
    Cache,
}

/// A span that has arrived.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) permit: FetchPermit,
    /// The span's share of the byte budget, held until it is stored.
    pub(crate) grant: Grant,
    /// The compressed bytes; none when they are in the cache.
    pub(crate) bytes: Bytes,
    /// What was done of it while it arrived.
    pub(crate) begun: Option<Inflating>,
    pub(crate) origin: Origin,
}

/// Queues an arrived span.
pub(crate) fn submit(core: &Arc<LayerCore>, arrived: Arrived) {
    let priority = arrived.permit.priority().clone();
    let urgent = (priority.class() > FetchClass::Background).then(|| core.shared.demand.enter());
    let task = Arc::clone(core);
    core.shared.workers.submit(priority, move || {
        work(&task, arrived);
        drop(urgent);
    });
}

fn work(core: &Arc<LayerCore>, arrived: Arrived) {
    let Arrived { mut permit, grant, bytes: mut compressed, begun, origin } = arrived;
    let id = permit.id();
    match origin {
        Origin::Cache => match core.shared.cache.read_all(&core.key(id, SpanForm::Compressed)) {
            Some(bytes) => compressed = bytes,
            // It was evicted or damaged meanwhile.
            None => {
                drop(grant);
                return fetch::anew(core, permit);
            }
        },
        Origin::Source(source) | Origin::Fresh(source) => {
            let genuine = match &begun {
                Some(begun) => begun.verifies(core, &compressed),
                None => verify::is_genuine(&core.spans, id, &compressed),
            };
            if !genuine {
                core.meter.count(Event::Mismatches, 1);
                drop((grant, compressed, begun));
                return mismatch(core, permit, origin, source);
            }
            let class = permit.priority().class();
            core.meter.count(Event::SpansFetched(class), 1);
            core.meter.count(Event::BytesFetched(class), core.compressed_len(id));
            if permit.want() == SpanForm::Compressed {
                store(core, id, SpanForm::Compressed, &compressed, class);
                match permit.stored() {
                    Some(wanted) => permit = wanted,
                    None => return,
                }
            }
        }
    }
    let inflating = match begun {
        Some(begun) => Ok(begun),
        None => {
            let looked = Instant::now();
            match core.window(id) {
                Ok(window) => Inflating::new(core, id, &window),
                Err(error) => {
                    // What has come need not come again.
                    if !core.has(id, SpanForm::Compressed) {
                        store(core, id, SpanForm::Compressed, &compressed, permit.priority().class());
                    }
                    drop((grant, compressed));
                    return mend::mend(core, permit, looked, error);
                }
            }
        }
    };
    match inflating.and_then(|inflating| inflating.finish(core, &compressed, |valid| permit.serve(valid))) {
        Ok(bytes) => {
            drop(compressed);
            let class = permit.priority().class();
            // Whom the next read of this span comes from finds it in memory; what was read ahead is found on disk.
            if class == FetchClass::OnDemand {
                core.shared.recent.insert(core.id, id, bytes.clone());
            }
            permit.whole(&bytes);
            if store(core, id, SpanForm::Plain, &bytes, class) {
                let compressed = core.key(id, SpanForm::Compressed);
                if core.shared.cache.contains(&compressed) {
                    core.shared.cache.remove(&compressed);
                }
            } else {
                core.shared.recent.insert(core.id, id, bytes);
            }
        }
        Err(error) if matches!(origin, Origin::Cache) && error.kind() == ReadErrorKind::Integrity => {
            core.shared.cache.remove(&core.key(id, SpanForm::Compressed));
            drop((grant, compressed));
            fetch::anew(core, permit);
        }
        Err(error) => {
            core.meter.count(Event::SpansFailed(permit.priority().class()), 1);
            core.spoil(id);
            permit.fail(&error);
        }
    }
}

/// The first wrong answer is asked for anew, the second is an error.
fn mismatch(core: &Arc<LayerCore>, permit: FetchPermit, origin: Origin, source: SourceId) {
    let id = permit.id();
    if matches!(origin, Origin::Source(_)) {
        tracing::warn!(ztoc = %core.ztoc, span = id.0, "span digests do not match, fetching it once more");
        return fetch::again(core, permit, source);
    }
    core.spoil(id);
    core.meter.count(Event::SpansFailed(permit.priority().class()), 1);
    let message = format!(
        "{}: span digests do not match, twice; the layer in the registry and the SOCI index do not belong together",
        core.name(id)
    );
    permit.fail(&ReadError::new(ReadErrorKind::Integrity, message));
}

/// Stores a span. Returns whether it is in the cache; when not, whoever waits was served or is served from memory.
fn store(core: &LayerCore, id: SpanId, form: SpanForm, bytes: &[u8], class: FetchClass) -> bool {
    let open = || !core.closed.is_cancelled();
    match core.shared.cache.put(&core.key(id, form), bytes, class, open) {
        Ok(Stored::Yes) => {
            core.failing.store(false, Ordering::Relaxed);
            return true;
        }
        Ok(Stored::NoRoom | Stored::Unwanted) => {}
        // Once per disk that fills up, not once per span.
        Err(error) if core.failing.swap(true, Ordering::Relaxed) => {
            tracing::debug!(ztoc = %core.ztoc, span = id.0, %error, "cannot cache a span");
        }
        Err(error) => {
            tracing::warn!(ztoc = %core.ztoc, span = id.0, %error, "cannot cache spans, serving them from memory");
        }
    }
    core.meter.count(Event::NotCached, 1);
    if class == FetchClass::Background {
        core.full.store(true, Ordering::Relaxed);
    }
    false
}
