//! Credentials in a Docker config file, as a node meets them: missing, wrong, rotated while a layer is mounted, and
//! never shown.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use base64::Engine as _;
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::image::Dialect;
use soci_testkit::{AuthMode, wait};

/// What a rotation changes the password to.
const NEXT: &str = "n9-Rotated-Qz41";

/// A denied read may wait this long for the credentials to change, and a little for a busy machine.
const DENIED: Duration = Duration::from_secs(15);

#[test]
fn without_credentials_containerd_takes_over_and_the_log_says_why() -> Result<()> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.credentials = false;
    let stage = Stage::start(options)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/private", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 0);
    assert_eq!(stage.probe(KUBELET, &published, "echo", &["echo", "started"])?, "started\n");
    let log = stage.snapshotter.log_text();
    let said = log.lines().find(|line| line.contains("401") && line.contains(&stage.registry.host()));
    assert!(said.is_some(), "no line names the host and the status:\n{}", stage.log_tail());
    Ok(())
}

#[test]
fn a_wrong_password_is_told_from_a_missing_one() -> Result<()> {
    let stage = Stage::start(StageOptions::new(AuthMode::Bearer)?)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/private", "1")?;
    stage.set_login(Some((USER, "not-the-password")))?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 0);
    assert_eq!(stage.probe(KUBELET, &published, "echo", &["echo", "started"])?, "started\n");
    let log = stage.snapshotter.log_text();
    assert!(
        log.contains("docker-config"),
        "the log does not name the option that had the credentials:\n{log}"
    );
    assert!(!log.contains("not-the-password"));
    Ok(())
}

fn rotated(auth: AuthMode) -> Result<()> {
    let mut options = StageOptions::new(auth)?;
    // A token outlives the password that it was got by; the shortest that works makes the rotation felt.
    options.registry.tokens.ttl = Duration::from_secs(1);
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/private", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;

    stage.registry.rotate_password(USER, NEXT);
    stage.registry.revoke_tokens();
    let start = Instant::now();
    if std::fs::read(mounted.path().join("random")).is_ok() {
        bail!("a file was read with credentials that the registry refuses");
    }
    let waited = start.elapsed();
    if waited > DENIED {
        bail!("a refused read took {} s", waited.as_secs());
    }

    stage.set_login(Some((USER, NEXT)))?;
    let healed = wait::until(Duration::from_secs(30), || std::fs::read(mounted.path().join("random")).ok());
    let Some(content) = healed else {
        bail!("the layer did not heal after the rotation; end of the log:\n{}", stage.log_tail());
    };
    assert_eq!(content.len(), 5 * 1024 * 1024 + 17);
    let log = stage.snapshotter.log_text();
    assert!(!log.contains(NEXT) && !log.contains(PASSWORD));
    Ok(())
}

#[test]
fn rotated_credentials_heal_a_mounted_layer_basic() -> Result<()> {
    rotated(AuthMode::Basic)
}

#[test]
fn rotated_credentials_heal_a_mounted_layer_bearer() -> Result<()> {
    rotated(AuthMode::Bearer)
}

#[test]
fn no_secret_is_logged_at_any_level() -> Result<()> {
    for auth in [AuthMode::Basic, AuthMode::Bearer] {
        let mut options = StageOptions::new(auth)?;
        options.log_level = "trace".to_owned();
        let stage = Stage::start(options)?;
        let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/private", "1")?;
        stage.pull_as_kubelet(&published)?;
        stage.probe(KUBELET, &published, "sum", &["sum", "/large"])?;
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
        let mut secrets = vec![PASSWORD.to_owned(), encoded];
        for seen in stage.registry.log() {
            let token = seen.header("authorization").and_then(|value| value.split_once(' '));
            secrets.extend(token.map(|(_, token)| token.to_owned()));
        }
        let log = stage.snapshotter.log_text();
        assert!(log.contains("trace") || log.contains("debug"), "the level was not applied");
        for secret in secrets {
            assert!(!log.contains(&secret), "a secret is in the log of {auth:?}");
        }
    }
    Ok(())
}
