//! The doctor before a real containerd, daemon and registry: what it finds is what a pull would meet.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::Value;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, containerd2, images};
use soci_testkit::AuthMode;
use soci_testkit::image::Dialect;

/// What the doctor said: exit status and findings.
struct Said {
    status: Option<i32>,
    findings: Vec<Value>,
}

impl Said {
    /// Returns the texts of a check's findings of a level.
    fn texts(&self, check: &str, level: &str) -> Vec<&str> {
        let found = self.findings.iter().filter(|found| found["check"] == check && found["level"] == level);
        found.filter_map(|found| found["what"].as_str()).collect()
    }

    /// Returns what is to be changed by a finding whose text contains `part`.
    fn change(&self, part: &str) -> Option<(&str, &str)> {
        let found = self
            .findings
            .iter()
            .find(|found| found["what"].as_str().is_some_and(|what| what.contains(part)))?;
        Some((found["place"].as_str().unwrap_or_default(), found["change"].as_str()?))
    }
}

fn doctor(stage: &Stage, config: &Path, containerd: &Path, words: &[&str]) -> Result<Said> {
    let mut shell = stage.cli_env();
    shell.push(("DOCKER_CONFIG".to_owned(), stage.path().join("docker").into()));
    doctor_of(shell, stage, config, containerd, words)
}

/// The doctor, called from a shell with these variables.
fn doctor_of(
    shell: Vec<(String, OsString)>,
    stage: &Stage,
    config: &Path,
    containerd: &Path,
    words: &[&str],
) -> Result<Said> {
    let mut command = Command::new(stage.binaries.path("soci-snapshotter-grpc"));
    command.arg("--address").arg(stage.snapshotter.socket()).arg("--root").arg(stage.snapshotter.root());
    command
        .arg("--config")
        .arg(config)
        .args(["doctor", "--json", "--containerd-config"])
        .arg(containerd)
        .args(words);
    let output = command.envs(shell).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains(PASSWORD), "{text}");
    let report: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let findings = report["findings"].as_array().context("no findings")?.clone();
    for finding in &findings {
        let trouble = finding["level"] == "warning" || finding["level"] == "error";
        assert!(!trouble || finding["change"].is_string(), "it does not say what to change: {finding}");
    }
    Ok(Said { status: output.status.code(), findings })
}

#[test]
fn a_node_and_an_image_that_are_well_are_said_to_be_with_each_containerd() -> Result<()> {
    for programs in [None, Some(containerd2::programs()?)] {
        let mut options = StageOptions::new(AuthMode::Basic)?;
        if let Some(programs) = programs {
            options.containerd = programs;
        }
        options.config.push_str("[resolver]\nconfig_path = \"{stage}/certs.d\"\n");
        let stage = Stage::start(options)?;
        let (config, containerd) = (stage.path().join("s/config.toml"), stage.path().join("c/config.toml"));
        let image = images::odd(Dialect::Oci);
        let published = stage.publish_v2(&image, "team/app", "1")?;
        let said = doctor(&stage, &config, &containerd, &[&published.reference])?;
        let bad: Vec<_> = said
            .findings
            .iter()
            .filter(|found| found["level"] == "error" || found["level"] == "warning")
            .collect();
        assert!(bad.is_empty(), "{bad:#?}");
        assert_eq!(said.status, Some(0));
        assert_eq!(said.texts("daemon", "ok").len(), 1);
        let wiring = said.texts("containerd", "ok").join("\n");
        for part in ["it answers on", "plugin \"soci\" is this daemon", "which image a layer belongs to"] {
            assert!(wiring.contains(part), "{part}: {wiring}");
        }
        let login = said.texts("login", "ok").join("\n");
        for part in [stage.registry.host().as_str(), "docker-config", USER] {
            assert!(login.contains(part), "{part}: {login}");
        }
        assert_eq!(said.texts("ranges", "ok").len(), 1);
        let layers = said.texts("layer", "ok");
        let of = |at: usize| {
            layers.iter().find(|text| text.contains(&image.layers[at].digest)).copied().unwrap_or_default()
        };
        assert!(
            of(0).contains("lazy") && of(1).contains("lazy") && of(2).contains("leaves it out"),
            "{layers:?}"
        );
    }
    Ok(())
}

