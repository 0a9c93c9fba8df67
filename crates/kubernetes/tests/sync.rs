//! The keychain against an API server that misbehaves as real ones do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use serde_json::json;
use soci_auth::keychain::{Keychain, Outcome, Rejected};
use soci_auth::{Credential, CredentialScope, Origin, Scheme};
use soci_oci::ImageRef;
use soci_testkit::kube_api::KubeApi;
use support::{Rig, TYPE, auths, count, eventually, put, resumed, until, users};

#[tokio::test]
async fn t89_t90_t91_secrets_of_the_type_are_used_and_followed() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "ns1", "pull", "reg.example", "first");
    api.put("ns1", "opaque", "Opaque", &[(".dockerconfigjson", &auths("opaque.example", "x"))]);
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    assert_eq!(users(&keychain, "reg.example/any:1").await, ["first"]);
    assert!(users(&keychain, "opaque.example/a").await.is_empty());
    assert!(api.log().iter().all(|logged| logged.selector == "type=kubernetes.io/dockerconfigjson"));
    let before = rig.board.generation("reg.example");
    put(&api, "ns1", "pull", "reg.example", "second");
    eventually(&keychain, "reg.example/any:1", &["second"]).await;
    assert!(rig.board.generation("reg.example") > before, "readers that wait are woken");
    let before = rig.board.generation("reg.example");
    api.delete("ns1", "pull");
    eventually(&keychain, "reg.example/any:1", &[]).await;
    assert!(rig.board.generation("reg.example") > before, "they are woken to look for another option");
}

#[tokio::test]
async fn t93_a_malformed_secret_costs_itself_only() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "good", "reg.example", "good");
    put(&api, "b", "turns-bad", "other.example", "soon-gone");
    api.put("c", "bad", TYPE, &[(".dockerconfigjson", "{")]);
    api.put("c", "without", TYPE, &[]);
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    assert_eq!(users(&keychain, "reg.example/a").await, ["good"]);
    assert_eq!(users(&keychain, "other.example/a").await, ["soon-gone"]);
    api.put("b", "turns-bad", TYPE, &[(".dockerconfigjson", "[]")]);
    eventually(&keychain, "other.example/a", &[]).await;
}

#[tokio::test]
async fn t93_a_faulty_secret_is_told_once_for_each_version_not_for_each_list() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    api.put("c", "bad", TYPE, &[(".dockerconfigjson", "{")]);
    let many: serde_json::Map<_, _> =
        (0..5000).map(|at| (format!("r{at}.example"), json!({ "username": "u", "password": "p" }))).collect();
    let many = json!({ "auths": many }).to_string();
    api.put("c", "many", TYPE, &[(".dockerconfigjson", &many)]);
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    for lists in 1..4 {
        // Each watch is opened after a list.
        resumed(&api, lists - 1).await;
        assert_eq!(count(&api, "list"), lists);
        api.forget_history();
        api.cut_watches();
    }
    resumed(&api, 3).await;
    let told = |name: &str| log.warnings(&format!("name={name} "));
    assert_eq!((told("bad"), told("many")), (1, 1), "{}", log.text());
    assert_eq!(log.warnings("904 entries more than the 4096"), 1);
    api.put("c", "bad", TYPE, &[(".dockerconfigjson", "[")]);
    until("its next version is told", || told("bad") == 2).await;
    assert_eq!(keychain.len(), 1);
}

#[tokio::test]
async fn t94_every_secret_has_its_turn_and_none_empties_the_option() {
    let api = KubeApi::start("t").await.unwrap();
    for at in 0..25 {
        put(&api, "team", &format!("s{at:02}"), "reg.example", &format!("u{at:02}"));
    }
    // The same login in other payloads takes no place from others.
    for at in 0..25 {
        let auths = json!({ "auths": {
            "reg.example": { "username": "copy", "password": "p" },
            format!("r{at}.example"): { "username": "u", "password": "p" },
        } });
        api.put("a", &format!("copy{at:02}"), TYPE, &[(".dockerconfigjson", &auths.to_string())]);
    }
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    let image: ImageRef = "reg.example/app:1".parse().unwrap();
    let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
    let look = async || keychain.lookup(&scope, &Rejected::default()).await.unwrap();
    let mut refused = Vec::new();
    while refused.len() < 26 {
        let lookup = look().await;
        assert!(
            lookup.findings[0].0.starts_with("50 secrets synced, 50 of their keys match"),
            "{:?}",
            lookup.findings
        );
        let next = lookup.candidates[0].id.clone();
        assert!(!refused.contains(&next), "{next:?} has its turn before {refused:?} have it again");
        rig.board.refuse("reg.example", "app", next.fingerprint);
        refused.push(next);
    }
    let lookup = look().await;
    assert!(!lookup.candidates.is_empty(), "that all are refused does not make it empty");

    let last = refused.pop().unwrap();
    keychain.verdict(&scope, &last, Outcome::Accepted);
    rig.board.accept("reg.example", "app", last.fingerprint);
    assert_eq!(look().await.candidates[0].id, last, "the one accepted last comes first");
}

