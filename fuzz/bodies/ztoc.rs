//! What the fuzz targets of `soci-ztoc` do with their input: plain functions, so that ordinary tests replay the corpora.
#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "a test; each of its users takes what it needs"
)]

use std::sync::OnceLock;

use soci_ztoc::tar::{Parser, Step};
use soci_ztoc::{
    BuildOptions, Compression, DecodeLimits, SpanId, SpanInflate, UncompressedOffset, Ztoc, ZtocBuilder,
};

/// Decodes `data` as a zTOC and, if it is one, uses all of it. Returns whether it is.
pub fn ztoc_decode(data: &[u8]) -> bool {
    let limits = DecodeLimits::default();
    let Ok(ztoc) = Ztoc::decode(data.to_vec().into(), &limits) else { return false };
    let table = ztoc.spans();
    let mut end = 0;
    let mut count = 0;
    for entry in ztoc.entries() {
        assert!(entry.header.0 >= end && entry.header < entry.data);
        end = entry.data.0 + entry.size;
        assert!(end <= ztoc.uncompressed_size());
        let range = entry.data..UncompressedOffset(end);
        let covered: usize = table.covering(range).unwrap().map(|slice| slice.part.len()).sum();
        assert_eq!(covered as u64, entry.size);
        assert!(entry.xattrs().count() <= entry.pax().count());
        count += 1;
    }
    assert_eq!(count, ztoc.entries().len());
    let mut at = 0;
    for id in table.ids() {
        let (compressed, uncompressed) = (table.compressed(id), table.uncompressed(id));
        assert!(compressed.start < compressed.end && compressed.end.0 <= table.compressed_size());
        assert_eq!(uncompressed.start.0, at);
        at = uncompressed.end.0;
        let window = table.window(id).range;
        let window = usize::try_from(window.start).unwrap()..usize::try_from(window.end).unwrap();
        table.window(id).check(&data[window]).unwrap();
        assert!(table.digest(id).hex().len() >= 64);
    }
    assert_eq!(at, table.uncompressed_size());
    true
}

/// Decodes a zTOC of several checkpoints after changes to its structure: each five bytes of `data` choose a place outside
/// the windows, which make up nearly all of it, and what is written there.
pub fn ztoc_edit(data: &[u8]) {
    static BASE: OnceLock<(Vec<u8>, Vec<usize>)> = OnceLock::new();
    let (base, places) = BASE.get_or_init(|| {
        let (ztoc, _) = sample();
        let table = ztoc.spans();
        assert!(table.len() > 2);
        let windows: Vec<_> = table.ids().map(|id| table.window(id).range).collect();
        let outside = |at: &usize| !windows.iter().any(|window| window.contains(&(*at as u64)));
        (ztoc.bytes().to_vec(), (0..ztoc.bytes().len()).filter(outside).collect())
    });
    let mut bytes = base.clone();
    for edit in data.chunks_exact(5) {
        let at = places[usize::from(u16::from_le_bytes([edit[0], edit[1]])) % places.len()];
        // A byte, a half word or a word: offsets and lengths are four bytes, many of their values need two.
        let len = [1, 2, 4][usize::from(edit[2] % 3)];
        let value = u32::from_le_bytes([edit[3], edit[4], edit[2] >> 4, edit[2]]).to_le_bytes();
        for (byte, value) in bytes.iter_mut().skip(at).zip(&value[..len]) {
            *byte = *value;
        }
    }
    let _ = ztoc_decode(&bytes);
}

fn options(span_size: u64) -> BuildOptions {
    BuildOptions { span_size, build_tool: "fuzz".into() }
}

/// A layer whose spans begin within bytes, with two members.
fn sample() -> &'static (Ztoc, Vec<u8>) {
    static SAMPLE: OnceLock<(Ztoc, Vec<u8>)> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let layer = include_bytes!("sample-layer.tar.gz").to_vec();
        let mut builder = ZtocBuilder::new(Compression::Gzip, options(20_000)).unwrap();
        builder.push(&layer).unwrap();
        let built = builder.finish().unwrap();
        (Ztoc::decode(built.bytes.into(), &DecodeLimits::default()).unwrap(), layer)
    })
}

/// The first byte chooses: feed the rest to a span of a known layer, or take it for a layer, index it and read it back.
pub fn span_inflate(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    if choice % 2 == 0 {
        let (ztoc, _) = sample();
        let id = SpanId(u32::from(choice / 2) % ztoc.spans().len());
        inflate(ztoc, id, data, usize::from(choice / 16) * 50 + 1);
    } else {
        let mut builder = ZtocBuilder::new(Compression::Gzip, options(u64::from(choice / 2) * 64)).unwrap();
        let pieces = data.chunks(usize::from(*choice) * 7);
        if pieces.map(|piece| builder.push(piece)).any(|pushed| pushed.is_err()) {
            return;
        }
        let Ok(built) = builder.finish() else { return };
        let ztoc = Ztoc::decode(built.bytes.into(), &DecodeLimits::default()).unwrap();
        for id in ztoc.spans().ids() {
            let range = ztoc.spans().compressed(id);
            let range = usize::try_from(range.start.0).unwrap()..usize::try_from(range.end.0).unwrap();
            assert!(ztoc.spans().digest(id).verifies(&data[range.clone()]));
            assert!(inflate(&ztoc, id, &data[range], 333), "what was built must be readable");
        }
    }
}

fn inflate(ztoc: &Ztoc, id: SpanId, data: &[u8], chunk: usize) -> bool {
    let window = ztoc.spans().window(id);
    let bytes = &ztoc.bytes()
        [usize::try_from(window.range.start).unwrap()..usize::try_from(window.range.end).unwrap()];
    let mut inflate = SpanInflate::new(ztoc.spans(), id, &window.check(bytes).unwrap()).unwrap();
    let mut out = vec![0; inflate.output_len()];
    let mut valid = 0;
    for piece in data.chunks(chunk) {
        match inflate.feed(piece, &mut out) {
            Ok(now) => {
                assert!(now >= valid && now <= out.len());
                valid = now;
            }
            Err(_) => return false,
        }
    }
    inflate.finish(&out).is_ok()
}

/// Reads `data` as a tar, whole and in small pieces: both give the same members. Each member's own headers, read alone,
/// give that member.
pub fn tar_header(data: &[u8]) {
    let whole = read(data, usize::MAX);
    assert_eq!(whole, read(data, 97));
}

fn read(data: &[u8], chunk: usize) -> (Vec<soci_ztoc::tar::Member>, Option<soci_ztoc::tar::TarError>, u64) {
    let mut parser = Parser::new();
    let mut members = Vec::new();
    let mut bytes = 0;
    for piece in data.chunks(chunk) {
        let mut input = piece;
        loop {
            match parser.step(&mut input) {
                Ok(Step::More) => break,
                Ok(Step::Data(data)) => bytes += data.len() as u64,
                Ok(Step::Global(_)) => {}
                Ok(Step::Member(member)) => {
                    let group =
                        usize::try_from(member.header.0).unwrap()..usize::try_from(member.data.0).unwrap();
                    assert_eq!(
                        soci_ztoc::tar::parse_group(&data[group], member.header).as_ref(),
                        Ok(&*member)
                    );
                    members.push(*member);
                }
                Ok(Step::End) => return (members, None, bytes),
                Err(error) => return (members, Some(error), bytes),
            }
        }
    }
    (members, parser.finish().err(), bytes)
}
