//! From a blob to a tar.

use std::io::{self, BufRead, Read};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use soci_oci::{BlobStream, Digest, Hasher};
use tokio::sync::mpsc;

use crate::buffers::Buffers;
use crate::{LayerReader, ReadError, ReadErrorKind, TarStream};

/// How much is inflated at a time.
const STEP: usize = 512 << 10;
/// Pieces that may wait between two threads.
const QUEUE: usize = 4;

/// How a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Not at all.
    Plain,
    /// gzip, any number of members.
    Gzip,
    /// zstd, any number of frames.
    Zstd,
}

impl Codec {
    /// Returns the codec that the first bytes of a blob show. Media types do not always tell, and some are wrong.
    pub fn of_magic(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// The bytes of a layer, wherever they are.
pub enum LayerBytes {
    /// Spans, fetched as needed and verified one by one.
    Spanned(Arc<LayerReader>),
    /// The blob from its first byte to its last.
    Whole {
        /// The compressed bytes.
        stream: BlobStream,
        /// How they are compressed; `None` to look at the first bytes.
        codec: Option<Codec>,
        /// The blob's digest, checked when its last byte has come. `None` when the bytes are verified already.
        digest: Option<Digest>,
    },
}

impl std::fmt::Debug for LayerBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Spanned(reader) => f.debug_tuple("Spanned").field(reader).finish(),
            Self::Whole { codec, .. } => write!(f, "Whole({codec:?})"),
        }
    }
}

impl LayerBytes {
    /// Returns the tar. A whole blob is inflated on a thread of its own; call this within a Tokio runtime.
    pub fn tar(self) -> TarStream {
        match self {
            Self::Spanned(reader) => reader.tar(),
            Self::Whole { stream, codec, digest } => inflated(stream, codec, digest),
        }
    }
}

fn inflated(mut stream: BlobStream, codec: Option<Codec>, digest: Option<Digest>) -> TarStream {
    let (compressed, input) = mpsc::channel(QUEUE);
    let (output, tar) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        while let Some(piece) = stream.next().await {
            let piece = piece.map(Some).map_err(|error| ReadError::fetch("fetching a layer", error));
            let failed = piece.is_err();
            if compressed.send(piece).await.is_err() || failed {
                return;
            }
        }
        // Only this says that the blob is complete: a task that is dropped says nothing.
        let _nobody_reads_any_more = compressed.send(Ok(None)).await;
    });
    tokio::task::spawn_blocking(move || {
        let hasher = digest.as_ref().map(Digest::hasher);
        let mut input = Pieces { input, piece: Bytes::new(), hasher, ended: false, error: None };
        if let Err(error) = pump(&mut input, codec, digest, &output) {
            let _nobody_reads_any_more = output.blocking_send(Err(error));
        }
    });
    TarStream::new(futures::stream::unfold(tar, |mut tar| async move { Some((tar.recv().await?, tar)) }))
}

type Inflated = mpsc::Sender<Result<Bytes, ReadError>>;

fn pump(
    input: &mut Pieces,
    codec: Option<Codec>,
    digest: Option<Digest>,
    output: &Inflated,
) -> Result<(), ReadError> {
    let wrong = |error: io::Error| ReadError::because(ReadErrorKind::Integrity, "inflating a layer", error);
    let codec = match codec {
        Some(codec) => codec,
        None => Codec::of_magic(input.fill_buf().map_err(wrong)?),
    };
    let copied = match codec {
        Codec::Plain => copy(&mut *input, output),
        Codec::Gzip => copy(flate2::bufread::MultiGzDecoder::new(&mut *input), output),
        Codec::Zstd => {
            zstd::stream::read::Decoder::with_buffer(&mut *input).and_then(|inflate| copy(inflate, output))
        }
    };
    // What the decoder makes of a fetch that failed is of no interest.
    let copied = match (input.error.take(), copied) {
        (Some(error), _) => return Err(error),
        (None, copied) => copied.map_err(wrong)?,
    };
    if !copied {
        return Ok(());
    }
    // A decoder may stop before the end of the blob; all of it counts for the digest.
    while !input.fill_buf().map_err(wrong)?.is_empty() {
        let len = input.piece.len();
        input.consume(len);
    }
    if let Some(error) = input.error.take() {
        return Err(error);
    }
    match (digest, input.hasher.take()) {
        (Some(expected), Some(hasher)) => {
            let got = hasher.finish();
            let message = || format!("the layer's blob has digest {got}, the image says {expected}");
            if got == expected { Ok(()) } else { Err(ReadError::new(ReadErrorKind::Integrity, message())) }
        }
        _ => Ok(()),
    }
}

/// Copies to the end. Returns whether anybody wanted all of it.
fn copy(mut from: impl Read, output: &Inflated) -> io::Result<bool> {
    let buffers = Buffers::new(STEP * (QUEUE + 2));
    loop {
        let mut buffer = buffers.take(STEP);
        let mut filled = 0;
        while filled < buffer.len() {
            match from.read(&mut buffer[filled..])? {
                0 => break,
                len => filled += len,
            }
        }
        let full = filled == buffer.len();
        if filled > 0 && output.blocking_send(Ok(buffer.freeze().slice(..filled))).is_err() {
            return Ok(false);
        }
        if !full {
            return Ok(true);
        }
    }
}

/// The compressed bytes as they arrive, hashed on the way.
struct Pieces {
    input: mpsc::Receiver<Result<Option<Bytes>, ReadError>>,
    piece: Bytes,
    hasher: Option<Hasher>,
    ended: bool,
    error: Option<ReadError>,
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.piece.is_empty() && !self.ended {
            match self.input.blocking_recv() {
                Some(Ok(Some(piece))) => {
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&piece);
                    }
                    self.piece = piece;
                }
                Some(Ok(None)) => self.ended = true,
                Some(Err(error)) => {
                    self.ended = true;
                    self.error = Some(error);
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                None => {
                    self.ended = true;
                    self.error =
                        Some(ReadError::new(ReadErrorKind::Closed, "the fetch of a layer was given up"));
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, len: usize) {
        self.piece.advance(len);
    }
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let len = available.len().min(out.len());
        out[..len].copy_from_slice(&available[..len]);
        self.consume(len);
        Ok(len)
    }
}
