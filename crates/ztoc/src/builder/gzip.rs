//! Inflating a layer and noting checkpoints.
//!
//! Where checkpoints fall decides the zTOC's digest, so the rule is the reference's (zlib's `zran` example): right after
//! the first gzip header, then at the first block boundary more than a span's size after the last checkpoint, but not
//! after the last block of a member. One thing differs: a checkpoint that does not advance the output is left out. The
//! reference takes a second one when the stream begins with an empty member or an empty block, and then refuses to mount
//! what it built.

use super::BuildError;
use super::digests::Cut;
use super::toc::TocScan;
use crate::inflate::{Format, Inflater, Stop, Until, WINDOW};
use crate::limits::DecodeLimits;
use crate::zinfo::{GZIP_CHECKPOINT, GZIP_HEAD};

/// Room for output behind the window. More would only fall out of the processor's cache.
const ROOM: usize = 256 << 10;

/// With less room than this left, the window is moved to the front instead.
const LITTLE: usize = 32 << 10;

#[derive(Debug)]
enum Stage {
    /// The first bytes, kept to tell what a layer is that is not gzip.
    Magic([u8; 4], usize),
    Member,
    BetweenMembers,
}

#[derive(Debug)]
pub(super) struct GzipScan {
    inflater: Inflater,
    stage: Stage,
    span_size: u64,
    input: u64,
    output: u64,
    /// Output position of the last checkpoint.
    last: u64,
    /// The zinfo blob; its head is filled in at the end.
    blob: Vec<u8>,
    count: i32,
    /// Linear, never circular: the decoder may scribble over all of the output slice it is given, so the window it might
    /// still refer to stands before that slice and is copied forward when the room is used up.
    buffer: Vec<u8>,
    /// End of the output in `buffer`; at least a window's length, so that the window is always there (zeros at first).
    end: usize,
}

impl GzipScan {
    pub(super) fn new(span_size: u64) -> Result<Self, BuildError> {
        Ok(Self {
            inflater: Inflater::new(Format::Gzip).ok_or(BuildError::Memory)?,
            stage: Stage::Magic([0; 4], 0),
            span_size,
            input: 0,
            output: 0,
            last: 0,
            blob: vec![0; GZIP_HEAD],
            count: 0,
            buffer: vec![0; WINDOW + ROOM],
            end: WINDOW,
        })
    }

    pub(super) fn push(
        &mut self,
        piece: &[u8],
        cuts: &mut Vec<Cut>,
        toc: &mut TocScan,
    ) -> Result<(), BuildError> {
        let mut input = piece;
        if let Stage::Magic(mut magic, have) = self.stage {
            let taken = input.len().min(magic.len() - have);
            magic[have..have + taken].copy_from_slice(&input[..taken]);
            let have = have + taken;
            if have < magic.len() {
                self.stage = Stage::Magic(magic, have);
                return Ok(());
            }
            check_magic(magic)?;
            self.stage = Stage::Member;
            self.inflate(&magic, cuts, toc)?;
            input = &input[taken..];
        }
        self.inflate(input, cuts, toc)
    }

    fn inflate(
        &mut self,
        mut input: &[u8],
        cuts: &mut Vec<Cut>,
        toc: &mut TocScan,
    ) -> Result<(), BuildError> {
        let mut idle = 0;
        loop {
            if input.is_empty() && self.end < self.buffer.len() {
                return Ok(());
            }
            if self.buffer.len() - self.end < LITTLE {
                self.buffer.copy_within(self.end - WINDOW..self.end, 0);
                self.end = WINDOW;
            }
            if matches!(self.stage, Stage::BetweenMembers) {
                let Some(first) = input.first() else { return Ok(()) };
                if *first != 0x1f {
                    return Err(BuildError::Trailing { at: self.input });
                }
                self.inflater.reset(Format::Gzip).map_err(|fault| self.corrupt(fault.0))?;
                self.stage = Stage::Member;
            }
            let run = self.inflater.run(input, &mut self.buffer[self.end..], Until::Block);
            let progress = run.map_err(|fault| self.corrupt(fault.0))?;
            input = &input[progress.consumed..];
            self.input += progress.consumed as u64;
            let begin = self.end;
            self.end += progress.produced;
            self.output += progress.produced as u64;
            toc.push(&self.buffer[begin..self.end])?;
            match progress.stop {
                Stop::End => self.stage = Stage::BetweenMembers,
                Stop::Boundary { bits, last: false } => self.boundary(bits, cuts)?,
                Stop::Boundary { .. } | Stop::Midway => {}
            }
            if progress.produced > 0 || progress.consumed > 0 || progress.stop == Stop::End {
                idle = 0;
            } else if input.is_empty() {
                return Ok(());
            } else {
                // A boundary may be reported without progress, but only once.
                idle += 1;
                if idle > 2 {
                    return Err(self.corrupt("the decoder is stuck"));
                }
            }
        }
    }

    fn corrupt(&self, what: &'static str) -> BuildError {
        BuildError::Corrupt { at: self.input, what }
    }

    /// Between two blocks, or after a header: perhaps a checkpoint.
    fn boundary(&mut self, bits: u8, cuts: &mut Vec<Cut>) -> Result<(), BuildError> {
        if self.count > 0 && self.output - self.last <= self.span_size {
            return Ok(());
        }
        let limit = DecodeLimits::default().bytes;
        if self.blob.len() + GZIP_CHECKPOINT > limit {
            return Err(BuildError::TooLarge { limit, span_size: self.span_size });
        }
        self.blob.extend_from_slice(&self.input.to_le_bytes());
        self.blob.extend_from_slice(&self.output.to_le_bytes());
        self.blob.push(bits);
        self.blob.extend_from_slice(&self.buffer[self.end - WINDOW..self.end]);
        self.count += 1;
        self.last = self.output;
        cuts.push(Cut { input: self.input, bits });
        Ok(())
    }

    /// The zinfo blob of the whole layer.
    pub(super) fn finish(mut self) -> Result<Vec<u8>, BuildError> {
        match self.stage {
            Stage::BetweenMembers => {}
            Stage::Magic(_, 0) => return Err(BuildError::Empty),
            Stage::Magic(_, have) => return Err(BuildError::Truncated { at: have as u64 }),
            Stage::Member => return Err(BuildError::Truncated { at: self.input }),
        }
        self.blob[..4].copy_from_slice(&self.count.to_le_bytes());
        self.blob[4..GZIP_HEAD].copy_from_slice(&self.span_size.to_le_bytes());
        Ok(self.blob)
    }
}

fn check_magic(magic: [u8; 4]) -> Result<(), BuildError> {
    let found = match magic {
        [0x1f, 0x8b, ..] => return Ok(()),
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => "zstd",
        [b'B', b'Z', b'h', _] => "bzip2",
        [0xfd, b'7', b'z', b'X'] => "xz",
        [0x78, ..] => "zlib, or something encrypted",
        _ => "something else (encrypted, or not compressed)",
    };
    Err(BuildError::NotGzip { found })
}
