//! The soci command line.

fn main() {}
