//! Answers of the API server, read within bounds, and wiped when they are done with: they hold secrets.

use std::io;

use futures::{AsyncBufRead, AsyncBufReadExt as _};
use zeroize::{Zeroize as _, Zeroizing};

/// What is allocated first, in bytes.
const FIRST: usize = 64 << 10;

/// Bytes that are wiped also where they have to move because more of them come.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Zeroizing<Vec<u8>>,
    limit: usize,
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// All that was asked for.
    Whole,
    /// The answer ended before.
    Ended,
    /// It is larger than the limit.
    TooLarge,
}

impl Buffer {
    /// Returns an empty buffer of at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { bytes: Zeroizing::new(Vec::with_capacity(FIRST.min(limit))), limit }
    }

    /// Returns what was read last.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads all of an answer in place of what was there.
    ///
    /// # Errors
    /// Those of the connection.
    pub(crate) async fn read_all(&mut self, answer: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Read> {
        Ok(match self.read(answer, None).await? {
            Read::Ended => Read::Whole,
            other => other,
        })
    }

    /// Reads the next line of an answer, without its end, in place of what was there.
    ///
    /// # Errors
    /// Those of the connection.
    pub(crate) async fn read_line(&mut self, answer: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Read> {
        self.read(answer, Some(b'\n')).await
    }

    async fn read(
        &mut self,
        answer: &mut (impl AsyncBufRead + Unpin),
        until: Option<u8>,
    ) -> io::Result<Read> {
        self.bytes.zeroize();
        loop {
            let chunk = answer.fill_buf().await?;
            if chunk.is_empty() {
                return Ok(Read::Ended);
            }
            let end = until.and_then(|until| chunk.iter().position(|byte| *byte == until));
            let taken = &chunk[..end.unwrap_or(chunk.len())];
            if self.bytes.len() + taken.len() > self.limit {
                return Ok(Read::TooLarge);
            }
            push(&mut self.bytes, taken);
            let consumed = taken.len() + usize::from(end.is_some());
            answer.consume_unpin(consumed);
            if end.is_some() {
                return Ok(Read::Whole);
            }
        }
    }
}

fn push(bytes: &mut Zeroizing<Vec<u8>>, more: &[u8]) {
    let needed = bytes.len() + more.len();
    if needed > bytes.capacity() {
        let mut larger = Zeroizing::new(Vec::with_capacity(needed.max(2 * bytes.capacity())));
        larger.extend_from_slice(bytes);
        *bytes = larger;
    }
    bytes.extend_from_slice(more);
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use futures::io::{BufReader, Cursor};

    use super::*;

    /// Reads what comes in pieces of three bytes.
    fn answer(text: &str) -> BufReader<Cursor<&[u8]>> {
        BufReader::with_capacity(3, Cursor::new(text.as_bytes()))
    }

    #[test]
    fn lines_are_read_one_by_one_up_to_the_limit() {
        let mut buffer = Buffer::new(8);
        let mut answer = answer("one\n\nand three\n12345678\ncut");
        for (expected, text) in [(Read::Whole, "one"), (Read::Whole, "")] {
            assert_eq!(
                (block_on(buffer.read_line(&mut answer)).unwrap(), buffer.bytes()),
                (expected, text.as_bytes())
            );
        }
        assert_eq!(block_on(buffer.read_line(&mut answer)).unwrap(), Read::TooLarge);
        let rest = BufReader::new(Cursor::new(&b"12345678\ncut"[..]));
        let mut rest = BufReader::with_capacity(5, rest);
        assert_eq!(block_on(buffer.read_line(&mut rest)).unwrap(), Read::Whole);
        assert_eq!(buffer.bytes(), b"12345678");
        assert_eq!(block_on(buffer.read_line(&mut rest)).unwrap(), Read::Ended);
        assert_eq!(buffer.bytes(), b"cut");
    }

    #[test]
    fn an_answer_is_read_whole_or_not_at_all() {
        let text = "x".repeat(FIRST + 10);
        let mut buffer = Buffer::new(FIRST + 10);
        assert_eq!(block_on(buffer.read_all(&mut answer(&text))).unwrap(), Read::Whole);
        assert_eq!(buffer.bytes(), text.as_bytes());
        assert_eq!(block_on(buffer.read_all(&mut answer(&format!("{text}x")))).unwrap(), Read::TooLarge);
    }
}
