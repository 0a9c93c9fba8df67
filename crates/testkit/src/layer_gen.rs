//! Layers made of nothing but their description: the same call gives the same bytes.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use bytes::Bytes;
use flate2::{Compression, GzBuilder};
use sha2::{Digest as _, Sha256};

/// Kinds of entries that [`LayerBuilder::device`] takes.
pub use tar::EntryType;

/// The time of entries that name none: 2024-01-02 03:04:05 UTC.
pub const MTIME: u64 = 1_704_164_645;

/// A compressed layer and what a manifest says of it.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The stored bytes.
    pub blob: Bytes,
    /// `sha256:…` of the stored bytes.
    pub digest: String,
    /// `sha256:…` of the tar stream.
    pub diff_id: String,
    /// Media type.
    pub media_type: String,
}

/// Attributes of an entry. The default is mode 0644, root, [`MTIME`], no xattrs.
#[derive(Debug, Clone)]
pub struct Attr {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Modification time in seconds.
    pub mtime: u64,
    /// Extended attributes: name without a prefix of the archive format, and value.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Default for Attr {
    fn default() -> Self {
        Self { mode: 0o644, uid: 0, gid: 0, mtime: MTIME, xattrs: Vec::new() }
    }
}

impl Attr {
    /// Attributes with this mode.
    pub fn mode(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }

    /// The same with an owner and a group.
    pub fn owned(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// The same with one more extended attribute.
    pub fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        self.xattrs.push((name.to_owned(), value.to_vec()));
        self
    }
}

/// Writes a tar archive into memory.
pub struct LayerBuilder {
    tar: tar::Builder<Vec<u8>>,
}

impl std::fmt::Debug for LayerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerBuilder").finish_non_exhaustive()
    }
}

impl Default for LayerBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl LayerBuilder {
    /// An empty archive.
    pub fn new() -> Self {
        Self { tar: tar::Builder::new(Vec::new()) }
    }

    /// Adds a directory.
    pub fn dir(self, path: impl AsRef<[u8]>, attr: &Attr) -> Self {
        self.entry(EntryType::Directory, path.as_ref(), attr, None, &[])
    }

    /// Adds a file.
    pub fn file(self, path: impl AsRef<[u8]>, attr: &Attr, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, path.as_ref(), attr, None, content)
    }

    /// Adds a symbolic link.
    pub fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Symlink, path.as_ref(), &Attr::mode(0o777), Some(target.as_ref()), &[])
    }

    /// Adds another name of a file that came before.
    pub fn hard_link(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>, attr: &Attr) -> Self {
        self.entry(EntryType::Link, path.as_ref(), attr, Some(target.as_ref()), &[])
    }

    /// Adds a pipe.
    pub fn fifo(self, path: impl AsRef<[u8]>, attr: &Attr) -> Self {
        self.entry(EntryType::Fifo, path.as_ref(), attr, None, &[])
    }

    /// Adds a device: character or block.
    ///
    /// # Panics
    /// Where the numbers do not fit a tar header.
    pub fn device(mut self, path: &str, attr: &Attr, kind: EntryType, major: u32, minor: u32) -> Self {
        let mut header = header(kind, attr, 0);
        header.set_device_major(major).expect("a GNU header has device numbers");
        header.set_device_minor(minor).expect("a GNU header has device numbers");
        self.tar.append_data(&mut header, path, io::empty()).expect("writing to memory");
        self
    }

    /// Removes a name that a lower layer has.
    pub fn whiteout(self, path: &str) -> Self {
        let (directory, name) =
            path.rsplit_once('/').map_or(("", path), |(directory, name)| (directory, name));
        let slash = if directory.is_empty() { "" } else { "/" };
        self.file(format!("{directory}{slash}.wh.{name}"), &Attr::default(), &[])
    }

    /// Hides everything that lower layers have in a directory.
    pub fn opaque(self, directory: &str) -> Self {
        self.file(format!("{directory}/.wh..wh..opq"), &Attr::default(), &[])
    }

    /// Ends the archive and returns its bytes.
    ///
    /// # Panics
    /// Never: it is written to memory.
    pub fn tar(self) -> Vec<u8> {
        self.tar.into_inner().expect("writing to memory")
    }

    /// Ends the archive and compresses it.
    pub fn gzip(self) -> Layer {
        gzip(&self.tar(), Compression::default())
    }

    fn entry(
        mut self,
        kind: EntryType,
        path: &[u8],
        attr: &Attr,
        link: Option<&[u8]>,
        content: &[u8],
    ) -> Self {
        let pax: Vec<(String, &[u8])> = attr
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice()))
            .collect();
        if !pax.is_empty() {
            let records = pax.iter().map(|(name, value)| (name.as_str(), *value));
            self.tar.append_pax_extensions(records).expect("writing to memory");
        }
        let mut header = header(kind, attr, content.len() as u64);
        let path = Path::new(OsStr::from_bytes(path));
        match link {
            Some(target) => self.tar.append_link(&mut header, path, Path::new(OsStr::from_bytes(target))),
            None => self.tar.append_data(&mut header, path, content),
        }
        .expect("writing to memory");
        self
    }
}

