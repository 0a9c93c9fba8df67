//! The snapshotter daemon's program.

use std::process::ExitCode;

fn main() -> ExitCode {
    soci_snapshotter_grpc::run::main()
}
