//! Replays the seeds of the fuzz targets, and whatever fuzzing found since, as ordinary tests.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

#[path = "../../../fuzz/bodies/ztoc.rs"]
mod bodies;

fn replay(target: &str, body: impl Fn(&[u8])) {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut count = 0;
    for file in std::fs::read_dir(corpus).unwrap() {
        body(&std::fs::read(file.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 1, "{target} has no corpus");
}

#[test]
fn ztoc_decode() {
    replay("ztoc_decode", |data| {
        let _ = bodies::ztoc_decode(data);
    });
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