fn header(kind: EntryType, attr: &Attr, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(attr.mode);
    header.set_uid(attr.uid);
    header.set_gid(attr.gid);
    header.set_mtime(attr.mtime);
    header.set_size(size);
    header
}

/// Compresses a tar archive into a layer.
///
/// # Panics
/// Never: it is written to memory.
pub fn gzip(tar: &[u8], level: Compression) -> Layer {
    let mut encoder = GzBuilder::new().write(Vec::with_capacity(tar.len() / 2), level);
    encoder.write_all(tar).expect("writing to memory");
    let blob = encoder.finish().expect("writing to memory");
    Layer {
        digest: digest(&blob),
        diff_id: digest(tar),
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        blob: blob.into(),
    }
}

/// Returns `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(hash: &[u8]) -> String {
    use std::fmt::Write as _;
    hash.iter().fold("sha256:".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A reader that knows the digest of what went through it.
#[derive(Debug)]
pub struct Hashed<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: io::Read> Hashed<R> {
    /// Reads from `inner`.
    pub fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    /// Returns `sha256:…` of everything read.
    pub fn digest(self) -> String {
        hex(&self.hasher.finalize())
    }
}

impl<R: io::Read> io::Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Numbers that look random and are the same each time (xorshift64*).
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Self {
        // Spread, since the state must not be zero: of two neighbours, setting a bit would make one.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns the next.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns `len` bytes that do not compress.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    /// Returns `len` bytes that gzip makes about a third of: words of a small vocabulary between random runs.
    pub fn prose(&mut self, len: usize) -> Vec<u8> {
        // 2048 words: the index below is taken from the low bits.
        let words: Vec<Vec<u8>> = (0..2048)
            .map(|_| {
                let length = 3 + (self.next_u64() % 9) as usize;
                self.bytes(length).iter().map(|byte| b'a' + byte % 26).collect()
            })
            .collect();
        let mut text = Vec::with_capacity(len + 64);
        while text.len() < len {
            let number = self.next_u64();
            let index = (number % 2048) as usize;
            text.extend_from_slice(&words[index]);
            text.push(if number >> 60 == 0 { b'\n' } else { b' ' });
            if number >> 58 == 63 {
                let run = self.bytes(16);
                text.extend_from_slice(&run);
            }
        }
        text.truncate(len);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_description_gives_the_same_bytes() {
        let build = || {
            let attr = Attr::mode(0o4755).owned(3, 4).xattr("user.empty", b"");
            LayerBuilder::new()
                .dir("d", &Attr::mode(0o755))
                .file("d/f", &attr, b"x")
                .hard_link("d/h", "d/f", &attr)
        };
        let (one, two) = (build().gzip(), build().gzip());
        assert_eq!((one.digest.clone(), one.diff_id.clone()), (two.digest, two.diff_id));
        assert_eq!(one.digest, digest(&one.blob));
    }

    #[test]
    fn prose_compresses_to_about_a_third() {
        let text = Numbers::new(7).prose(1 << 20);
        let ratio = text.len() / gzip(&text, Compression::default()).blob.len();
        assert!((2..=4).contains(&ratio), "{ratio}");
    }
}
