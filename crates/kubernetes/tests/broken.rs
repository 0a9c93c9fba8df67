//! The sync against an API server that denies, hangs, breaks off and forgets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use soci_kubernetes::{Settings, Timing};
use soci_testkit::kube_api::{Hang, KubeApi, WatchBreak};
use support::{LONG, Rig, TYPE, auths, count, eventually, healed, put, resumed, told, until, users};

const DENIED: &str = "not permitted to list and watch secrets";

#[tokio::test]
async fn t100_what_was_dropped_with_the_permission_comes_back_with_it() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.revoked = Duration::from_millis(300);
    let keychain = rig.synced_with(&api, settings).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    api.set_denied(true);
    api.cut_watches();
    until("the secrets are dropped", || keychain.is_empty()).await;
    told(&keychain, DENIED).await;
    api.set_denied(false);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    healed(&keychain).await;
}

#[tokio::test]
async fn a_namespace_that_is_closed_takes_its_own_secrets_only() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "open", "x", "open.example", "x");
    put(&api, "closed", "y", "closed.example", "y");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.namespaces = vec!["open".into(), "closed".into()];
    settings.timing.revoked = Duration::from_millis(300);
    let keychain = rig.synced_with(&api, settings).await;
    until("both watches are open", || count(&api, "watch") == 2).await;
    api.set_denied_in("closed", true);
    api.cut_watches();
    eventually(&keychain, "closed.example/a", &[]).await;
    assert_eq!(users(&keychain, "open.example/a").await, ["x"]);
    put(&api, "open", "x", "open.example", "followed");
    eventually(&keychain, "open.example/a", &["followed"]).await;
    told(&keychain, "in closed").await;
    api.set_denied_in("closed", false);
    eventually(&keychain, "closed.example/a", &["y"]).await;
    healed(&keychain).await;
}

#[tokio::test]
async fn a_denial_that_is_over_does_not_count_when_the_next_one_comes() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.revoked = Duration::from_secs(3);
    let revoked = settings.timing.revoked;
    let keychain = rig.synced_with(&api, settings).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    let begun = Instant::now();
    let denials = || api.log().iter().filter(|logged| logged.status == 403).count();
    let deny = async || {
        let (watches, before) = (count(&api, "watch"), denials());
        api.set_denied(true);
        api.cut_watches();
        // When it asks for the second time, it has dealt with the first answer.
        until("it is denied twice", || denials() >= before + 2).await;
        assert_eq!(keychain.len(), 1, "it was denied a moment ago");
        api.set_denied(false);
        resumed(&api, watches).await;
    };
    deny().await;
    until("the first denial is long ago", || begun.elapsed() > revoked).await;
    deny().await;
    healed(&keychain).await;
    assert_eq!(users(&keychain, "reg.example/a").await, ["x"]);
}

#[tokio::test]
async fn what_is_wrong_in_one_namespace_is_not_hidden_by_another() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "open", "x", "open.example", "x");
    api.set_denied_in("closed", true);
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.namespaces = vec!["open".into(), "closed".into()];
    rig.login(&api, &json!({ "token": "t" }));
    let keychain = rig.start(settings);
    told(&keychain, "in closed").await;
    eventually(&keychain, "open.example/a", &["x"]).await;
    for at in 0..3 {
        // Listed anew and watched on, in the one that is open.
        let watches = count(&api, "watch");
        api.break_watches(WatchBreak::Error(410));
        resumed(&api, watches).await;
        let user = format!("x{at}");
        put(&api, "open", "x", "open.example", &user);
        eventually(&keychain, "open.example/a", &[&user]).await;
        let progress = keychain.progress();
        assert!(!progress.complete, "the closed one was never listed");
        assert!(progress.trouble.is_some_and(|trouble| trouble.contains("in closed")));
    }
    api.set_denied_in("closed", false);
    healed(&keychain).await;
    assert!(keychain.progress().complete);
}

