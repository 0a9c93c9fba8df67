//! Writes a tar of files whose names are short and whose bytes come as streams.

use std::io::{self, Write};

/// Writes members one after the other. Everything that could differ between two runs is constant: owner 0, time 0.
#[derive(Debug)]
pub(super) struct Archive<W> {
    writer: W,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(writer: W) -> Self {
        Self { writer }
    }

    /// Writes a directory.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.writer.write_all(&header(name, 0o755, 0, b'5')?)
    }

    /// Begins a file of `size` bytes, which must follow by [`data`](Self::data), then [`end`](Self::end).
    pub(super) fn file(&mut self, name: &str, mode: u32, size: u64) -> io::Result<()> {
        self.writer.write_all(&header(name, mode, size, b'0')?)
    }

    /// Writes bytes of the present file.
    pub(super) fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes)
    }

    /// Ends the present file, which had `size` bytes.
    pub(super) fn end(&mut self, size: u64) -> io::Result<()> {
        let padding = usize::try_from(size.wrapping_neg() % 512).unwrap_or(0);
        self.writer.write_all(&[0; 512][..padding])
    }

    /// Ends the archive and returns the writer.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.writer.write_all(&[0; 1024])?;
        self.writer.flush()?;
        Ok(self.writer)
    }
}

/// Returns a ustar header; a size of 8 GiB or more is written in base 256, as GNU tar and Go do.
fn header(name: &str, mode: u32, size: u64, kind: u8) -> io::Result<[u8; 512]> {
    let mut block = [0; 512];
    let too_long =
        || io::Error::new(io::ErrorKind::InvalidInput, format!("name {name:?} is too long for a tar"));
    block.get_mut(..name.len().min(101)).filter(|_| name.len() <= 100).ok_or_else(too_long)?;
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    block[136..148].copy_from_slice(b"00000000000\0");
    block[148..156].copy_from_slice(b"        ");
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read_back() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("blobs/").unwrap();
        for (name, content) in [("a", &b"content"[..]), ("b", &[7; 512]), ("empty", b"")] {
            archive.file(name, 0o444, content.len() as u64).unwrap();
            archive.data(content).unwrap();
            archive.end(content.len() as u64).unwrap();
        }
        let bytes = archive.finish().unwrap();
        let mut tar = tar::Archive::new(&bytes[..]);
        let members: Vec<(String, u32, u64)> = tar
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let size = io::copy(&mut entry, &mut io::sink()).unwrap();
                (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap(), size)
            })
            .collect();
        let expected = [("blobs/", 0o755, 0), ("a", 0o444, 7), ("b", 0o444, 512), ("empty", 0o444, 0)];
        assert_eq!(members, expected.map(|(name, mode, size)| (name.to_owned(), mode, size)));
    }

    #[test]
    fn large_sizes_and_long_names() {
        for size in [(1 << 33) - 1, 1 << 33, 1 << 40] {
            let block = header("a", 0o644, size, b'0').unwrap();
            let header = tar::Header::from_byte_slice(&block);
            assert_eq!(header.size().unwrap(), size);
            let (stored, computed) = (header.cksum().unwrap(), {
                let mut block = block;
                block[148..156].fill(b' ');
                block.iter().map(|byte| u32::from(*byte)).sum::<u32>()
            });
            assert_eq!(stored, computed);
        }
        assert!(header(&"x".repeat(101), 0o644, 0, b'0').is_err());
        assert!(header(&"x".repeat(100), 0o644, 0, b'0').is_ok());
    }
}
