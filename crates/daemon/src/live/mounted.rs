//! One layer that is mounted: its tree, its reader and its FUSE session.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use soci_fs::{
    FsMeter, FsOptions, FuseHub, HeaderCheck, Inode, LayerFs, LayerState, LayerTree, MountOptions,
    OpaqueXattr, ServeOptions, Session, TreeOptions, Unmount,
};
use soci_index::prefetch::Prefetch;
use soci_layer::unpack::{Below, DirAttr};
use soci_layer::{LayerPool, LayerReader, LayerSpec, ZtocFile};
use soci_oci::{BlobSource, Digest, with_causes};
use soci_snapshotter::SnapshotDir;
use soci_snapshotter::provider::{DirOwner, ImpliedDir, MAX_REFERENCES, SetbackKind, Xattr};
use soci_ztoc::{SpanId, Ztoc};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::metrics::{Series, Timing};

/// How often a directory is unmounted before giving up: mounts of several dead processes may lie on each other.
const STACKED: usize = 64;

/// What all mounts share.
#[derive(Debug)]
pub struct Ground {
    /// Readers of layers.
    pub pool: Arc<LayerPool>,
    /// Threads that serve mounts.
    pub hub: FuseHub,
    /// Which attribute marks an opaque directory.
    pub opaque: OpaqueXattr,
    /// Whether tar headers are compared with the zTOC when a file is first read.
    pub header_check: HeaderCheck,
    /// How long a read of a file may take.
    pub read_timeout: Duration,
    /// A directory on the file system whose space is reported.
    pub statfs: PathBuf,
}

/// A layer to mount.
#[derive(Debug)]
pub struct Plan {
    /// The layer's digest, as its image names it.
    pub layer: Digest,
    /// The zTOC.
    pub ztoc: Digest,
    /// The zTOC as it is stored.
    pub ztoc_file: Arc<dyn ZtocFile>,
    /// The zTOC, decoded.
    pub decoded: Ztoc,
    /// Whether no file has extended attributes.
    pub disable_xattrs: bool,
    /// Where bytes come from: the images that have the layer, oldest first; they are asked in this order.
    pub sources: Vec<Arc<dyn BlobSource>>,
    /// What may have them on this machine, which is asked before.
    pub here: Option<Arc<dyn BlobSource>>,
    /// Who is told of operations.
    pub meter: Arc<dyn FsMeter>,
    /// Who is told how long it takes.
    pub series: Arc<Series>,
    /// The manifest of the image it is mounted for, where it is known.
    pub image: Option<Digest>,
    /// The image, as the client named it.
    pub reference: String,
}

/// A mounted layer. Dropping it stops serving; it does not unmount.
#[derive(Debug)]
pub struct Mounted {
    /// The zTOC.
    pub ztoc: Digest,
    /// The layer's digest.
    pub layer: Digest,
    /// How many spans it has.
    pub spans: u32,
    /// The manifest of the image it was mounted for.
    pub image: Option<Digest>,
    /// That image, as the client named it.
    pub reference: String,
    session: Session,
    /// One per image that has the layer, oldest first; each keeps its source in use.
    readers: Mutex<Vec<Arc<LayerReader>>>,
    /// Cancels what is done for this mount alone.
    work: Option<DropGuard>,
}

/// A layer that could not be mounted.
#[derive(Debug)]
pub struct Failed {
    /// What kind of trouble.
    pub kind: SetbackKind,
    /// What was being done and why it failed.
    pub message: String,
}

impl Failed {
    fn new(kind: SetbackKind, what: String, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { kind, message: format!("{what}: {}", with_causes(error)) }
    }
}

impl Mounted {
    /// Returns the file system.
    pub fn fs(&self) -> &Arc<LayerFs> {
        self.session.fs()
    }

    /// Returns a reader of the layer.
    pub fn reader(&self) -> Option<Arc<LayerReader>> {
        self.readers.lock().last().cloned()
    }

