//! Replays the corpus of the fuzz target as an ordinary test.

#[path = "../../../fuzz/bodies/config.rs"]
mod bodies;
#[path = "../../../fuzz/bodies/corpus.rs"]
mod corpus;

#[test]
fn daemon_config() {
    corpus::replay("daemon_config", bodies::daemon_config);
    bodies::daemon_config(include_bytes!("sample.toml"));
}
