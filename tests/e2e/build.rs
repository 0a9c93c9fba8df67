//! Builds the program that runs inside test containers: static, so that an image needs nothing else.

use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=probe/main.rs");
    let directory = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
    let compiler = std::env::var_os("RUSTC").ok_or("cargo sets no RUSTC")?;
    let status = Command::new(compiler)
        .args(["--edition", "2024", "-O", "-C", "panic=abort", "-C", "strip=symbols"])
        .args(["-C", "target-feature=+crt-static", "-o"])
        .arg(directory.join("probe"))
        .arg("probe/main.rs")
        .status()?;
    if !status.success() {
        return Err(format!("the probe does not build: {status}").into());
    }
    Ok(())
}
