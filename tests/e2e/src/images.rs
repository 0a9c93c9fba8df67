//! The images of the tests: small, generated, and with everything odd that layers in the wild have.

use std::collections::BTreeSet;

use flate2::Compression;
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::{Attr, EntryType, Layer, LayerBuilder, Numbers, digest, gzip};

/// The static program that runs in test containers, as `/probe`.
pub const PROBE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe"));

/// What the probe prints of bytes that it has read.
pub fn sum(content: &[u8]) -> u64 {
    content.iter().fold(0, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

/// Size of [`odd`]'s large file: some spans of 4 MiB, and not a multiple of anything.
pub const LARGE: usize = 13 * 1024 * 1024 + 4321;

fn bottom() -> Layer {
    let mut numbers = Numbers::new(1);
    let directory = Attr::mode(0o755);
    LayerBuilder::new()
        .dir("./", &directory)
        .file("probe", &Attr::mode(0o755), PROBE)
        .dir("etc", &directory)
        .file("etc/passwd", &Attr::default(), b"root:x:0:0::/:/probe\n")
        .dir("dev", &directory)
        .dir("proc", &directory)
        .dir("sys", &directory)
        .dir("tmp", &Attr::mode(0o1777))
        .dir("run", &directory)
        .dir("home", &directory)
        .dir("home/user", &Attr::mode(0o2750).owned(1000, 1001))
        .file("home/user/kept", &Attr::mode(0o600).owned(1000, 1001), b"from the lowest layer")
        .file("home/user/replaced", &Attr::default(), b"old")
        .file("home/user/removed", &Attr::default(), b"hidden by a whiteout")
        .dir("opaque", &directory)
        .file("opaque/lower", &Attr::default(), b"hidden by an opaque directory")
        .dir("gone", &directory)
        .file("gone/inside", &Attr::default(), b"hidden with its directory")
        .dir("implied", &Attr::mode(0o711).owned(7, 8).xattr("user.from", b"below"))
        .file("implied/lower", &Attr::default(), b"lower")
        .file("large", &Attr::default(), &numbers.prose(LARGE))
        .gzip()
}

fn middle() -> Layer {
    let mut numbers = Numbers::new(2);
    let directory = Attr::mode(0o755);
    let long = format!("names/{}/{}", "d".repeat(120), "f".repeat(200));
    let linked = Attr::mode(0o644).owned(3, 4);
    LayerBuilder::new()
        .dir("names", &directory)
        .dir(format!("names/{}", "d".repeat(120)), &directory)
        .file(&long, &Attr::default(), b"a path longer than a header has room for")
        .symlink("names/far", "x".repeat(150))
        .file(b"names/not \xff\xfe utf-8".as_slice(), &Attr::default(), b"bytes")
        .file("names/with space and \u{1f980}", &Attr::default(), b"crab")
        .dir("links", &directory)
        .file("links/first", &linked, b"three names")
        .hard_link("links/second", "links/first", &linked)
        .hard_link("names/third", "links/first", &linked)
        .symlink("links/relative", "first")
        .symlink("links/absolute", "/links/first")
        .symlink("links/dangling", "/nowhere/at/all")
        .dir("special", &directory)
        .device("special/null", &Attr::mode(0o666), EntryType::Char, 1, 3)
        .device("special/loop", &Attr::mode(0o660).owned(0, 6), EntryType::Block, 7, 300)
        .fifo("special/pipe", &Attr::mode(0o640))
        .file("special/setuid", &Attr::mode(0o4755), b"suid")
        .file("special/setgid", &Attr::mode(0o2755), b"sgid")
        .file("special/none", &Attr::mode(0), b"")
        .file("special/old", &Attr { mtime: 0, ..Attr::default() }, b"1970")
        .file("special/huge-owner", &Attr::default().owned(2_000_000, 1_999_999), b"")
        .dir("xattrs", &directory.clone().xattr("user.directory", b"yes"))
        .file("xattrs/plain", &Attr::default().xattr("user.key", b"value"), b"x")
        .file("xattrs/empty", &Attr::default().xattr("user.empty", b""), b"x")
        .file("xattrs/binary", &Attr::default().xattr("user.binary", b"\x00\xff\n=\x01"), b"x")
        .file("xattrs/several", &Attr::default().xattr("user.a", b"1").xattr("trusted.b", b"2"), b"x")
        .file("xattrs/capability", &Attr::mode(0o755).xattr("security.capability", CAPABILITY), b"x")
        .whiteout("home/user/removed")
        .file("home/user/replaced", &Attr::mode(0o640).owned(5, 5), b"new")
        .dir("opaque", &Attr::mode(0o755))
        .opaque("opaque")
        .file("opaque/upper", &Attr::default(), b"alone")
        .whiteout("gone")
        .file("implied/upper", &Attr::default(), b"its directory has no entry here")
        .file("implied/deeper/still", &Attr::default(), b"nor have these")
        .file("random", &Attr::default(), &numbers.bytes(5 * 1024 * 1024 + 17))
        .gzip()
}

/// `cap_net_bind_service=ep`, revision 2, as the kernel stores it.
pub const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Smaller than any layer that is indexed by default.
fn top() -> Layer {
    LayerBuilder::new()
        .dir("top", &Attr::mode(0o755))
        .file("top/small", &Attr::default(), b"a layer too small to index")
        .file("implied/top", &Attr::mode(0o600), b"unpacked, and its directory is implied too")
        .whiteout("names/far")
        .gzip()
}

/// An image of three layers: two worth indexing and one too small for it.
pub fn odd(dialect: Dialect) -> Image {
    Image::new(vec![bottom(), middle(), top()], dialect, &["/probe", "echo", "hello"])
}

/// An image whose layer is as eStargz makes it: each entry a gzip member of its own, an index of them as the last file, and
/// a footer without data that says where that is.
pub fn estargz(seed: u64) -> Image {
    let mut numbers = Numbers::new(seed);
    let tar = LayerBuilder::new()
        .file("probe", &Attr::mode(0o755), PROBE)
        .dir("some", &Attr::mode(0o755))
        .file("some/prose", &Attr::default(), &numbers.prose(6 << 20))
        .symlink("some/link", "prose")
        .file("some/random", &Attr::default(), &numbers.bytes(3 << 20))
        .file("stargz.index.json", &Attr::default(), b"{\"version\":1,\"entries\":[]}")
        .tar();
    let mut blob = Vec::new();
    let mut last = 0;
    for member in members(&tar) {
        last = blob.len();
        blob.extend_from_slice(&gzip(member, Compression::default()).blob);
    }
    // RFC 1952: an extra field of one subfield "SG", then an empty stored block, checksum and size zero.
    blob.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0]);
    blob.extend_from_slice(format!("{last:016x}STARGZ").as_bytes());
    blob.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let layer = Layer {
        digest: digest(&blob),
        diff_id: digest(&tar),
        blob: blob.into(),
        ..gzip(b"", Compression::none())
    };
    Image::new(vec![layer], Dialect::Oci, &["/probe", "echo", "hello"])
}

