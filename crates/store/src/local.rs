//! The soci store: content in an OCI image layout on disk.
//!
//! ```text
//! oci-layout              {"imageLayoutVersion":"1.0.0"}
//! index.json              an image index; ours stays empty, the Go tools list manifests in it
//! blobs/<algorithm>/<hex> content, mode 0444
//! ingest/<hex>_<suffix>   content being written, locked by its writer
//! labels/<algorithm>-<hex> labels of content as a JSON object, where it has any; hints, so never flushed
//! ```
//!
//! Content appears under `blobs` by rename, after it was verified and flushed to disk; so what is there is whole, even
//! after a crash. What a crash leaves in `ingest` is never read and is removed by the next [`LocalStore::open`] that
//! finds it unlocked. Several processes may use one store.
//!
//! An index is written after what it names, so what nobody names may be about to be named. Who makes an index therefore
//! holds `blobs` locked with others of his kind ([`LocalStore::for_writing`]), and who removes what nobody names holds it
//! alone ([`LocalStore::try_collect`]).

mod ingest;
mod labels;
mod source;

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use soci_oci::{BlobSource, BlobStream, Descriptor, Digest};

use self::ingest::Ingest;
pub use self::source::FileBlob;
use crate::{ContentInfo, ContentStore, StoreError};

/// Pieces of a stream that wait for the disk.
const WRITE_QUEUE: usize = 4;

/// Content in an OCI image layout.
#[derive(Debug, Clone)]
pub struct LocalStore {
    layout: PathBuf,
    /// Held locked while this may write content that an index is to name.
    writer: Option<Arc<File>>,
}

