//! The zTOC of one layer.

use bytes::Bytes;
use futures::StreamExt as _;
use soci_oci::{
    BlobSource, Descriptor, Digest, FetchClass, FetchContext, FetchError, annotation, media_type, with_causes,
};
use soci_store::{ContentInfo, StoreError};
use soci_ztoc::{BuiltZtoc, Compression, DecodeLimits, Ztoc, ZtocBuilder};

use super::select::{Selection, select, skipped};
use super::{BuildOptions, Observer, Stores, Work};

/// Pieces of a layer that are read ahead of the builder.
const QUEUE: usize = 4;
/// How long reading one layer may take. Local content is read at hundreds of megabytes a second.
const READ_LIMIT: std::time::Duration = std::time::Duration::from_secs(6 * 60 * 60);

/// A layer that could not be indexed because it, or the machine, is at fault.
#[derive(Debug, thiserror::Error)]
#[error("layer {layer}: {}", with_causes(.cause))]
pub struct LayerError {
    /// The layer.
    pub layer: Digest,
    /// What is wrong.
    pub cause: LayerFault,
}

/// What can be wrong with a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerFault {
    /// It is not in local content.
    #[error("not found in the content store; pull the image with its layers first, not lazily")]
    Absent,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It could not be read to its end.
    #[error("reading")]
    Read(#[source] FetchError),
    /// Local content is not what its digest says.
    #[error("local content is damaged: it has digest {found}")]
    Digest {
        /// The digest of what was read.
        found: Box<Digest>,
    },
    /// Its size is not that of the manifest.
    #[error("the manifest says {expected} bytes, local content has {found}")]
    Size {
        /// As the manifest says.
        expected: u64,
        /// As it is.
        found: u64,
    },
    /// The builder failed.
    #[error(transparent)]
    Build(#[from] soci_ztoc::BuildError),
    /// The task that builds failed.
    #[error("the builder stopped: {0}")]
    Stopped(String),
}

pub(super) fn joined(errors: &[LayerError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// What became of a layer.
#[derive(Debug)]
pub(super) enum Outcome {
    Built { descriptor: Box<Descriptor>, line: String },
    Skipped(String),
    Ignored,
}

impl Outcome {
    pub(super) fn descriptor(&self) -> Option<&Descriptor> {
        match self {
            Self::Built { descriptor, .. } => Some(descriptor),
            Self::Skipped(_) | Self::Ignored => None,
        }
    }

    pub(super) fn report(&self, observer: &dyn Observer) {
        match self {
            Self::Built { line, .. } | Self::Skipped(line) => observer.line(line),
            Self::Ignored => {}
        }
    }
}

/// Finds or builds the zTOC of `layer`.
pub(super) async fn layer(
    layer: &Descriptor,
    stores: &Stores,
    options: &BuildOptions,
    observer: &dyn Observer,
) -> Result<Outcome, LayerError> {
    let compression = match select(layer, options.min_layer_size) {
        Selection::Build(compression) => compression,
        Selection::Skip(line) => return Ok(Outcome::Skipped(line)),
        Selection::Ignore => return Ok(Outcome::Ignored),
    };
    observer.begins(Work::Index, layer);
    let made = make(layer, compression, stores, options, observer).await;
    observer.ends(&layer.digest);
    match made {
        Ok(outcome) => Ok(outcome),
        Err(LayerFault::Build(error)) if error.is_unindexable() => {
            let reason = format!("cannot be described by a ztoc: {error}");
            Ok(Outcome::Skipped(skipped(&layer.digest, &layer.media_type, &reason)))
        }
        Err(cause) => Err(LayerError { layer: layer.digest, cause }),
    }
}

async fn make(
    layer: &Descriptor,
    compression: Compression,
    stores: &Stores,
    options: &BuildOptions,
    observer: &dyn Observer,
) -> Result<Outcome, LayerFault> {
    let span_size = options.span_size.to_string();
    if !options.force
        && let Some(ztoc) = existing(layer, &span_size, stores).await?
        && let Some(outcome) = reuse(layer, &ztoc, &span_size, stores, options).await?
    {
        return Ok(outcome);
    }
    let found = stores.image.source(&layer.digest).await?;
    let (source, size) = found.ok_or(LayerFault::Absent)?;
    if size != layer.size {
        return Err(LayerFault::Size { expected: layer.size, found: size });
    }
    let built = scan(layer, compression, &*source, options, observer).await?;
    let mut descriptor = Descriptor::new(media_type::ZTOC, built.digest, built.bytes.len() as u64);
    // These labels say that this program built the zTOC from that layer. One that was fetched has no such label: only
    // its index claims which layer it describes, and another image's index must not decide about this one.
    let labels = [
        (annotation::LAYER_DIGEST.to_owned(), layer.digest.to_string()),
        (annotation::SPAN_SIZE.to_owned(), span_size.clone()),
    ];
    stores.artifacts.put(&descriptor, built.bytes.into(), &labels).await?;
    annotate(&mut descriptor, layer, &span_size, options.xattr && !built.xattrs_needed);
    let line = format!("layer {} -> ztoc {}", layer.digest, descriptor.digest);
    Ok(Outcome::Built { descriptor: Box::new(descriptor), line })
}

fn annotate(ztoc: &mut Descriptor, layer: &Descriptor, span_size: &str, disable_xattrs: bool) {
    let mut set = |key: &str, value: String| drop(ztoc.annotations.insert(key.to_owned(), value));
    set(annotation::LAYER_MEDIA_TYPE, layer.media_type.clone());
    set(annotation::LAYER_DIGEST, layer.digest.to_string());
    set(annotation::SPAN_SIZE, span_size.to_owned());
    if disable_xattrs {
        set(annotation::DISABLE_XATTRS, "true".to_owned());
    }
}

/// Returns the zTOC that was built from `layer` before, with this span size.
async fn existing(
    layer: &Descriptor,
    span_size: &str,
    stores: &Stores,
) -> Result<Option<ContentInfo>, StoreError> {
    let mut found = stores.artifacts.find(annotation::LAYER_DIGEST, &layer.digest.to_string()).await?;
    found.retain(|info| info.labels.get(annotation::SPAN_SIZE).is_some_and(|size| size == span_size));
    found.sort_by_key(|info| info.digest);
    Ok(found.into_iter().next())
}

/// Returns the outcome of using `ztoc` again, or `None` when it turns out to be unusable.
async fn reuse(
    layer: &Descriptor,
    ztoc: &ContentInfo,
    span_size: &str,
    stores: &Stores,
    options: &BuildOptions,
) -> Result<Option<Outcome>, StoreError> {
    let mut descriptor = Descriptor::new(media_type::ZTOC, ztoc.digest, ztoc.size);
    if !stores.artifacts.pin(&descriptor).await? {
        return Ok(None);
    }
    let mut disable_xattrs = false;
    if options.xattr {
        let bytes = stores.artifacts.read(&ztoc.digest, crate::resolve::MAX_ZTOC_SIZE).await;
        let Ok(Some(bytes)) = bytes else { return Ok(None) };
        let Ok(decoded) = Ztoc::decode(bytes, &DecodeLimits::default()) else { return Ok(None) };
        disable_xattrs = !needs_xattrs(&decoded);
    }
    annotate(&mut descriptor, layer, span_size, disable_xattrs);
    let line = format!("layer {} -> ztoc {} (already exists)", layer.digest, ztoc.digest);
    Ok(Some(Outcome::Built { descriptor: Box::new(descriptor), line }))
}

/// Whether a layer has extended attributes, or opaque directories, which overlayfs sees as such.
fn needs_xattrs(ztoc: &Ztoc) -> bool {
    ztoc.entries().any(|entry| entry.name.ends_with(b".wh..wh..opq") || entry.xattrs().next().is_some())
}

/// Reads the layer once and builds its zTOC.
async fn scan(
    layer: &Descriptor,
    compression: Compression,
    source: &dyn BlobSource,
    options: &BuildOptions,
    observer: &dyn Observer,
) -> Result<BuiltZtoc, LayerFault> {
    let context = FetchContext::new(std::time::Instant::now() + READ_LIMIT, FetchClass::OnDemand);
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(QUEUE);
    let builder_options = soci_ztoc::BuildOptions {
        span_size: options.span_size,
        build_tool: annotation::BUILD_TOOL_VALUE.to_owned(),
    };
    // The builder hashes by SHA-256; a layer that is named otherwise is hashed here.
    let mut other = (layer.digest.algorithm() != "sha256").then(|| layer.digest.hasher());
    let builder = tokio::task::spawn_blocking(move || {
        let mut builder = ZtocBuilder::new(compression, builder_options)?;
        while let Some(bytes) = receiver.blocking_recv() {
            builder.push(&bytes)?;
            if let Some(hasher) = &mut other {
                hasher.update(&bytes);
            }
        }
        let built = builder.finish()?;
        let digest = other.map_or(built.layer_digest, soci_oci::Hasher::finish);
        Ok::<_, soci_ztoc::BuildError>((built, digest))
    });
    let fed = feed(layer, source, &context, sender, observer).await;
    let built = builder.await.map_err(|error| LayerFault::Stopped(error.to_string()))?;
    fed?;
    let (built, digest) = built?;
    if digest != layer.digest {
        return Err(LayerFault::Digest { found: Box::new(digest) });
    }
    Ok(built)
}

async fn feed(
    layer: &Descriptor,
    source: &dyn BlobSource,
    context: &FetchContext,
    sender: tokio::sync::mpsc::Sender<Bytes>,
    observer: &dyn Observer,
) -> Result<(), LayerFault> {
    let mut stream = source.open(0..layer.size, context).await.map_err(LayerFault::Read)?;
    while let Some(bytes) = stream.next().await {
        let bytes = bytes.map_err(LayerFault::Read)?;
        observer.advances(&layer.digest, bytes.len() as u64);
        if sender.send(bytes).await.is_err() {
            break; // the builder failed, and says why
        }
    }
    Ok(())
}
