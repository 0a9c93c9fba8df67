//! Compiles the containerd messages this crate speaks, without a protobuf compiler on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/content.proto", "proto/images.proto", "proto/leases.proto"];
    for file in files.iter().chain(&["proto/descriptor.proto"]) {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    // Servers are generated for the in-process fakes of the tests.
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