#[tokio::test]
async fn r49_the_secret_accepted_last_comes_first_with_its_next_password_too() {
    let api = KubeApi::start("t").await.unwrap();
    for at in (0..7).rev() {
        put(&api, &format!("ns{at}"), "pull", "reg.example", &format!("u{at}"));
    }
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    let image: ImageRef = "reg.example/a:1".parse().unwrap();
    let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
    let lookup = keychain.lookup(&scope, &Rejected::default()).await.unwrap();
    let strangers: Vec<_> = lookup.candidates.iter().map(|candidate| candidate.id.clone()).collect();
    assert_eq!(
        strangers.iter().map(|id| id.entry.as_str()).collect::<Vec<_>>(),
        ["secret ns0/pull", "secret ns1/pull", "secret ns2/pull", "secret ns3/pull", "secret ns4/pull"]
    );
    for stranger in &strangers {
        rig.board.refuse("reg.example", "a", stranger.fingerprint);
        keychain.verdict(&scope, stranger, Outcome::Rejected);
    }
    // News end the rest of the refused, not the memory that they were.
    rig.board.bump("reg.example");
    assert_eq!(users(&keychain, "reg.example/a:1").await[..2], ["u5", "u6"]);
    let lookup = keychain.lookup(&scope, &Rejected::default()).await.unwrap();
    let own = lookup.candidates[1].id.clone();
    keychain.verdict(&scope, &own, Outcome::Accepted);
    assert_eq!(users(&keychain, "reg.example/a:1").await[..2], ["u6", "u5"]);

    rig.board.refuse("reg.example", "a", own.fingerprint);
    keychain.verdict(&scope, &own, Outcome::Rejected);
    assert_eq!(
        users(&keychain, "reg.example/a:1").await[0],
        "u5",
        "what was refused is not the first to try"
    );
    put(&api, "ns6", "pull", "reg.example", "rotated");
    eventually(&keychain, "reg.example/a:1", &["rotated", "u5", "u0", "u1", "u2", "u3", "u4"]).await;
}

#[tokio::test]
async fn t98_after_410_what_was_deleted_meanwhile_is_gone() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "kept", "reg.example", "kept");
    put(&api, "a", "gone", "gone.example", "gone");
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    api.delete("a", "gone");
    api.forget_history();
    api.cut_watches();
    eventually(&keychain, "gone.example/a", &[]).await;
    assert_eq!(users(&keychain, "reg.example/a").await, ["kept"]);
}

#[tokio::test]
async fn t99_a_closed_watch_resumes_from_the_bookmark_without_a_list() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") == 1).await;
    let lists = count(&api, "list");
    let heard = keychain.progress().last_success;
    let bookmark = api.bookmark();
    until("the bookmark has come", || keychain.progress().last_success > heard).await;
    api.cut_watches();
    resumed(&api, 1).await;
    let watches: Vec<_> = api.log().into_iter().filter(|logged| logged.verb == "watch").collect();
    assert!(watches.iter().all(|logged| logged.bookmarks), "bookmarks are asked for");
    assert_eq!(watches[1].version, Some(bookmark.to_string()));
    assert_eq!(count(&api, "list"), lists, "nothing was listed again");
    put(&api, "a", "y", "y.example", "y");
    eventually(&keychain, "y.example/a", &["y"]).await;
}

