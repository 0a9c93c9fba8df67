//! The registry client against a real HTTP registry that can misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod auth;
mod blobs;
mod common;
mod corpus;
mod hosts;
mod manifests;
mod push;
mod secrets;
#[path = "../../../../fuzz/bodies/corpus.rs"]
mod seeds;
