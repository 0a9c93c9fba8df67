//! Unpacking against the `tar` crate's unpack and against what containerd does where the two differ.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use soci_layer::unpack::{
    ApplyOptions, Below, BelowError, Codec, DirAttr, LayerBytes, NothingBelow, OpaqueXattr, UnpackError,
    Usage, apply,
};
use soci_layer::{ReadErrorKind, TarStream};
use soci_oci::{Digest, FetchError, FetchErrorKind};
use support::{Layer, Rig, settings, tar_of};
use tar::{Builder, EntryType, Header};

fn need_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "unpacking sets owners and makes devices, which needs root"
    );
}

/// Builds a tar member by member.
struct Archive(Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(&mut self, kind: EntryType, path: &str, mode: u32, change: impl FnOnce(&mut Header), data: &[u8]) {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(data.len() as u64);
        // As in the wild: any bytes, also those that the crate would refuse.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
    }

    fn file(&mut self, path: &str, data: &[u8]) {
        self.add(EntryType::Regular, path, 0o644, |_| {}, data);
    }

    fn dir(&mut self, path: &str, mode: u32) {
        self.add(EntryType::Directory, path, mode, |_| {}, b"");
    }

    fn link(&mut self, kind: EntryType, path: &str, target: &str) {
        let set = |header: &mut Header| {
            header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        };
        self.add(kind, path, 0o777, set, b"");
    }

    fn pax(&mut self, records: &[(&str, &[u8])]) {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
    }

    fn end(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn stream(tar: Vec<u8>) -> TarStream {
    let pieces: Vec<_> = tar.chunks(777).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    TarStream::new(futures::stream::iter(pieces))
}

async fn unpack(tar: Vec<u8>, at: &Path) -> Result<Usage, UnpackError> {
    let diff_id = Some(Digest::of(&tar));
    apply(stream(tar), at, Arc::new(NothingBelow), ApplyOptions { diff_id, ..ApplyOptions::default() }).await
}

/// What a tree looks like: type, mode, owner, time, size, device, link, content; hard links by the first name.
fn look(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        let mut names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        for path in names {
            let data = path.symlink_metadata().unwrap();
            let kind = data.file_type();
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
            let mut text = format!("{:o} {}:{} ", data.mode(), data.uid(), data.gid());
            text += &format!("{}.{} {} ", data.mtime(), data.mtime_nsec(), data.rdev());
            if kind.is_symlink() {
                text += &format!("-> {:?}", std::fs::read_link(&path).unwrap());
            } else if kind.is_file() {
                text += &Digest::of(&std::fs::read(&path).unwrap()).to_string();
                text += &format!(" = {:?}", inodes.entry(data.ino()).or_insert_with(|| name.clone()));
            } else if kind.is_dir() {
                todo.push(path);
            }
            seen.insert(name, text);
        }
    }
    seen
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let len = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(len);
    Some(value)
}

fn ordinary() -> Vec<u8> {
    let mut tar = Archive::new();
    tar.dir("./", 0o755);
    tar.dir("bin/", 0o755);
    let suid = |header: &mut Header| {
        header.set_uid(1000);
        header.set_gid(50);
    };
    tar.add(EntryType::Regular, "bin/su", 0o6755, suid, &support::text(300_000, 5));
    let same = |header: &mut Header| {
        suid(header);
        header.as_old_mut().linkname[..6].copy_from_slice(b"bin/su");
    };
    tar.add(EntryType::Link, "bin/su2", 0o6755, same, b"");
    tar.link(EntryType::Symlink, "bin/sh", "/usr/bin/bash");
    tar.link(EntryType::Symlink, "lib", "usr/lib");
    tar.dir("usr/", 0o711);
    tar.dir("usr/lib/", 0o1777);
    tar.file("lib/through-a-link", b"x");
    tar.file("empty", b"");
    tar.add(EntryType::Fifo, "pipe", 0o600, |_| {}, b"");
    let device = |header: &mut Header| {
        header.set_device_major(5).unwrap();
        header.set_device_minor(300).unwrap();
    };
    tar.add(EntryType::Char, "tty", 0o620, device, b"");
    tar.add(EntryType::Block, "disk", 0o660, device, b"");
    // A file that replaces another, a file that replaces a tree, a directory listed twice.
    tar.file("twice", b"first");
    tar.file("twice", b"second");
    tar.dir("tree/", 0o700);
    tar.dir("tree/deep/", 0o700);
    tar.file("tree/deep/file", b"x");
    tar.file("tree", b"no tree any more");
    tar.dir("usr/lib/", 0o750);
    tar.end()
}

#[tokio::test]
async fn a_tree_is_what_the_tar_says() {
    need_root();
    let ours = tempfile::tempdir().unwrap();
    let usage = unpack(ordinary(), ours.path()).await.unwrap();
    let seen = look(ours.path());
    let line = |name: &str| seen[name.as_bytes()].as_str();
    let content = Digest::of(&support::text(300_000, 5));
    assert_eq!(line("bin/su"), format!("106755 1000:50 1600000000.0 0 {content} = {:?}", b"bin/su".to_vec()));
    assert!(line("bin/su2").ends_with(&format!("= {:?}", b"bin/su".to_vec())));
    assert_eq!(line("bin/sh"), "120777 0:0 1600000000.0 0 -> \"/usr/bin/bash\"");
    assert!(line("usr/lib/through-a-link").starts_with("100644 0:0 1600000000.0"));
    assert!(line("usr/lib").starts_with("40750 0:0 1600000000.0"));
    assert!(line("usr").starts_with("40711 0:0 1600000000.0"));
    let device = rustix::fs::makedev(5, 300);
    assert_eq!(line("tty"), format!("20620 0:0 1600000000.0 {device} "));
    assert_eq!(line("disk"), format!("60660 0:0 1600000000.0 {device} "));
    assert!(line("pipe").starts_with("10600 0:0"));
    assert_eq!(std::fs::read(ours.path().join("twice")).unwrap(), b"second");
    assert_eq!(std::fs::read(ours.path().join("tree")).unwrap(), b"no tree any more");
    assert!(usage.inodes >= 12 && usage.bytes >= 300_000, "{usage:?}");
}

#[tokio::test]
async fn the_tar_crate_unpacks_the_same() {
    need_root();
    let mut tar = Archive::new();
    tar.dir("a/", 0o750);
    for number in 0..40_u64 {
        let owner = |header: &mut Header| {
            header.set_uid(number);
            header.set_gid(number * 3);
            header.set_mtime(1_500_000_000 + number);
        };
        let data = support::text(usize::try_from(number * 700).unwrap(), number);
        tar.add(
            EntryType::Regular,
            &format!("a/file{number}"),
            0o600 + u32::try_from(number).unwrap(),
            owner,
            &data,
        );
    }
    tar.link(EntryType::Symlink, "a/link", "../b");
    let tar = tar.end();
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    unpack(tar.clone(), ours.path()).await.unwrap();
    let mut oracle = tar::Archive::new(&tar[..]);
    oracle.set_preserve_permissions(true);
    oracle.set_preserve_ownerships(true);
    oracle.set_preserve_mtime(true);
    oracle.unpack(theirs.path()).unwrap();
    // The crate writes the directory's time before its files.
    let without = |mut seen: BTreeMap<Vec<u8>, String>| {
        seen.remove(&b"a"[..]);
        seen
    };
    assert_eq!(without(look(ours.path())), without(look(theirs.path())));
}

#[tokio::test]
async fn whiteouts_become_what_overlayfs_reads() {
    need_root();
    let mut tar = Archive::new();
    tar.dir("d/", 0o755);
    tar.file("d/.wh.gone", b"");
    tar.file("implied/.wh..wh..opq", b"");
    tar.dir("both/", 0o755);
    tar.file(".wh.both", b"");
    let dir = tempfile::tempdir().unwrap();
    unpack(tar.end(), dir.path()).await.unwrap();
    let gone = dir.path().join("d/gone").symlink_metadata().unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert_eq!(xattr(&dir.path().join("implied"), "trusted.overlay.opaque"), Some(b"y".to_vec()));
    assert_eq!(xattr(&dir.path().join("both"), "trusted.overlay.opaque"), Some(b"y".to_vec()));
    assert!(!dir.path().join("d/.wh.gone").exists());

    let mut tar = Archive::new();
    tar.file("u/.wh..wh..opq", b"");
    let user = tempfile::tempdir().unwrap();
    let options = ApplyOptions { opaque: OpaqueXattr::User, ..ApplyOptions::default() };
    apply(stream(tar.end()), user.path(), Arc::new(NothingBelow), options).await.unwrap();
    assert_eq!(xattr(&user.path().join("u"), "user.overlay.opaque"), Some(b"y".to_vec()));
}

#[tokio::test]
async fn extended_attributes_are_set_and_those_of_overlayfs_are_not_an_images_to_set() {
    need_root();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut tar = Archive::new();
    tar.pax(&[
        ("SCHILY.xattr.user.empty", b""),
        ("SCHILY.xattr.user.some", b"a\0b"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.security.capability", &capability),
    ]);
    tar.add(EntryType::Regular, "ping", 0o755, |header| header.set_uid(7), b"x");
    tar.pax(&[("SCHILY.xattr.user.on-a-link", b"1")]);
    tar.link(EntryType::Symlink, "link", "ping");
    let dir = tempfile::tempdir().unwrap();
    unpack(tar.end(), dir.path()).await.unwrap();
    let ping = dir.path().join("ping");
    assert_eq!(xattr(&ping, "user.empty"), Some(Vec::new()));
    assert_eq!(xattr(&ping, "user.some"), Some(b"a\0b".to_vec()));
    assert_eq!(xattr(&ping, "trusted.overlay.opaque"), None);
    assert_eq!(xattr(&ping, "security.capability"), Some(capability.to_vec()));
    assert_eq!(xattr(&dir.path().join("link"), "user.on-a-link"), None);
}

#[derive(Debug)]
struct OneBelow;

impl Below for OneBelow {
    fn dir(&self, path: &[u8]) -> Result<Option<DirAttr>, BelowError> {
        let xattrs = vec![(b"user.kept".to_vec(), b"1".to_vec())];
        Ok((path == b"var/lib").then_some(DirAttr { mode: 0o2711, uid: 5, gid: 6, mtime: (77, 8), xattrs }))
    }
}

#[tokio::test]
async fn a_directory_that_is_only_implied_looks_as_it_does_below() {
    need_root();
    let mut tar = Archive::new();
    tar.file("var/lib/data", b"x");
    let dir = tempfile::tempdir().unwrap();
    apply(stream(tar.end()), dir.path(), Arc::new(OneBelow), ApplyOptions::default()).await.unwrap();
    let data = dir.path().join("var/lib").metadata().unwrap();
    assert_eq!((data.mode() & 0o7777, data.uid(), data.gid(), data.mtime()), (0o2711, 5, 6, 77));
    assert_eq!(xattr(&dir.path().join("var/lib"), "user.kept"), Some(b"1".to_vec()));
    assert_eq!(dir.path().join("var").metadata().unwrap().mode() & 0o7777, 0o755);
}

#[tokio::test]
async fn nothing_is_written_outside_whatever_links_a_layer_makes() {
    need_root();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("victim"), b"untouched").unwrap();
    let target = outside.path().to_str().unwrap();
    let up = "../../../../../../../../..".to_owned() + target;
    let mut tar = Archive::new();
    tar.link(EntryType::Symlink, "absolute", target);
    tar.file("absolute/victim", b"overwritten");
    tar.link(EntryType::Symlink, "relative", &up);
    tar.file("relative/victim", b"overwritten");
    tar.file("../../victim", b"clamped");
    tar.file("a/../../../b", b"clamped too");
    tar.link(EntryType::Symlink, "file", &format!("{target}/victim"));
    tar.file("file", b"replaces the link");
    let dir = tempfile::tempdir().unwrap();
    unpack(tar.end(), dir.path()).await.unwrap();
    assert_eq!(std::fs::read(outside.path().join("victim")).unwrap(), b"untouched");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    let inside = dir.path().join(target.trim_start_matches('/')).join("victim");
    assert_eq!(std::fs::read(inside).unwrap(), b"overwritten");
    assert_eq!(std::fs::read(dir.path().join("victim")).unwrap(), b"clamped");
    assert_eq!(std::fs::read(dir.path().join("b")).unwrap(), b"clamped too");
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"replaces the link");

    // A hard link to what is outside finds nothing.
    let mut tar = Archive::new();
    tar.link(EntryType::Link, "leak", &format!("../../..{target}/victim"));
    let dir = tempfile::tempdir().unwrap();
    let error = unpack(tar.end(), dir.path()).await.unwrap_err();
    assert!(matches!(&error, UnpackError::File { what: "making the hard link", .. }), "{error:?}");
    let mut tar = Archive::new();
    tar.link(EntryType::Symlink, "loop", "loop");
    tar.file("loop/x", b"");
    let error = unpack(tar.end(), tempfile::tempdir().unwrap().path()).await.unwrap_err();
    assert!(matches!(&error, UnpackError::File { what: "opening the directory", .. }), "{error:?}");
}