#[test]
fn an_image_is_looked_at_in_the_environment_of_the_daemon() -> Result<()> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config.push_str("[resolver]\nconfig_path = \"{stage}/certs.d\"\n");
    let mut stage = Stage::start(options)?;
    let (config, containerd) = (stage.path().join("s/config.toml"), stage.path().join("c/config.toml"));
    let published = stage.publish_v2(&images::single(63), "team/app", "1")?;
    // The shell knows neither the login nor whom the registry's certificate is of.
    let shell = vec![("DOCKER_CONFIG".to_owned(), stage.path().join("nowhere").into())];
    let said = doctor_of(shell.clone(), &stage, &config, &containerd, &[&published.reference])?;
    let pid = stage.snapshotter.daemon().id();
    assert_eq!(said.texts("environment", "ok"), [format!("the running daemon's (process {pid})")]);
    assert_eq!((said.texts("image", "ok").len(), said.texts("image", "error").len()), (1, 0));
    let login = said.texts("login", "ok").join("\n");
    assert!(login.contains("docker-config") && login.contains(USER), "{login}");
    stage.snapshotter.daemon().stop();
    let said = doctor_of(shell, &stage, &config, &containerd, &[])?;
    let environment = said.texts("environment", "note").join("\n");
    assert!(environment.starts_with("this shell's: no daemon runs"), "{:?}", said.findings);
    Ok(())
}

#[test]
fn each_thing_that_keeps_an_image_from_being_lazy_is_named_with_its_remedy() -> Result<()> {
    let stage = Stage::start(StageOptions::new(AuthMode::Basic)?)?;
    let (config, containerd) = (stage.path().join("s/config.toml"), stage.path().join("c/config.toml"));
    // The stage's containerd reads hosts from a directory of its own.
    let said = doctor(&stage, &config, &containerd, &[])?;
    assert_eq!(said.status, Some(1));
    let (place, change) = said.change("registry hosts").context("no finding about hosts")?;
    assert!(
        place.starts_with(&format!("{}:", containerd.display())) && change.contains("certs.d"),
        "{place}: {change}"
    );

    // containerd keeps the labels to itself.
    let text = std::fs::read_to_string(&containerd)?;
    let mute = stage.path().join("mute.toml");
    std::fs::write(
        &mute,
        text.replace("disable_snapshot_annotations = false", "disable_snapshot_annotations = true"),
    )?;
    let said = doctor(&stage, &config, &mute, &[])?;
    assert_eq!(said.status, Some(2));
    let (_, change) = said.change("so no layer is lazy").context("no finding about annotations")?;
    assert!(change.ends_with("disable_snapshot_annotations = false"), "{change}");

    // An index that the configuration does not look for, and none at all.
    let published = stage.publish_v1(&images::single(61), "team/v1", "1")?;
    let v2_only = stage.path().join("v2.toml");
    std::fs::write(&v2_only, "")?;
    let said = doctor(&stage, &v2_only, &containerd, &[&published.reference])?;
    let (_, change) = said.change("which is not looked for").context("no finding about the index")?;
    assert_eq!(change, "[pull_modes.soci_v1]\nenable = true");
    let said = doctor(&stage, &config, &containerd, &[&published.reference])?;
    assert!(
        said.texts("index", "ok").iter().any(|text| text.starts_with("v1 sha256:")),
        "{:?}",
        said.findings
    );
    let plain = stage.publish(&images::single(62), "team/plain", "1");
    let said = doctor(&stage, &config, &containerd, &[&plain.reference])?;
    let (_, change) = said.change("no SOCI index found").context("no finding about the index")?;
    assert!(change.contains("soci convert"), "{change}");

    // A login that the registry refuses, and no daemon.
    stage.set_login(Some((USER, "hunter2-not-it")))?;
    let said = doctor(&stage, &config, &containerd, &[&published.reference])?;
    assert_eq!(said.status, Some(2));
    let refused = said.texts("image", "error").join("\n");
    assert!(refused.contains(&stage.registry.host()) && refused.contains("401"), "{refused}");
    assert!(!refused.contains("hunter2"), "{refused}");
    let (_, change) = said.change("401").context("no remedy for the login")?;
    assert!(change.contains("soci auth explain --check"), "{change}");
    let mut stage = stage;
    stage.snapshotter.daemon().stop();
    let said = doctor(&stage, &config, &containerd, &[])?;
    assert_eq!((said.status, said.texts("daemon", "error").len()), (Some(2), 1), "{:?}", said.findings);
    Ok(())
}
