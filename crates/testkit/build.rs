//! Generates clients of the container runtime interface and of the snapshot service, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    #[cfg(feature = "containerd")]
    {
        let files = protox::compile(["proto/cri.proto", "proto/snapshots.proto"], ["proto"])?;
        tonic_prost_build::configure().build_server(false).compile_fds(files)?;
    }
    Ok(())
}
