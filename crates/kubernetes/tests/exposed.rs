//! What is logged of files that are open to others. A program of its own: a log line that a test without a log meets first,
//! in the same process, may stay off for all.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::json;
use soci_testkit::kube_api::KubeApi;
use support::{Rig, capture_log, count, healed, until};

#[tokio::test]
async fn a_kubeconfig_that_others_can_read_is_named_once() {
    let (log, _guard) = capture_log();
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