/// While this lives, nobody makes an index in the store.
#[derive(Debug)]
pub struct Collecting(#[expect(dead_code, reason = "it holds the lock")] File);

impl LocalStore {
    /// Opens the store of the program root `root`, the layout `<root>/content`; creates it where it is absent.
    ///
    /// Blocks on the disk for a moment.
    ///
    /// # Errors
    /// When directories or the layout's files cannot be created.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::at(&root.join("content"))
    }

    /// Opens the OCI image layout `layout` itself; creates it where it is absent. Blocks on the disk for a moment.
    ///
    /// # Errors
    /// When directories or the layout's files cannot be created.
    pub fn at(layout: &Path) -> Result<Self, StoreError> {
        for directory in ["blobs/sha256", "ingest", "labels"] {
            let path = layout.join(directory);
            fs::create_dir_all(&path).map_err(StoreError::io("creating", &path))?;
        }
        let store = Self { layout: layout.to_owned(), writer: None };
        store.create("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        store.create(
            "index.json",
            br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#,
        )?;
        ingest::clean(&layout.join("ingest"));
        Ok(store)
    }

    /// Returns the store for one who makes an index: until it and its clones are dropped, nobody collects. To be called before
    /// content is looked for that the index may name. Blocks while somebody collects, which takes a moment.
    ///
    /// # Errors
    /// When the store cannot be locked.
    pub fn for_writing(mut self) -> Result<Self, StoreError> {
        let (file, path) = self.lock_file()?;
        file.lock_shared().map_err(StoreError::io("locking", &path))?;
        self.writer = Some(Arc::new(file));
        Ok(self)
    }

    /// Lets the caller remove what no index names; nothing while somebody makes an index. Does not wait.
    ///
    /// # Errors
    /// When the store cannot be locked.
    pub fn try_collect(&self) -> Result<Option<Collecting>, StoreError> {
        let (file, path) = self.lock_file()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Collecting(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(StoreError::io("locking", &path)(error)),
        }
    }

    fn lock_file(&self) -> Result<(File, PathBuf), StoreError> {
        let path = self.layout.join("blobs");
        let file = File::open(&path).map_err(StoreError::io("opening", &path))?;
        Ok((file, path))
    }

    /// Returns the directory of the layout.
    pub fn layout(&self) -> &Path {
        &self.layout
    }

    /// Returns the file that holds `digest`, whether or not it exists. Nobody may write to it.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.layout.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    /// Makes one of the layout's files where it is absent, or was left empty by a process that was killed.
    fn create(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.layout.join(name);
        let empty = match fs::metadata(&path) {
            Ok(found) if found.len() > 0 => return Ok(()),
            found => found.is_ok(),
        };
        let temporary = self.layout.join("ingest").join(format!("{name}-{}", ingest::suffix()));
        fs::write(&temporary, bytes).map_err(StoreError::io("writing", &temporary))?;
        // Another process may have made it meanwhile, and written more to it than this.
        let placed = if empty { fs::rename(&temporary, &path) } else { fs::hard_link(&temporary, &path) };
        let _ = fs::remove_file(&temporary);
        match placed {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(StoreError::io("creating", &path)(error))
            }
            _ => Ok(()),
        }
    }

    fn stat(&self, digest: &Digest) -> Result<Option<ContentInfo>, StoreError> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(ContentInfo {
                digest: *digest,
                size: metadata.len(),
                created: metadata.modified().ok(),
                labels: labels::read(&self.layout, digest),
            })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("looking at", &path)(error)),
        }
    }

    /// Whether content of this digest and size is there already; a file of another size is not it.
    fn holds(&self, descriptor: &Descriptor) -> Result<bool, StoreError> {
        Ok(self.stat(&descriptor.digest)?.is_some_and(|info| info.size == descriptor.size))
    }

    fn entries(&self) -> Result<Vec<ContentInfo>, StoreError> {
        let mut all = Vec::new();
        for algorithm in ["sha256", "sha512"] {
            let path = self.layout.join("blobs").join(algorithm);
            let entries = match fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(StoreError::io("listing", &path)(error)),
            };
            for entry in entries {
                let entry = entry.map_err(StoreError::io("listing", &path))?;
                let Some(hex) = entry.file_name().to_str().map(str::to_owned) else { continue };
                let Ok(digest) = format!("{algorithm}:{hex}").parse::<Digest>() else { continue };
                all.extend(self.stat(&digest)?);
            }
        }
        Ok(all)
    }

    /// Whether the file of `digest` begins as a JSON object does.
    fn looks_like_json(&self, digest: &Digest) -> bool {
        let mut first = [0];
        let read = File::open(self.path(digest)).and_then(|mut file| io::Read::read(&mut file, &mut first));
        matches!(read, Ok(1)) && first == *b"{"
    }

    /// Takes `digest` out of `index.json`, in which the Go tools list manifests.
    fn unlist(&self, digest: &Digest) -> Result<(), StoreError> {
        let path = self.layout.join("index.json");
        let text = digest.to_string();
        let bytes = fs::read(&path).unwrap_or_default();
        let Ok(mut index) = serde_json::from_slice::<serde_json::Value>(&bytes) else { return Ok(()) };
        let Some(manifests) = index.get_mut("manifests").and_then(|list| list.as_array_mut()) else {
            return Ok(());
        };
        let before = manifests.len();
        manifests.retain(|entry| entry.get("digest").and_then(|digest| digest.as_str()) != Some(&text));
        if manifests.len() == before {
            return Ok(());
        }
        let temporary = self.layout.join(format!("ingest/index.json_{}", ingest::suffix()));
        let written = fs::write(&temporary, index.to_string()).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(StoreError::io("rewriting", &path))
    }
}

/// Runs `work` where it may block on the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::Io {
            action: "running a task on",
            path: PathBuf::from("the content store"),
            source: io::Error::other(error),
        }),
    }
}

#[async_trait]
impl ContentStore for LocalStore {
    async fn info(&self, digest: &Digest) -> Result<Option<ContentInfo>, StoreError> {
        let (store, digest) = (self.clone(), *digest);
        blocking(move || store.stat(&digest)).await
    }

    async fn read(&self, digest: &Digest, max: u64) -> Result<Option<Bytes>, StoreError> {
        let (store, digest) = (self.clone(), *digest);
        blocking(move || source::read(&store.path(&digest), &digest, max)).await
    }

