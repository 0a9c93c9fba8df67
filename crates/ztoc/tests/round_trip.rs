//! Layers made up at random: build, decode, inflate every span, against decoders and a tar reader that are not ours.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Write;

use flate2::Compression as Level;
use proptest::prelude::*;
use soci_ztoc::{
    BuildError, BuildOptions, BuiltZtoc, Compression, DecodeLimits, SpanId, SpanInflate, SpanTable,
    UncompressedOffset, Window, Ztoc, ZtocBuilder, inflate_span,
};

fn build(
    layer: &[u8],
    compression: Compression,
    span_size: u64,
    chunk: usize,
) -> Result<BuiltZtoc, BuildError> {
    let mut builder = ZtocBuilder::new(compression, BuildOptions { span_size, build_tool: "test".into() })?;
    for piece in layer.chunks(chunk) {
        builder.push(piece)?;
    }
    builder.finish()
}

fn decode(built: &BuiltZtoc) -> Ztoc {
    Ztoc::decode(built.bytes.clone().into(), &DecodeLimits::default()).unwrap()
}

fn window(ztoc: &Ztoc, id: SpanId) -> Window {
    let window = ztoc.spans().window(id);
    let range = usize::try_from(window.range.start).unwrap()..usize::try_from(window.range.end).unwrap();
    window.check(&ztoc.bytes()[range]).unwrap()
}

fn compressed<'a>(layer: &'a [u8], table: &SpanTable, id: SpanId) -> &'a [u8] {
    let range = table.compressed(id);
    &layer[usize::try_from(range.start.0).unwrap()..usize::try_from(range.end.0).unwrap()]
}

fn len(table: &SpanTable, id: SpanId) -> usize {
    let range = table.uncompressed(id);
    usize::try_from(range.end.0 - range.start.0).unwrap()
}

/// Text-like and random stretches, from a seed, so that blocks of every kind occur.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let run = usize::try_from(next() % 5000).unwrap();
        match next() % 4 {
            0 => (0..run).for_each(|_| bytes.push(next().to_le_bytes()[3])),
            1 => bytes.extend(std::iter::repeat_n(next().to_le_bytes()[2], run * 10)),
            _ => (0..run).for_each(|_| bytes.push(b"etaoin shrdlu\n"[usize::try_from(next() % 14).unwrap()])),
        }
    }
    bytes.truncate(len);
    bytes
}

fn tar_of(files: &[(u64, usize)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (index, (seed, len)) in files.iter().enumerate() {
        let data = content(*seed, *len);
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        let name = format!("dir/{}{index}", "n".repeat(usize::try_from(seed % 150).unwrap()));
        archive.append_data(&mut header, name, data.as_slice()).unwrap();
    }
    archive.into_inner().unwrap()
}

/// gzip with a member per piece, or one in all.
fn gzip(tar: &[u8], level: u32, members: usize) -> Vec<u8> {
    let size = tar.len().div_ceil(members).max(1);
    tar.chunks(size).fold(Vec::new(), |layer, piece| {
        let mut encoder = flate2::write::GzEncoder::new(layer, Level::new(level));
        encoder.write_all(piece).unwrap();
        encoder.finish().unwrap()
    })
}

/// gzip with a block boundary after every `every` bytes at least.
fn gzip_in_blocks(tar: &[u8], level: u32, every: usize) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Level::new(level));
    for piece in tar.chunks(every) {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
    }
    encoder.finish().unwrap()
}