    /// Keeps a further source of the layer in use, for as long as there are not more than a record remembers.
    pub fn share(&self, reader: Arc<LayerReader>) {
        let mut readers = self.readers.lock();
        let over = (readers.len() + 1).saturating_sub(MAX_REFERENCES);
        readers.drain(..over);
        readers.push(reader);
    }

    /// Has what a prefetch artifact names fetched before anything that is done in the background. Returns at once.
    pub fn prefetch(&self, artifact: &[u8]) {
        let Some(reader) = self.reader() else { return };
        // A range outside the layer makes it void.
        match Prefetch::decode(artifact).and_then(|artifact| artifact.spans(self.spans)) {
            Ok(ranges) => {
                reader.prefetch(ranges.into_iter().flatten().map(SpanId));
            }
            Err(error) => {
                tracing::warn!(layer = %self.layer, error = %with_causes(&error), "prefetch artifact is not used");
            }
        }
    }

    /// Has all of the layer fetched in the background. Returns at once.
    pub fn complete(&self) {
        if let Some(reader) = self.reader() {
            reader.complete_for(self.image.as_ref().unwrap_or(&self.layer));
        }
    }

    /// Has `work` end with the mount.
    pub fn bound_to(&mut self, work: CancellationToken) {
        self.work = Some(work.drop_guard());
    }

    /// Returns where it is mounted.
    pub fn at(&self) -> &std::path::Path {
        self.session.at()
    }

    /// Whether it is still served.
    pub fn serves(&self) -> bool {
        !self.session.has_ended()
    }

    /// Whether it serves no more though the mount is in place.
    pub fn is_broken(&self) -> bool {
        self.session.is_broken()
    }

    /// Returns mode and owner of the root directory.
    pub fn root(&self) -> DirOwner {
        match self.fs().getattr(Inode::ROOT) {
            Ok(attr) => DirOwner { mode: attr.mode & 0o7777, uid: attr.uid, gid: attr.gid },
            Err(_) => DirOwner { mode: 0o755, uid: 0, gid: 0 },
        }
    }
}

/// Mounts `plan` at `at`, with directories that the layer only implies as `implied` has them. Blocks.
///
/// # Errors
/// [`Failed`]; nothing is mounted then.
pub fn mount(
    ground: &Ground,
    plan: Plan,
    at: &SnapshotDir,
    implied: &dyn Fn(&[u8]) -> Option<DirAttr>,
) -> Result<Mounted, Failed> {
    let layer = plan.layer;
    let options = TreeOptions { xattrs: !plan.disable_xattrs, opaque: ground.opaque, implied };
    let begun = Instant::now();
    let tree = LayerTree::build(&plan.decoded, &options)
        .map_err(|error| Failed::new(SetbackKind::Malformed, format!("files of layer {layer}"), &error))?;
    if let Some(link) = tree.broken_links().next() {
        let link = String::from_utf8_lossy(link).into_owned();
        let message = format!("files of layer {layer}: hard link {link:?} has no target");
        return Err(Failed { kind: SetbackKind::Malformed, message });
    }
    plan.series.observe(Timing::MetadataInit, begun.elapsed());
    let spans = Arc::clone(plan.decoded.spans());
    let count = spans.len();
    drop(plan.decoded);
    let spec = LayerSpec { ztoc: plan.ztoc, ztoc_file: plan.ztoc_file, spans };
    let open = |source| ground.pool.open(spec.clone(), source);
    // The one that is opened last is asked first.
    let mut readers: Vec<Arc<LayerReader>> = plan.sources.into_iter().rev().map(open).collect();
    readers.reverse();
    let here = plan.here.map(open);
    // The file system keeps its reader for good, the images come and go.
    let Some(reader) = here.as_ref().or(readers.last()).cloned() else {
        let message = format!("layer {layer} has no source");
        return Err(Failed { kind: SetbackKind::NotFound, message });
    };
    let state = State { layer, reader: Arc::clone(&reader) };
    let options = FsOptions {
        layer: layer.to_string(),
        header_check: ground.header_check,
        read_timeout: ground.read_timeout,
        state: Some(Arc::new(state)),
        statfs: ground.statfs.clone(),
        meter: Some(plan.meter),
    };
    let fs = LayerFs::new(tree, reader, options);
    let mountpoint = at.fs();
    let begun = Instant::now();
    let device = soci_fs::mount(&mountpoint, &MountOptions::default())
        .map_err(|error| Failed::new(SetbackKind::Local, format!("mount layer {layer}"), &error))?;
    match Session::serve(device, None, fs, &ServeOptions::default(), &ground.hub) {
        Ok(session) => {
            plan.series.observe(Timing::FuseMount, begun.elapsed());
            let Plan { ztoc, image, reference, .. } = plan;
            let readers = Mutex::new(readers);
            Ok(Mounted { ztoc, layer, spans: count, image, reference, session, readers, work: None })
        }
        Err(error) => {
            if let Err(error) = soci_fs::unmount(&mountpoint, Unmount::Detach) {
                tracing::warn!(error = %with_causes(&error), "a mount that cannot be served stays");
            }
            Err(Failed::new(SetbackKind::Local, format!("serve layer {layer}"), &error))
        }
    }
}

