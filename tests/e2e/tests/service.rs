//! The daemon as a service: how it starts, what it refuses, what it leaves on disk.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use soci_e2e::binaries::Binaries;
use soci_e2e::stage::StageDir;
use soci_e2e::{Stage, StageOptions};
use soci_testkit::snapshotter::{Options, Snapshotter};
use soci_testkit::{AuthMode, wait};

fn with_config(config: &str) -> Result<(StageDir, Snapshotter)> {
    let directory = StageDir::new()?;
    let options = Options {
        program: Binaries::ours()?.path("soci-snapshotter-grpc"),
        config: config.to_owned(),
        env: Vec::new(),
        log_level: "info".to_owned(),
    };
    let snapshotter = Snapshotter::start(&directory.path().join("s"), options)?;
    Ok((directory, snapshotter))
}

#[test]
fn it_starts_with_an_empty_config_and_says_so() -> Result<()> {
    let (_directory, snapshotter) = with_config("")?;
    let said = wait::until(Duration::from_secs(10), || {
        snapshotter.log_text().contains("successfully").then_some(())
    });
    assert!(said.is_some(), "{}", snapshotter.log_text());
    for line in snapshotter.log_text().lines() {
        let line: serde_json::Value =
            serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
        assert!(line["level"].is_string() && line["msg"].is_string() && line["time"].is_string(), "{line}");
    }
    Ok(())
}

#[test]
fn it_starts_with_the_defaults_it_prints() -> Result<()> {
    let program = Binaries::ours()?.path("soci-snapshotter-grpc");
    let printed = soci_testkit::process::output(Command::new(program).args(["config", "default"]))?;
    with_config(&printed)?;
    Ok(())
}

#[test]
fn a_bad_config_is_refused_with_file_and_key() -> Result<()> {
    let program = Binaries::ours()?.path("soci-snapshotter-grpc");
    let directory = StageDir::new()?;
    for (text, named) in [
        ("[background_fetch]\ndrop_policy = \"sideways\"\n", "drop_policy"),
        ("metrics_address = [\n", "config.toml"),
    ] {
        let config = directory.path().join("config.toml");
        std::fs::write(&config, text)?;
        let output = Command::new(&program)
            .arg("--config")
            .arg(&config)
            .arg("--root")
            .arg(directory.path().join("root"))
            .arg("--address")
            .arg(directory.path().join("s.sock"))
            .stdin(Stdio::null())
            .output()?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains(named), "{told}");
        assert!(told.contains("fatal"), "{told}");
    }
    Ok(())
}

#[test]
fn a_config_that_is_named_must_exist() -> Result<()> {
    let program = Binaries::ours()?.path("soci-snapshotter-grpc");
    let directory = StageDir::new()?;
    let output = Command::new(&program)
        .arg("--config")
        .arg(directory.path().join("nowhere.toml"))
        .arg("--root")
        .arg(directory.path().join("root"))
        .arg("--address")
        .arg(directory.path().join("s.sock"))
        .stdin(Stdio::null())
        .output()?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("nowhere.toml"), "{told}");
    Ok(())
}

#[test]
fn state_and_socket_are_for_the_owner_alone() -> Result<()> {
    let stage = Stage::start(StageOptions::new(AuthMode::None)?)?;
    let mode =
        |path: &std::path::Path| -> Result<u32> { Ok(path.symlink_metadata()?.permissions().mode() & 0o777) };
    assert_eq!(mode(&stage.snapshotter.socket())?, 0o600);
    assert_eq!(mode(&stage.snapshotter.root())?, 0o700);
    assert_eq!(mode(&stage.snapshotter.root().join("snapshotter/snapshots"))? & 0o077, 0);
    Ok(())
}
