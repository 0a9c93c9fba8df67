//! How the sync is known to the API server: certificates and exec plugins, while they change, and who else can read them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use soci_testkit::kube_api::KubeApi;
use support::{Rig, count, eventually, healed, put, until};

const VERSION: &str = "client.authentication.k8s.io/v1";

/// Points a link somewhere else, as the kubelet does when it rotates its certificate.
fn point(link: &Path, to: &Path) {
    let new = link.with_extension("new");
    symlink(to, &new).unwrap();
    std::fs::rename(new, link).unwrap();
}

#[tokio::test]
async fn t102_a_certificate_that_is_swapped_by_its_link_connects_anew() {
    let api = KubeApi::start_with_certificates().await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let current = rig.dir.path().join("client-current.pem");
    // Certificate and key in one file, both named by the kubeconfig, as the kubelet keeps them.
    rig.login(&api, &json!({ "client-certificate": current, "client-key": current }));
    let mut rotate = {
        let mut turns = 0;
        let (api, rig, current) = (&api, &rig, &current);
        move || {
            let client = api.issue_client().unwrap();
            turns += 1;
            let name = format!("client-{turns}.pem");
            rig.write(&name, &format!("{}{}", client.certificate_pem, client.key_pem));
            api.accept_only(&client);
            point(current, &rig.dir.path().join(name));
        }
    };
    rotate();
    let keychain = rig.start(rig.settings());
    eventually(&keychain, "reg.example/a", &["x"]).await;
    for user in ["second", "third"] {
        rotate();
        api.cut_watches();
        put(&api, "a", "x", "reg.example", user);
        eventually(&keychain, "reg.example/a", &[user]).await;
        healed(&keychain).await;
    }
}

#[tokio::test]
async fn a_certificate_that_is_refused_is_named_until_it_is_replaced() {
    let api = KubeApi::start_with_certificates().await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let (known, other) = (api.issue_client().unwrap(), api.issue_client().unwrap());
    api.accept_only(&known);
    let rig = Rig::new();
    rig.write("client.pem", &other.certificate_pem);
    rig.write("client.key", &other.key_pem);
    let (certificate, key) = (rig.dir.path().join("client.pem"), rig.dir.path().join("client.key"));
    rig.login(&api, &json!({ "client-certificate": certificate, "client-key": key }));
    let keychain = rig.start(rig.settings());
    until("the refusal is told", || {
        keychain.progress().trouble.is_some_and(|trouble| trouble.contains("Unauthorized"))
    })
    .await;
    // Both files are replaced, one after the other: in between they do not fit together.
    rig.write("client.pem", &known.certificate_pem);
    rig.write("client.key", &known.key_pem);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    healed(&keychain).await;
}

/// Writes a plugin that prints the token `t` with what `expires` prints as its end, and returns how to count its runs.
fn plugin(rig: &Rig, api: &KubeApi, expires: &str) -> impl Fn() -> usize + use<> {
    let (script, runs): (PathBuf, PathBuf) = (rig.dir.path().join("plugin"), rig.dir.path().join("runs"));
    let text = format!(
        r#"#!/bin/sh
echo run >> {}
printf '{{"apiVersion":"{VERSION}","status":{{"token":"t","expirationTimestamp":"%s"}}}}' "$({expires})"
"#,
        runs.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    rig.login(api, &json!({ "exec": { "apiVersion": VERSION, "command": script } }));
    move || std::fs::read_to_string(&runs).unwrap_or_default().lines().count()
}

#[tokio::test]
async fn a_token_that_seems_to_have_ended_is_used_while_the_server_takes_it() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let runs = plugin(&rig, &api, "echo 2020-01-01T00:00:00Z");
    let keychain = rig.start(rig.settings());
    eventually(&keychain, "reg.example/a", &["x"]).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    put(&api, "a", "x", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
    assert_eq!((runs(), count(&api, "list")), (1, 1), "the plugin does not run in a loop");
}

#[tokio::test]
async fn a_plugin_runs_again_before_its_token_ends() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let runs = plugin(&rig, &api, "date -u -d '+12 seconds' +%Y-%m-%dT%H:%M:%SZ");
    let mut settings = rig.settings();
    settings.timing.renewal = Duration::from_millis(10);
    let keychain = rig.start(settings);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    until("it ran again", || runs() > 1).await;
    healed(&keychain).await;
}

#[tokio::test]
async fn a_kubeconfig_that_others_can_read_is_named_once() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    for at in 0..3 {
        // Replaced and as open as before: the connection is made anew.
        let lists = count(&api, "list");
        rig.login(&api, &json!({ "token": "t", "username": format!("{at}") }));
        until("it is connected anew", || count(&api, "list") > lists).await;
    }
    healed(&keychain).await;
    let said = log.text();
    assert_eq!(said.matches("others may read credentials").count(), 1, "{said}");
    assert!(said.contains(".kube/config has mode 0644"), "{said}");
}

#[tokio::test]
async fn the_login_of_a_proxy_or_a_server_is_not_told() {
    let api = KubeApi::start("t").await.unwrap();
    for (key, value) in [
        ("proxy-url", "ftp://proxy-user:hunter2@proxy.example:2121"),
        ("server", "https://server-user:hunter2@127.0.0.1:1"),
    ] {
        let (log, _guard) = soci_testkit::log::capture();
        let rig = Rig::new();
        let mut config: serde_json::Value =
            serde_json::from_str(&api.kubeconfig(&json!({ "token": "t" }))).unwrap();
        config["clusters"][0]["cluster"][key] = value.into();
        rig.write(".kube/config", &config.to_string());
        let keychain = rig.start(rig.settings());
        keychain.ready().await;
        let trouble = keychain.progress().trouble.unwrap();
        assert!(!trouble.contains("hunter2"), "{trouble}");
        assert_eq!((log.warnings("cannot be synced") > 0, log.warnings("hunter2")), (true, 0));
        let place = value.rsplit('@').next().unwrap();
        assert!(trouble.contains(place), "{trouble}");
    }
}
