//! zTOCs made by the reference's command line: ours must be the same bytes. See `fixtures/README.md`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use soci_oci::Digest;
use soci_ztoc::{
    BuildOptions, BuiltZtoc, Compression, DecodeLimits, SpanId, Ztoc, ZtocBuilder, inflate_span,
};

/// The two for which the reference writes checkpoints that it refuses itself.
const DIFFERENT: [&str; 2] = ["empty-first-member.tar.gz", "leading-sync-flush.tar.gz"];

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn golden() -> Vec<serde_json::Value> {
    serde_json::from_slice(&std::fs::read(fixtures().join("ztoc/golden.json")).unwrap()).unwrap()
}

fn layer(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join("layers").join(name)).unwrap()
}

fn reference(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join("ztoc").join(format!("{name}.ztoc"))).unwrap()
}

fn build(name: &str, chunk: usize) -> BuiltZtoc {
    let compression = if name.ends_with(".gz") { Compression::Gzip } else { Compression::Uncompressed };
    let options = BuildOptions { span_size: 65_536, build_tool: "AWS SOCI CLI v0.2".into() };
    let mut builder = ZtocBuilder::new(compression, options).unwrap();
    for piece in layer(name).chunks(chunk) {
        builder.push(piece).unwrap();
    }
    builder.finish().unwrap()
}

fn decode(bytes: Vec<u8>) -> Ztoc {
    Ztoc::decode(bytes.into(), &DecodeLimits::default()).unwrap()
}

/// The tar of a layer, by a decoder that is not ours.
fn plain(name: &str) -> Vec<u8> {
    let layer = layer(name);
    if !name.ends_with(".gz") {
        return layer;
    }
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(layer.as_slice()), &mut tar).unwrap();
    tar
}

/// Every span of the layer verifies and inflates to its part of the tar.
fn check_spans(ztoc: &Ztoc, name: &str) {
    let (blob, tar) = (layer(name), plain(name));
    let table = ztoc.spans();
    let mut at = 0;
    for id in table.ids() {
        let compressed = table.compressed(id);
        let compressed =
            &blob[usize::try_from(compressed.start.0).unwrap()..usize::try_from(compressed.end.0).unwrap()];
        assert!(table.digest(id).verifies(compressed), "{name} span {id}");
        let window = table.window(id);
        let range = usize::try_from(window.range.start).unwrap()..usize::try_from(window.range.end).unwrap();
        let window = window.check(&ztoc.bytes()[range]).unwrap();
        let uncompressed = table.uncompressed(id);
        assert_eq!(uncompressed.start.0, at, "{name} span {id}");
        at = uncompressed.end.0;
        let expected = &tar[usize::try_from(uncompressed.start.0).unwrap()..usize::try_from(at).unwrap()];
        let mut out = vec![0xaa; expected.len()];
        inflate_span(table, id, &window, compressed, &mut out).unwrap();
        assert!(out == expected, "{name} span {id} has other content");
    }
    assert_eq!(at, ztoc.uncompressed_size());
}

