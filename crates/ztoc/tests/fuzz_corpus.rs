//! Replays the seeds of the fuzz targets, and whatever fuzzing found since, as ordinary tests.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

#[path = "../../../fuzz/bodies/ztoc.rs"]
mod bodies;
#[path = "../../../fuzz/bodies/corpus.rs"]
mod corpus;

use corpus::replay;

#[test]
fn ztoc_decode() {
    replay("ztoc_decode", bodies::ztoc_decode);
    // `cargo xtask fuzz` begins with these as well.
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ztoc");
    let mut count = 0;
    for file in std::fs::read_dir(fixtures).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "ztoc") {
            count += usize::from(bodies::ztoc_decode(&std::fs::read(&path).unwrap()));
        }
    }
    assert_eq!(count, 14, "all but the two that the reference refuses itself");
}

#[test]
fn ztoc_edit() {
    replay("ztoc_edit", bodies::ztoc_edit);
}

#[test]
fn span_inflate() {
    replay("span_inflate", bodies::span_inflate);
}

#[test]
fn tar_header() {
    replay("tar_header", bodies::tar_header);
}
