//! How the sync is known to the API server: certificates and exec plugins, while they change, and who else can read them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use soci_testkit::kube_api::KubeApi;
use support::{Rig, count, eventually, healed, put, resumed, until};

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
    resumed(&api, 1).await;
    healed(&keychain).await;
    assert_eq!(count(&api, "list"), 1, "the watch goes on where it was");
}

#[tokio::test]
async fn a_token_that_is_replaced_costs_no_list() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    rig.write("token", "t");
    rig.login(&api, &json!({ "tokenFile": rig.dir.path().join("token") }));
    let keychain = rig.start(rig.settings());
    eventually(&keychain, "reg.example/a", &["x"]).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    put(&api, "a", "x", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
    for at in 1..4 {
        let (user, token) = (format!("u{at}"), format!("t{at}"));
        // Once in time, and once when the server has refused the one before.
        if at == 2 {
            api.set_token(&token);
            api.cut_watches();
            until("it is refused", || keychain.progress().trouble.is_some()).await;
        }
        put(&api, "a", "x", "reg.example", &user);
        api.set_token(&token);
        rig.write("token", &token);
        resumed(&api, at).await;
        eventually(&keychain, "reg.example/a", &[&user]).await;
    }
    assert_eq!(count(&api, "list"), 1, "the watch goes on where it was");
    // What the server has forgotten meanwhile is listed.
    api.set_token("last");
    put(&api, "a", "x", "reg.example", "last");
    api.forget_history();
    rig.write("token", "last");
    until("it is listed anew", || count(&api, "list") == 2).await;
    eventually(&keychain, "reg.example/a", &["last"]).await;
}

#[tokio::test]
async fn a_token_file_that_cannot_be_used_leaves_the_last_good_token_in_use() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    rig.write("token", "t");
    let token = rig.dir.path().join("token");
    rig.login(&api, &json!({ "tokenFile": token }));
    let keychain = rig.start(rig.settings());
    eventually(&keychain, "reg.example/a", &["x"]).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    for (user, words) in [("empty", "token is empty"), ("gone", "No such file")] {
        match user {
            "empty" => rig.write("token", "\n"),
            _ => std::fs::remove_file(&token).unwrap(),
        }
        until("it is named", || log.warnings(words) > 0).await;
        put(&api, "a", "x", "reg.example", user);
        eventually(&keychain, "reg.example/a", &[user]).await;
        assert_eq!((keychain.progress().trouble, keychain.behind()), (None, Duration::ZERO));
        assert_eq!(
            (count(&api, "watch"), log.warnings("look what writes it, or correct tokenFile")),
            match user {
                "empty" => (1, 1),
                _ => (1, 2),
            }
        );
    }
    rig.write("token", "t");
    resumed(&api, 1).await;
    put(&api, "a", "x", "reg.example", "back");
    eventually(&keychain, "reg.example/a", &["back"]).await;
}

#[tokio::test]
async fn a_plugin_that_fails_beside_a_connection_that_works_is_named_once() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    let runs = plugin(&rig, &api, "kill $$");
    until("it ran again and again", || runs() > 3).await;
    assert_eq!(log.warnings("run it by hand to see why"), 1, "{}", log.text());
    put(&api, "a", "x", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
}

#[tokio::test]
async fn a_kubeconfig_that_is_replaced_while_its_plugin_runs_is_noticed() {
    let (first, second) = (KubeApi::start("t").await.unwrap(), KubeApi::start("t").await.unwrap());
    put(&first, "a", "x", "reg.example", "first");
    put(&second, "a", "x", "reg.example", "second");
    let rig = Rig::new();
    rig.write("next", &second.kubeconfig(&json!({ "token": "t" })));
    let (next, used) = (rig.dir.path().join("next"), rig.dir.path().join(".kube/config"));
    let runs = plugin(&rig, &first, &format!("mv {} {}", next.display(), used.display()));
    // What the plugin prints as the end of its token is nothing.
    let script = std::fs::read_to_string(rig.dir.path().join("plugin")).unwrap();
    std::fs::write(rig.dir.path().join("plugin"), script.replace(r#","expirationTimestamp":"%s""#, ""))
        .unwrap();
    let keychain = rig.start(rig.settings());
    eventually(&keychain, "reg.example/a", &["second"]).await;
    assert_eq!((runs(), count(&first, "list")), (1, 1));
}

#[tokio::test]
async fn a_kubeconfig_that_comes_before_the_one_in_use_is_used_when_it_appears() {
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.environment.kubeconfig = ["listed-first", "listed"].map(|name| rig.dir.path().join(name)).into();
    let mut servers = Vec::new();
    let mut keychain = None;
    for place in ["kube/config", ".kube/config", "listed", "listed-first"] {
        let api = KubeApi::start("t").await.unwrap();
        put(&api, "a", "x", "reg.example", place);
        rig.write(place, &api.kubeconfig(&json!({ "token": "t" })));
        servers.push(api);
        let keychain = keychain.get_or_insert_with(|| rig.start(settings.clone()));
        eventually(keychain, "reg.example/a", &[place]).await;
    }
}

#[tokio::test]
async fn r48_that_two_kubeconfigs_are_there_is_told_once_and_names_both() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    let rig = Rig::new();
    rig.write("kube/config", &api.kubeconfig(&json!({ "token": "t" })));
    let _keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    for at in 1..4 {
        rig.login(&api, &json!({ "token": "t", "username": format!("{at}") }));
        resumed(&api, at).await;
    }
    let home = rig.dir.path().display();
    let line = format!("{home}/.kube/config is used and {home}/kube/config is not; set kubeconfig_path");
    assert_eq!(log.warnings(&line), 1, "{}", log.text());
}

#[tokio::test]
async fn a_kubeconfig_that_others_can_read_is_named_once() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    for at in 0..3 {
        // Replaced and as open as before: the connection is made anew.
        let watches = count(&api, "watch");
        rig.login(&api, &json!({ "token": "t", "username": format!("{at}") }));
        resumed(&api, watches).await;
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