#[tokio::test]
async fn a_watch_that_goes_on_without_a_change_ends_the_trouble() {
    let mut api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") == 1).await;
    let lists = count(&api, "list");
    for how in [WatchBreak::Reset, WatchBreak::Error(500), WatchBreak::Close, WatchBreak::Cut] {
        let watches = count(&api, "watch");
        api.break_watches(how);
        resumed(&api, watches).await;
        healed(&keychain).await;
    }
    let watches = count(&api, "watch");
    api.close().await;
    until("the loss is noticed", || keychain.progress().trouble.is_some()).await;
    until("what is known grows old", || keychain.behind() > Duration::ZERO).await;
    api.reopen().await.unwrap();
    resumed(&api, watches).await;
    healed(&keychain).await;
    assert_eq!(count(&api, "list"), lists, "nothing was listed again");
    put(&api, "a", "x", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
}

#[tokio::test]
async fn a_server_that_is_away_for_an_hour_is_asked_now_and_then_and_found_when_it_is_back() {
    let (log, _guard) = soci_testkit::log::capture();
    let mut api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let settings = Settings { timing: Timing::default(), ..rig.settings() };
    let longest = settings.timing.back_off.1;
    let keychain = rig.synced_with(&api, settings).await;
    until("the watch is open", || count(&api, "watch") == 1).await;
    let attempt = format!("connecting to {}", api.address());
    let attempts = || log.text().matches(&attempt).count();
    let before = attempts();
    assert!(before > 0, "attempts can be counted");
    api.close().await;
    until("the loss is noticed", || keychain.progress().trouble.is_some()).await;

    // Nobody is there to answer, so nothing is waited for but the time, which passes by itself.
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let asked = attempts() - before;
    assert!((100..=300).contains(&asked), "{asked} times in an hour");
    assert_eq!(log.warnings("cannot be synced"), 1);
    assert_eq!(users(&keychain, "reg.example/a").await, ["x"], "the last values stay in use");
    api.reopen().await.unwrap();
    tokio::time::advance(longest).await;
    tokio::time::resume();

    resumed(&api, 1).await;
    healed(&keychain).await;
    put(&api, "a", "x", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
    assert_eq!(count(&api, "list"), 1, "nothing was listed again");
}

#[tokio::test]
async fn t98_a_410_within_a_watch_lists_anew() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "kept", "reg.example", "kept");
    put(&api, "a", "gone", "gone.example", "gone");
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    let lists = count(&api, "list");
    api.break_watches(WatchBreak::Error(410));
    api.delete("a", "gone");
    api.forget_history();
    eventually(&keychain, "gone.example/a", &[]).await;
    assert_eq!(users(&keychain, "reg.example/a").await, ["kept"]);
    assert!(count(&api, "list") > lists);
    healed(&keychain).await;
}

#[tokio::test]
async fn t98_a_410_on_a_further_page_begins_the_list_again() {
    let api = KubeApi::start("t").await.unwrap();
    for at in 0..600 {
        put(&api, "a", &format!("s{at}"), "reg.example", &format!("u{at}"));
    }
    api.fail_next_page(410);
    let rig = Rig::new();
    rig.login(&api, &json!({ "token": "t" }));
    let keychain = rig.start(rig.settings());
    healed(&keychain).await;
    assert_eq!(keychain.len(), 600);
    assert_eq!(count(&api, "list"), 3, "one page, then both");
}

#[tokio::test]
async fn an_event_that_breaks_off_is_sent_again() {
    let api = KubeApi::start("t").await.unwrap();
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    for (user, how) in [("cut", WatchBreak::Cut), ("reset", WatchBreak::Reset)] {
        let watches = count(&api, "watch");
        until("the watch is open", || count(&api, "watch") > 0).await;
        api.break_watches(how);
        put(&api, "a", "x", "reg.example", user);
        resumed(&api, watches).await;
        eventually(&keychain, "reg.example/a", &[user]).await;
    }
    assert_eq!(count(&api, "list"), 1, "nothing was listed again");
}

#[tokio::test]
async fn a_watch_that_falls_silent_is_opened_anew() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.watch = (Duration::from_secs(1), Duration::from_secs(1));
    settings.timing.silence = Duration::from_millis(100);
    let keychain = rig.synced_with(&api, settings).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    api.break_watches(WatchBreak::Stall);
    put(&api, "a", "x", "reg.example", "changed");
    eventually(&keychain, "reg.example/a", &["changed"]).await;
    assert_eq!(count(&api, "list"), 1, "nothing was listed again");
}

#[tokio::test]
async fn silence_after_a_bookmark_is_a_lost_connection_and_known_as_one() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.heard = Duration::from_millis(300);
    settings.timing.quiet = Duration::from_millis(1500);
    let keychain = rig.synced_with(&api, settings).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    let heard = keychain.progress().last_success;
    let bookmark = api.bookmark();
    until("the bookmark has come", || keychain.progress().last_success > heard).await;
    api.break_watches(WatchBreak::Stall);
    put(&api, "a", "x", "reg.example", "changed");
    until("what is known grows old", || keychain.behind() > Duration::ZERO).await;
    assert_eq!(keychain.progress().trouble, None, "it is not known yet");
    told(&keychain, "not a word within 1.5s of the watch of secrets").await;
    assert!(
        keychain.behind() >= Duration::from_secs(1),
        "since it was heard of last: {:?}",
        keychain.behind()
    );
    eventually(&keychain, "reg.example/a", &["changed"]).await;
    let resumed_at = api.log().last().unwrap().version.clone();
    assert_eq!(
        (resumed_at, count(&api, "list")),
        (Some(bookmark.to_string()), 1),
        "nothing was listed again"
    );
    assert_eq!(log.warnings("not a word within"), 1);
}

