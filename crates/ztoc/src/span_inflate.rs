//! Decoding one span, from its checkpoint, as its bytes arrive.

use crate::inflate::{Corrupt, Format, Inflater, Stop, Until};
use crate::offset::SpanId;
use crate::span_table::{Compression, SpanTable};
use crate::window::Window;

/// The trailer of a gzip member: CRC-32 and length. A raw decoder leaves it in the input.
const TRAILER: usize = 8;

/// A span that cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("span {span}: {fault}")]
pub struct InflateError {
    /// The span.
    pub span: SpanId,
    /// Why.
    pub fault: InflateFault,
}

/// Why a span cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InflateFault {
    /// The data are invalid.
    #[error("corrupt data: {0}")]
    Corrupt(&'static str),
    /// The data end early.
    #[error("{got} bytes came out, not {want}")]
    Short {
        /// How many came out.
        got: usize,
        /// The span's length.
        want: usize,
    },
    /// More than the span's length came out.
    #[error("more than {want} bytes came out")]
    Long {
        /// The span's length.
        want: usize,
    },
    /// More than the span's compressed bytes were fed.
    #[error("more than the span's {want} compressed bytes were fed")]
    Input {
        /// The span's compressed length.
        want: u64,
    },
    /// Fewer than the span's compressed bytes were fed.
    #[error("{got} compressed bytes were fed, not {want}")]
    Incomplete {
        /// How many were fed.
        got: u64,
        /// The span's compressed length.
        want: u64,
    },
    /// The decoder takes nothing and gives nothing.
    #[error("the decoder is stuck")]
    Stuck,
    /// The output buffer has not the span's length.
    #[error("the output buffer has {got} bytes, not {want}")]
    Buffer {
        /// Its length.
        got: usize,
        /// The span's length.
        want: usize,
    },
    /// The span begins inside the stream but no window was given.
    #[error("the span's window is missing")]
    Window,
    /// No memory for the decoder.
    #[error("out of memory")]
    Memory,
}

#[derive(Debug)]
enum Stage {
    /// The first byte's upper bits belong to the span.
    Prime { bits: u8 },
    /// Within the member the span begins in.
    Raw,
    /// Within that member's trailer.
    Trailer { left: usize },
    /// Between members.
    NextMember,
    /// Within a later member.
    Member,
}

#[derive(Debug)]
enum Decoder {
    Copy,
    Deflate { inflater: Inflater, stage: Stage },
}

/// Inflates one span; fed as bytes arrive. A plain tar's span is copied.
///
/// Work and memory are bounded: every byte fed is used once, output goes to the caller's buffer only. Data that are
/// corrupt, end early, yield too much or stop the decoder are errors; nothing is ever filled with zeros. Members of a
/// gzip stream that begin inside the span have their checksum verified when they end inside it.
#[derive(Debug)]
pub struct SpanInflate {
    span: SpanId,
    decoder: Decoder,
    fed: u64,
    compressed: u64,
    valid: usize,
    want: usize,
    open_ended: bool,
}

impl SpanInflate {
    /// A decoder for span `id` of `table`, whose window was checked with [`WindowRef::check`](crate::WindowRef::check).
    ///
    /// # Errors
    /// [`InflateFault::Window`] and [`InflateFault::Memory`].
    pub fn new(table: &SpanTable, id: SpanId, window: &Window) -> Result<Self, InflateError> {
        let error = |fault| InflateError { span: id, fault };
        let span = table.span(id);
        let decoder = match table.compression() {
            Compression::Uncompressed => Decoder::Copy,
            Compression::Gzip => {
                let mut inflater = Inflater::new(Format::Raw).ok_or(error(InflateFault::Memory))?;
                match window.bytes() {
                    Some(window) => inflater.set_dictionary(window).map_err(|fault| error(fault.into()))?,
                    None if span.window_at == 0 => {}
                    None => return Err(error(InflateFault::Window)),
                }
                let stage = if span.bits == 0 { Stage::Raw } else { Stage::Prime { bits: span.bits } };
                Decoder::Deflate { inflater, stage }
            }
        };
        let compressed = table.compressed(id);
        let uncompressed = table.uncompressed(id);
        Ok(Self {
            span: id,
            decoder,
            fed: 0,
            compressed: compressed.end.0 - compressed.start.0,
            valid: 0,
            want: usize::try_from(uncompressed.end.0 - uncompressed.start.0).unwrap_or(usize::MAX),
            open_ended: table.open_ended(id),
        })
    }

    /// Length of the span's content: what `out` must have.
    pub fn output_len(&self) -> usize {
        self.want
    }

