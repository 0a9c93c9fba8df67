//! Mounting a layer of a pull, and mounting again what an earlier process had mounted.
//!
//! Order of writes of a lazy layer: zTOC (synced), mount, record (synced), answer. A process that is killed between any two
//! of them leaves a zTOC that nobody claims or a directory without record; both go at the next start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use soci_oci::{BlobSource, Digest, FetchClass, FetchContext, FetchErrorKind, ImageRef, with_causes};
use soci_snapshotter::plan::ResolveErrorKind;
use soci_snapshotter::provider::{ImpliedDir, Reference, SetbackKind};
use soci_snapshotter::{Ancestor, LayerRequest, MountRecord, ResolveError, SnapshotDir};
use soci_ztoc::{DecodeLimits, Ztoc};

use super::Live;
use super::artifacts::Ready;
use super::below::Layers;
use super::content::LocalBlob;
use super::kept::PulledAs;
use super::listed::List;
use super::mounted::{self, Asked, Failed, Mounted, Plan};
use super::session::Image;
use super::ztocs::Ztocs;

/// How long fetching a zTOC that was lost may take.
const LOST_ZTOC: Duration = Duration::from_secs(30);

impl Live {
    /// Mounts a layer that has a zTOC.
    pub(super) async fn try_mount(
        &self,
        layer: &LayerRequest,
        below: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<MountRecord, Failed> {
        let resolve =
            |error: ResolveError| Failed { kind: resolve_kind(error.kind), message: with_causes(&error) };
        let image = self.image(layer).await.map_err(resolve)?;
        let deadline = Instant::now() + self.mount_timeout;
        let ready = match image.artifacts.ready(&layer.layer, deadline).await {
            Some(Ok(ready)) => ready,
            Some(Err(error)) => {
                return Err(Failed { kind: fetch_kind(error.kind()), message: with_causes(&error) });
            }
            None => {
                return Err(Failed { kind: SetbackKind::NotFound, message: "no ztoc for layer".to_owned() });
            }
        };
        let layers = Arc::new(self.beneath(below).map_err(local)?);
        // From here on the snapshot needs the zTOC, whatever becomes of the pull's session.
        self.claims.claim(at.id(), ready.digest);
        let mounted = self.mount_ready(&image, layer, &ready, layers, at).await;
        if mounted.is_err() {
            self.claims.unclaim(at.id());
        }
        let (mounted, implied, layer_size) = mounted?;
        let list = ready.prefetch.as_ref().map(|coming| {
            let content = self.local(&layer.namespace);
            List::coming(coming.clone(), layer.layer, image.repository.clone(), content, at)
        });
        let mounted = self.admit(at, mounted, list);
        self.pulls.lock().insert(at.id(), vec![self.pulled(layer.into(), &layer.image)]);
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
            prefetch: ready.prefetch.as_ref().map(|coming| coming.artifact),
        })
    }

    async fn mount_ready(
        &self,
        image: &Image,
        layer: &LayerRequest,
        ready: &Arc<Ready>,
        layers: Arc<Layers>,
        at: &SnapshotDir,
    ) -> Result<(Mounted, Vec<ImpliedDir>, u64), Failed> {
        let taken = ready.decoded.lock().take();
        let (ztocs, digest, size) = (Arc::clone(&self.ztocs), ready.digest, ready.size);
        let load = move || {
            let lost = || format!("zTOC {digest} is lost: pull the image again");
            decode(&digest, read(&ztocs, &digest, size)?.ok_or_else(lost)?)
        };
        let decoded = match taken {
            Some(decoded) => decoded,
            None => tokio::task::spawn_blocking(load)
                .await
                .map_err(|error| local(error.to_string()))?
                .map_err(local)?,
        };
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
        let here = LocalBlob::new(self.local(&layer.namespace), layer.layer, layer_size);
        let plan = Plan {
            layer: layer.layer,
            ztoc: ready.digest,
            ztoc_file: self.kept(layer.layer, &ready.digest, ready.size),
            decoded,
            disable_xattrs: ready.disable_xattrs,
            sources: vec![image.repository.blob(&layer.layer, layer_size)],
            here: Some(Arc::new(here)),
            meter: self.metrics.file_system(
                &ready.digest,
                &layer.layer,
                &image.index.digest,
                &layer.manifest,
            ),
            series: self.metrics.series(&layer.layer),
            image: Some(layer.manifest),
            reference: layer.image.to_string(),
        };
        let (ground, at) = (Arc::clone(&self.ground), at.clone());
        let mounted = tokio::task::spawn_blocking(move || {
            let asked = Asked::new(&*layers);
            let mounted = mounted::mount(&ground, plan, &at, &|path| asked.ask(path))?;
            match asked.answers() {
                Ok(implied) => Ok((mounted, implied)),
                Err(message) => {
                    drop(mounted);
                    let cleared = mounted::clear(&at).map_err(|error| with_causes(&error));
                    let message = cleared.err().unwrap_or(message);
                    Err(Failed { kind: SetbackKind::Local, message })
                }
            }
        });
        let (mounted, implied) = mounted.await.map_err(|error| local(error.to_string()))??;
        Ok((mounted, implied, layer_size))
    }

    /// Mounts again what `record` says. Uses the network only for a zTOC that was lost.
    pub(super) async fn try_restore(&self, record: &MountRecord, at: &SnapshotDir) -> Result<(), String> {
        self.claims.claim(at.id(), record.ztoc);
        let old = self.mounts.lock().remove(&at.id());
        let mut sources: Vec<Arc<dyn BlobSource>> = Vec::new();
        let mut pulls = Vec::new();
        for reference in &record.references {
            let image = parse(reference)?;
            sources.push(self.registry.repository(&image).blob(&record.layer, record.layer_size));
            pulls.push(self.pulled(reference.clone(), &image));
        }
        let here = record.references.first().map(|reference| {
            let content = self.local(&reference.namespace);
            Arc::new(LocalBlob::new(content, record.layer, record.layer_size)) as Arc<dyn BlobSource>
        });
        self.pulls.lock().insert(at.id(), pulls);
        let (ztocs, digest, size) = (Arc::clone(&self.ztocs), record.ztoc, record.ztoc_size);
        let stored = tokio::task::spawn_blocking(move || read(&ztocs, &digest, size));
        let bytes = match stored.await.map_err(|error| error.to_string())?? {
            Some(bytes) => bytes,
            None => self.fetch_lost(record).await?,
        };
        let reference = record.references.first();
        let manifest = reference.map(|reference| reference.manifest);
        let image = manifest.unwrap_or(record.index);
        let meter = self.metrics.file_system(&record.ztoc, &record.layer, &record.index, &image);
        let reference = reference.map(|reference| reference.image.clone()).unwrap_or_default();
        let series = self.metrics.series(&record.layer);
        let list = self.recorded_list(record, at)?;
        let ztoc_file = self.kept(record.layer, &record.ztoc, record.ztoc_size);
        let (ground, at_dir, record) = (Arc::clone(&self.ground), at.clone(), record.clone());
        let mounted = tokio::task::spawn_blocking(move || {
            drop(old);
            mounted::clear(&at_dir).map_err(|error| with_causes(&error))?;
            let plan = Plan {
                layer: record.layer,
                ztoc: record.ztoc,
                ztoc_file,
                decoded: decode(&record.ztoc, bytes)?,
                disable_xattrs: record.disable_xattrs,
                sources,
                here,
                meter,
                series,
                image: manifest,
                reference,
            };
            let implied = |path: &[u8]| mounted::from_record(&record.implied, path);
            mounted::mount(&ground, plan, &at_dir, &implied).map_err(|failed| failed.message)
        });
        let mounted = mounted.await.map_err(|error| error.to_string())??;
        self.admit(at, mounted, list);
        Ok(())
    }

    /// Returns the prefetch list that `record` names, where such are used.
    fn recorded_list(&self, record: &MountRecord, at: &SnapshotDir) -> Result<Option<List>, String> {
        let (Some(artifact), Some(reference)) = (record.prefetch, record.references.last()) else {
            return Ok(None);
        };
        let list = || {
            let repository = self.registry.repository(&parse(reference)?);
            Ok(List::recorded(artifact, record.layer, repository, self.local(&reference.namespace), at))
        };
        self.prefetch.then(list).transpose()
    }

    /// Whether all that a mount needs is on disk, as far as can be told without reading it. Blocks for a moment.
    pub(super) fn has_all_of(&self, record: &MountRecord) -> bool {
        let found = std::fs::metadata(self.ztocs.path(&record.ztoc));
        found.is_ok_and(|found| found.len() == record.ztoc_size)
    }

    /// Has the zTOC of a record again.
    async fn fetch_lost(&self, record: &MountRecord) -> Result<Bytes, String> {
        let context = FetchContext::new(Instant::now() + LOST_ZTOC, FetchClass::OnDemand);
        let had =
            self.have_again(record.layer, &record.ztoc, record.ztoc_size, &record.references, &context).await;
        let bytes =
            had.map_err(|error| chain_of(&error, &format!("zTOC {} is lost; fetch it again", record.ztoc)))?;
        tracing::info!(ztoc = %record.ztoc, "a lost zTOC was fetched again");
        Ok(bytes)
    }

    pub(super) fn pulled(&self, reference: Reference, image: &ImageRef) -> PulledAs {
        PulledAs { reference, _pin: self.board.pin(&image.key()) }
    }
}

