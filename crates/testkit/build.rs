//! Generates the client of the container runtime interface, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    #[cfg(feature = "containerd")]
    {
        let files = protox::compile(["proto/cri.proto"], ["proto"])?;
        tonic_prost_build::configure().build_server(false).compile_fds(files)?;
    }
    Ok(())
}