    /// Decodes the next bytes of the span; returns how many bytes of `out` are valid now, counted from its begin.
    ///
    /// `out` is the whole span's buffer, the same for every call. Bytes past the returned length have unspecified values.
    ///
    /// # Errors
    /// [`InflateError`]; the decoder must not be used after one.
    pub fn feed(&mut self, input: &[u8], out: &mut [u8]) -> Result<usize, InflateError> {
        let span = self.span;
        self.advance(input, out).map_err(|fault| InflateError { span, fault })
    }

    fn advance(&mut self, input: &[u8], out: &mut [u8]) -> Result<usize, InflateFault> {
        if out.len() != self.want {
            return Err(InflateFault::Buffer { got: out.len(), want: self.want });
        }
        self.fed = self.fed.saturating_add(input.len() as u64);
        if self.fed > self.compressed {
            return Err(InflateFault::Input { want: self.compressed });
        }
        match &mut self.decoder {
            Decoder::Copy => {
                let target = &mut out[self.valid..];
                let len = input.len().min(target.len());
                target[..len].copy_from_slice(&input[..len]);
                self.valid += len;
            }
            Decoder::Deflate { inflater, stage } => {
                let mut input = input;
                loop {
                    // Past the end of the archive only padding follows: not worth decoding.
                    let enough = self.open_ended && self.valid == self.want;
                    if input.is_empty() || enough {
                        break;
                    }
                    match stage {
                        Stage::Prime { bits } => {
                            inflater.prime(*bits, input[0] >> (8 - *bits))?;
                            input = &input[1..];
                            *stage = Stage::Raw;
                        }
                        Stage::Trailer { left } => {
                            let len = input.len().min(*left);
                            input = &input[len..];
                            *left -= len;
                            if *left == 0 {
                                *stage = Stage::NextMember;
                            }
                        }
                        Stage::NextMember => {
                            inflater.reset(Format::Gzip)?;
                            *stage = Stage::Member;
                        }
                        Stage::Raw | Stage::Member => {
                            let (consumed, ended) = decode(inflater, input, out, &mut self.valid)?;
                            input = &input[consumed..];
                            if ended {
                                let raw = matches!(stage, Stage::Raw);
                                *stage =
                                    if raw { Stage::Trailer { left: TRAILER } } else { Stage::NextMember };
                            }
                        }
                    }
                }
            }
        }
        Ok(self.valid)
    }

    /// Checks that all of the span was fed and exactly its length came out.
    ///
    /// # Errors
    /// [`InflateFault::Incomplete`], [`InflateFault::Short`] or [`InflateFault::Long`].
    pub fn finish(mut self, out: &[u8]) -> Result<(), InflateError> {
        let error = |fault| InflateError { span: self.span, fault };
        if self.fed != self.compressed {
            return Err(error(InflateFault::Incomplete { got: self.fed, want: self.compressed }));
        }
        if self.valid != self.want || out.len() != self.want {
            return Err(error(InflateFault::Short { got: self.valid.min(out.len()), want: self.want }));
        }
        if let Decoder::Deflate { inflater, stage: Stage::Raw | Stage::Member } = &mut self.decoder
            && !self.open_ended
        {
            // The end of a copy may still wait inside the decoder for room.
            let progress =
                inflater.run(&[], &mut [0; 64], Until::Full).map_err(|fault| error(fault.into()))?;
            if progress.produced > 0 {
                return Err(error(InflateFault::Long { want: self.want }));
            }
        }
        Ok(())
    }
}

/// One call of the decoder: how many bytes it took, and whether the member ended.
fn decode(
    inflater: &mut Inflater,
    input: &[u8],
    out: &mut [u8],
    valid: &mut usize,
) -> Result<(usize, bool), InflateFault> {
    let want = out.len();
    let full = *valid == want;
    // Where all is there, what remains may end blocks and members but yield nothing more.
    let mut beyond = [0; 64];
    let target = if full { &mut beyond[..] } else { &mut out[*valid..] };
    let progress = inflater.run(input, target, Until::Full)?;
    if full && progress.produced > 0 {
        return Err(InflateFault::Long { want });
    }
    *valid += progress.produced;
    let ended = progress.stop == Stop::End;
    if progress.consumed == 0 && progress.produced == 0 && !ended {
        return Err(InflateFault::Stuck);
    }
    Ok((progress.consumed, ended))
}

impl From<Corrupt> for InflateFault {
    fn from(Corrupt(what): Corrupt) -> Self {
        Self::Corrupt(what)
    }
}

/// Decodes a whole span at once: `input` is exactly its compressed bytes, `out` has exactly its uncompressed length.
///
/// # Errors
/// As [`SpanInflate`].
pub fn inflate_span(
    table: &SpanTable,
    id: SpanId,
    window: &Window,
    input: &[u8],
    out: &mut [u8],
) -> Result<(), InflateError> {
    let mut inflate = SpanInflate::new(table, id, window)?;
    inflate.feed(input, out)?;
    inflate.finish(out)
}