fn whole(bytes: Vec<u8>, digest: Option<Digest>) -> TarStream {
    let pieces: Vec<_> = bytes.chunks(5000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    LayerBytes::Whole { stream: futures::stream::iter(pieces).boxed(), codec: None, digest }.tar()
}

async fn all(mut tar: TarStream) -> Result<Vec<u8>, ReadErrorKind> {
    let mut out = Vec::new();
    while let Some(piece) = tar.next().await {
        out.extend(piece.map_err(|error| error.kind())?);
    }
    Ok(out)
}

fn gzip(tar: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(tar).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn whole_blobs_are_inflated_whatever_their_codec_and_verified() {
    let tar = tar_of(&[1_000_000, 5]);
    let members = [gzip(&tar[..600_000]), gzip(&tar[600_000..])].concat();
    let mut zstd = Vec::new();
    zstd::stream::read::Encoder::new(&tar[..], 1).unwrap().read_to_end(&mut zstd).unwrap();
    for blob in [tar.clone(), gzip(&tar), members.clone(), zstd] {
        let digest = Digest::of(&blob);
        assert_eq!(all(whole(blob, Some(digest))).await.as_ref(), Ok(&tar));
    }
    let other = Some(Digest::of(b"something else"));
    assert_eq!(all(whole(members.clone(), other)).await, Err(ReadErrorKind::Integrity));
    let mut cut = members.clone();
    cut.truncate(members.len() / 2);
    assert_eq!(all(whole(cut, None)).await, Err(ReadErrorKind::Integrity));
    assert_eq!(Codec::of_magic(&members), Codec::Gzip);

    let refused = Err(FetchError::new(FetchErrorKind::Denied, "refused"));
    let pieces = vec![Ok(Bytes::copy_from_slice(&members[..100])), refused];
    let stream = futures::stream::iter(pieces).boxed();
    let tar = LayerBytes::Whole { stream, codec: Some(Codec::Gzip), digest: None }.tar();
    assert_eq!(all(tar).await, Err(ReadErrorKind::Denied));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_layer_unpacks_from_its_spans() {
    need_root();
    let layer = Layer::gzip(ordinary(), 32 << 10);
    let rig = Rig::new(settings());
    let reader = rig.open(&layer, &layer.source());
    let (from_spans, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options = ApplyOptions { diff_id: Some(Digest::of(&layer.tar)), ..ApplyOptions::default() };
    apply(LayerBytes::Spanned(reader).tar(), from_spans.path(), Arc::new(NothingBelow), options)
        .await
        .unwrap();
    unpack(layer.tar.clone(), plain.path()).await.unwrap();
    assert_eq!(look(from_spans.path()), look(plain.path()));
}

#[tokio::test]
async fn a_wrong_diff_id_and_a_cut_tar_are_errors() {
    need_root();
    let tar = ordinary();
    let dir = tempfile::tempdir().unwrap();
    let diff_id = Some(Digest::of(b"another layer"));
    let options = ApplyOptions { diff_id, ..ApplyOptions::default() };
    let error = apply(stream(tar.clone()), dir.path(), Arc::new(NothingBelow), options).await.unwrap_err();
    assert!(matches!(error, UnpackError::DiffId { .. }), "{error:?}");
    let dir = tempfile::tempdir().unwrap();
    let error = unpack(tar[..200_000].to_vec(), dir.path()).await.unwrap_err();
    assert!(matches!(error, UnpackError::Tar(_)), "{error:?}");
    // A tar without its final blocks of zeros is complete, and trailing bytes count for the digest.
    let dir = tempfile::tempdir().unwrap();
    unpack([tar, vec![0; 4096], b"trailing".to_vec()].concat(), dir.path()).await.unwrap();
}

#[tokio::test]
async fn a_source_that_fails_fails_the_unpack_with_its_error() {
    need_root();
    let error = soci_layer::ReadError::new(ReadErrorKind::Denied, "refused");
    let pieces = vec![Ok(Bytes::copy_from_slice(&ordinary()[..1000])), Err(error)];
    let dir = tempfile::tempdir().unwrap();
    let tar = TarStream::new(futures::stream::iter(pieces));
    let error = apply(tar, dir.path(), Arc::new(NothingBelow), ApplyOptions::default()).await.unwrap_err();
    assert!(matches!(&error, UnpackError::Read(error) if error.kind() == ReadErrorKind::Denied), "{error:?}");
}
