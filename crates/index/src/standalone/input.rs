//! The layout to convert: a directory or a tar, read where it is.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{BlobSource, BlobStream, Descriptor, Digest, FetchClass, FetchContext};
use soci_store::{ContentInfo, ContentStore, FileBlob, LocalStore, StoreError};
use soci_ztoc::UncompressedOffset;
use soci_ztoc::tar::{BLOCK, Parser, Step};

use super::StandaloneError;

/// Members of a tar that are looked at: more than any image has blobs.
const MAX_MEMBERS: usize = 1 << 20;
/// How long reading a blob of the input may take.
const READ_LIMIT: std::time::Duration = std::time::Duration::from_secs(6 * 60 * 60);

/// Where a blob's bytes are.
#[derive(Debug, Clone)]
struct Place {
    path: PathBuf,
    offset: u64,
    size: u64,
}

/// A layout that is only read.
#[derive(Debug)]
pub(super) struct Input {
    path: PathBuf,
    index: Bytes,
    blobs: HashMap<Digest, Place>,
}

impl Input {
    /// Opens a directory or a tar.
    pub(super) async fn open(path: &Path) -> Result<Self, StandaloneError> {
        let path = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || Self::open_blocking(&path)).await;
        opened.map_err(|error| StandaloneError::Access {
            path: PathBuf::new(),
            source: io::Error::other(error),
        })?
    }

    fn open_blocking(path: &Path) -> Result<Self, StandaloneError> {
        let access = |source| StandaloneError::Access { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(access)?.is_dir() { open_directory(path) } else { open_tar(path) }
    }

    /// Returns the path that was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the bytes of `index.json`.
    pub(super) fn index(&self) -> &Bytes {
        &self.index
    }

    /// Returns digest and size of every blob, in the order of digests.
    pub(super) fn blobs(&self) -> BTreeMap<Digest, u64> {
        self.blobs.iter().map(|(digest, place)| (*digest, place.size)).collect()
    }

    fn source(&self, digest: &Digest) -> Option<(FileBlob, u64)> {
        let place = self.blobs.get(digest)?;
        Some((FileBlob::within(place.path.clone(), place.offset, *digest, place.size), place.size))
    }
}

fn index_error(path: &Path, reason: impl ToString) -> StandaloneError {
    StandaloneError::IndexJson { path: path.to_owned(), reason: reason.to_string() }
}

fn open_directory(path: &Path) -> Result<Input, StandaloneError> {
    let index_path = path.join("index.json");
    let size = std::fs::metadata(&index_path).map_err(|error| index_error(path, error))?.len();
    if size > MAX_MANIFEST_SIZE {
        return Err(index_error(
            path,
            format!("{size} bytes are over the limit of {MAX_MANIFEST_SIZE} bytes"),
        ));
    }
    let index = std::fs::read(&index_path).map_err(|error| index_error(path, error))?;
    let mut blobs = HashMap::new();
    for algorithm in ["sha256", "sha512"] {
        // A layout without blobs of an algorithm needs no directory for it.
        let Ok(entries) = std::fs::read_dir(path.join("blobs").join(algorithm)) else { continue };
        for entry in entries.flatten() {
            let digest = format!("{algorithm}:{}", entry.file_name().to_string_lossy()).parse::<Digest>();
            // Not the entry's own metadata: a blob may be a symbolic link to where it is shared.
            if let (Ok(digest), Ok(metadata)) = (digest, std::fs::metadata(entry.path()))
                && metadata.is_file()
            {
                blobs.insert(digest, Place { path: entry.path(), offset: 0, size: metadata.len() });
            }
        }
    }
    Ok(Input { path: path.to_owned(), index: index.into(), blobs })
}

