//! Conversion of OCI layouts on disk: no containerd, no root, nothing but files.
//!
//! The input is read in place, whether it is a directory or a tar; what is made is written beside it into a work layout.
//! The output appears at its name when it is whole: a failed conversion leaves what was there before. Input and output may
//! be the same.

mod archive;
mod input;
mod output;
mod root;

pub(crate) use input::fuzz_layout_tar;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use soci_oci::{Descriptor, FetchError};
use soci_store::{LocalStore, StoreError};

use crate::build::{BuildOptions, Observer, Stores};
use crate::convert::{ConvertError, Converted, convert};
use crate::image::Platforms;
use input::{Input, WorkStore};

/// How the output is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A tar of an OCI image layout.
    OciArchive,
    /// A directory with an OCI image layout; one that is there is replaced.
    OciDir,
}

/// A conversion of a layout that failed.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    /// The input is not there.
    #[error("failed to access input {}", path.display())]
    Access {
        /// The input.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The input is no tar.
    #[error("failed to extract OCI tar {}: {reason}", path.display())]
    Tar {
        /// The input.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The input is no OCI image layout.
    #[error("failed to read index.json from {}: {reason}", path.display())]
    IndexJson {
        /// The input.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The layout holds no image.
    #[error("index.json contains no manifests")]
    NoManifests,
    /// The image's list of manifests could not be read.
    #[error("read manifest list")]
    List(#[source] crate::image::ImageError),
    /// None of the image's manifests is in the layout.
    #[error("manifest list contains no entries with available blobs")]
    NothingAvailable,
    /// The conversion itself.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The work layout.
    #[error("writing the converted image")]
    Store(#[from] StoreError),
    /// A blob of the input.
    #[error("reading the image layout")]
    Read(#[from] FetchError),
    /// The output could not be written.
    #[error("{action} {}", path.display())]
    Output {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl StandaloneError {
    fn output(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Output { action, path, source }
    }
}

/// Converts the image in the layout `input` and writes the layout `output`.
///
/// What is made on the way to an archive is kept in a directory of its own below `work`, which is removed at the end.
///
/// # Errors
/// When the input is no layout with an image, the image cannot be converted, or the output cannot be written.
pub async fn convert_layout(
    input: &Path,
    output: &Path,
    format: Format,
    platforms: &Platforms,
    work: &Path,
    options: &BuildOptions,
    observer: &dyn Observer,
) -> Result<Converted, StandaloneError> {
    let input = Arc::new(Input::open(input).await?);
    let beside = match format {
        Format::OciArchive => work,
        // Renamed to the output in the end, so it has to be on the same file system.
        Format::OciDir => match output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        },
    };
    let directory = tempfile::Builder::new().prefix(".soci-convert-").tempdir_in(beside);
    let directory = directory.map_err(StandaloneError::output("creating a work directory in", beside))?;
    let made = LocalStore::at(&directory.path().join("layout"))?;
    let store = WorkStore::new(made.clone(), Arc::clone(&input));
    let root = root::find(&input, &store).await?;
    let shared: Arc<dyn soci_store::ContentStore> = Arc::new(store.clone());
    let stores = Stores { image: Arc::clone(&shared), artifacts: shared };
    let converted = convert(&root, platforms, &stores, options, observer).await?;
    match format {
        Format::OciArchive => output::archive(&store, &converted.target, output, observer).await?,
        Format::OciDir => output::directory(&store, &converted.target, output, observer).await?,
    }
    Ok(converted)
}

/// Returns the `index.json` of a layout that holds `target` and nothing else.
fn index_json(target: &Descriptor) -> Vec<u8> {
    soci_oci::Index {
        schema_version: 2,
        media_type: soci_oci::media_type::OCI_INDEX.to_owned(),
        artifact_type: None,
        manifests: vec![Descriptor::new(target.media_type.clone(), target.digest, target.size)],
        subject: None,
        annotations: std::collections::BTreeMap::new(),
    }
    .encode()
}