#[tokio::test]
async fn t100_denied_permission_is_one_clear_message_and_heals() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    api.set_denied(true);
    let rig = Rig::new();
    rig.write(".kube/config", &api.kubeconfig(&json!({ "token": "t" })));
    let keychain = rig.start(rig.settings());
    keychain.ready().await;
    let trouble = keychain.progress().trouble.unwrap();
    assert!(
        trouble.contains("ClusterRole") && trouble.contains("list") && trouble.contains("watch"),
        "{trouble}"
    );
    assert!(users(&keychain, "reg.example/a").await.is_empty());
    let denials = || api.log().iter().filter(|logged| logged.status == 403).count();
    until("it is denied again and again", || denials() >= 4).await;
    assert_eq!(log.warnings("cannot be synced"), 1, "{}", log.text());
    api.set_denied(false);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    assert_eq!(keychain.progress().trouble, None);
}

#[tokio::test]
async fn revoked_permission_keeps_the_last_values_for_a_while_only() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    rig.write(".kube/config", &api.kubeconfig(&json!({ "token": "t" })));
    let mut settings = rig.settings();
    settings.timing.revoked = Duration::from_millis(400);
    let keychain = rig.start(settings);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    api.set_denied(true);
    api.cut_watches();
    until("the denial is noticed", || keychain.progress().trouble.is_some()).await;
    assert_eq!(keychain.len(), 1, "the last values stay in use");
    until("they are dropped", || keychain.is_empty()).await;
}

#[tokio::test]
async fn t101_a_kubeconfig_may_appear_late_and_at_every_documented_place() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let text = api.kubeconfig(&json!({ "token": "t" }));
    for place in ["kube/config", ".kube/config", "listed", "explicit"] {
        let rig = Rig::new();
        let mut settings = rig.settings();
        match place {
            "listed" => {
                settings.environment.kubeconfig =
                    vec![rig.dir.path().join("missing"), rig.dir.path().join("listed")];
            }
            "explicit" => settings.kubeconfig = Some(rig.dir.path().join("explicit")),
            _ => {}
        }
        let keychain = rig.start(settings);
        keychain.ready().await;
        assert!(keychain.progress().failed && keychain.is_empty(), "{place}: nobody waits for a file");
        rig.write(place, &text);
        eventually(&keychain, "reg.example/a", &["x"]).await;
    }
}

#[tokio::test]
async fn t102_a_rotated_token_file_and_a_refused_exec_token_connect_anew() {
    let api = KubeApi::start("first").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    rig.write("token", "first\n");
    let token = rig.dir.path().join("token");
    rig.write(".kube/config", &api.kubeconfig(&json!({ "tokenFile": token })));
    let keychain = rig.start(rig.settings());
    eventually(&keychain, "reg.example/a", &["x"]).await;
    api.set_token("second");
    rig.write("token", "second\n");
    api.cut_watches();
    put(&api, "a", "x", "reg.example", "after-rotation");
    eventually(&keychain, "reg.example/a", &["after-rotation"]).await;

    let script = rig.dir.path().join("plugin");
    let text = format!(
        "#!/bin/sh\necho '{{\"apiVersion\":\"client.authentication.k8s.io/v1\",\"status\":{{\"token\":\"'$(cat {})'\"}}}}'\n",
        token.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let exec = json!({ "exec": { "apiVersion": "client.authentication.k8s.io/v1", "command": script } });
    rig.write(".kube/config", &api.kubeconfig(&exec));
    put(&api, "a", "x", "reg.example", "by-exec");
    eventually(&keychain, "reg.example/a", &["by-exec"]).await;
    api.set_token("third");
    rig.write("token", "third");
    api.cut_watches();
    put(&api, "a", "x", "reg.example", "by-exec-again");
    eventually(&keychain, "reg.example/a", &["by-exec-again"]).await;
}

#[tokio::test]
async fn t103_a_server_that_comes_late_or_back_is_found() {
    let api = KubeApi::start("t").await.unwrap();
    let address = api.address();
    let kubeconfig = api.kubeconfig(&json!({ "token": "t" }));
    api.shutdown().await;
    let rig = Rig::new();
    rig.write(".kube/config", &kubeconfig);
    let keychain = rig.start(rig.settings());
    keychain.ready().await;
    assert!(keychain.progress().failed);
    let lookup = users(&keychain, "reg.example/a").await;
    assert!(lookup.is_empty(), "an absent server only makes the option empty");
    let api = KubeApi::start_at(address, "t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    rig.write(".kube/config", &api.kubeconfig(&json!({ "token": "t" })));
    eventually(&keychain, "reg.example/a", &["x"]).await;
}

#[tokio::test]
async fn a_server_that_was_away_and_is_another_version_is_listed_anew() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "kept", "reg.example", "before");
    put(&api, "a", "gone", "gone.example", "gone");
    for _ in 0..20 {
        api.bookmark();
    }
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    let address = api.address();
    assert_eq!(keychain.behind(), Duration::ZERO);
    api.shutdown().await;
    until("the loss is noticed", || keychain.progress().trouble.is_some()).await;
    assert_eq!(users(&keychain, "reg.example/a").await, ["before"], "the last values stay in use");
    until("what is known grows old", || keychain.behind() > Duration::ZERO).await;
    // A restored or upgraded cluster: other versions (lower ones), another authority, other content.
    let api = KubeApi::start_at(address, "t").await.unwrap();
    put(&api, "a", "kept", "reg.example", "after");
    rig.write(".kube/config", &api.kubeconfig(&json!({ "token": "t" })));
    eventually(&keychain, "reg.example/a", &["after"]).await;
    eventually(&keychain, "gone.example/a", &[]).await;
    put(&api, "a", "kept", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
    assert_eq!((keychain.progress().trouble, keychain.behind()), (None, Duration::ZERO));
}

#[tokio::test]
async fn a_kubeconfig_that_turns_to_garbage_is_named_and_costs_no_update() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    let named = || log.warnings(".kube/config");
    let good = api.kubeconfig(&json!({ "token": "t" }));
    for garbage in ["{", "", "\u{feff}\0\0", "apiVersion: v1\nkind: Config\n", &good[..good.len() / 2]] {
        let (before, watches) = (named(), count(&api, "watch"));
        rig.write(".kube/config", garbage);
        until("the garbage is named", || named() > before).await;
        assert_eq!(users(&keychain, "reg.example/a").await, ["x"], "the last values stay in use");
        put(&api, "a", "y", "y.example", garbage);
        eventually(&keychain, "y.example/a", &[garbage]).await;
        assert_eq!((keychain.progress().trouble, count(&api, "watch")), (None, watches));
        rig.write(".kube/config", &good);
        resumed(&api, watches).await;
    }
    assert_eq!(count(&api, "list"), 1, "nothing was listed again");
}

