//! Credentials in a Docker config file, as a node meets them: missing, wrong, rotated while a layer is mounted, and
//! never shown.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use base64::Engine as _;
use serde_json::{Value, json};
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::image::Dialect;
use soci_testkit::{AuthMode, wait};

/// What a rotation changes the password to.
const NEXT: &str = "n9-Rotated-Qz41";

/// A refused read ends within five seconds, whatever the kernel asks on its behalf; and a little for a busy machine.
const DENIED: Duration = Duration::from_secs(8);

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

#[test]
fn explain_says_what_is_used_and_what_the_registry_answers() -> Result<()> {
    let stage = Stage::start(StageOptions::new(AuthMode::Basic)?)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/private", "1")?;
    let image = published.reference.as_str();
    let own = stage.soci("default", &["auth", "explain", "--check", "--json", image])?;
    let own: Value = serde_json::from_str(&own)?;
    let host = &own["hosts"][0];
    assert_eq!((&host["uses"], &own["check"]["served"]), (&json!("docker-config"), &json!(true)), "{own:#}");
    assert_eq!(host["options"][0]["standing"], "off", "no --user is given");
    assert_eq!(host["options"][1]["candidates"][0]["accepted"]["status"], 200);

    let refused = ["auth", "explain", "--check", "--user", &format!("{USER}:wr0ng-Pw-Kx"), image];
    let refused = stage.soci_command("default", &refused).output()?;
    let (said, errors) = (String::from_utf8_lossy(&refused.stdout), String::from_utf8_lossy(&refused.stderr));
    assert!(!refused.status.success(), "an image that is not served is a failure");
    for part in [
        "1. --user",
        "refused with status 401",
        "check: not served",
        "rests for",
        "2. docker-config        not used: --user is given",
    ] {
        assert!(said.contains(part), "{part} in\n{said}");
    }
    assert!(!said.contains("wr0ng") && !errors.contains("wr0ng"));

    // The daemon has a login of its own, and keeps what the registry said of it.
    stage.set_login(Some((USER, "wr0ng-Pw-Kx")))?;
    let control = stage.snapshotter.socket().with_file_name("control.sock");
    let control = control.to_str().unwrap_or_default();
    let asked = ["auth", "explain", "--daemon", "--control", control, "--check", image];
    let asked = stage.soci_command("default", &asked).output()?;
    assert!(!asked.status.success());
    let after = stage.explain(image)?;
    let candidate = &after["hosts"][0]["options"][0]["candidates"][0];
    assert_eq!(candidate["rejected"]["status"], 401, "{after:#}");
    assert!(!after.to_string().contains("wr0ng"));
    stage.set_login(Some((USER, PASSWORD)))?;
    let asked = ["auth", "explain", "--daemon", "--control", control, "--check", image];
    assert!(stage.soci("default", &asked)?.contains("check: served: application/vnd.oci.image"));

    let nobody = ["auth", "explain", "--daemon", "--control", "/nonexistent/control.sock", image];
    let nobody = stage.soci_command("default", &nobody).output()?;
    let errors = String::from_utf8_lossy(&nobody.stderr);
    assert!(errors.contains("nobody listens there: start soci-snapshotter-grpc"), "{errors}");
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
        bail!("a refused read took {waited:?}");
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
