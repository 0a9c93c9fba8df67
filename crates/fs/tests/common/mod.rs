//! Layers in memory, mounted for a test and gone after it.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test binary uses its part of these test helpers"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use soci_fs::{
    FsOptions, FuseHub, HeaderCheck, LayerFs, LayerTree, MountOptions, OpaqueXattr, ServeOptions, Session,
    TreeOptions, Unmount,
};
use soci_layer::{RangeRead, ReadChunks, ReadError, ReadErrorKind};
use soci_ztoc::{BuildOptions, Compression, DecodeLimits, UncompressedOffset, Ztoc, ZtocBuilder};
use tokio::sync::watch;

/// How a source behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// All is at hand.
    Cached,
    /// Everything has to be waited for, and comes.
    Remote,
    /// Nothing comes.
    Stalled,
    /// Every read fails.
    Failing,
}

/// The bytes of a plain tar, in pieces.
#[derive(Debug)]
pub struct Source {
    tar: Bytes,
    behaviour: watch::Sender<Behaviour>,
    reads: AtomicUsize,
}

impl Source {
    pub fn new(tar: impl Into<Bytes>, behaviour: Behaviour) -> Arc<Self> {
        let (behaviour, _) = watch::channel(behaviour);
        Arc::new(Self { tar: tar.into(), behaviour, reads: AtomicUsize::new(0) })
    }

    pub fn set(&self, behaviour: Behaviour) {
        self.behaviour.send_replace(behaviour);
    }

    /// Reads that had to wait so far.
    pub fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }

    fn slice(&self, at: UncompressedOffset, len: usize) -> ReadChunks {
        let start = usize::try_from(at.0).unwrap().min(self.tar.len());
        let end = (start + len).min(self.tar.len());
        let mut chunks = ReadChunks::new();
        // In pieces of odd size, as spans would cut them.
        for from in (start..end).step_by(100_003) {
            chunks.push(self.tar.slice(from..end.min(from + 100_003)));
        }
        chunks
    }
}

#[async_trait::async_trait]
impl RangeRead for Source {
    fn try_read(&self, at: UncompressedOffset, len: usize) -> Option<ReadChunks> {
        (*self.behaviour.borrow() == Behaviour::Cached).then(|| self.slice(at, len))
    }

    async fn read_at(
        &self,
        at: UncompressedOffset,
        len: usize,
        _deadline: Instant,
    ) -> Result<ReadChunks, ReadError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let mut behaviour = self.behaviour.subscribe();
        let behaviour = *behaviour.wait_for(|now| *now != Behaviour::Stalled).await.unwrap();
        match behaviour {
            Behaviour::Failing => Err(ReadError::new(ReadErrorKind::Unavailable, "the test's source fails")),
            Behaviour::Cached | Behaviour::Remote | Behaviour::Stalled => Ok(self.slice(at, len)),
        }
    }
}

/// Builds the zTOC of a plain tar.
pub fn ztoc(tar: &[u8]) -> Ztoc {
    let options = BuildOptions { span_size: 4 << 20, build_tool: "test".into() };
    let mut builder = ZtocBuilder::new(Compression::Uncompressed, options).unwrap();
    builder.push(tar).unwrap();
    let built = builder.finish().unwrap();
    Ztoc::decode(built.bytes.into(), &DecodeLimits::default()).unwrap()
}

pub const TREE_OPTIONS: TreeOptions<'_> =
    TreeOptions { xattrs: true, opaque: OpaqueXattr::Trusted, implied: &|_| None };

pub fn tree(tar: &[u8]) -> LayerTree {
    LayerTree::build(&ztoc(tar), &TREE_OPTIONS).unwrap()
}

pub fn fs_options() -> FsOptions {
    FsOptions {
        layer: "test".into(),
        header_check: HeaderCheck::FirstRead,
        read_timeout: Duration::from_secs(60),
        state: None,
        statfs: "/tmp".into(),
        meter: None,
    }
}

/// Threads and a runtime to serve mounts with.
pub struct Machine {
    pub hub: FuseHub,
    pub runtime: tokio::runtime::Runtime,
}

impl Machine {
    pub fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let hub = FuseHub::new(runtime.handle().clone(), 2).unwrap();
        Self { hub, runtime }
    }

    pub fn mount(&self, fs: Arc<LayerFs>) -> Mounted {
        let directory = tempfile::Builder::new().prefix("soci-fs-test").tempdir().unwrap();
        let at = directory.path().join("mount");
        std::fs::create_dir(&at).unwrap();
        let device = soci_fs::mount(&at, &MountOptions::default())
            .expect("this test needs root and /dev/fuse: run it as root on a kernel with FUSE");
        let session = Session::serve(device, None, fs, &ServeOptions::default(), &self.hub).unwrap();
        Mounted { at, session: Some(session), directory }
    }

    /// Mounts a plain tar whose bytes are at hand.
    pub fn mount_tar(&self, tar: &[u8]) -> Mounted {
        self.mount(LayerFs::new(tree(tar), Source::new(tar.to_vec(), Behaviour::Cached), fs_options()))
    }
}

/// A mounted layer. Dropped, it is detached and no longer served, so that nobody hangs in it.
pub struct Mounted {
    pub at: PathBuf,
    pub session: Option<Session>,
    directory: tempfile::TempDir,
}

impl Mounted {
    /// A directory beside the mount.
    pub fn beside(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub fn top(&self) -> &Path {
        self.directory.path()
    }

    pub fn session(&self) -> &Session {
        self.session.as_ref().unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = soci_fs::unmount(&self.at, Unmount::Detach);
        self.session = None;
        soci_testkit::mounts::detach(self.directory.path());
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not for a minute.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}
