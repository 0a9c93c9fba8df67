//! Live layers: what is mounted and served by this process.
//!
//! [`Live`] is the snapshotter's [`LayerProvider`]. It joins the crates that know one thing each: the index is found by
//! [`session`], its zTOCs are fetched by [`artifacts`], stored by [`ztocs`] and kept by [`claims`]; [`mounting`] mounts a
//! layer, now or again; its tree, reader and FUSE session are made by [`mounted`], and its zTOC is had again by [`kept`];
//! [`listed`] has what its prefetch artifact names fetched first; a layer without zTOC is unpacked by [`unpack`];
//! [`below`] tells what a layer implies; [`observe`] shows all of it.
//!
//! What must hold: a record returned by `mount_lazy` suffices to mount again without network or containerd, and all that
//! it names is on disk; nothing here looks into a mount of ours; no lock is held while anything waits.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_trait::async_trait;
use parking_lot::Mutex;
use soci_auth::AuthBoard;
use soci_fs::{FuseHub, HeaderCheck, OpaqueXattr};
use soci_layer::unpack::Below;
use soci_layer::{BackgroundSettings, LayerPool, Settings as ReaderSettings, SpanCache};
use soci_oci::{Digest, with_causes};
use soci_registry::Registry;
use soci_snapshotter::provider::{MAX_REFERENCES, SetbackKind};
use soci_snapshotter::{
    Ancestor, ImageFacts, LayerFacts, LayerProvider, LayerRequest, LazyError, Lower, MountRecord, Record,
    ReleaseError, ResolveError, RestoreError, SnapshotDir, UnpackError, Usage,
};
use soci_store::{Containerd, ContentStore, LocalStore};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::field::Empty;

use crate::Config;
use crate::allocator;
use crate::metrics::{Metrics, Timing, names};
use crate::traces;

pub mod artifacts;
pub mod below;
pub mod claims;
pub mod content;
mod kept;
mod listed;
pub mod mounted;
mod mounting;
pub mod observe;
pub mod session;
pub mod unpack;
pub mod ztocs;

use below::{Layers, Lower as Beneath};
use claims::Claims;
use content::LocalContent;
use kept::PulledAs;
use listed::List;
use mounted::{Ground, Mounted};
use session::{Image, Sessions};
use ztocs::Ztocs;

/// How often images that nobody pulls any more are looked for.
const SWEEP: Duration = Duration::from_secs(30);

