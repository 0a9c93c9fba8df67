//! Builds the SOCI index of one image manifest from local content.
//!
//! Each layer is read once, in pieces; a few layers at a time. A layer that cannot be indexed for what it is (too small,
//! of another compression, with entries no zTOC can describe) is skipped and said so; a layer that cannot be read, or is
//! not what its digest says, fails the build. Results are reported and listed in the order of the image's layers,
//! whichever is finished first, so that equal layers give equal indexes and equal output.

mod layer;
mod select;

use std::num::NonZeroUsize;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use soci_oci::{Descriptor, Digest, Manifest, annotation};
use soci_store::{ContentStore, StoreError};

use crate::manifest::{EMPTY_CONFIG, SociIndex};
use crate::prefetch::create::{Layers, create};

pub use layer::LayerError;

/// The span size used unless another is asked for, in bytes.
pub const SPAN_SIZE: u64 = 4 << 20;
/// Layers below this size are skipped unless another size is asked for, in bytes.
pub const MIN_LAYER_SIZE: u64 = 10 << 20;

/// How to build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Bytes of uncompressed data per span.
    pub span_size: u64,
    /// Layers strictly smaller are skipped, in bytes of the compressed layer.
    pub min_layer_size: u64,
    /// Whether zTOCs of layers without extended attributes say so.
    pub xattr: bool,
    /// Whether to build zTOCs that exist already.
    pub force: bool,
    /// Files whose spans are to be prefetched, as paths inside the image.
    pub prefetch: Vec<String>,
    /// Layers that are worked on at a time.
    pub parallel: NonZeroUsize,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            span_size: SPAN_SIZE,
            min_layer_size: MIN_LAYER_SIZE,
            xattr: false,
            force: false,
            prefetch: Vec::new(),
            parallel: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// Is told how a build goes. Called from several tasks.
pub trait Observer: Send + Sync {
    /// A result, in the exact words of the reference's tool.
    fn line(&self, text: &str);
    /// Something that did not work out, but does not fail the build.
    fn warn(&self, text: &str);
    /// Work that takes its time begins; `blob` names it and has as many bytes as there are to do.
    fn begins(&self, _work: Work, _blob: &Descriptor) {}
    /// So many more bytes are done.
    fn advances(&self, _blob: &Digest, _bytes: u64) {}
    /// The work on a blob is done, well or not.
    fn ends(&self, _blob: &Digest) {}
}

/// What an [`Observer`] can watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A layer is read and indexed.
    Index,
    /// A blob is sent to a registry.
    Upload,
    /// An image layout is written.
    Write,
}

/// Where a build reads and writes.
#[derive(Debug, Clone)]
pub struct Stores {
    /// Holds the image.
    pub image: Arc<dyn ContentStore>,
    /// Gets the SOCI index and what it names.
    pub artifacts: Arc<dyn ContentStore>,
}

/// A build that failed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No layer gave a zTOC.
    #[error("no ztocs created, all layers either skipped or produced errors")]
    Empty,
    /// Layers that could not be read or are damaged.
    #[error("errors encountered while building soci layers; {}", layer::joined(.0))]
    Layers(Vec<LayerError>),
    /// The store for artifacts.
    #[error("storing the SOCI index")]
    Store(#[from] StoreError),
}

/// Builds, stores and returns the index of `manifest`: of version 1 with a `subject`, its descriptor, else of version 2.
///
/// # Errors
/// [`BuildError::Empty`] when no layer got a zTOC, else when a layer or the store fails.
pub async fn build(
    manifest: &Manifest,
    subject: Option<&Descriptor>,
    stores: &Stores,
    options: &BuildOptions,
    observer: &dyn Observer,
) -> Result<SociIndex, BuildError> {
    let mut first_of = std::collections::HashMap::new();
    for (at, layer) in manifest.layers.iter().enumerate() {
        first_of.entry(layer.digest).or_insert(at);
    }
    // A layer that occurs again is not built again; its line is printed again, and its zTOC listed again.
    let unique = manifest.layers.iter().enumerate().filter(|(at, layer)| first_of[&layer.digest] == *at);
    let mut outcomes = std::collections::HashMap::new();
    let mut errors = Vec::new();
    let mut done = stream::iter(unique.map(|(_, layer)| async move {
        (layer.digest, layer::layer(layer, stores, options, observer).await)
    }))
    .buffered(options.parallel.get());
    let mut ztocs: Vec<Descriptor> = Vec::new();
    let mut next = 0;
    while let Some((digest, outcome)) = done.next().await {
        match outcome {
            Ok(outcome) => drop(outcomes.insert(digest, outcome)),
            Err(error) => errors.push(error),
        }
        // Everything up to the next layer that is not done yet can be reported.
        while let Some(layer) = manifest.layers.get(next) {
            if !outcomes.contains_key(&layer.digest) && errors.iter().all(|error| error.layer != layer.digest)
            {
                break;
            }
            if let Some(outcome) = outcomes.get(&layer.digest) {
                outcome.report(observer);
                ztocs.extend(outcome.descriptor().cloned());
            }
            next += 1;
        }
    }
    drop(done);
    if !errors.is_empty() {
        return Err(BuildError::Layers(errors));
    }
    if ztocs.is_empty() {
        return Err(BuildError::Empty);
    }
    let mut artifacts = ztocs;
    artifacts.extend(prefetch(&artifacts, stores, options, observer).await?);
    let index = SociIndex::new(artifacts, subject);
    stores.artifacts.put(&index.manifest.config, Bytes::from_static(EMPTY_CONFIG), &[]).await?;
    stores.artifacts.put(&index.descriptor(), index.bytes.clone(), &index.gc_labels()).await?;
    Ok(index)
}

/// Creates and stores the prefetch artifacts of the layers that have `ztocs`; returns their descriptors in that order.
async fn prefetch(
    ztocs: &[Descriptor],
    stores: &Stores,
    options: &BuildOptions,
    observer: &dyn Observer,
) -> Result<Vec<Descriptor>, StoreError> {
    if options.prefetch.is_empty() {
        return Ok(Vec::new());
    }
    let mut layers = Layers::default();
    for ztoc in ztocs {
        let Some(layer) = ztoc.annotation(annotation::LAYER_DIGEST).and_then(|text| text.parse().ok()) else {
            continue;
        };
        let bytes = stores.artifacts.read(&ztoc.digest, crate::resolve::MAX_ZTOC_SIZE).await?;
        match bytes.map(|bytes| soci_ztoc::Ztoc::decode(bytes, &soci_ztoc::DecodeLimits::default())) {
            Some(Ok(ztoc)) => layers.push(layer, &ztoc),
            Some(Err(error)) => observer.warn(&format!("prefetch: ztoc {}: {error}", ztoc.digest)),
            None => observer.warn(&format!("prefetch: ztoc {} is gone", ztoc.digest)),
        }
    }
    let created = create(&layers, &options.prefetch, observer);
    let mut descriptors = Vec::new();
    for (layer, prefetch) in created {
        let bytes = prefetch.encode();
        let descriptor = crate::prefetch::Prefetch::descriptor(&bytes, &layer);
        stores.artifacts.put(&descriptor, bytes.into(), &[]).await?;
        observer.line(&format!("Created prefetch artifact for layer {layer}: {}", descriptor.digest));
        descriptors.push(descriptor);
    }
    Ok(descriptors)
}