/// Every span, whole and in pieces, gives its part of `tar`; windows are the true bytes before the span.
fn check(ztoc: &Ztoc, layer: &[u8], tar: &[u8], feed: usize) {
    let table = ztoc.spans();
    let mut at = 0;
    for id in table.ids() {
        let (window, input) = (window(ztoc, id), compressed(layer, table, id));
        assert!(table.digest(id).verifies(input));
        // A span past the archive's end begins somewhere in the padding.
        if let Some(window) = window.bytes().filter(|_| !table.uncompressed(id).is_empty()) {
            let known = at.min(window.len());
            assert!(
                window[window.len() - known..] == tar[at - known..at],
                "span {id}: the window is not what precedes"
            );
            assert!(window[..window.len() - known].iter().all(|byte| *byte == 0));
        }
        let want = len(table, id);
        let expected = &tar[at..at + want];
        let mut out = vec![0xaa; want];
        inflate_span(table, id, &window, input, &mut out).unwrap();
        assert!(out == expected, "span {id} whole");
        let mut out = vec![0x55; want];
        let mut inflate = SpanInflate::new(table, id, &window).unwrap();
        let mut valid = 0;
        for piece in input.chunks(feed) {
            let now = inflate.feed(piece, &mut out).unwrap();
            assert!(now >= valid);
            valid = now;
            assert!(out[..valid] == expected[..valid], "span {id}: bytes said to be valid are not");
        }
        inflate.finish(&out).unwrap();
        assert_eq!(valid, want);
        at += want;
    }
    assert_eq!(at as u64, ztoc.uncompressed_size());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn gzip_layers_round_trip(
        files in prop::collection::vec((any::<u64>(), 0usize..120_000), 0..6),
        level in 0u32..10,
        members in 1usize..5,
        span_size in prop::sample::select(vec![0u64, 1000, 20_000, 65_536, 1 << 20]),
        feed in 1usize..40_000,
        chunk in 1usize..300_000,
    ) {
        let tar = tar_of(&files);
        let layer = gzip(&tar, level, members);
        let built = build(&layer, Compression::Gzip, span_size, chunk).unwrap();
        prop_assert_eq!(&built, &build(&layer, Compression::Gzip, span_size, usize::MAX).unwrap());
        let ztoc = decode(&built);
        prop_assert_eq!(ztoc.entries().len(), files.len());
        prop_assert_eq!(ztoc.uncompressed_size(), tar.len() as u64);
        check(&ztoc, &layer, &tar, feed);
        for (entry, (seed, len)) in ztoc.entries().zip(&files) {
            let data = usize::try_from(entry.data.0).unwrap();
            prop_assert!(tar[data..data + len] == content(*seed, *len));
        }
    }

    #[test]
    fn plain_layers_round_trip(
        files in prop::collection::vec((any::<u64>(), 0usize..30_000), 0..4),
        span_size in 1u64..40_000,
        padding in 0usize..30_000,
        feed in 1usize..5000,
    ) {
        let mut tar = tar_of(&files);
        let size = tar.len() as u64;
        tar.resize(tar.len() + padding, 0);
        let ztoc = decode(&build(&tar, Compression::Uncompressed, span_size, 7000).unwrap());
        prop_assert_eq!(ztoc.uncompressed_size(), size, "padding is not counted");
        prop_assert_eq!(ztoc.compressed_size(), tar.len() as u64);
        check(&ztoc, &tar, &tar, feed);
    }

    #[test]
    fn covering_is_a_linear_scan(
        files in prop::collection::vec((any::<u64>(), 0usize..60_000), 1..4),
        span_size in prop::sample::select(vec![0u64, 3000, 30_000]),
        ends in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let ztoc = decode(&build(&gzip(&tar_of(&files), 6, 2), Compression::Gzip, span_size, usize::MAX).unwrap());
        let table = ztoc.spans();
        let size = usize::try_from(table.uncompressed_size()).unwrap();
        let (a, b) = (ends.0.index(size + 1), ends.1.index(size + 1));
        let (start, end) = (a.min(b) as u64, a.max(b) as u64);
        let scan: Vec<(SpanId, u64, u64)> = table
            .ids()
            .filter_map(|id| {
                let span = table.uncompressed(id);
                let (from, to) = (start.max(span.start.0), end.min(span.end.0));
                (from < to).then(|| (id, from - span.start.0, to - span.start.0))
            })
            .collect();
        let ours: Vec<(SpanId, u64, u64)> = table
            .covering(UncompressedOffset(start)..UncompressedOffset(end))
            .unwrap()
            .map(|slice| (slice.id, slice.part.start as u64, slice.part.end as u64))
            .collect();
        prop_assert_eq!(ours, scan);
        let holds = table.ids().rfind(|id| table.uncompressed(*id).start.0 <= start).unwrap();
        prop_assert_eq!(table.at(UncompressedOffset(start)), holds);
    }
}

