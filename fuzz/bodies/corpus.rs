//! The corpora of the fuzz targets, for ordinary tests: each crate whose parsers are fuzzed includes this.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test")]

use std::path::Path;

/// Returns what is in the corpus of `target`, which began with seeds and has what fuzzing found since; always in the same order.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 1, "{target} has no corpus");
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// Does with the corpus of `target` what the target does.
pub fn replay<T>(target: &str, body: impl Fn(&[u8]) -> T) {
    for seed in seeds(target) {
        body(&seed);
    }
}
