//! The corpora of the fuzz targets, replayed.

use std::path::Path;

use soci_registry::fuzzing;

fn replay(name: &str, body: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let files: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 8, "{name} has {} seeds", files.len());
    for file in files {
        body(&std::fs::read(file).unwrap());
    }
}

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