    async fn source(&self, digest: &Digest) -> Result<Option<(Arc<dyn BlobSource>, u64)>, StoreError> {
        let Some(info) = self.info(digest).await? else { return Ok(None) };
        let source = FileBlob::new(self.path(digest), *digest, info.size);
        Ok(Some((Arc::new(source), info.size)))
    }

    async fn put(
        &self,
        descriptor: &Descriptor,
        bytes: Bytes,
        labels: &[(String, String)],
    ) -> Result<(), StoreError> {
        let (store, descriptor, labels) = (self.clone(), descriptor.clone(), labels.to_vec());
        blocking(move || {
            if !store.holds(&descriptor)? {
                let mut ingest = Ingest::begin(&store.layout, &descriptor)?;
                ingest.write(&bytes)?;
                ingest.commit()?;
            }
            labels::merge(&store.layout, &descriptor.digest, &labels)
        })
        .await
    }

    async fn put_stream(
        &self,
        descriptor: &Descriptor,
        mut stream: BlobStream,
        labels: &[(String, String)],
    ) -> Result<(), StoreError> {
        let (store, wanted) = (self.clone(), descriptor.clone());
        if blocking(move || store.holds(&wanted)).await? {
            return self.label(&descriptor.digest, labels).await;
        }
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(WRITE_QUEUE);
        let (store, wanted) = (self.clone(), descriptor.clone());
        let writer = blocking(move || {
            let mut ingest = Ingest::begin(&store.layout, &wanted)?;
            while let Some(bytes) = receiver.blocking_recv() {
                ingest.write(&bytes)?;
            }
            Ok(ingest)
        });
        let digest = descriptor.digest;
        let feeder = async move {
            while let Some(bytes) = stream.next().await {
                let bytes = bytes.map_err(|source| StoreError::Source { digest, source })?;
                if sender.send(bytes).await.is_err() {
                    break; // the writer failed, and says why
                }
            }
            Ok::<(), StoreError>(())
        };
        let (fed, written) = tokio::join!(feeder, writer);
        fed?;
        let ingest = written?;
        let (store, labels) = (self.clone(), labels.to_vec());
        blocking(move || {
            ingest.commit()?;
            labels::merge(&store.layout, &digest, &labels)
        })
        .await
    }

    async fn label(&self, digest: &Digest, labels: &[(String, String)]) -> Result<(), StoreError> {
        let (store, digest, labels) = (self.clone(), *digest, labels.to_vec());
        blocking(move || {
            if !store.path(&digest).is_file() {
                return Err(StoreError::NotFound(digest.to_string()));
            }
            labels::merge(&store.layout, &digest, &labels)
        })
        .await
    }

    async fn delete(&self, digest: &Digest) -> Result<bool, StoreError> {
        let (store, digest) = (self.clone(), *digest);
        blocking(move || {
            let path = store.path(&digest);
            match fs::remove_file(&path) {
                Ok(()) => {
                    labels::remove(&store.layout, &digest);
                    store.unlist(&digest)?;
                    Ok(true)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(StoreError::io("removing", &path)(error)),
            }
        })
        .await
    }

    async fn walk(&self) -> Result<Vec<ContentInfo>, StoreError> {
        let store = self.clone();
        blocking(move || store.entries()).await
    }

    async fn find(&self, label: &str, value: &str) -> Result<Vec<ContentInfo>, StoreError> {
        let (store, label, value) = (self.clone(), label.to_owned(), value.to_owned());
        blocking(move || {
            let mut found = Vec::new();
            for digest in labels::labelled(&store.layout) {
                found.extend(store.stat(&digest)?.filter(|info| info.labels.get(&label) == Some(&value)));
            }
            Ok(found)
        })
        .await
    }

    async fn index_candidates(&self) -> Result<Vec<ContentInfo>, StoreError> {
        let store = self.clone();
        blocking(move || {
            let mut all = store.entries()?;
            all.retain(|info| {
                info.size <= soci_oci::manifest::MAX_MANIFEST_SIZE && store.looks_like_json(&info.digest)
            });
            Ok(all)
        })
        .await
    }
}

#[cfg(test)]
mod tests;
