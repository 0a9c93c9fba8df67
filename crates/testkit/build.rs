//! Generates clients of the container runtime interface, and both sides of the snapshot service, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    #[cfg(feature = "containerd")]
    {
        let cri = protox::compile(["proto/cri.proto"], ["proto"])?;
        tonic_prost_build::configure().build_server(false).compile_fds(cri)?;
        let snapshots = protox::compile(["proto/snapshots.proto"], ["proto"])?;
        tonic_prost_build::configure().compile_fds(snapshots)?;
    }
    Ok(())
}