#[test]
fn offsets_outside_the_archive_are_refused_or_clamped() {
    let ztoc =
        decode(&build(&gzip(&tar_of(&[(1, 50_000)]), 6, 1), Compression::Gzip, 5000, usize::MAX).unwrap());
    let table = ztoc.spans();
    let size = table.uncompressed_size();
    let range = |start, end| table.covering(UncompressedOffset(start)..UncompressedOffset(end));
    assert!(range(0, size + 1).is_err());
    assert!(range(10, 9).is_err());
    assert!(range(u64::MAX, u64::MAX).is_err());
    assert_eq!(range(size, size).unwrap().count(), 0);
    let last = SpanId(table.len() - 1);
    assert_eq!(table.at(UncompressedOffset(u64::MAX)), last);
    assert_eq!(table.at(UncompressedOffset(size)), last);
    assert_eq!(table.id(table.len()), None);
}

/// zlib-rs writes scratch bytes past what it reports. A window taken from a circular buffer, as zlib's `zran` example
/// does, has its oldest bytes overwritten; the check compares every byte of every window.
#[test]
fn windows_are_not_damaged_by_the_decoder_s_scratch_bytes() {
    let tar = tar_of(&[(3, 3_000_000), (4, 1_500_000), (5, 900_000)]);
    for level in [1, 6, 9] {
        let layer = gzip_in_blocks(&tar, level, 30_011);
        let ztoc = decode(&build(&layer, Compression::Gzip, 20_000, usize::MAX).unwrap());
        assert!(ztoc.spans().len() > 100, "{}", ztoc.spans().len());
        check(&ztoc, &layer, &tar, 1000);
    }
}

#[test]
fn padding_longer_than_a_span_gives_empty_spans_that_decode_to_nothing() {
    let mut tar = tar_of(&[(9, 10_000)]);
    let size = tar.len() as u64;
    tar.extend(content(1, 300_000));
    let layer = gzip_in_blocks(&tar, 1, 25_000);
    let ztoc = decode(&build(&layer, Compression::Gzip, 20_000, usize::MAX).unwrap());
    assert_eq!(ztoc.uncompressed_size(), size);
    let table = ztoc.spans();
    assert!(table.uncompressed(SpanId(table.len() - 1)).is_empty());
    check(&ztoc, &layer, &tar, 777);
}

#[test]
fn a_span_that_is_cut_short_or_continued_is_an_error_and_never_zeros() {
    let tar = tar_of(&[(11, 200_000)]);
    for layer in [
        gzip_in_blocks(&tar, 6, 10_000),
        [gzip_in_blocks(&tar[..70_000], 6, 9000), gzip(&tar[70_000..], 1, 3)].concat(),
    ] {
        let ztoc = decode(&build(&layer, Compression::Gzip, 30_000, usize::MAX).unwrap());
        let table = ztoc.spans();
        for id in table.ids() {
            let (window, input) = (window(&ztoc, id), compressed(&layer, table, id));
            let mut out = vec![0; len(table, id)];
            for cut in [0, 1, input.len() / 2, input.len() - 1] {
                assert!(
                    inflate_span(table, id, &window, &input[..cut], &mut out).is_err(),
                    "{id} cut at {cut}"
                );
            }
            let longer = [input, &[0]].concat();
            assert!(inflate_span(table, id, &window, &longer, &mut out).is_err());
            assert!(inflate_span(table, id, &window, input, &mut out[1..]).is_err());
        }
        // The bytes of another span of the same length come out too short, too long, or corrupt, or at least differ.
        let other = compressed(&layer, table, SpanId(1));
        let mut out = vec![0; len(table, SpanId(0))];
        let mut inflate = SpanInflate::new(table, SpanId(0), &Window::NONE).unwrap();
        let fed =
            inflate.feed(&other[..other.len().min(compressed(&layer, table, SpanId(0)).len())], &mut out);
        assert!(fed.is_err() || inflate.finish(&out).is_err());
    }
}