#[tokio::test]
async fn errors_of_the_server_are_waited_out() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    for status in [500, 503, 429, 401] {
        api.fail_next(status, (status == 429).then_some(0));
    }
    let rig = Rig::new();
    rig.write(".kube/config", &api.kubeconfig(&json!({ "token": "t" })));
    let keychain = rig.start(rig.settings());
    eventually(&keychain, "reg.example/a", &["x"]).await;
}

#[tokio::test]
async fn namespaces_and_the_legacy_type_are_selected() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "mine", "x", "reg.example", "mine");
    put(&api, "other", "x", "other.example", "other");
    let legacy = json!({ "legacy.example": { "username": "old", "password": "p" } }).to_string();
    api.put("mine", "old", "kubernetes.io/dockercfg", &[(".dockercfg", &legacy)]);
    let rig = Rig::new();
    rig.write(".kube/config", &api.kubeconfig(&json!({ "token": "t" })));
    let mut settings = rig.settings();
    settings.namespaces = vec!["mine".into()];
    settings.legacy_dockercfg = true;
    let keychain = rig.start(settings);
    eventually(&keychain, "legacy.example/a", &["old"]).await;
    eventually(&keychain, "reg.example/a", &["mine"]).await;
    assert!(users(&keychain, "other.example/a").await.is_empty());
    assert!(api.log().iter().all(|logged| logged.namespace == "mine"));
}

#[tokio::test]
async fn ten_thousand_secrets_in_a_thousand_namespaces() {
    let api = KubeApi::start("t").await.unwrap();
    for at in 0..10_000 {
        let (namespace, name) = (format!("ns{:04}", at % 1000), format!("pull{}", at / 1000));
        put(&api, &namespace, &name, "reg.example", &format!("{namespace}-{name}"));
    }
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    assert_eq!(keychain.len(), 10_000);
    let image: ImageRef = "reg.example/team/app:1".parse().unwrap();
    for at in (0..1000).step_by(37) {
        let namespace = format!("ns{at:04}");
        let mut scope =
            CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image.clone());
        scope.namespace = Some(namespace.clone());
        let lookup = keychain.lookup(&scope, &Rejected::default()).await.unwrap();
        let Credential::Basic { username, .. } = &lookup.candidates[0].credential else { panic!("a pair") };
        assert!(username.starts_with(&namespace), "{username} for {namespace}");
    }
}
