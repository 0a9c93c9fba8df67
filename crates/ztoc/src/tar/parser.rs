//! The state machine: bytes in, members and their data out.

use super::block::{Header, c_string};
use super::error::{TarError, TarFault};
use super::member::{Member, PaxRecords};
use super::{BLOCK, MAX_EXTENSION, MAX_GROUP, align, pax};
use crate::entry::EntryKind;
use crate::offset::UncompressedOffset;

/// What [`Parser::step`] came upon.
#[derive(Debug)]
pub enum Step<'a> {
    /// The input is used up; call again with the bytes that follow.
    More,
    /// A member begins; its data, if any, follow as [`Step::Data`], `size` bytes in all.
    Member(Box<Member>),
    /// The next bytes of the current member's data; never empty.
    Data(&'a [u8]),
    /// PAX records for all members that follow. containerd's unpack ignores them, and so may the caller; no
    /// [`Member`] has them applied.
    Global(PaxRecords),
    /// The two blocks of zeros: the archive ends here, whatever follows is padding.
    End,
}

/// Which extension header is being collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extension {
    Pax,
    GlobalPax,
    LongName,
    LongLink,
}

#[derive(Debug)]
enum State {
    /// Collecting a header block; `zeros` is whether the block before was one of zeros.
    Header { zeros: bool },
    /// Collecting the payload of an extension header.
    Extension { kind: Extension, left: u64 },
    /// Within a member's data.
    Data { left: u64 },
    /// Within the padding after data or an extension header; `ends_member` is whether a new member begins after it.
    Padding { left: u64, ends_member: bool },
    /// After the two blocks of zeros.
    Ended,
}

/// Reads a tar that is pushed in pieces of any size. Holds at most one extension header and one block.
///
/// After an error the parser must not be used further.
///
/// ```
/// use soci_ztoc::tar::{Parser, Step};
/// let mut parser = Parser::new();
/// let mut input = &[0u8; 1024][..];
/// assert!(matches!(parser.step(&mut input), Ok(Step::End)));
/// assert_eq!(parser.position(), 1024);
/// ```
#[derive(Debug)]
pub struct Parser {
    state: State,
    position: u64,
    /// Where the headers of the next member begin.
    group: u64,
    buffer: Vec<u8>,
    records: PaxRecords,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// A parser at the beginning of an archive.
    pub fn new() -> Self {
        Self::at(UncompressedOffset(0))
    }

    /// A parser for a piece of an archive that begins with a header at `position`.
    pub fn at(position: UncompressedOffset) -> Self {
        Self {
            state: State::Header { zeros: false },
            position: position.0,
            group: position.0,
            buffer: Vec::with_capacity(BLOCK),
            records: PaxRecords::new(),
            long_name: Vec::new(),
            long_link: Vec::new(),
        }
    }

    /// Position in the archive of the next byte to be taken. At [`Step::End`]: right after the two blocks of zeros.
    pub fn position(&self) -> u64 {
        self.position
    }

    fn error(&self, fault: TarFault) -> TarError {
        TarError { at: self.position, fault }
    }

