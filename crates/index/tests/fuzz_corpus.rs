//! Replays the seeds of the fuzz targets, and whatever fuzzing found since, as ordinary tests.
#![allow(clippy::unwrap_used, reason = "in a test, what cannot be unwrapped is a failure")]

use std::path::Path;

use soci_index::fuzzing;

fn replay(target: &str, body: impl Fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut count = 0;
    for file in std::fs::read_dir(corpus).unwrap() {
        body(&std::fs::read(file.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 1, "{target} has no corpus");
}

#[test]
fn soci_index() {
    replay("soci_index", fuzzing::soci_index);
}

#[test]
fn layout_tar() {
    replay("layout_tar", fuzzing::layout_tar);
}

#[test]
fn prefetch() {
    replay("prefetch", fuzzing::prefetch);
}

#[test]
fn image_document() {
    replay("image_document", fuzzing::image_document);
}
