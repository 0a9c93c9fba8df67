//! Decoding zTOCs that no builder of ours writes: old ones, huge ones, and hostile ones.

use soci_oci::Digest;

use crate::encode::{Document, FileRow, encode, encode_tar_zinfo};
use crate::span_table::SpanTable;
use crate::{
    Compression, DecodeLimits, EntryFault, EntryKind, Mtime, SpanId, UncompressedOffset, WINDOW_LEN,
    ZinfoFault, Ztoc, ZtocError,
};

/// A zTOC whose parts can be bent.
#[derive(Clone)]
struct Sketch {
    compression: Compression,
    compressed_size: i64,
    uncompressed_size: i64,
    zinfo: Vec<u8>,
    digests: usize,
    files: Vec<FileRow<'static>>,
}

fn checkpoint(input: i64, output: i64, bits: u8) -> Vec<u8> {
    let mut bytes = [input.to_le_bytes(), output.to_le_bytes()].concat();
    bytes.push(bits);
    bytes.resize(17 + WINDOW_LEN, 7);
    bytes
}

fn gzip_zinfo(have: i32, checkpoints: &[(i64, i64, u8)]) -> Vec<u8> {
    let mut blob = have.to_le_bytes().to_vec();
    blob.extend(1000i64.to_le_bytes());
    checkpoints.iter().for_each(|(input, output, bits)| blob.extend(checkpoint(*input, *output, *bits)));
    blob
}

