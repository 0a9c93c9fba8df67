//! The open layers of a process, and what they share: cache, memory, threads.
//!
//! A layer is known by its zTOC, so two images that hold it read through one set of slots and one cache, with the
//! sources of both. A layer closes when its last reader is dropped, or by [`LayerPool::close`]: its requests end, its memory is freed, and its
//! cached spans stay until they are evicted or removed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use soci_oci::{BlobSource, Digest};
use soci_ztoc::SpanTable;
use tokio::runtime::Handle;

use crate::background::Background;
use crate::budget::{Budget, Limits};
use crate::buffers::Buffers;
use crate::core::LayerCore;
use crate::demand::Demand;
use crate::fill::Fill;
use crate::line::Line;
use crate::reader::LayerReader;
use crate::recent::Recent;
use crate::sources::SourceId;
use crate::workers::Workers;
use crate::{Meters, Settings, SpanCache, ZtocFile};

/// What a layer is made of.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Digest of the zTOC.
    pub ztoc: Digest,
    /// The zTOC as it is stored: decoder windows are read from it as long as the layer is open.
    pub ztoc_file: Arc<dyn ZtocFile>,
    /// Its spans, from the decoded zTOC.
    pub spans: Arc<SpanTable>,
}

/// What layers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) cache: Arc<SpanCache>,
    pub(crate) settings: Settings,
    pub(crate) meters: Meters,
    pub(crate) handle: Handle,
    pub(crate) buffers: Arc<Buffers>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) workers: Workers,
    pub(crate) recent: Recent,
    pub(crate) demand: Arc<Demand>,
    pub(crate) background: Background,
    pub(crate) fill: Fill,
    pub(crate) line: Arc<Line>,
}

/// The open layers.
#[derive(Debug)]
pub struct LayerPool {
    shared: Arc<Shared>,
    /// Lock order: taken first.
    layers: Mutex<BTreeMap<Digest, Open>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Open {
    core: Arc<LayerCore>,
    readers: usize,
}

/// What is in flight at a moment. All are zero when nothing is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Layers that are open.
    pub layers: usize,
    /// Spans that are fetched or inflated.
    pub spans: usize,
    /// Bytes that these take.
    pub bytes: u64,
    /// Jobs that wait for a thread or run.
    pub jobs: usize,
    /// Readers and pulls that wait, and requests made for them.
    pub waiting: usize,
}

impl LayerPool {
    /// Returns a pool without layers. Its tasks run on the runtime it is called in.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn new(cache: Arc<SpanCache>, settings: Settings, meters: Meters) -> Arc<Self> {
        let keep = usize::try_from(settings.keep).unwrap_or(usize::MAX);
        let shared = Arc::new_cyclic(|shared: &Weak<Shared>| {
            let idle = Weak::clone(shared);
            let trim = move || idle.upgrade().iter().for_each(|shared| shared.trim());
            Shared {
                buffers: Buffers::new(keep),
                budget: Budget::new(Limits {
                    total: settings.in_flight,
                    reserve: settings.reserve,
                    background: settings.background.in_flight,
                }),
                workers: Workers::new(settings.workers, trim),
                recent: Recent::new(settings.recent),
                demand: Demand::new(),
                background: Background::new(settings.background.clone()),
                fill: Fill::default(),
                line: Arc::default(),
                handle: Handle::current(),
                cache,
                settings,
                meters,
            }
        });
        Arc::new(Self { shared, layers: Mutex::default(), next: AtomicU64::new(1) })
    }

    /// Opens a layer, or opens it once more: then `source` joins those it has, and is asked first.
    pub fn open(self: &Arc<Self>, spec: LayerSpec, source: Arc<dyn BlobSource>) -> Arc<LayerReader> {
        let mut layers = self.layers.lock();
        let open = layers.entry(spec.ztoc).or_insert_with(|| {
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let (file, spans) = (Arc::clone(&spec.ztoc_file), Arc::clone(&spec.spans));
            Open {
                core: Arc::new(LayerCore::new(id, spec.ztoc, file, spans, Arc::clone(&self.shared))),
                readers: 0,
            }
        });
        open.readers += 1;
        let core = Arc::clone(&open.core);
        let source = core.sources.add(source);
        drop(layers);
        *core.file.lock() = spec.ztoc_file;
        Arc::new(LayerReader::new(Arc::downgrade(self), core, source))
    }

    /// Returns a layer that nobody has opened.
    #[cfg(test)]
    pub(crate) fn core(&self, spec: LayerSpec) -> Arc<LayerCore> {
        let LayerSpec { ztoc, ztoc_file, spans } = spec;
        Arc::new(LayerCore::new(0, ztoc, ztoc_file, spans, Arc::clone(&self.shared)))
    }

    /// Opens a layer that is open once more; its source is asked last.
    pub(crate) fn reopen(
        pool: &Weak<Self>,
        core: &Arc<LayerCore>,
        source: Arc<dyn BlobSource>,
    ) -> Arc<LayerReader> {
        if let Some(pool) = pool.upgrade()
            && let Some(open) = pool.layers.lock().get_mut(&core.ztoc)
            // One that was closed by force may have a successor.
            && Arc::ptr_eq(&open.core, core)
        {
            open.readers += 1;
        }
        let source = core.sources.join(source);
        Arc::new(LayerReader::new(Weak::clone(pool), Arc::clone(core), source))
    }

    /// Ends one reader; the last one closes the layer.
    pub(crate) fn release(pool: &Weak<Self>, core: &Arc<LayerCore>, source: SourceId) {
        core.sources.remove(source);
        let Some(pool) = pool.upgrade() else { return core.close() };
        let mut layers = pool.layers.lock();
        // One that was closed by force may have a successor.
        let of_core = |open: &&mut Open| Arc::ptr_eq(&open.core, core);
        let Some(open) = layers.get_mut(&core.ztoc).filter(of_core) else { return };
        open.readers -= 1;
        if open.readers == 0 {
            layers.remove(&core.ztoc);
            drop(layers);
            core.close();
        }
    }

    /// Closes a layer whoever still reads it: its requests end, and nothing of it is stored any more. Readers that are left
    /// get errors; opened again, it is a new layer.
    pub fn close(&self, ztoc: &Digest) {
        let open = self.layers.lock().remove(ztoc);
        if let Some(open) = open {
            open.core.close();
        }
    }

    /// Returns what is in flight.
    pub fn gauges(&self) -> Gauges {
        let layers = self.layers.lock();
        Gauges {
            layers: layers.len(),
            spans: layers.values().map(|open| open.core.slots.len()).sum(),
            bytes: self.shared.budget.used(),
            jobs: self.shared.workers.busy(),
            waiting: self.shared.demand.count(),
        }
    }

    /// Does `work` that a pull waits for; what is done in the background steps aside for it, at most for some seconds.
    pub async fn before_background<T>(&self, work: impl Future<Output = T>) -> T {
        self.shared.demand.during_pull(work).await
    }

    /// Returns how many layers wait to be completed in the background.
    pub fn queued(&self) -> usize {
        self.shared.background.queued()
    }

    /// Returns the cache.
    pub fn cache(&self) -> &Arc<SpanCache> {
        &self.shared.cache
    }

    /// Frees memory and files that are kept only for speed. Happens by itself after some seconds without work.
    pub fn trim(&self) {
        self.shared.trim();
    }
}

impl Shared {
    fn trim(&self) {
        self.recent.clear();
        self.buffers.trim();
        self.cache.trim();
    }
}
