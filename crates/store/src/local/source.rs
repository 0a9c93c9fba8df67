//! Reading content of the soci store: whole and verified, or ranges as a stream.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use soci_oci::{BlobSource, BlobStream, Digest, FetchContext, FetchError, FetchErrorKind};

use crate::StoreError;

/// Bytes of one piece of a stream: large enough that system calls do not count, small enough for the L2 cache.
const PIECE: usize = 256 << 10;
/// Pieces that are read ahead of the consumer.
const QUEUE: usize = 2;

/// Returns the verified content of `path`.
pub(super) fn read(path: &Path, digest: &Digest, max: u64) -> Result<Option<Bytes>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("opening", path)(error)),
    };
    let size = file.metadata().map_err(StoreError::io("looking at", path))?.len();
    if size > max {
        return Err(StoreError::TooLarge { digest: *digest, size, limit: max });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.take(max).read_to_end(&mut bytes).map_err(StoreError::io("reading", path))?;
    let mut hasher = digest.hasher();
    hasher.update(&bytes);
    let found = hasher.finish();
    if found != *digest {
        return Err(StoreError::Corrupt {
            digest: *digest,
            found: format!("{found}, {} bytes", bytes.len()),
        });
    }
    Ok(Some(bytes.into()))
}

/// Content in a file, or in a part of one; the file is opened anew for each range.
///
/// The bytes it yields are not verified.
#[derive(Debug)]
pub struct FileBlob {
    path: PathBuf,
    offset: u64,
    digest: Digest,
    size: u64,
}

impl FileBlob {
    /// Returns the content `digest`, which is the first `size` bytes of `path`.
    pub fn new(path: PathBuf, digest: Digest, size: u64) -> Self {
        Self { path, offset: 0, digest, size }
    }

    /// Returns the content `digest`, which is the `size` bytes of `path` from byte `offset` on.
    pub fn within(path: PathBuf, offset: u64, digest: Digest, size: u64) -> Self {
        Self { path, offset, digest, size }
    }
}

#[async_trait]
impl BlobSource for FileBlob {
    async fn open(&self, range: Range<u64>, _context: &FetchContext) -> Result<BlobStream, FetchError> {
        let digest = self.digest;
        if range.start > range.end || range.end > self.size {
            let message = format!("{digest}: range {range:?} is outside of its {} bytes", self.size);
            return Err(FetchError::new(FetchErrorKind::Local, message));
        }
        if range.is_empty() {
            return Ok(futures::stream::empty().boxed());
        }
        let failed = move |error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::NotFound => FetchErrorKind::NotFound,
                _ => FetchErrorKind::Local,
            };
            FetchError::because(kind, format!("{digest}: reading local content"), error)
        };
        let path = self.path.clone();
        let opened = tokio::task::spawn_blocking(move || File::open(path)).await;
        let file = opened.map_err(io::Error::other).and_then(|result| result).map_err(failed)?;
        let offset = self.offset;
        let (sender, receiver) = tokio::sync::mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || {
            let mut at = range.start;
            while at < range.end {
                let piece = usize::try_from(range.end - at).map_or(PIECE, |left| left.min(PIECE));
                let mut bytes = vec![0; piece];
                let item = match file.read_exact_at(&mut bytes, offset.saturating_add(at)) {
                    Ok(()) => Ok(Bytes::from(bytes)),
                    Err(error) => Err(failed(error)),
                };
                at += piece as u64;
                let end = item.is_err();
                if sender.blocking_send(item).is_err() || end {
                    return;
                }
            }
        });
        Ok(tokio_stream::wrappers::ReceiverStream::new(receiver).boxed())
    }
}