/// Splits an archive before each header; what ends it belongs to the last part.
fn members(tar: &[u8]) -> Vec<&[u8]> {
    let mut starts = Vec::new();
    let mut at = 0;
    while let Some(header) = tar.get(at..at + 512).filter(|header| header.iter().any(|byte| *byte != 0)) {
        starts.push(at);
        let digits = header[124..135].iter().filter(|byte| byte.is_ascii_digit());
        let size = digits.fold(0, |size, digit| size * 8 + usize::from(digit - b'0'));
        at += 512 + size.next_multiple_of(512);
    }
    let ends = starts.iter().skip(1).copied().chain([tar.len()]);
    starts.iter().zip(ends).map(|(start, end)| &tar[*start..end]).collect()
}

/// An image of one layer, different for each `seed`.
pub fn single(seed: u64) -> Image {
    let layer = LayerBuilder::new()
        .file("probe", &Attr::mode(0o755), PROBE)
        .file("content", &Attr::default(), &Numbers::new(seed).prose(4 << 20))
        .gzip();
    Image::new(vec![layer], Dialect::Oci, &["/probe", "echo", "hello"])
}

/// A small image, different for each `seed`: a layer that all have in common, and one of their own with the file `content`.
pub fn small(seed: u64) -> Image {
    let base = LayerBuilder::new().file("probe", &Attr::mode(0o755), PROBE).gzip();
    let content = Numbers::new(seed).bytes(1_200_000);
    let own = LayerBuilder::new().file("content", &Attr::default(), &content).gzip();
    Image::new(vec![base, own], Dialect::Oci, &["/probe", "echo", "hello"])
}

/// As many layers as an image may have, with a small file each: `0` in the lowest.
pub fn tall() -> Image {
    let layer = |number: usize| {
        let mut builder = LayerBuilder::new();
        if number == 0 {
            builder = builder.file("probe", &Attr::mode(0o755), PROBE);
        }
        builder.file(number.to_string(), &Attr::default(), number.to_string().as_bytes()).gzip()
    };
    Image::new((0..127).map(layer).collect(), Dialect::Oci, &["/probe", "echo", "hello"])
}

/// A small image that holds a pod's namespaces: it waits.
pub fn pause() -> Image {
    let layer = LayerBuilder::new().file("probe", &Attr::mode(0o755), PROBE).gzip();
    Image::new(vec![layer], Dialect::Oci, &["/probe", "wait"])
}

/// Directories of [`odd`] whose times no topmost entry states.
pub fn odd_timeless() -> BTreeSet<Vec<u8>> {
    ["", "implied", "implied/deeper", "home", "home/user", "names", "links"]
        .iter()
        .map(|path| path.as_bytes().to_vec())
        .collect()
}

/// Smallest layer that the tests index: [`odd`]'s two large layers are above it, its small one below.
pub const MIN_LAYER: &str = "1000000";