/// Takes every mount off `at`, also those of dead processes. Blocks, but never on who serves them.
///
/// # Errors
/// When the kernel does not let go.
pub fn clear(at: &SnapshotDir) -> Result<(), soci_fs::MountError> {
    let mountpoint = at.fs();
    for _ in 0..STACKED {
        if !soci_fs::unmount(&mountpoint, Unmount::Detach)? {
            break;
        }
    }
    Ok(())
}

/// Asks the layers below and notes what they said, for the record.
#[derive(Debug)]
pub struct Asked<'a> {
    below: &'a dyn Below,
    answers: Mutex<Vec<ImpliedDir>>,
    failed: Mutex<Option<String>>,
}

impl<'a> Asked<'a> {
    /// Returns a note of questions to `below`.
    pub fn new(below: &'a dyn Below) -> Self {
        Self { below, answers: Mutex::default(), failed: Mutex::default() }
    }

    /// Answers for the directory `path`.
    pub fn ask(&self, path: &[u8]) -> Option<DirAttr> {
        match self.below.dir(path) {
            Ok(found) => {
                let attr = found?;
                self.answers.lock().push(to_record(path, &attr));
                Some(attr)
            }
            Err(error) => {
                self.failed.lock().get_or_insert(with_causes(&error));
                None
            }
        }
    }

    /// Returns the answers given.
    ///
    /// # Errors
    /// When a question could not be answered.
    pub fn answers(self) -> Result<Vec<ImpliedDir>, String> {
        match self.failed.into_inner() {
            Some(failed) => Err(failed),
            None => Ok(self.answers.into_inner()),
        }
    }
}

fn to_record(path: &[u8], attr: &DirAttr) -> ImpliedDir {
    ImpliedDir {
        path: path.to_vec(),
        owner: DirOwner { mode: attr.mode, uid: attr.uid, gid: attr.gid },
        mtime: Some(attr.mtime),
        xattrs: attr
            .xattrs
            .iter()
            .map(|(name, value)| Xattr { name: name.clone(), value: value.clone() })
            .collect(),
    }
}

/// Returns what a record says about the directory `path`.
pub fn from_record(implied: &[ImpliedDir], path: &[u8]) -> Option<DirAttr> {
    let dir = implied.iter().find(|dir| dir.path == path)?;
    Some(DirAttr {
        mode: dir.owner.mode,
        uid: dir.owner.uid,
        gid: dir.owner.gid,
        mtime: dir.mtime.unwrap_or_default(),
        xattrs: dir.xattrs.iter().map(|xattr| (xattr.name.clone(), xattr.value.clone())).collect(),
    })
}

#[derive(Debug)]
struct State {
    layer: Digest,
    reader: Arc<LayerReader>,
}

impl LayerState for State {
    fn digest(&self) -> &Digest {
        &self.layer
    }

    fn size(&self) -> u64 {
        self.reader.size()
    }

    fn fetched(&self) -> u64 {
        self.reader.fetched_bytes()
    }
}
