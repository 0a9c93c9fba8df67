//! Building a zTOC in one pass over a layer, while its bytes pass by.
//!
//! Three things happen to each piece of the layer: it is inflated, with checkpoints noted at block boundaries
//! ([`gzip`]); the tar that comes out is scanned for headers ([`toc`]); and the compressed bytes are hashed, for the
//! layer's digest and for the digest of the span they belong to ([`digests`]). Inflating takes most of the time and
//! hashing most of the rest, so hashing has a thread of its own behind a short queue once a layer is large enough.
//!
//! Nothing of the layer is kept but what goes into the zTOC: the checkpoints' windows and a compact list of files.

mod digests;
mod error;
mod gzip;
mod toc;

use bytes::Bytes;
use soci_oci::{Digest, Hasher};

pub use error::BuildError;

use crate::encode::{Document, encode, encode_tar_zinfo};
use crate::limits::DecodeLimits;
use crate::span_table::Compression;
use crate::ztoc::Ztoc;
use digests::{Cut, Hashing};
use gzip::GzipScan;
use toc::TocScan;

/// Pieces the layer is worked on in: small enough for the cache, large enough to hand to another thread.
const PIECE: usize = 256 << 10;

/// How to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOptions {
    /// Uncompressed bytes after which the next span may begin. The usual value is 4 MiB.
    pub span_size: u64,
    /// Written into the zTOC, informational: `AWS SOCI CLI v0.2` gives the digests of the reference's tool.
    pub build_tool: String,
}

/// A finished zTOC and what was learnt on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltZtoc {
    /// The zTOC.
    pub bytes: Vec<u8>,
    /// SHA-256 of `bytes`.
    pub digest: Digest,
    /// SHA-256 of what was pushed.
    pub layer_digest: Digest,
    /// Number of bytes pushed.
    pub layer_size: u64,
    /// Whether any file has extended attributes or marks its directory opaque: otherwise the layer can be mounted without
    /// extended attributes.
    pub xattrs_needed: bool,
    /// Number of spans.
    pub spans: u32,
}

#[derive(Debug)]
enum Scan {
    Gzip(Box<GzipScan>),
    Plain { span_size: u64, spans: u64, layer: Box<Hasher> },
}

/// Builds the zTOC of one layer from its bytes, pushed in order in pieces of any size.
///
/// Deterministic: the result depends only on the bytes and the options. CPU-bound; call it where blocking is allowed.
/// Holds about half a megabyte, the checkpoints, and some sixty bytes and the names per file.
///
/// ```
/// use soci_ztoc::{BuildOptions, Compression, DecodeLimits, Ztoc, ZtocBuilder};
/// let options = BuildOptions { span_size: 4 << 20, build_tool: "example".into() };
/// let mut builder = ZtocBuilder::new(Compression::Uncompressed, options)?;
/// builder.push(&[0; 1024])?;
/// let built = builder.finish()?;
/// let ztoc = Ztoc::decode(built.bytes.into(), &DecodeLimits::default())?;
/// assert_eq!(ztoc.entries().len(), 0);
/// assert_eq!(ztoc.spans().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ZtocBuilder {
    options: BuildOptions,
    scan: Scan,
    toc: TocScan,
    hashing: Hashing,
    size: u64,
}

impl ZtocBuilder {
    /// A builder for one layer.
    ///
    /// # Errors
    /// [`BuildError::SpanSize`] when the span size is 0 for a plain tar or does not fit the format.
    pub fn new(compression: Compression, options: BuildOptions) -> Result<Self, BuildError> {
        let span_size = options.span_size;
        if i64::try_from(span_size).is_err() {
            return Err(BuildError::SpanSize { span_size, reason: "must be less than 2^63 bytes" });
        }
        let scan = match compression {
            Compression::Gzip => Scan::Gzip(Box::new(GzipScan::new(span_size)?)),
            Compression::Uncompressed if span_size == 0 => {
                return Err(BuildError::SpanSize {
                    span_size,
                    reason: "must not be 0 for an uncompressed layer",
                });
            }
            Compression::Uncompressed => {
                Scan::Plain { span_size, spans: 0, layer: Box::new(Hasher::sha256()) }
            }
        };
        // A plain tar's bytes are hashed for the layer where they are scanned, and for their span by the other thread.
        let hashing = Hashing::new(compression == Compression::Gzip);
        Ok(Self { options, scan, toc: TocScan::new(), hashing, size: 0 })
    }

    /// Takes the next bytes of the layer.
    ///
    /// # Errors
    /// [`BuildError`]: the layer cannot be indexed, and the builder must be dropped.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), BuildError> {
        for piece in chunk.chunks(PIECE) {
            let mut cuts = Vec::new();
            match &mut self.scan {
                Scan::Gzip(gzip) => gzip.push(piece, &mut cuts, &mut self.toc)?,
                Scan::Plain { span_size, spans, layer } => {
                    let end = self.size + piece.len() as u64;
                    while let Some(input) = spans.checked_mul(*span_size).filter(|input| *input < end) {
                        cuts.push(Cut { input, bits: 0 });
                        *spans += 1;
                    }
                    layer.update(piece);
                    self.toc.push(piece)?;
                }
            }
            self.size += piece.len() as u64;
            self.hashing.push(piece, cuts)?;
        }
        Ok(())
    }

    /// Ends the layer and returns its zTOC, which is certain to decode.
    ///
    /// # Errors
    /// [`BuildError`]: the layer ended too early or cannot be represented.
    pub fn finish(self) -> Result<BuiltZtoc, BuildError> {
        let span_size = self.options.span_size;
        let limit = DecodeLimits::default().bytes;
        let too_large = BuildError::TooLarge { limit, span_size };
        let signed = |value: u64| i64::try_from(value).map_err(|_| too_large.clone());
        let (compression, checkpoints, plain_layer) = match self.scan {
            Scan::Gzip(gzip) => (Compression::Gzip, gzip.finish()?, None),
            Scan::Plain { .. } if self.size == 0 => return Err(BuildError::Empty),
            Scan::Plain { layer, .. } => {
                let zinfo = encode_tar_zinfo(signed(span_size)?, signed(self.size)?)
                    .map_err(|_| too_large.clone())?;
                (Compression::Uncompressed, zinfo, Some(layer.finish()))
            }
        };
        let toc = self.toc.finish()?;
        let (layer, span_digests) = self.hashing.finish()?;
        let document = Document {
            build_tool: &self.options.build_tool,
            compression,
            compressed_size: signed(self.size)?,
            uncompressed_size: signed(toc.archive_size)?,
            checkpoints: &checkpoints,
            span_digests: &span_digests,
        };
        let expected = toc.files.encoded_size();
        let files = toc.files;
        let bytes = encode(&document, |each| files.for_each_backwards(each), expected)
            .ok()
            .filter(|bytes| bytes.len() <= limit)
            .ok_or(too_large)?;
        drop(checkpoints);
        let bytes = Bytes::from(bytes);
        // What is built must be readable: the reader's rules are the builder's.
        Ztoc::decode(bytes.clone(), &DecodeLimits::default())?;
        let bytes = Vec::from(bytes);
        Ok(BuiltZtoc {
            digest: Digest::of(&bytes),
            bytes,
            layer_digest: plain_layer.or(layer).ok_or(BuildError::Hashing)?,
            layer_size: self.size,
            xattrs_needed: toc.xattrs_needed,
            spans: u32::try_from(span_digests.len()).unwrap_or(u32::MAX),
        })
    }
}
