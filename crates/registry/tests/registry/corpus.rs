//! The corpora of the fuzz targets, replayed.

use soci_registry::fuzzing;

use crate::seeds::{replay, seeds};

#[test]
fn the_hosts_toml_corpus_replays() {
    replay("hosts_toml", fuzzing::hosts_toml);
}

#[test]
fn the_content_range_corpus_replays() {
    replay("content_range", fuzzing::content_range);
}

#[test]
fn the_link_corpus_replays() {
    replay("link", fuzzing::link);
}

#[test]
fn the_referrers_corpus_replays() {
    replay("referrers", fuzzing::referrers);
}

#[test]
fn the_error_body_corpus_replays() {
    replay("error_body", fuzzing::error_body);
}

#[test]
fn the_presigned_corpus_replays() {
    replay("presigned", fuzzing::presigned);
}

/// A seed with some bytes replaced, removed or repeated: what a fuzzer does in its first seconds.
fn mutants(name: &'static str) -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    use proptest::prelude::*;
    let edit = (any::<proptest::sample::Index>(), any::<u8>(), 0..4u8);
    (proptest::sample::select(seeds(name)), proptest::collection::vec(edit, 0..12)).prop_map(
        |(mut bytes, edits)| {
            for (at, byte, kind) in edits {
                let at = if bytes.is_empty() { 0 } else { at.index(bytes.len()) };
                match kind {
                    _ if bytes.is_empty() => bytes.push(byte),
                    0 => bytes[at] = byte,
                    1 => drop(bytes.remove(at)),
                    2 => bytes.insert(at, byte),
                    _ => {
                        let copy = bytes[at..].to_vec();
                        bytes.extend_from_slice(&copy);
                    }
                }
                bytes.truncate(1 << 16);
            }
            bytes
        },
    )
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 2_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn mutants_of_hosts_toml_are_files_or_errors(bytes in mutants("hosts_toml")) {
        fuzzing::hosts_toml(&bytes);
    }

    #[test]
    fn mutants_of_content_range_are_sane(bytes in mutants("content_range")) {
        fuzzing::content_range(&bytes);
    }

    #[test]
    fn mutants_of_link_are_sane(bytes in mutants("link")) {
        fuzzing::link(&bytes);
    }

    #[test]
    fn mutants_of_error_body_are_fit_for_a_log(bytes in mutants("error_body")) {
        fuzzing::error_body(&bytes);
    }

    #[test]
    fn mutants_of_presigned_are_sane(bytes in mutants("presigned")) {
        fuzzing::presigned(&bytes);
    }

    #[test]
    fn mutants_of_referrers_are_lists_or_errors(bytes in mutants("referrers")) {
        fuzzing::referrers(&bytes);
    }
}