    /// Takes bytes off the front of `input` until something is found or the input is used up.
    ///
    /// # Errors
    /// [`TarError`] when the bytes are no tar, or one that cannot be represented; see [`TarFault`].
    pub fn step<'a>(&mut self, input: &mut &'a [u8]) -> Result<Step<'a>, TarError> {
        loop {
            match self.state {
                State::Ended => return Ok(Step::End),
                State::Data { left: 0 } => {
                    let left = align(self.position) - self.position;
                    self.state = State::Padding { left, ends_member: true };
                }
                State::Padding { left: 0, ends_member } => {
                    self.state = State::Header { zeros: false };
                    if ends_member {
                        self.group = self.position;
                    }
                }
                State::Extension { kind, left: 0 } => {
                    if let Some(records) = self.extension(kind)? {
                        return Ok(Step::Global(records));
                    }
                }
                _ if input.is_empty() => return Ok(Step::More),
                State::Data { ref mut left } => {
                    let data = take(input, *left);
                    *left -= len(data);
                    self.position = self.position.saturating_add(len(data));
                    return Ok(Step::Data(data));
                }
                State::Padding { ref mut left, .. } => {
                    let padding = take(input, *left);
                    *left -= len(padding);
                    self.position = self.position.saturating_add(len(padding));
                }
                State::Extension { ref mut left, .. } => {
                    let piece = take(input, *left);
                    *left -= len(piece);
                    self.buffer.extend_from_slice(piece);
                    self.position = self.position.saturating_add(len(piece));
                }
                State::Header { zeros } => {
                    let missing = BLOCK - self.buffer.len();
                    let piece = take(input, missing as u64);
                    self.buffer.extend_from_slice(piece);
                    self.position = self.position.saturating_add(len(piece));
                    if self.buffer.len() == BLOCK
                        && let Some(member) = self.header(zeros)?
                    {
                        return Ok(Step::Member(Box::new(member)));
                    }
                }
            }
        }
    }

    /// Tells that the input has ended.
    ///
    /// An archive may end without its blocks of zeros, and within the padding after a member, as Go's reader has it.
    ///
    /// # Errors
    /// [`TarFault::Truncated`] inside a header or a member's data.
    pub fn finish(&self) -> Result<(), TarError> {
        match self.state {
            State::Header { .. } if self.buffer.is_empty() => Ok(()),
            State::Padding { .. } | State::Ended | State::Data { left: 0 } => Ok(()),
            State::Header { .. } | State::Extension { .. } | State::Data { .. } => {
                Err(self.error(TarFault::Truncated))
            }
        }
    }

    /// A whole block is in the buffer.
    fn header(&mut self, zeros: bool) -> Result<Option<Member>, TarError> {
        let block_at = self.position.saturating_sub(BLOCK as u64);
        let fail = |fault| TarError { at: block_at, fault };
        let block: [u8; BLOCK] = self.buffer.as_slice().try_into().map_err(|_| fail(TarFault::Truncated))?;
        self.buffer.clear();
        if block == [0; BLOCK] {
            self.state = if zeros { State::Ended } else { State::Header { zeros: true } };
            return Ok(None);
        }
        if zeros {
            return Err(fail(TarFault::ZeroBlock));
        }
        if self.position - self.group > MAX_GROUP {
            return Err(fail(TarFault::GroupSize { limit: MAX_GROUP }));
        }
        let header = Header::parse(&block).map_err(fail)?;
        let extension = match header.flag {
            b'x' => Extension::Pax,
            b'g' => Extension::GlobalPax,
            b'L' => Extension::LongName,
            b'K' => Extension::LongLink,
            _ => return self.member(header).map(Some).map_err(fail),
        };
        let left = u64::try_from(header.size).map_err(|_| fail(TarFault::NegativeSize))?;
        if left > MAX_EXTENSION {
            return Err(fail(TarFault::ExtensionSize { size: left, limit: MAX_EXTENSION }));
        }
        self.state = State::Extension { kind: extension, left };
        Ok(None)
    }

    /// The payload of an extension header is in the buffer. Returns the records of a global one.
    fn extension(&mut self, kind: Extension) -> Result<Option<PaxRecords>, TarError> {
        let payload = std::mem::replace(&mut self.buffer, Vec::with_capacity(BLOCK));
        let left = align(self.position) - self.position;
        self.state = State::Padding { left, ends_member: kind == Extension::GlobalPax };
        match kind {
            Extension::LongName => self.long_name = c_string(&payload).to_vec(),
            Extension::LongLink => self.long_link = c_string(&payload).to_vec(),
            // A second header replaces the first as a whole.
            Extension::Pax => self.records = pax::parse(&payload).map_err(|fault| self.error(fault))?,
            Extension::GlobalPax => {
                // What stood before it is forgotten, as by Go's reader.
                self.forget();
                return pax::parse(&payload).map(Some).map_err(|fault| self.error(fault));
            }
        }
        Ok(None)
    }

    fn forget(&mut self) {
        self.records = PaxRecords::new();
        self.long_name = Vec::new();
        self.long_link = Vec::new();
    }

    /// Applies the extension headers to a member's own header.
    fn member(&mut self, mut header: Header) -> Result<Member, TarFault> {
        let mtime = pax::apply(&mut header, &self.records)?;
        if !self.long_name.is_empty() {
            header.name = std::mem::take(&mut self.long_name);
        }
        if !self.long_link.is_empty() {
            header.link = std::mem::take(&mut self.long_link);
        }
        let kind = match header.flag {
            // Archives from before POSIX mark a directory by its trailing slash.
            0 if header.name.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' => EntryKind::Regular,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'S' => return Err(TarFault::Sparse),
            other => return Err(TarFault::Kind(other)),
        };
        if pax::is_sparse(&self.records) {
            return Err(TarFault::Sparse);
        }
        let size = match kind.has_data() {
            true => u64::try_from(header.size).map_err(|_| TarFault::NegativeSize)?,
            false => 0,
        };
        let pax = std::mem::take(&mut self.records);
        self.forget();
        self.state = State::Data { left: size };
        Ok(Member {
            name: header.name,
            kind,
            link: header.link,
            header: UncompressedOffset(self.group),
            data: UncompressedOffset(self.position),
            size,
            raw_mode: header.mode,
            raw_uid: header.uid,
            raw_gid: header.gid,
            uname: header.uname,
            gname: header.gname,
            mtime,
            raw_dev_major: header.dev_major,
            raw_dev_minor: header.dev_minor,
            pax,
        })
    }
}

