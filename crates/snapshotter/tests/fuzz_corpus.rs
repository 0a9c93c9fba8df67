//! Replays the corpora of the fuzz targets as ordinary tests.

#[path = "../../../fuzz/bodies/corpus.rs"]
mod corpus;
#[path = "../../../fuzz/bodies/filter.rs"]
mod filter;
#[path = "../../../fuzz/bodies/record.rs"]
mod record;

use corpus::replay;

#[test]
fn snapshot_record() {
    replay("snapshot_record", record::snapshot_record);
}

#[test]
fn filter() {
    replay("filter", filter::filter);
}