/// The layers of this process.
#[derive(Debug)]
pub struct Live {
    /// This, for work that outlives a call.
    this: Weak<Self>,
    registry: Registry,
    /// Told which images are in use.
    board: Arc<AuthBoard>,
    containerd: Containerd,
    soci: Arc<dyn ContentStore>,
    ztocs: Arc<Ztocs>,
    claims: Arc<Claims>,
    sessions: Arc<Sessions>,
    ground: Arc<Ground>,
    metrics: Metrics,
    background: bool,
    /// Whether prefetch artifacts are honoured.
    prefetch: bool,
    mount_timeout: Duration,
    /// By snapshot.
    mounts: Mutex<BTreeMap<u64, Arc<Mounted>>>,
    /// By snapshot: the images that its layer was pulled as, oldest first.
    pulls: Mutex<BTreeMap<u64, Vec<PulledAs>>>,
    /// Told when a layer was mounted or has gone.
    changed: Arc<Notify>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Live {
    /// Opens everything beneath `root`. Blocks on the disk; call it within a tokio runtime. Uses no network.
    ///
    /// # Errors
    /// With the directory that cannot be used.
    pub fn open(
        root: &Path,
        config: &Config,
        userxattr: bool,
        registry: Registry,
        board: Arc<AuthBoard>,
        metrics: Metrics,
    ) -> anyhow::Result<Arc<Self>> {
        let ztocs = Arc::new(Ztocs::open(root).with_context(|| format!("zTOCs beneath {root:?}"))?);
        let soci = LocalStore::open(root).with_context(|| format!("content beneath {root:?}"))?;
        let spans = root.join("soci").join("spans");
        let cache = SpanCache::open(&spans, config.cache.clone().into())
            .with_context(|| format!("span cache {spans:?}"))?;
        let background =
            BackgroundSettings { bytes_per_second: config.background_rate, ..BackgroundSettings::default() };
        let reader =
            ReaderSettings { fetch_timeout: config.blob.request, background, ..ReaderSettings::default() };
        let hub = FuseHub::new(tokio::runtime::Handle::current(), FuseHub::suitable_threads())
            .context("start FUSE threads")?;
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let claims = Arc::new(Claims::default());
        let resolving = session::Settings {
            discovery: config.discovery,
            timeout: config.mount_timeout,
            prefetch: config.prefetch,
        };
        let pool = LayerPool::new(cache, reader, soci_layer::Meters::new(Arc::new(metrics.clone())));
        let sessions = Sessions::new(
            resolving,
            Arc::clone(&ztocs),
            Arc::clone(&claims),
            Arc::clone(&pool),
            metrics.clone(),
            tracker.clone(),
            stop.clone(),
        );
        let ground = Ground {
            pool,
            hub,
            opaque: if userxattr { OpaqueXattr::User } else { OpaqueXattr::Trusted },
            header_check: if config.verify_headers { HeaderCheck::FirstRead } else { HeaderCheck::Off },
            read_timeout: config.read_timeout,
            statfs: spans,
        };
        let live = Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            registry,
            board,
            containerd: Containerd::connect(&config.containerd, "default"),
            soci: Arc::new(soci),
            ztocs,
            claims,
            sessions: Arc::new(sessions),
            ground: Arc::new(ground),
            metrics,
            background: config.background_fetch,
            prefetch: config.prefetch,
            mount_timeout: config.mount_timeout,
            mounts: Mutex::default(),
            pulls: Mutex::default(),
            changed: Arc::default(),
            tracker,
            stop,
        });
        let cleaning = Self::keep_clean(Arc::downgrade(&live), Arc::clone(&live.claims), live.stop.clone());
        live.tracker.spawn(cleaning);
        live.tracker.spawn(allocator::give_back(Arc::clone(&live.changed), live.stop.clone()));
        Ok(live)
    }

    /// Returns the pool that layers are read through.
    pub fn pool(&self) -> &Arc<LayerPool> {
        &self.ground.pool
    }

    /// Deletes zTOCs and cached spans that no snapshot needs: leftovers of a process that was killed. Blocks.
    fn sweep(&self) {
        let mut all = self.ztocs.list();
        all.extend(self.pool().cache().layers());
        all.sort_unstable();
        all.dedup();
        all.iter().for_each(|ztoc| self.forget(ztoc));
    }

    /// Deletes what belongs to `ztoc` unless somebody needs it. Blocks.
    fn forget(&self, ztoc: &Digest) {
        let deleted = self.claims.unless_needed(ztoc, || {
            // Threads that serve the mount let go of the layer a moment after it is gone: nothing may be stored by then.
            self.pool().close(ztoc);
            self.ztocs.remove(ztoc);
        });
        if !deleted {
            return;
        }
        self.metrics.forget(ztoc);
        if let Err(error) = self.pool().cache().remove_layer(ztoc) {
            tracing::warn!(%error, %ztoc, "cached spans of a removed layer cannot be deleted");
        }
    }

    /// Deletes what lost its last claim, and forgets images that nobody pulls any more, until this is stopped.
    async fn keep_clean(live: Weak<Self>, claims: Arc<Claims>, stop: CancellationToken) {
        loop {
            let ended = tokio::select! {
                ended = claims.ended() => ended,
                () = tokio::time::sleep(SWEEP) => Vec::new(),
                () = stop.cancelled() => return,
            };
            let Some(live) = live.upgrade() else { return };
            live.sessions.expire();
            if !ended.is_empty() {
                let deleting =
                    tokio::task::spawn_blocking(move || ended.iter().for_each(|ztoc| live.forget(ztoc)));
                // What it leaves is found at the next start.
                let _ = deleting.await;
            }
        }
    }

    /// What is on this machine: what mounts need, containerd's content, then our own.
    fn local(&self, namespace: &str) -> LocalContent {
        let containerd = self.containerd.in_namespace(namespace).content();
        LocalContent::new(Arc::clone(&self.ztocs), vec![containerd, Arc::clone(&self.soci)])
    }

    async fn image(&self, layer: &LayerRequest) -> Result<Arc<Image>, ResolveError> {
        let reach = || {
            let content = self.local(&layer.namespace);
            (self.registry.repository(&layer.image), Arc::new(content) as Arc<dyn ContentStore>)
        };
        self.sessions.image(layer, reach).await
    }

    /// Returns the layers beneath one, without their mounts.
    fn beneath(&self, below: &[Ancestor]) -> Result<Layers, String> {
        let mounts = self.mounts.lock();
        let lower = below.iter().map(|ancestor| {
            if ancestor.record.lazy.is_none() {
                return Ok(Beneath::Plain(ancestor.dir.fs()));
            }
            let mounted = mounts.get(&ancestor.dir.id());
            let mounted =
                mounted.ok_or_else(|| format!("layer {} below is not mounted", ancestor.dir.id()))?;
            Ok(Beneath::Lazy(Arc::clone(mounted.fs())))
        });
        lower.collect::<Result<_, _>>().map(Layers::new)
    }

    /// Notes a new mount and starts what it does in the background.
    fn admit(&self, at: &SnapshotDir, mut mounted: Mounted, list: Option<List>) -> Arc<Mounted> {
        let work = self.stop.child_token();
        if list.is_some() {
            mounted.bound_to(work.clone());
        }
        let mounted = Arc::new(mounted);
        self.mounts.lock().insert(at.id(), Arc::clone(&mounted));
        self.changed.notify_one();
        match list {
            // What is to come first is not known yet; the mount does not wait for it, but what comes second does.
            Some(list) => {
                let fetching = list.fetch(Arc::downgrade(&mounted), self.background);
                self.tracker.spawn(work.run_until_cancelled_owned(fetching));
            }
            None if self.background => mounted.complete(),
            None => {}
        }
        mounted
    }

    async fn try_unpack(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<Usage, UnpackError> {
        let image = self.image(layer).await.map_err(|error| UnpackError {
            kind: mounting::resolve_kind(error.kind),
            message: with_causes(&error),
        })?;
        let layers =
            self.beneath(below).map_err(|message| UnpackError { kind: SetbackKind::Local, message })?;
        let opaque = match self.ground.opaque {
            OpaqueXattr::Trusted => soci_layer::unpack::OpaqueXattr::Trusted,
            OpaqueXattr::User => soci_layer::unpack::OpaqueXattr::User,
        };
        unpack::unpack(&image, &layer.layer, Arc::new(layers) as Arc<dyn Below>, opaque, at).await
    }
}