#[test]
fn a_missing_or_damaged_window_is_noticed() {
    let layer = gzip_in_blocks(&tar_of(&[(12, 200_000)]), 6, 10_000);
    let ztoc = decode(&build(&layer, Compression::Gzip, 30_000, usize::MAX).unwrap());
    let reference = ztoc.spans().window(SpanId(1));
    let range =
        usize::try_from(reference.range.start).unwrap()..usize::try_from(reference.range.end).unwrap();
    let mut bytes = ztoc.bytes()[range].to_vec();
    bytes[100] ^= 1;
    assert!(reference.check(&bytes).is_err());
    assert!(reference.check(&bytes[1..]).is_err());
    assert!(SpanInflate::new(ztoc.spans(), SpanId(1), &Window::NONE).is_err());
    assert!(ztoc.spans().window(SpanId(0)).range.is_empty());
}

#[test]
fn layers_that_cannot_be_indexed_are_refused_with_the_reason() {
    let gz = |layer: &[u8]| build(layer, Compression::Gzip, 1 << 20, usize::MAX).unwrap_err();
    let tar = tar_of(&[(5, 5000)]);
    let good = gzip(&tar, 6, 1);
    let global = {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XGlobalHeader);
        header.set_size(18);
        header.set_cksum();
        let mut archive = header.as_bytes().to_vec();
        archive.extend(b"18 comment=abcdef\n");
        archive.resize(1024, 0);
        [archive, tar.clone()].concat()
    };
    let sparse = {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNUSparse);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let escaping = {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..8].copy_from_slice(b"a/../../");
        header.set_size(0);
        header.set_cksum();
        [header.as_bytes().to_vec(), vec![0; 1024]].concat()
    };
    let table = [
        (vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0], "not gzip but zstd", true),
        (tar.clone(), "not gzip but something else", true),
        (vec![], "layer is empty", true),
        (good[..2].to_vec(), "ends after 2 bytes", false),
        (good[..good.len() - 3].to_vec(), "in the middle of its gzip data", false),
        ([good.as_slice(), b"\0\0\0"].concat(), "follows a gzip member but begins no other", false),
        ([good.as_slice(), b"\x1f\0\0\0"].concat(), "corrupt", false),
        (gzip(&tar[..3000], 6, 1), "ends in the middle of a member", false),
        (
            gzip(b"this is no tar, whatever the media type says".repeat(20).as_slice(), 6, 1),
            "not a tar header",
            false,
        ),
        (gzip(&global, 6, 1), "global pax headers", true),
        (gzip(&sparse, 6, 1), "sparse files are not supported", true),
        (gzip(&escaping, 6, 1), "leaves the root", true),
    ];
    for (layer, reason, unindexable) in table {
        let error = gz(&layer);
        assert!(error.to_string().contains(reason), "{error} (wanted {reason})");
        assert_eq!(error.is_unindexable(), unindexable, "{error}");
    }
    let mut corrupt = good.clone();
    let last = corrupt.len() - 6;
    corrupt[last] ^= 1;
    assert!(
        gz(&corrupt).to_string().contains("incorrect data check"),
        "the checksum of the member is verified"
    );
    let plain = |span_size| build(&tar, Compression::Uncompressed, span_size, usize::MAX);
    assert!(plain(0).is_err());
    assert!(plain(u64::MAX).is_err());
    assert_eq!(build(&[], Compression::Uncompressed, 1, 1).unwrap_err(), BuildError::Empty);
}