/// Parses the headers of one member: `bytes` are `[header, data)` of a zTOC's entry, and `at` is where `header` is.
///
/// # Errors
/// As [`Parser::step`]; [`TarFault::NotOneMember`] unless the bytes are used up exactly by one member's headers.
pub fn parse_group(bytes: &[u8], at: UncompressedOffset) -> Result<Member, TarError> {
    let mut parser = Parser::at(at);
    let mut input = bytes;
    match parser.step(&mut input)? {
        Step::Member(member) if input.is_empty() => Ok(*member),
        Step::More => Err(parser.error(TarFault::Truncated)),
        Step::Member(_) | Step::Data(_) | Step::Global(_) | Step::End => {
            Err(parser.error(TarFault::NotOneMember))
        }
    }
}

/// Splits up to `most` bytes off the front of `input`.
fn take<'a>(input: &mut &'a [u8], most: u64) -> &'a [u8] {
    let most = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
    let (piece, rest) = input.split_at(most);
    *input = rest;
    piece
}

fn len(piece: &[u8]) -> u64 {
    piece.len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flag: u8, name: &[u8], size: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        block[..name.len()].copy_from_slice(name);
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = flag;
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block[155] = b' ';
        block
    }

    fn extension(flag: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = [header(flag, b"x", payload.len() as u64), payload.to_vec()].concat();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    #[test]
    fn a_group_is_used_up_exactly() {
        let pax = extension(b'x', b"30 mtime=253402300800.0000001\n");
        let group = [pax, extension(b'L', b"long/name\0"), header(b'0', b"short", 5)].concat();
        let at = UncompressedOffset(4096);
        let member = parse_group(&group, at).unwrap();
        assert_eq!(member.name, b"long/name");
        assert_eq!((member.header, member.data.0), (at, 4096 + group.len() as u64));
        assert_eq!(member.mtime, crate::Mtime { secs: 253_402_300_800, nanos: 100 });
        let fault = |bytes: &[u8]| parse_group(bytes, at).unwrap_err().fault;
        assert_eq!(fault(&[group.clone(), vec![0; 512]].concat()), TarFault::NotOneMember);
        assert_eq!(fault(&group[..group.len() - 1]), TarFault::Truncated);
        assert_eq!(fault(&group[..1024]), TarFault::Truncated);
        assert_eq!(fault(&[]), TarFault::Truncated);
        assert_eq!(fault(&[0; 1024]), TarFault::NotOneMember);
        assert_eq!(fault(&extension(b'g', b"")), TarFault::NotOneMember);
    }

    #[test]
    fn extension_headers_are_bounded() {
        let large = header(b'x', b"", MAX_EXTENSION + 1);
        let error = parse_group(&large, UncompressedOffset(0)).unwrap_err();
        assert_eq!(error.fault, TarFault::ExtensionSize { size: MAX_EXTENSION + 1, limit: MAX_EXTENSION });
        // Each may be large, and there may be many, but not without end.
        let payload = vec![b'n'; 1 << 20];
        let group = [extension(b'L', &payload).repeat(4), header(b'0', b"", 0)].concat();
        let error = parse_group(&group, UncompressedOffset(0)).unwrap_err();
        assert_eq!(error.fault, TarFault::GroupSize { limit: MAX_GROUP });
        let negative = {
            let mut block = header(b'0', b"a", 0);
            block[124..136].copy_from_slice(&[0xff; 12]);
            block[148..156].copy_from_slice(b"        ");
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            block
        };
        assert_eq!(parse_group(&negative, UncompressedOffset(0)).unwrap_err().fault, TarFault::NegativeSize);
    }

    #[test]
    fn kinds_without_data_have_none_whatever_their_size_field_says() {
        let archive =
            [header(b'1', b"link", 700), header(b'0', b"file", 3), vec![b'a'; 512], vec![0; 1024]].concat();
        let mut parser = Parser::new();
        let mut input = archive.as_slice();
        let mut seen = Vec::new();
        loop {
            match parser.step(&mut input).unwrap() {
                Step::Member(member) => seen.push((member.header.0, member.data.0, member.size)),
                Step::End => break,
                Step::Data(data) => assert_eq!(data, b"aaa"),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(seen, [(0, 512, 0), (512, 1024, 3)]);
        assert_eq!(parser.position(), archive.len() as u64);
    }
}