fn open_tar(path: &Path) -> Result<Input, StandaloneError> {
    let failed = |reason: &dyn std::fmt::Display| StandaloneError::Tar {
        path: path.to_owned(),
        reason: reason.to_string(),
    };
    let file = File::open(path).map_err(|error| failed(&error))?;
    let mut magic = [0; 4];
    if file.read_exact_at(&mut magic, 0).is_ok()
        && (magic[..2] == [0x1f, 0x8b] || magic == [0x28, 0xb5, 0x2f, 0xfd])
    {
        return Err(failed(&"it is compressed; decompress it first"));
    }
    let mut blobs = HashMap::new();
    let mut index = None;
    let mut parser = Parser::new();
    let mut block = [0; BLOCK];
    for _ in 0..MAX_MEMBERS {
        let Some(member) = next_member(&file, &mut parser, &mut block).map_err(|error| failed(&error))?
        else {
            let index = index.ok_or_else(|| index_error(path, "the archive has none"))?;
            return Ok(Input { path: path.to_owned(), index, blobs });
        };
        let name = String::from_utf8_lossy(&member.name).into_owned();
        let name = name.trim_start_matches("./");
        let place = Place { path: path.to_owned(), offset: member.data.0, size: member.size };
        if name == "index.json" {
            if member.size > MAX_MANIFEST_SIZE {
                return Err(index_error(path, format!("{} bytes are too many", member.size)));
            }
            let mut bytes = BytesMut::zeroed(usize::try_from(member.size).unwrap_or(0));
            file.read_exact_at(&mut bytes, place.offset).map_err(|error| index_error(path, error))?;
            index = Some(bytes.freeze());
        } else if let Some((algorithm, hex)) =
            name.strip_prefix("blobs/").and_then(|rest| rest.split_once('/'))
            && let Ok(digest) = format!("{algorithm}:{hex}").parse::<Digest>()
            && member.kind.has_data()
        {
            blobs.insert(digest, place);
        }
        // The data are passed over without being read.
        let next = member.data.0.saturating_add(member.size).checked_next_multiple_of(BLOCK as u64);
        let Some(next) = next else { return Err(failed(&"a member's size is senseless")) };
        parser = Parser::at(UncompressedOffset(next));
    }
    Err(failed(&format!("more than {MAX_MEMBERS} members")))
}

/// Reads headers from the parser's position on until a member is complete; `None` at the end of the archive.
fn next_member(
    file: &File,
    parser: &mut Parser,
    block: &mut [u8; BLOCK],
) -> Result<Option<soci_ztoc::tar::Member>, Box<dyn std::error::Error>> {
    loop {
        let mut filled = 0;
        while filled < BLOCK {
            let at = parser.position().saturating_add(filled as u64);
            match file.read_at(&mut block[filled..], at)? {
                0 => break,
                read => filled += read,
            }
        }
        let mut input = &block[..filled];
        match parser.step(&mut input)? {
            Step::Member(member) => return Ok(Some(*member)),
            Step::End => return Ok(None),
            Step::More | Step::Global(_) | Step::Data(_) if filled == BLOCK => {}
            Step::More | Step::Global(_) | Step::Data(_) => {
                parser.finish()?;
                return Ok(None);
            }
        }
    }
}

/// Body of the fuzz target `layout_tar`: a tar is a layout or an error, and its blobs are named and in order.
pub(crate) fn fuzz_layout_tar(data: &[u8]) {
    thread_local! {
        static FILE: tempfile::NamedTempFile = tempfile::NamedTempFile::new().expect("a temporary file");
    }
    let opened = FILE.with(|file| {
        std::fs::write(file.path(), data).expect("a temporary file can be written");
        Input::open_blocking(file.path())
    });
    let Ok(input) = opened else { return };
    assert!(input.index.len() as u64 <= MAX_MANIFEST_SIZE);
    for (digest, size) in input.blobs() {
        let Place { offset, .. } = input.blobs[&digest];
        // Data may be cut off, which reading them finds out.
        assert!(
            offset <= data.len() as u64 && offset % BLOCK as u64 == 0 && offset.checked_add(size).is_some()
        );
    }
}

/// The input with what is made on top of it: reads see both, writes go to the latter.
#[derive(Debug, Clone)]
pub(super) struct WorkStore {
    made: LocalStore,
    input: Arc<Input>,
}

impl WorkStore {
    pub(super) fn new(made: LocalStore, input: Arc<Input>) -> Self {
        Self { made, input }
    }

    /// Returns the layout that writes go to.
    pub(super) fn made(&self) -> &LocalStore {
        &self.made
    }