#[tokio::test]
async fn a_page_that_is_too_large_is_asked_for_in_smaller_ones() {
    let api = KubeApi::start("t").await.unwrap();
    let junk = "x".repeat(900 << 10);
    for at in 0..10 {
        let auths = auths("reg.example", &format!("u{at}"));
        api.put("a", &format!("s{at}"), TYPE, &[(".dockerconfigjson", &auths), ("junk", &junk)]);
    }
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.first_sync = LONG;
    let keychain = rig.synced_with(&api, settings).await;
    assert_eq!(keychain.len(), 10);
    assert!(count(&api, "list") > 2, "{}", count(&api, "list"));
    api.put("a", "huge", TYPE, &[("junk", &junk.repeat(8))]);
    told(&keychain, "an answer with one secret is larger than the limit").await;
    assert_eq!(keychain.len(), 10, "the others stay in use");
    api.delete("a", "huge");
    api.forget_history();
    healed(&keychain).await;
}

#[tokio::test]
async fn a_server_that_takes_a_list_and_does_not_answer_is_named_and_asked_again() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.answer = Duration::from_millis(300);
    api.set_hanging("list", Some(Hang::Head));
    rig.login(&api, &json!({ "token": "t" }));
    let keychain = rig.start(settings);
    told(&keychain, "no answer within 300ms").await;
    keychain.ready().await;
    assert!(keychain.progress().failed, "nobody waits for it");
    api.set_hanging("list", Some(Hang::Body));
    let lists = api.log().len();
    until("it is asked again", || api.log().len() > lists + 1).await;
    told(&keychain, "no answer within 300ms").await;
    api.set_hanging("list", None);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    healed(&keychain).await;

    api.set_hanging("watch", Some(Hang::Head));
    api.cut_watches();
    told(&keychain, "no answer within 300ms").await;
    assert_eq!(users(&keychain, "reg.example/a").await, ["x"], "the last values stay in use");
    api.set_hanging("watch", None);
    put(&api, "a", "x", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
    healed(&keychain).await;
}

#[tokio::test]
async fn a_list_in_slow_pages_is_waited_for() {
    let api = KubeApi::start("t").await.unwrap();
    for at in 0..2100 {
        put(&api, "a", &format!("s{at}"), "reg.example", &format!("u{at}"));
    }
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.answer = Duration::from_secs(5);
    // Five pages: each comes in time, all of them together do not.
    api.set_page_delay(Duration::from_millis(1100));
    let keychain = rig.synced_with(&api, settings).await;
    assert_eq!((keychain.len(), count(&api, "list")), (2100, 5));
}

#[tokio::test]
async fn a_kubeconfig_that_is_deleted_is_missed_and_costs_nothing_until_it_is_needed() {
    let (log, _guard) = soci_testkit::log::capture();
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let keychain = rig.synced(&api).await;
    until("the watch is open", || count(&api, "watch") > 0).await;
    std::fs::remove_file(rig.dir.path().join(".kube/config")).unwrap();
    until("it is missed", || log.warnings("no kubeconfig at") > 0).await;
    put(&api, "a", "x", "reg.example", "followed");
    eventually(&keychain, "reg.example/a", &["followed"]).await;
    assert_eq!((keychain.progress().trouble, keychain.behind()), (None, Duration::ZERO));
    api.set_token("other");
    api.cut_watches();
    told(&keychain, "no kubeconfig").await;
    until("what is known grows old", || keychain.behind() > Duration::ZERO).await;
    assert_eq!(users(&keychain, "reg.example/a").await, ["followed"], "the last values stay in use");
    rig.login(&api, &json!({ "token": "other" }));
    healed(&keychain).await;
}

#[tokio::test]
async fn a_server_that_is_overloaded_says_when_to_come_back() {
    // What a proxy answers may repeat what was asked, token included: it is told neither by us nor by the libraries.
    let page = "<h1>busy</h1> authorization: Bearer t0ken-7421";
    for (status, by_proxy) in [(429, false), (429, true), (503, false), (503, true)] {
        let (log, _guard) = soci_testkit::log::capture();
        let api = KubeApi::start("t0ken-7421").await.unwrap();
        put(&api, "a", "x", "reg.example", "x");
        match by_proxy {
            true => api.fail_next_as_proxy(status, Some(2), page),
            false => api.fail_next(status, Some(2)),
        }
        let rig = Rig::new();
        let mut settings = rig.settings();
        settings.timing.first_sync = LONG;
        let begun = Instant::now();
        rig.login(&api, &json!({ "token": "t0ken-7421" }));
        let keychain = rig.start(settings);
        told(&keychain, &format!("the API server answers {status} ")).await;
        eventually(&keychain, "reg.example/a", &["x"]).await;
        assert!(begun.elapsed() >= Duration::from_secs(2), "it was asked not to come back earlier");
        let text = log.text();
        assert!(!text.contains("t0ken-7421") && !text.contains("<h1>"), "{text}");
    }
}