pub(super) fn parse(reference: &Reference) -> Result<ImageRef, String> {
    reference.image.parse().map_err(|error| chain_of(&error, "image of the record"))
}

fn local(message: String) -> Failed {
    Failed { kind: SetbackKind::Local, message }
}

/// Reads a stored zTOC; `None` when it is absent or damaged. Blocks.
fn read(ztocs: &Ztocs, digest: &Digest, size: u64) -> Result<Option<Bytes>, String> {
    ztocs.read(digest, size).map_err(|error| chain_of(&error, &format!("read zTOC {digest}")))
}

fn decode(digest: &Digest, bytes: Bytes) -> Result<Ztoc, String> {
    Ztoc::decode(bytes, &DecodeLimits::default())
        .map_err(|error| chain_of(&error, &format!("decode zTOC {digest}")))
}

fn chain_of(error: &(dyn std::error::Error + 'static), what: &str) -> String {
    format!("{what}: {}", with_causes(error))
}

/// Returns what kind of setback it is that an image could not be resolved.
pub(super) fn resolve_kind(kind: ResolveErrorKind) -> SetbackKind {
    match kind {
        ResolveErrorKind::None
        | ResolveErrorKind::Disabled
        | ResolveErrorKind::Missing
        | ResolveErrorKind::OnMachine => SetbackKind::NotFound,
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
