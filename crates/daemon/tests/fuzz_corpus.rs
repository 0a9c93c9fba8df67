//! Replays the corpus of the fuzz target as an ordinary test.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

#[path = "../../../fuzz/bodies/config.rs"]
mod bodies;

#[test]
fn daemon_config() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/daemon_config");
    let files: Vec<PathBuf> = std::fs::read_dir(corpus).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(files.len() > 1);
    files.iter().for_each(|file| bodies::daemon_config(&std::fs::read(file).unwrap()));
    bodies::daemon_config(include_bytes!("sample.toml"));
}