fn file(name: &'static [u8], data: i64, size: i64) -> FileRow<'static> {
    FileRow {
        name,
        kind: EntryKind::Regular,
        data,
        size,
        link: b"",
        mode: 0o100_644,
        uid: 0,
        gid: 0,
        uname: b"",
        gname: b"",
        mtime: Mtime::default(),
        dev_major: 0,
        dev_minor: 0,
        pax: Vec::new(),
    }
}

impl Sketch {
    /// Three spans, two files.
    fn gzip() -> Self {
        Self {
            compression: Compression::Gzip,
            compressed_size: 5000,
            uncompressed_size: 20_480,
            zinfo: gzip_zinfo(3, &[(10, 0, 0), (2000, 6000, 3), (3000, 12_000, 0)]),
            digests: 3,
            files: vec![file(b"a", 512, 5000), file(b"b", 6144, 100)],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let digests = vec![Digest::of(b""); self.digests];
        let document = Document {
            build_tool: "test",
            compression: self.compression,
            compressed_size: self.compressed_size,
            uncompressed_size: self.uncompressed_size,
            checkpoints: &self.zinfo,
            span_digests: &digests,
        };
        encode(&document, |each| self.files.iter().rev().for_each(each), 0).unwrap()
    }

    fn decode(&self) -> Result<Ztoc, ZtocError> {
        Ztoc::decode(self.bytes().into(), &DecodeLimits::default())
    }

    fn with_spans(checkpoints: &[(i64, i64, u8)]) -> Result<Ztoc, ZtocError> {
        let have = i32::try_from(checkpoints.len()).unwrap();
        Self { zinfo: gzip_zinfo(have, checkpoints), digests: checkpoints.len(), ..Self::gzip() }.decode()
    }

    fn entry_fault(files: Vec<FileRow<'static>>) -> EntryFault {
        match (Self { files, ..Self::gzip() }).decode() {
            Err(ZtocError::Entry { fault, .. }) => fault,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn ranges_follow_from_checkpoints() {
    let ztoc = Sketch::gzip().decode().unwrap();
    let table = ztoc.spans();
    let ranges: Vec<_> = table
        .ids()
        .map(|id| (table.compressed(id), table.uncompressed(id)))
        .map(|(c, u)| (c.start.0, c.end.0, u.start.0, u.end.0))
        .collect();
    // Byte 1999 is the last of span 0 and the first of span 1.
    assert_eq!(ranges, [(10, 2000, 0, 6000), (1999, 3000, 6000, 12_000), (3000, 5000, 12_000, 20_480)]);
    assert_eq!(table.head().end.0, 10);
    let windows: Vec<usize> = table.ids().map(|id| table.window(id).range.clone().count()).collect();
    assert_eq!(windows, [0, WINDOW_LEN, WINDOW_LEN]);
}

#[test]
fn a_version_1_zinfo_lacks_the_first_checkpoint() {
    let v1 = Sketch { zinfo: gzip_zinfo(3, &[(2000, 6000, 3), (3000, 12_000, 0)]), ..Sketch::gzip() };
    let (v1, v2) = (v1.decode().unwrap(), Sketch::gzip().decode().unwrap());
    for id in v1.spans().ids() {
        assert_eq!(v1.spans().compressed(id), v2.spans().compressed(id));
        assert_eq!(v1.spans().uncompressed(id), v2.spans().uncompressed(id));
    }
    let one = Sketch { zinfo: gzip_zinfo(1, &[]), digests: 1, ..Sketch::gzip() };
    assert_eq!(one.zinfo.len(), 12);
    assert_eq!(one.decode().unwrap().spans().len(), 1);
}

#[test]
fn a_zinfo_must_have_the_length_it_claims() {
    let full = gzip_zinfo(3, &[(10, 0, 0), (2000, 6000, 3), (3000, 12_000, 0)]);
    // 32785 * 131_040 wraps to a small number in 32 bits.
    for have in [-1, 0, 1, 2, 5, 131_040, i32::MAX, i32::MIN] {
        let mut zinfo = full.clone();
        zinfo[..4].copy_from_slice(&have.to_le_bytes());
        let error = Sketch { zinfo, ..Sketch::gzip() }.decode().unwrap_err();
        assert!(
            matches!(error, ZtocError::Zinfo(ZinfoFault::Length { .. } | ZinfoFault::Empty)),
            "{have}: {error}"
        );
    }
    for len in [0, 11, 12, full.len() - 1] {
        let sketch = Sketch { zinfo: full[..len].to_vec(), ..Sketch::gzip() };
        assert!(matches!(sketch.decode(), Err(ZtocError::Zinfo(_))), "{len}");
    }
}

#[test]
fn spans_must_advance_on_both_sides_and_stay_inside() {
    type Checkpoints = [(i64, i64, u8)];
    let table: [(&Checkpoints, &str); 12] = [
        (&[(10, 0, 0), (2000, 0, 0)], "non-monotonic at span 1"),
        (&[(10, 0, 0), (2000, 9000, 0), (3000, 6000, 0)], "non-monotonic at span 2"),
        (&[(10, 0, 0), (10, 6000, 0)], "non-monotonic at span 0"),
        (&[(2000, 0, 0), (10, 6000, 0)], "non-monotonic at span 0"),
        (&[(10, 5, 0)], "non-monotonic at span 0"),
        (&[(5000, 0, 0)], "non-monotonic at span 0"),
        (&[(10, 0, 0), (6000, 100, 0)], "non-monotonic at span 0"),
        (&[(10, 0, 0), (5001, 100, 1)], "non-monotonic at span 0"),
        (&[(10, 0, 1)], "begins 1 bits"),
        (&[(10, 0, 0), (2000, 6000, 8)], "begins 8 bits"),
        (&[(-10, 0, 0)], "offset -10 is negative"),
        (&[(10, 0, 0), (15, 12_000, 0)], "claims 12000 bytes from 5 compressed bytes"),
    ];
    for (spans, reason) in table {
        let error = Sketch::with_spans(spans).unwrap_err().to_string();
        assert!(error.contains(reason), "{error} (wanted {reason})");
    }
}

#[test]
fn counts_of_spans_must_agree() {
    for digests in [0, 2, 4] {
        let error = Sketch { digests, ..Sketch::gzip() }.decode().unwrap_err().to_string();
        assert!(error.contains("given max span ID differs from calculated max span ID"), "{error}");
    }
}

#[test]
fn sizes_must_not_be_negative() {
    for sketch in [
        Sketch { compressed_size: -1, ..Sketch::gzip() },
        Sketch { uncompressed_size: i64::MIN, ..Sketch::gzip() },
    ] {
        assert!(matches!(sketch.decode(), Err(ZtocError::Negative { .. })));
    }
}

#[test]
fn the_zinfo_of_a_plain_tar_must_fit_the_archive() {
    let plain = |span_size, size, digests| Sketch {
        compression: Compression::Uncompressed,
        compressed_size: 20_480,
        zinfo: encode_tar_zinfo(span_size, size).unwrap(),
        digests,
        ..Sketch::gzip()
    };
    let exact = plain(10_240, 20_480, 2).decode().unwrap();
    assert_eq!(exact.spans().len(), 2);
    let last = exact.spans().uncompressed(SpanId(1));
    assert_eq!((last.start.0, last.end.0), (10_240, 20_480));
    for (span_size, size, digests) in [
        (0, 20_480, 0),
        (-5, 20_480, 1),
        (10_240, 20_479, 2),
        (10_240, -1, 2),
        (10_240, 20_480, 3),
        (1, 20_480, 2),
    ] {
        assert!(plain(span_size, size, digests).decode().is_err(), "{span_size} {size} {digests}");
    }
    // The archive may end before the file does, not after it.
    let padded = Sketch { uncompressed_size: 10_000, files: vec![], ..plain(4096, 20_480, 5) };
    let table = padded.decode().unwrap();
    let table = table.spans();
    assert_eq!(table.uncompressed(SpanId(2)).end.0, 10_000);
    assert!(table.uncompressed(SpanId(3)).is_empty());
    assert!(Sketch { uncompressed_size: 20_481, ..plain(4096, 20_480, 5) }.decode().is_err());
}

#[test]
fn entries_must_be_in_order_and_inside_the_archive() {
    use EntryFault::{Alignment, Escape, HardLink, HeaderSize, Negative, Nul, Order, OutOfArchive};
    let link = |name, target| FileRow { kind: EntryKind::HardLink, link: target, ..file(name, 512, 0) };
    let table = [
        (vec![file(b"a", -512, 0)], Negative),
        (vec![file(b"a", 512, -1)], Negative),
        (vec![file(b"a", 513, 0)], Alignment(513)),
        (vec![file(b"a", 0, 0)], Order { header: 0, data: 0 }),
        (vec![file(b"a", 512, 600), file(b"b", 1536, 0)], Order { header: 1536, data: 1536 }),
        (vec![file(b"a", 2048, 0), file(b"b", 1024, 0)], Order { header: 2048, data: 1024 }),
        (vec![file(b"a", 512, 19_969)], OutOfArchive { data: 512, size: 19_969 }),
        (vec![file(b"a", 512, i64::MAX)], OutOfArchive { data: 512, size: i64::MAX.cast_unsigned() }),
        (vec![file(b"a", 8 << 20, 0)], HeaderSize(8 << 20)),
        (vec![file(b"x\0y", 512, 0)], Nul),
        (vec![file(b"a/../../etc/passwd", 512, 0)], Escape),
        (vec![link(b"a", b"")], HardLink),
        (vec![link(b"./a", b"/a")], HardLink),
    ];
    for (files, fault) in table {
        assert_eq!(Sketch::entry_fault(files), fault);
    }
    let many = vec![(&b"k"[..], &b"v"[..]); 3];
    let fine =
        Sketch { files: vec![FileRow { pax: many, ..file(b"\xff\xfe/", 512, 19_968) }], ..Sketch::gzip() };
    let ztoc = fine.decode().unwrap();
    let entry = ztoc.entries().next().unwrap();
    assert_eq!((entry.name, entry.pax().count(), entry.mode), (&b"\xff\xfe/"[..], 3, 0o644));
}

#[test]
fn sizes_of_kinds_without_data_are_ignored() {
    let dir = FileRow { kind: EntryKind::Directory, ..file(b"d/", 512, 4096) };
    let ztoc = Sketch { files: vec![dir, file(b"d/x", 1024, 3)], ..Sketch::gzip() }.decode().unwrap();
    let entries: Vec<_> = ztoc.entries().map(|entry| (entry.header.0, entry.data.0, entry.size)).collect();
    assert_eq!(entries, [(0, 512, 0), (512, 1024, 3)]);
}

#[test]
fn a_list_that_names_the_same_entry_over_and_over_is_refused() {
    let record = (&b"key"[..], &b"value"[..]);
    let bytes = |pax| {
        let files = vec![FileRow { pax, ..file(b"a", 512, 0) }];
        Sketch { files, zinfo: gzip_zinfo(1, &[]), digests: 1, ..Sketch::gzip() }.bytes()
    };
    let decode = |bytes: Vec<u8>| Ztoc::decode(bytes.into(), &DecodeLimits::default());
    let ztoc = decode(share_first_record(bytes(vec![record; 2000]), 2000)).unwrap();
    assert_eq!(
        ztoc.entries().next().unwrap().pax().filter(|(key, value)| (*key, *value) == record).count(),
        2000
    );
    // Small as a file, huge once every reference is followed: one long text counts 2000 times.
    let long: &'static [u8] = Box::leak(vec![b'v'; 200_000].into_boxed_slice());
    let mut pax = vec![record; 2000];
    pax[0] = (b"key", long);
    let error = decode(share_first_record(bytes(pax), 2000)).unwrap_err();
    assert_eq!(error, ZtocError::Entry { index: 0, fault: EntryFault::Amplification });
}

/// Makes all `count` slots of the records' vector lead to the first record.
fn share_first_record(mut bytes: Vec<u8>, count: u32) -> Vec<u8> {
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    // The vector is a count, then that many offsets, the first to something behind the vector.
    let is_vector = |at: &usize| word(&bytes, *at) == count && word(&bytes, at + 4) > 4 * count;
    let begin = (0..bytes.len() - 8).step_by(4).find(is_vector).unwrap() + 4;
    let first = word(&bytes, begin);
    for slot in 0..count {
        let at = begin + 4 * usize::try_from(slot).unwrap();
        bytes[at..at + 4].copy_from_slice(&(first - 4 * slot).to_le_bytes());
    }
    bytes
}

#[test]
fn offsets_beyond_4_gib_are_exact() {
    const GIB: i64 = 1 << 30;
    let spans: Vec<(i64, i64, u8)> =
        (0..64).map(|index| (10 + index * GIB / 4, index * GIB / 2 + i64::from(index > 0), 0)).collect();
    let mut big = file(b"big", 512, 31 * GIB);
    big.uid = u32::MAX;
    let sketch = Sketch {
        compressed_size: 17 * GIB,
        uncompressed_size: 32 * GIB,
        zinfo: gzip_zinfo(64, &spans),
        digests: 64,
        files: vec![big, file(b"after", 512 + 31 * GIB + 512, 3)],
        ..Sketch::gzip()
    };
    let ztoc = sketch.decode().unwrap();
    let table: &SpanTable = ztoc.spans();
    let gib = GIB.cast_unsigned();
    assert_eq!(table.at(UncompressedOffset(9 * gib)), SpanId(17));
    assert_eq!(table.at(UncompressedOffset(9 * gib + 1)), SpanId(18));
    assert_eq!(table.compressed(SpanId(18)).start.0, 10 + 18 * gib / 4);
    let entry = ztoc.entries().next().unwrap();
    let range = entry.data..UncompressedOffset(entry.data.0 + entry.size);
    let covered: u64 = table.covering(range).unwrap().map(|slice| slice.part.len() as u64).sum();
    assert_eq!(covered, 31 * gib);
    assert_eq!(ztoc.entries().nth(1).unwrap().header.0, 512 + 31 * gib);
}

#[test]
fn spans_with_small_files_are_told_from_those_amid_large_ones() {
    const MIB: i64 = 1 << 20;
    // Ten spans of 1 MiB: a small file up to the end of the first, a large one, another that ends in span 6, and 1 MiB on.
    let spans: Vec<_> = (0..10).map(|span| (10 + span * MIB / 4, span * MIB, 0)).collect();
    let large = file(b"large", MIB + 512, 5 * MIB + 512);
    let sketch = Sketch {
        compressed_size: 3 * MIB,
        uncompressed_size: 10 * MIB,
        zinfo: gzip_zinfo(10, &spans),
        digests: 10,
        files: vec![
            file(b"first", 512, MIB - 512),
            large,
            file(b"empty", 6 * MIB + 1536, 0),
            file(b"small", 6 * MIB + 2048, MIB),
            file(b"not quite small", 7 * MIB + 2048 + 512, MIB + 1),
        ],
        ..Sketch::gzip()
    };
    let ztoc = sketch.decode().unwrap();
    let table = ztoc.spans();
    let small: Vec<u32> = table.ids().filter(|id| table.has_small_files(*id)).map(|id| id.0).collect();
    assert_eq!(small, [0, 6, 7]);
}

#[test]
fn what_is_decoded_encodes_to_the_same_bytes() {
    let sketch = Sketch::gzip();
    let bytes = sketch.bytes();
    let ztoc = sketch.decode().unwrap();
    let files: Vec<FileRow<'_>> = ztoc
        .entries()
        .map(|entry| FileRow {
            name: entry.name,
            kind: entry.kind,
            data: i64::try_from(entry.data.0).unwrap(),
            size: i64::try_from(entry.size).unwrap(),
            link: entry.link,
            mode: entry.raw_mode,
            uid: entry.uid,
            gid: entry.gid,
            uname: entry.uname,
            gname: entry.gname,
            mtime: entry.mtime,
            dev_major: i64::from(entry.dev_major),
            dev_minor: i64::from(entry.dev_minor),
            pax: entry.pax().collect(),
        })
        .collect();
    let digests: Vec<Digest> = ztoc.spans().ids().map(|id| *ztoc.spans().digest(id)).collect();
    let document = Document {
        build_tool: ztoc.build_tool(),
        compression: ztoc.compression(),
        compressed_size: sketch.compressed_size,
        uncompressed_size: sketch.uncompressed_size,
        checkpoints: &sketch.zinfo,
        span_digests: &digests,
    };
    assert!(encode(&document, |each| files.iter().rev().for_each(each), 0).unwrap() == bytes);
}