#[async_trait]
impl LayerProvider for Live {
    async fn facts(&self, layer: &LayerRequest) -> Result<ImageFacts, ResolveError> {
        // Held by the image, once there is one.
        let series = self.metrics.series(&layer.layer);
        series.resolves(self.sessions.knows(layer));
        let image = self.image(layer).await?;
        let blob = image.manifest.layers.iter().find(|blob| blob.digest == layer.layer);
        Ok(ImageFacts {
            index: image.index.digest,
            layers: image.manifest.layers.len(),
            layer: LayerFacts {
                size: blob.map(|blob| blob.size),
                has_ztoc: image.artifacts.has(&layer.layer),
            },
        })
    }

    async fn mount_lazy(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<MountRecord, LazyError> {
        let started = Instant::now();
        let span = tracing::debug_span!(
            target: traces::TARGET,
            "layer.mount",
            image = %layer.image,
            layer = %layer.layer,
            outcome = Empty,
            otel.status_code = Empty
        );
        let mounted =
            traces::within(span, self.try_mount(layer, below, at), |failed| (failed.kind, true)).await;
        match &mounted {
            Ok(_) => self.metrics.series(&layer.layer).observe(Timing::Mount, started.elapsed()),
            Err(_) => self.metrics.add(&names::OPERATIONS, &["", "fuse_mount_failure_count"], 1),
        }
        mounted.map_err(|failed| LazyError { kind: failed.kind, message: failed.message })
    }

    async fn unpack(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<Usage, UnpackError> {
        let unpacked = self.try_unpack(layer, below, at).await;
        if unpacked.is_err() {
            self.metrics.add(&names::OPERATIONS, &["", "local_mount_failure_count"], 1);
        }
        unpacked
    }

    async fn share(&self, layer: &LayerRequest, at: &SnapshotDir) {
        let Some(mounted) = self.mounts.lock().get(&at.id()).cloned() else { return };
        let Some(reader) = mounted.reader() else { return };
        let source = self.registry.repository(&layer.image).blob(&layer.layer, reader.size());
        mounted.share(reader.also(source));
        let pull = self.pulled(layer.into(), &layer.image);
        // One that was released meanwhile has none.
        if let Some(pulls) = self.pulls.lock().get_mut(&at.id()) {
            pulls.drain(..(pulls.len() + 1).saturating_sub(MAX_REFERENCES));
            pulls.push(pull);
        }
    }

    async fn restore(&self, record: &MountRecord, at: &SnapshotDir) -> Result<(), RestoreError> {
        self.try_restore(record, at).await.map_err(|message| RestoreError { message })
    }

    fn starting(&self, at: &SnapshotDir) {
        let mounted = self.mounts.lock().get(&at.id()).cloned();
        if let Some(mounted) = mounted
            && let Some(reader) = mounted.reader()
        {
            reader.expect(mounted.fs().tree().startup_files());
        }
    }

    fn at_hand(&self, record: &MountRecord) -> bool {
        self.has_all_of(record)
    }

    async fn told_all(self: Arc<Self>, later: Vec<Arc<Record>>) {
        // Their zTOC is gone, their cached spans are not.
        for (record, lazy) in later.iter().filter_map(|record| Some((record, record.lazy.as_ref()?))) {
            self.claims.claim(record.id, lazy.ztoc);
        }
        // A sweep that fails says so itself, and what it leaves is found again.
        let _ = tokio::task::spawn_blocking(move || self.sweep()).await;
    }

    async fn broken(&self) -> Vec<u64> {
        self.ground.hub.broken().await;
        let gone: Vec<(u64, Arc<Mounted>)> = {
            let mut mounts = self.mounts.lock();
            let broken: Vec<u64> =
                mounts.iter().filter(|(_, mounted)| mounted.is_broken()).map(|(id, _)| *id).collect();
            broken.into_iter().filter_map(|id| mounts.remove_entry(&id)).collect()
        };
        // With it go the last copies of the devices, and with those the waits of readers.
        gone.into_iter().map(|(id, _)| id).collect()
    }

    async fn shutdown(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }

    fn lower(&self, at: &SnapshotDir) -> Lower {
        let served = self.mounts.lock().get(&at.id()).is_some_and(|mounted| mounted.serves());
        Lower { path: at.fs(), served }
    }

    fn cached(&self, at: &SnapshotDir) -> Option<Usage> {
        let (ztoc, first) = self.claims.of(at.id())?;
        if !first {
            // What several snapshots have in common is there once.
            return Some(Usage::default());
        }
        let (size, inodes) = self.pool().cache().layer_usage(&ztoc);
        let file = std::fs::metadata(self.ztocs.path(&ztoc)).map_or(0, |file| file.len());
        Some(Usage { size: size + file, inodes: inodes + u64::from(file > 0) })
    }

    async fn unmount(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        let mounted = self.mounts.lock().remove(&at.id());
        let at = at.clone();
        let cleared = tokio::task::spawn_blocking(move || {
            let cleared = mounted::clear(&at).map_err(|error| with_causes(&error));
            // After the unmount: whoever waits for a read is told that the mount is gone.
            drop(mounted);
            cleared
        });
        let cleared = cleared.await.map_err(|error| error.to_string()).and_then(|cleared| cleared);
        cleared.map_err(|message| ReleaseError { message })
    }

    async fn release(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        self.unmount(at).await?;
        self.pulls.lock().remove(&at.id());
        if let Some(ztoc) = self.claims.unclaim(at.id()) {
            if !self.claims.is_claimed(&ztoc) {
                self.sessions.abandon(&ztoc);
            }
            let live = self.this.upgrade();
            let deleting =
                tokio::task::spawn_blocking(move || live.iter().for_each(|live| live.forget(&ztoc)));
            let _ = deleting.await;
        }
        self.changed.notify_one();
        Ok(())
    }
}
