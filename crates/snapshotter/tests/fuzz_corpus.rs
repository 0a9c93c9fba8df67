//! Replays the corpus of the fuzz target as an ordinary test.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

#[path = "../../../fuzz/bodies/record.rs"]
mod bodies;

#[test]
fn snapshot_record() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/snapshot_record");
    let files: Vec<PathBuf> = std::fs::read_dir(corpus).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(files.len() > 1);
    files.iter().for_each(|file| bodies::snapshot_record(&std::fs::read(file).unwrap()));
}