    /// Returns digest and size of everything, in the order of digests.
    pub(super) async fn blobs(&self) -> Result<BTreeMap<Digest, u64>, StoreError> {
        let mut all = self.input.blobs();
        all.extend(self.made.walk().await?.into_iter().map(|info| (info.digest, info.size)));
        Ok(all)
    }

    /// Returns digest and size of what only the input has.
    pub(super) async fn missing(&self) -> Result<BTreeMap<Digest, u64>, StoreError> {
        let mut missing = self.input.blobs();
        for info in self.made.walk().await? {
            missing.remove(&info.digest);
        }
        Ok(missing)
    }

    /// Copies what is [missing](Self::missing) into the layout that is made, verified on the way.
    pub(super) async fn complete(
        &self,
        missing: BTreeMap<Digest, u64>,
        advances: impl Fn(u64),
    ) -> Result<(), StandaloneError> {
        for (digest, size) in missing {
            let Some((source, _)) = self.input.source(&digest) else { continue };
            let stream = source.open(0..size, &context()).await?;
            self.made.put_stream(&Descriptor::new("", digest, size), stream, &[]).await?;
            advances(size);
        }
        Ok(())
    }
}

/// Returns a context for reading the input.
pub(super) fn context() -> FetchContext {
    FetchContext::new(std::time::Instant::now() + READ_LIMIT, FetchClass::OnDemand)
}

#[async_trait]
impl ContentStore for WorkStore {
    async fn info(&self, digest: &Digest) -> Result<Option<ContentInfo>, StoreError> {
        if let Some(info) = self.made.info(digest).await? {
            return Ok(Some(info));
        }
        Ok(self.input.blobs.get(digest).map(|place| ContentInfo {
            digest: *digest,
            size: place.size,
            created: None,
            labels: BTreeMap::new(),
        }))
    }

    async fn read(&self, digest: &Digest, max: u64) -> Result<Option<Bytes>, StoreError> {
        if let Some(bytes) = self.made.read(digest, max).await? {
            return Ok(Some(bytes));
        }
        let Some((source, size)) = self.input.source(digest) else { return Ok(None) };
        if size > max {
            return Err(StoreError::TooLarge { digest: *digest, size, limit: max });
        }
        let failed = |source| StoreError::Source { digest: *digest, source };
        let mut stream = source.open(0..size, &context()).await.map_err(failed)?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = stream.next().await {
            bytes.extend_from_slice(&piece.map_err(failed)?);
        }
        if !digest.verifies(&bytes) {
            let found = format!("{}, {size} bytes in the image layout", Digest::of(&bytes));
            return Err(StoreError::Corrupt { digest: *digest, found });
        }
        Ok(Some(bytes.freeze()))
    }

    async fn source(&self, digest: &Digest) -> Result<Option<(Arc<dyn BlobSource>, u64)>, StoreError> {
        if let Some(found) = self.made.source(digest).await? {
            return Ok(Some(found));
        }
        Ok(self.input.source(digest).map(|(source, size)| (Arc::new(source) as Arc<dyn BlobSource>, size)))
    }

    async fn put(
        &self,
        descriptor: &Descriptor,
        bytes: Bytes,
        labels: &[(String, String)],
    ) -> Result<(), StoreError> {
        self.made.put(descriptor, bytes, labels).await
    }

    async fn put_stream(
        &self,
        descriptor: &Descriptor,
        stream: BlobStream,
        labels: &[(String, String)],
    ) -> Result<(), StoreError> {
        self.made.put_stream(descriptor, stream, labels).await
    }

    async fn label(&self, digest: &Digest, labels: &[(String, String)]) -> Result<(), StoreError> {
        self.made.label(digest, labels).await
    }

    async fn delete(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.made.delete(digest).await
    }

    async fn walk(&self) -> Result<Vec<ContentInfo>, StoreError> {
        let mut all = Vec::new();
        for digest in self.blobs().await?.keys() {
            all.extend(self.info(digest).await?);
        }
        Ok(all)
    }

    async fn find(&self, label: &str, value: &str) -> Result<Vec<ContentInfo>, StoreError> {
        self.made.find(label, value).await
    }
}
