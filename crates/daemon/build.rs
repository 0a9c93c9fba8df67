//! Compiles the messages of the snapshot service, without a protobuf compiler on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in ["proto/snapshots.proto", "proto/mount.proto"] {
        println!("cargo::rerun-if-changed={file}");
    }
    println!("cargo::rerun-if-env-changed=SOCI_REVISION");
    let descriptors = protox::compile(["proto/snapshots.proto"], ["proto"])?;
    // The client is for tests.
    tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    Ok(())
}
