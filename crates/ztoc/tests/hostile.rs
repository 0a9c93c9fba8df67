//! zTOCs that lie: every one is refused or read without panic.
#![allow(clippy::unwrap_used, reason = "tests")]

use soci_ztoc::{BuildOptions, Compression, DecodeLimits, Ztoc, ZtocBuilder};

#[path = "../../../fuzz/bodies/ztoc.rs"]
mod bodies;

fn small() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, link) in [("a", None), ("b/c", Some("a")), ("d", Some("b/c"))] {
        let mut header = tar::Header::new_ustar();
        match link {
            None => {
                header.set_size(3);
                archive.append_pax_extensions([("SCHILY.xattr.user.x", &b"value"[..])]).unwrap();
                archive.append_data(&mut header, name, &b"abc"[..]).unwrap();
            }
            Some(target) => {
                header.set_entry_type(tar::EntryType::Link);
                header.set_size(0);
                archive.append_link(&mut header, name, target).unwrap();
            }
        }
    }
    let options = BuildOptions { span_size: 1000, build_tool: "test".into() };
    let mut builder = ZtocBuilder::new(Compression::Uncompressed, options).unwrap();
    builder.push(&archive.into_inner().unwrap()).unwrap();
    builder.finish().unwrap().bytes
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    let whole = small();
    assert!(Ztoc::decode(whole.clone().into(), &DecodeLimits::default()).is_ok());
    let mut survived = 0;
    for len in 0..whole.len() {
        survived += usize::from(bodies::ztoc_decode(&whole[..len]));
    }
    // Only padding and the closing NUL of the string written first stand at the very end.
    assert!(survived <= 8, "{survived} truncations decode");
}

#[test]
fn every_single_byte_changed_is_survived() {
    let whole = small();
    for at in 0..whole.len() {
        for change in [1, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            bodies::ztoc_decode(&bytes);
        }
    }
}

#[test]
fn random_mutations_are_survived() {
    let seeds = [small(), std::fs::read("tests/fixtures/ztoc/plain-odd.tar.ztoc").unwrap()];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % bound
    };
    let mut decoded = 0;
    for round in 0..20_000 {
        let mut bytes = seeds[round % 2].clone();
        for _ in 0..1 + next(6) {
            let at = next(bytes.len() - 4);
            match next(4) {
                0 => bytes[at] = next(256).to_le_bytes()[0],
                1 => bytes[at..at + 4].copy_from_slice(&[0xff, 0xff, 0xff, [0x7f, 0xff][next(2)]]),
                2 => bytes[at..at + 4].copy_from_slice(&u32::try_from(next(1 << 12)).unwrap().to_le_bytes()),
                _ => {
                    let from = next(bytes.len() - 4);
                    bytes.copy_within(from..from + 4, at);
                }
            }
        }
        decoded += usize::from(bodies::ztoc_decode(&bytes));
    }
    assert!(decoded > 100, "mutations that still decode exercise the accessors: {decoded}");
}

#[test]
fn limits_are_enforced() {
    let bytes = small();
    let refused = |limits: DecodeLimits| Ztoc::decode(bytes.clone().into(), &limits).unwrap_err().to_string();
    let all = DecodeLimits::default();
    assert!(refused(DecodeLimits { bytes: 100, ..all }).contains("bytes, more than the limit of 100"));
    assert!(refused(DecodeLimits { entries: 2, ..all }).contains("3 entries, more than the limit of 2"));
    assert!(refused(DecodeLimits { spans: 1, ..all }).contains("spans, more than the limit of 1"));
    assert!(refused(DecodeLimits { span_bytes: 999, ..all }).contains("1000 bytes in a span"));
    assert!(refused(DecodeLimits { name: 2, ..all }).contains("longer than 2 bytes"));
}
