//! Replays the corpus of the fuzz target as an ordinary test.

#[path = "../../../fuzz/bodies/reference.rs"]
mod bodies;
#[path = "../../../fuzz/bodies/corpus.rs"]
mod corpus;

#[test]
fn reference() {
    corpus::replay("reference", bodies::reference);
}