#[test]
fn every_layer_gives_the_reference_s_bytes() {
    let cases = golden();
    assert_eq!(cases.len(), 16);
    for case in cases {
        let name = case["layer"].as_str().unwrap();
        if DIFFERENT.contains(&name) {
            continue;
        }
        let built = build(name, 100_000);
        assert_eq!(built.layer_digest.to_string(), case["layer_digest"].as_str().unwrap(), "{name}");
        assert_eq!(built.layer_size, layer(name).len() as u64, "{name}");
        assert!(built.bytes == reference(name), "{name}: not the reference's bytes");
        assert_eq!(built.digest.to_string(), case["ztoc_digest"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn the_result_does_not_depend_on_how_the_layer_is_cut() {
    for name in ["members.tar.gz", "pigz.tar.gz", "plain-odd.tar", "empty.tar.gz"] {
        let whole = build(name, usize::MAX);
        for chunk in [1, 7, 511, 65_536] {
            assert!(build(name, chunk) == whole, "{name} in pieces of {chunk}");
        }
    }
}

#[test]
fn a_checkpoint_that_does_not_advance_is_left_out() {
    for name in DIFFERENT {
        // The reference's has a second checkpoint at output 0, and we refuse it as the reference does.
        let error = Ztoc::decode(reference(name).into(), &DecodeLimits::default()).unwrap_err();
        assert!(error.to_string().contains("span offsets are non-monotonic"), "{error}");
        let ztoc = decode(build(name, 50_000).bytes);
        let table = ztoc.spans();
        assert_eq!(table.head().end.0, 10, "the first of the two is kept");
        let starts: Vec<u64> = table.ids().map(|id| table.uncompressed(id).start.0).collect();
        assert!(starts.windows(2).all(|pair| pair[0] < pair[1]), "{starts:?}");
        check_spans(&ztoc, name);
    }
}

#[test]
fn the_reference_s_ztocs_decode_and_every_span_inflates() {
    for case in golden() {
        let name = case["layer"].as_str().unwrap();
        if !DIFFERENT.contains(&name) {
            let ztoc = decode(reference(name));
            assert_eq!(ztoc.version(), "0.9");
            assert_eq!(ztoc.build_tool(), "AWS SOCI CLI v0.2");
            assert_eq!(ztoc.spans().span_size(), 65_536);
            check_spans(&ztoc, name);
        }
    }
}

#[test]
fn entries_are_those_of_an_independent_tar_reader() {
    for name in ["odd-entries.tar.gz", "gnu-format.tar.gz", "ordinary.tar.gz", "plain-odd.tar", "padded.tar"]
    {
        let tar = plain(name);
        let ztoc = decode(reference(name));
        let mut archive = tar::Archive::new(tar.as_slice());
        let mut entries = ztoc.entries();
        for member in archive.entries().unwrap() {
            let member = member.unwrap();
            let entry = entries.next().unwrap();
            assert_eq!(member.path_bytes().as_ref(), entry.name, "{name}");
            assert_eq!(member.raw_file_position(), entry.data.0, "{name}");
            assert_eq!(member.size(), entry.size, "{name}");
            if !entry.link.is_empty() {
                assert_eq!(member.link_name_bytes().unwrap().as_ref(), entry.link, "{name}");
            }
        }
        assert_eq!(entries.len(), 0, "{name}");
    }
}

#[test]
fn headers_of_every_entry_parse_to_that_entry() {
    for case in golden() {
        let name = case["layer"].as_str().unwrap();
        if DIFFERENT.contains(&name) {
            continue;
        }
        let tar = plain(name);
        for entry in decode(reference(name)).entries() {
            let group = usize::try_from(entry.header.0).unwrap()..usize::try_from(entry.data.0).unwrap();
            let member = soci_ztoc::tar::parse_group(&tar[group], entry.header).unwrap();
            assert!(member.describes(&entry), "{name}: {member:?}");
        }
    }
}

#[test]
fn odd_entries_keep_every_field() {
    let ztoc = decode(reference("odd-entries.tar.gz"));
    let find = |name: &str| ztoc.entries().find(|entry| entry.name == name.as_bytes()).unwrap();
    let caps: Vec<_> = find("./caps").xattrs().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!(caps[0].0, b"security.capability");
    assert_eq!(caps[0].1[..4], [1, 0, 0, 2]);
    assert_eq!(caps[1..], [(b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), b"2".to_vec())]);
    assert_eq!(find("./etc/").mode, 0o1777);
    assert_eq!((find("./etc/passwd").uid, find("./etc/passwd").gid), (70_000, 70_001));
    assert_eq!((find("./dev/null").dev_major, find("./dev/null").dev_minor), (1, 3));
    assert_eq!((find("./frac").mtime.secs, find("./frac").mtime.nanos), (1_700_000_000, 123_456_789));
    assert_eq!(find("./neg").mtime.secs, -1);
    assert_eq!(find("./etc/hard").link, b"./etc/passwd");
    assert_eq!(find("./huge-uid").gid, u32::MAX - 1);
}

#[test]
fn whether_xattrs_are_needed_is_told() {
    assert!(build("odd-entries.tar.gz", 65_536).xattrs_needed);
    assert!(!build("ordinary.tar.gz", 65_536).xattrs_needed);
}

#[test]
fn neighbouring_digests_share_the_partial_byte() {
    let (blob, ztoc) = (layer("ordinary.tar.gz"), decode(reference("ordinary.tar.gz")));
    let table = ztoc.spans();
    let shared = table
        .ids()
        .skip(1)
        .filter(|id| table.compressed(*id).start < table.compressed(SpanId(id.0 - 1)).end)
        .inspect(|id| {
            for id in [SpanId(id.0 - 1), *id] {
                let range = table.compressed(id);
                let bytes =
                    &blob[usize::try_from(range.start.0).unwrap()..usize::try_from(range.end.0).unwrap()];
                assert_eq!(Digest::of(bytes), *table.digest(id));
            }
        })
        .count();
    assert!(shared > 0, "the fixture has a checkpoint within a byte");
}
