//! The snapshotter daemon: configuration, wiring, live layers, gRPC, metrics, shutdown.

fn main() {}
