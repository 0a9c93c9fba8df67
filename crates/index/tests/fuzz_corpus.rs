//! Replays the seeds of the fuzz targets, and whatever fuzzing found since, as ordinary tests.

#[path = "../../../fuzz/bodies/corpus.rs"]
mod corpus;

use corpus::replay;
use soci_index::fuzzing;

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

#[test]
fn image_config() {
    replay("image_config", fuzzing::image_config);
}
