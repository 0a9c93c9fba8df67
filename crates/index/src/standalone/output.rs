//! Writes the converted layout, so that it appears whole or not at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::StreamExt as _;
use soci_oci::{Descriptor, Digest};
use soci_store::ContentStore as _;

use super::archive::Archive;
use super::input::{WorkStore, context};
use super::{StandaloneError, index_json};
use crate::build::{Observer, Work};

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;
/// Pieces of a blob that wait for the disk.
const QUEUE: usize = 4;

/// What every layout has.
const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// What the writing thread is told.
enum Piece {
    Begin { name: String, size: u64 },
    Data(Bytes),
    End { size: u64 },
}

/// Writes a tar of the layout to `output`. A regular file is replaced when the tar is whole; anything else is written to.
pub(super) async fn archive(
    store: &WorkStore,
    target: &Descriptor,
    output: &Path,
    observer: &dyn Observer,
) -> Result<(), StandaloneError> {
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Piece>(QUEUE);
    let (path, index) = (output.to_owned(), index_json(target));
    let writer = tokio::task::spawn_blocking(move || write_archive(&path, &index, &mut receiver));
    let blobs = store.blobs().await?;
    let whole = Descriptor::new("", target.digest, blobs.values().sum());
    observer.begins(Work::Write, &whole);
    let fed = feed(store, blobs, sender, |bytes| observer.advances(&whole.digest, bytes)).await;
    let written = writer.await.map_err(io::Error::other).and_then(|result| result);
    observer.ends(&whole.digest);
    // A writer that failed stops the feeder, so its reason comes first.
    let file = written.map_err(StandaloneError::output("writing output tar", output))?;
    fed?;
    file.persist().map_err(StandaloneError::output("failed to create output tar", output))
}

async fn feed(
    store: &WorkStore,
    blobs: BTreeMap<Digest, u64>,
    sender: tokio::sync::mpsc::Sender<Piece>,
    advances: impl Fn(u64),
) -> Result<(), StandaloneError> {
    for (digest, size) in blobs {
        let Some((source, _)) = store.source(&digest).await? else { continue };
        let name = format!("blobs/{}/{}", digest.algorithm(), digest.hex());
        if sender.send(Piece::Begin { name, size }).await.is_err() {
            return Ok(());
        }
        let mut stream = source.open(0..size, &context()).await?;
        let mut hasher = digest.hasher();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes?;
            hasher.update(&bytes);
            advances(bytes.len() as u64);
            if sender.send(Piece::Data(bytes)).await.is_err() {
                return Ok(());
            }
        }
        let found = hasher.finish();
        if found != digest {
            let found = format!("{found}, {size} bytes in the image layout");
            return Err(soci_store::StoreError::Corrupt { digest, found }.into());
        }
        if sender.send(Piece::End { size }).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// A file that is written under another name first.
struct Pending {
    temporary: Option<tempfile::TempPath>,
    target: PathBuf,
}

impl Pending {
    /// Opens what to write to for `target`.
    fn open(target: &Path) -> io::Result<(Self, File)> {
        if fs::metadata(target).is_ok_and(|metadata| !metadata.is_file()) {
            let file = File::options().write(true).open(target)?;
            return Ok((Self { temporary: None, target: target.to_owned() }, file));
        }
        let parent =
            target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new().prefix(".soci-convert-").tempfile_in(parent)?;
        let (file, temporary) = file.into_parts();
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        Ok((Self { temporary: Some(temporary), target: target.to_owned() }, file))
    }

    /// Gives the file its name.
    fn persist(self) -> io::Result<()> {
        match self.temporary {
            Some(temporary) => temporary.persist(&self.target).map_err(|error| error.error),
            None => Ok(()),
        }
    }
}

fn write_archive(
    output: &Path,
    index: &[u8],
    pieces: &mut tokio::sync::mpsc::Receiver<Piece>,
) -> io::Result<Pending> {
    let (pending, file) = Pending::open(output)?;
    let mut archive = Archive::new(BufWriter::with_capacity(BUFFER, file));
    for (name, bytes) in [("oci-layout", OCI_LAYOUT), ("index.json", index)] {
        archive.file(name, 0o644, bytes.len() as u64)?;
        archive.data(bytes)?;
        archive.end(bytes.len() as u64)?;
    }
    archive.directory("blobs/")?;
    archive.directory("blobs/sha256/")?;
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Begin { name, size } => archive.file(&name, 0o444, size)?,
            Piece::Data(bytes) => archive.data(&bytes)?,
            Piece::End { size } => archive.end(size)?,
        }
    }
    let file = archive.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    if pending.temporary.is_some() {
        file.sync_all()?;
    }
    Ok(pending)
}

/// Makes `output` a directory with the layout; what is there is removed when the new one is whole.
pub(super) async fn directory(
    store: &WorkStore,
    target: &Descriptor,
    output: &Path,
    observer: &dyn Observer,
) -> Result<(), StandaloneError> {
    let missing = store.missing().await?;
    let whole = Descriptor::new("", target.digest, missing.values().sum());
    observer.begins(Work::Write, &whole);
    let completed = store.complete(missing, |bytes| observer.advances(&whole.digest, bytes)).await;
    observer.ends(&whole.digest);
    completed?;
    let (layout, output) = (store.made().layout().to_owned(), output.to_owned());
    let (index, shown) = (index_json(target), output.clone());
    let swapped = tokio::task::spawn_blocking(move || swap(&layout, &index, &output)).await;
    let swapped = swapped.map_err(io::Error::other).and_then(|result| result);
    swapped.map_err(StandaloneError::output("failed to create output directory", &shown))
}

fn swap(layout: &Path, index: &[u8], output: &Path) -> io::Result<()> {
    for own in ["ingest", "labels"] {
        fs::remove_dir_all(layout.join(own))?;
    }
    let mut file = File::create(layout.join("index.json"))?;
    file.write_all(index)?;
    file.sync_all()?;
    for (name, mode) in [("", 0o755), ("index.json", 0o644), ("oci-layout", 0o644)] {
        fs::set_permissions(layout.join(name), fs::Permissions::from_mode(mode))?;
    }
    let old = layout.with_extension("old");
    let replaced = match fs::rename(output, &old) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    let renamed = fs::rename(layout, output);
    if renamed.is_err() && replaced {
        fs::rename(&old, output)?;
    }
    // The old one goes with the work directory it was moved into.
    renamed
}
