//! Live layers: what is mounted and served by this process.
//!
//! [`Live`] is the snapshotter's [`LayerProvider`]. It joins the crates that know one thing each: the index is found and
//! its zTOCs are fetched by [`session`], stored by [`ztocs`]; a layer's tree, reader and FUSE session are made by
//! [`mounted`]; a layer without zTOC is unpacked by [`unpack`]; [`below`] tells what a layer implies.
//!
//! What must hold: a record returned by `mount_lazy` suffices to mount again without network or containerd, and all that it
//! names is on disk; nothing here looks into a mount of ours; no lock is held while anything waits.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_trait::async_trait;
use parking_lot::Mutex;
use soci_auth::AuthBoard;
use soci_auth::board::Pin;
use soci_fs::{FuseHub, HeaderCheck, OpaqueXattr};
use soci_layer::unpack::Below;
use soci_layer::{CacheSettings, LayerPool, Settings as ReaderSettings, SpanCache};
use soci_oci::{BlobSource, Digest, FetchErrorKind, ImageRef};
use soci_registry::Registry;
use soci_snapshotter::error::chain;
use soci_snapshotter::plan::ResolveErrorKind;
use soci_snapshotter::provider::{Reference, SetbackKind};
use soci_snapshotter::{
    Ancestor, ImageFacts, LayerFacts, LayerProvider, LayerRequest, LazyError, Lower, MountRecord,
    ReleaseError, ResolveError, RestoreError, SnapshotDir, UnpackError, Usage,
};
use soci_store::{Containerd, ContentStore, LocalStore};
use soci_ztoc::{DecodeLimits, SpanId, Ztoc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Config;
use crate::metrics::text::Scrape;
use crate::metrics::{Metrics, names};

pub mod below;
pub mod content;
pub mod mounted;
pub mod session;
pub mod unpack;
pub mod ztocs;

use below::{Layers, Lower as Beneath};
use content::LocalContent;
use mounted::{Asked, Failed, Ground, Mounted, Plan};
use session::{Image, Ready, Sessions};
use ztocs::Ztocs;

/// How often images that nobody pulls any more are looked for.
const SWEEP: Duration = Duration::from_secs(30);

/// The layers of this process.
#[derive(Debug)]
pub struct Live {
    registry: Registry,
    /// Told which images are in use.
    board: Arc<AuthBoard>,
    containerd: Containerd,
    soci: Arc<dyn ContentStore>,
    ztocs: Arc<Ztocs>,
    sessions: Arc<Sessions>,
    ground: Arc<Ground>,
    metrics: Metrics,
    background: bool,
    mount_timeout: Duration,
    /// By snapshot.
    mounts: Mutex<HashMap<u64, Arc<Mounted>>>,
    /// By snapshot: keeps the credentials of pulls that its layer may still need.
    pins: Mutex<HashMap<u64, Vec<Pin>>>,
    /// The zTOC of each lazy snapshot there is, mounted or not.
    needed: Mutex<HashMap<u64, Digest>>,
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
        let cache = SpanCache::open(&spans, CacheSettings::default())
            .with_context(|| format!("span cache {spans:?}"))?;
        let reader = ReaderSettings { fetch_timeout: config.blob.request, ..ReaderSettings::default() };
        let hub = FuseHub::new(tokio::runtime::Handle::current(), FuseHub::suitable_threads())
            .context("start FUSE threads")?;
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let sessions = Sessions::new(
            config.discovery,
            config.mount_timeout,
            config.prefetch,
            Arc::clone(&ztocs),
            tracker.clone(),
            stop.clone(),
        );
        let ground = Ground {
            pool: LayerPool::new(cache, reader, soci_layer::Meters::new(Arc::new(metrics.clone()))),
            hub,
            opaque: if userxattr { OpaqueXattr::User } else { OpaqueXattr::Trusted },
            header_check: if config.verify_headers { HeaderCheck::FirstRead } else { HeaderCheck::Off },
            read_timeout: config.read_timeout,
            statfs: spans,
        };
        let live = Arc::new(Self {
            registry,
            board,
            containerd: Containerd::connect(&config.containerd, "default"),
            soci: Arc::new(soci),
            ztocs,
            sessions: Arc::new(sessions),
            ground: Arc::new(ground),
            metrics,
            background: config.background_fetch,
            mount_timeout: config.mount_timeout,
            mounts: Mutex::default(),
            pins: Mutex::default(),
            needed: Mutex::default(),
            tracker,
            stop,
        });
        let sweeper = Arc::downgrade(&live);
        let stop = live.stop.clone();
        live.tracker.spawn(async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(SWEEP) => {}
                    () = stop.cancelled() => return,
                }
                let Some(live) = sweeper.upgrade() else { return };
                let gone = live.sessions.expire();
                if !gone.is_empty() {
                    tokio::task::spawn_blocking(move || gone.iter().for_each(|ztoc| live.forget(ztoc)));
                }
            }
        });
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

    /// Adds what is mounted to `scrape`.
    pub fn collect(&self, scrape: &mut Scrape) {
        let mounts: Vec<Arc<Mounted>> = self.mounts.lock().values().cloned().collect();
        scrape.add(&names::MOUNTS, &[], mounts.len() as u64);
        for mounted in mounts {
            let Some(reader) = mounted.reader() else { continue };
            let at = mounted.at().display().to_string();
            let labels = [mounted.layer.to_string(), at];
            let labels = labels.each_ref().map(String::as_str);
            scrape.add(&names::SIZE, &labels, reader.size());
            scrape.add(&names::FETCHED_SIZE, &labels, reader.fetched_bytes());
        }
        scrape.add(&names::CACHE, &[], self.pool().cache().usage());
        scrape.add(&names::IN_FLIGHT, &[], self.pool().gauges().bytes);
    }

    fn is_needed(&self, ztoc: &Digest) -> bool {
        self.needed.lock().values().any(|needed| needed == ztoc) || self.sessions.holds(ztoc)
    }

    /// Deletes what belongs to `ztoc` unless somebody needs it. Blocks.
    fn forget(&self, ztoc: &Digest) {
        let needed = self.is_needed(ztoc);
        Leftovers { needed, ztocs: Arc::clone(&self.ztocs), pool: Arc::clone(self.pool()) }.delete(ztoc);
    }

    async fn image(&self, layer: &LayerRequest) -> Result<Arc<Image>, ResolveError> {
        let reach = || {
            let containerd = self.containerd.in_namespace(&layer.namespace).content();
            let content = LocalContent::new(vec![containerd, Arc::clone(&self.soci)]);
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

    /// Where the layer's bytes come from; what is on this machine is asked first.
    async fn sources(&self, image: &Image, layer: &Digest, size: u64) -> Vec<Arc<dyn BlobSource>> {
        let mut sources = vec![image.repository.blob(layer, size)];
        if let Ok(Some((local, local_size))) = image.content.source(layer).await
            && local_size == size
        {
            sources.push(local);
        }
        sources
    }

    /// Returns the meter of a layer's file system, and introduces the layer to the metrics.
    fn meter(&self, ztoc: &Digest, layer: &Digest, image: Option<&Digest>) -> Arc<dyn soci_fs::FsMeter> {
        self.metrics.introduce(ztoc, layer);
        self.metrics.file_system(layer, image)
    }

    /// Notes a new mount and starts what it does in the background.
    fn admit(&self, at: &SnapshotDir, mounted: Mounted, prefetch: Vec<SpanId>) -> Arc<Mounted> {
        let mounted = Arc::new(mounted);
        if let Some(reader) = mounted.reader() {
            if !prefetch.is_empty() {
                reader.prefetch(prefetch);
            }
            if self.background {
                reader.complete();
            }
        }
        self.mounts.lock().insert(at.id(), Arc::clone(&mounted));
        mounted
    }

    async fn try_mount(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<MountRecord, Failed> {
        let local = |message: String| Failed { kind: SetbackKind::Local, message };
        let resolve = |error: ResolveError| Failed { kind: resolve_kind(error.kind), message: chain(&error) };
        let image = self.image(layer).await.map_err(resolve)?;
        let deadline = Instant::now() + self.mount_timeout;
        let ready = match image.ready(&layer.layer, deadline).await {
            Some(Ok(ready)) => ready,
            Some(Err(error)) => {
                return Err(Failed { kind: fetch_kind(error.kind()), message: chain(&error) });
            }
            None => {
                return Err(Failed { kind: SetbackKind::NotFound, message: "no ztoc for layer".to_owned() });
            }
        };
        let layers = Arc::new(self.beneath(below).map_err(local)?);
        // Needed from here on, so that no sweep takes the zTOC away while it is being mounted.
        self.needed.lock().insert(at.id(), ready.digest);
        let mounted = self.mount_ready(&image, layer, &ready, layers, at).await;
        if mounted.is_err() {
            self.needed.lock().remove(&at.id());
        }
        let (mounted, implied, layer_size) = mounted?;
        let prefetch = prefetch(&ready, &mounted);
        let mounted = self.admit(at, mounted, prefetch);
        self.pins.lock().insert(at.id(), vec![self.board.pin(&layer.image.key())]);
        Ok(MountRecord {
            references: vec![Reference::from(layer)],
            layer: layer.layer,
            layer_size,
            index: image.index.digest,
            ztoc: ready.digest,
            ztoc_size: ready.size,
            disable_xattrs: ready.disable_xattrs,
            root: mounted.root(),
            implied,
        })
    }

    async fn mount_ready(
        &self,
        image: &Image,
        layer: &LayerRequest,
        ready: &Arc<Ready>,
        layers: Arc<Layers>,
        at: &SnapshotDir,
    ) -> Result<(Mounted, Vec<soci_snapshotter::provider::ImpliedDir>, u64), Failed> {
        let local = |message: String| Failed { kind: SetbackKind::Local, message };
        let taken = ready.decoded.lock().take();
        let (ztocs, digest, size) = (Arc::clone(&self.ztocs), ready.digest, ready.size);
        let decoded = tokio::task::spawn_blocking(move || match taken {
            Some(decoded) => Ok(decoded),
            None => load(&ztocs, &digest, size),
        });
        let decoded = decoded.await.map_err(|error| local(error.to_string()))?.map_err(local)?;
        let blob = image.manifest.layers.iter().find(|blob| blob.digest == layer.layer);
        let layer_size = blob.map_or(decoded.compressed_size(), |blob| blob.size);
        if layer_size != decoded.compressed_size() {
            let message = format!(
                "layer {} has {layer_size} bytes, its zTOC is of one with {}",
                layer.layer,
                decoded.compressed_size()
            );
            return Err(Failed { kind: SetbackKind::Malformed, message });
        }
        let plan = Plan {
            layer: layer.layer,
            ztoc: ready.digest,
            ztoc_file: self.ztocs.path(&ready.digest),
            decoded,
            disable_xattrs: ready.disable_xattrs,
            sources: self.sources(image, &layer.layer, layer_size).await,
            meter: Some(self.meter(&ready.digest, &layer.layer, Some(&layer.manifest))),
        };
        let (ground, at) = (Arc::clone(&self.ground), at.clone());
        let mounted = tokio::task::spawn_blocking(move || {
            let asked = Asked::new(&*layers);
            let mounted = mounted::mount(&ground, plan, &at, &|path| asked.ask(path))?;
            match asked.answers() {
                Ok(implied) => Ok((mounted, implied)),
                Err(message) => {
                    drop(mounted);
                    let cleared = mounted::clear(&at).map_err(|error| chain(&error));
                    let message = cleared.err().unwrap_or(message);
                    Err(Failed { kind: SetbackKind::Local, message })
                }
            }
        });
        let (mounted, implied) = mounted.await.map_err(|error| local(error.to_string()))??;
        Ok((mounted, implied, layer_size))
    }

    async fn try_unpack(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<Usage, UnpackError> {
        let image = self
            .image(layer)
            .await
            .map_err(|error| UnpackError { kind: resolve_kind(error.kind), message: chain(&error) })?;
        let layers =
            self.beneath(below).map_err(|message| UnpackError { kind: SetbackKind::Local, message })?;
        let opaque = match self.ground.opaque {
            OpaqueXattr::Trusted => soci_layer::unpack::OpaqueXattr::Trusted,
            OpaqueXattr::User => soci_layer::unpack::OpaqueXattr::User,
        };
        unpack::unpack(&image, &layer.layer, Arc::new(layers) as Arc<dyn Below>, opaque, at).await
    }

    async fn try_restore(&self, record: &MountRecord, at: &SnapshotDir) -> Result<(), String> {
        self.needed.lock().insert(at.id(), record.ztoc);
        let old = self.mounts.lock().remove(&at.id());
        let mut sources: Vec<Arc<dyn BlobSource>> = Vec::new();
        let mut pins = Vec::new();
        for reference in record.references.iter().rev() {
            let image: ImageRef =
                reference.image.parse().map_err(|error| chain_of(&error, "image of the record"))?;
            sources.push(self.registry.repository(&image).blob(&record.layer, record.layer_size));
            pins.push(self.board.pin(&image.key()));
        }
        self.pins.lock().insert(at.id(), pins);
        let (ground, ztocs, at_dir, record) =
            (Arc::clone(&self.ground), Arc::clone(&self.ztocs), at.clone(), record.clone());
        let image = record.references.first().map(|reference| &reference.manifest);
        let meter = Some(self.meter(&record.ztoc, &record.layer, image));
        let mounted = tokio::task::spawn_blocking(move || {
            drop(old);
            mounted::clear(&at_dir).map_err(|error| chain(&error))?;
            let decoded = load(&ztocs, &record.ztoc, record.ztoc_size)?;
            let plan = Plan {
                layer: record.layer,
                ztoc: record.ztoc,
                ztoc_file: ztocs.path(&record.ztoc),
                decoded,
                disable_xattrs: record.disable_xattrs,
                sources,
                meter,
            };
            let implied = |path: &[u8]| mounted::from_record(&record.implied, path);
            mounted::mount(&ground, plan, &at_dir, &implied).map_err(|failed| failed.message)
        });
        let mounted = mounted.await.map_err(|error| error.to_string())??;
        self.admit(at, mounted, Vec::new());
        Ok(())
    }
}

#[async_trait]
impl LayerProvider for Live {
    async fn facts(&self, layer: &LayerRequest) -> Result<ImageFacts, ResolveError> {
        let image = self.image(layer).await?;
        let blob = image.manifest.layers.iter().find(|blob| blob.digest == layer.layer);
        Ok(ImageFacts {
            index: image.index.digest,
            layers: image.manifest.layers.len(),
            layer: LayerFacts { size: blob.map(|blob| blob.size), has_ztoc: image.has(&layer.layer) },
        })
    }

    async fn mount_lazy(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<MountRecord, LazyError> {
        let started = Instant::now();
        let mounted = self.try_mount(layer, below, at).await;
        match &mounted {
            Ok(_) => self.metrics.mounted(&layer.layer, started.elapsed()),
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
        let pin = self.board.pin(&layer.image.key());
        self.pins.lock().entry(at.id()).or_default().push(pin);
    }

    async fn restore(&self, record: &MountRecord, at: &SnapshotDir) -> Result<(), RestoreError> {
        self.try_restore(record, at).await.map_err(|message| RestoreError { message })
    }

    async fn told_all(self: Arc<Self>) {
        // A sweep that fails says so itself, and what it leaves is found again.
        let _ = tokio::task::spawn_blocking(move || self.sweep()).await;
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
        let ztoc = self.needed.lock().get(&at.id()).copied()?;
        Some(Usage { size: self.pool().cache().layer_usage(&ztoc), inodes: 0 })
    }

    async fn unmount(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        let mounted = self.mounts.lock().remove(&at.id());
        if let Some(mounted) = &mounted {
            self.metrics.forget(&mounted.layer);
        }
        let at = at.clone();
        let cleared = tokio::task::spawn_blocking(move || {
            let cleared = mounted::clear(&at).map_err(|error| chain(&error));
            // After the unmount: whoever waits for a read is told that the mount is gone.
            drop(mounted);
            cleared
        });
        let cleared = cleared.await.map_err(|error| error.to_string()).and_then(|cleared| cleared);
        cleared.map_err(|message| ReleaseError { message })
    }

    async fn release(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        self.unmount(at).await?;
        self.pins.lock().remove(&at.id());
        let ztoc = self.needed.lock().remove(&at.id());
        if let Some(ztoc) = ztoc {
            let leftovers = Leftovers {
                needed: self.is_needed(&ztoc),
                ztocs: Arc::clone(&self.ztocs),
                pool: Arc::clone(self.pool()),
            };
            let _ = tokio::task::spawn_blocking(move || leftovers.delete(&ztoc)).await;
        }
        Ok(())
    }
}

/// What remains of a layer when its snapshot is gone.
struct Leftovers {
    needed: bool,
    ztocs: Arc<Ztocs>,
    pool: Arc<LayerPool>,
}

impl Leftovers {
    /// Deletes it unless somebody else needs it. Blocks.
    fn delete(&self, ztoc: &Digest) {
        if self.needed {
            return;
        }
        self.ztocs.remove(ztoc);
        if let Err(error) = self.pool.cache().remove_layer(ztoc) {
            tracing::warn!(%error, %ztoc, "cached spans of a removed layer cannot be deleted");
        }
    }
}

/// Reads and decodes a stored zTOC. Blocks.
fn load(ztocs: &Ztocs, digest: &Digest, size: u64) -> Result<Ztoc, String> {
    let bytes = ztocs.read(digest, size).map_err(|error| chain_of(&error, &format!("read zTOC {digest}")))?;
    let bytes = bytes.ok_or_else(|| format!("zTOC {digest} is lost: remove the image and pull it again"))?;
    Ztoc::decode(bytes, &DecodeLimits::default())
        .map_err(|error| chain_of(&error, &format!("decode zTOC {digest}")))
}

fn chain_of(error: &(dyn std::error::Error + 'static), what: &str) -> String {
    format!("{what}: {}", chain(error))
}

/// Returns the spans that the layer's prefetch artifact names; a range outside the layer makes it void.
fn prefetch(ready: &Ready, mounted: &Mounted) -> Vec<SpanId> {
    let Some(artifact) = ready.prefetch.lock().take() else { return Vec::new() };
    match artifact.spans(mounted.spans) {
        Ok(ranges) => ranges.into_iter().flatten().map(SpanId).collect(),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "prefetch artifact is not used");
            Vec::new()
        }
    }
}

fn resolve_kind(kind: ResolveErrorKind) -> SetbackKind {
    match kind {
        ResolveErrorKind::None | ResolveErrorKind::Disabled | ResolveErrorKind::Missing => {
            SetbackKind::NotFound
        }
        ResolveErrorKind::Denied => SetbackKind::Denied,
        ResolveErrorKind::Unavailable => SetbackKind::Unavailable,
        ResolveErrorKind::Malformed => SetbackKind::Malformed,
        ResolveErrorKind::Local => SetbackKind::Local,
    }
}

fn fetch_kind(kind: FetchErrorKind) -> SetbackKind {
    match kind {
        FetchErrorKind::NotFound => SetbackKind::NotFound,
        FetchErrorKind::Denied => SetbackKind::Denied,
        FetchErrorKind::Unavailable => SetbackKind::Unavailable,
        FetchErrorKind::Protocol | FetchErrorKind::Integrity => SetbackKind::Malformed,
        FetchErrorKind::Local => SetbackKind::Local,
    }
}
