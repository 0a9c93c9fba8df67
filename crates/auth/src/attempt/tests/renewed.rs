//! Tokens and news: what is fetched once, renewed, or waited for.

use super::*;
use crate::testing::install_helper;

/// Sends so many requests at once, which are all served.
async fn at_once(stack: &Arc<Stack>, count: usize) {
    let requests: Vec<_> = (0..count)
        .map(|_| {
            let stack = Arc::clone(stack);
            tokio::spawn(async move { stack.request().await })
        })
        .collect();
    for request in requests {
        request.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn t107_a_hundred_requests_at_once_fetch_one_token() {
    let d = option("docker-config", &[("u", "p")]);
    let registry = Registry::new(BEARER, &["Bearer T-u"]);
    let stack = Arc::new(Stack::new(&[&d], &registry, token_server(&["u:p"], true)));
    at_once(&stack, 100).await;
    assert_eq!(stack.tokens.sent().len(), 1);
}

#[tokio::test]
async fn t108_a_token_that_ran_out_after_the_password_was_rotated_heals_without_a_second_request() {
    let d = option("docker-config", &[("u", "old")]);
    let valid = Arc::new(Mutex::new("u:old"));
    let tokens = Script::by({
        let valid = Arc::clone(&valid);
        move |sent| match clear(sent.authorization.as_deref().map(|text| text.parse().unwrap()).as_ref()) {
            pair if pair == *valid.lock() => (200, format!(r#"{{"token":"T-{}"}}"#, &pair[2..])),
            _ => (401, String::new()),
        }
    });
    let registry = Registry::new(BEARER, &["Bearer T-old"]);
    let stack = Stack::new(&[&d], &registry, tokens);
    stack.request().await.unwrap();
    *valid.lock() = "u:new";
    registry.accept_only("Bearer T-new");
    d.set(vec![basic("u", "new")]);
    stack.request().await.unwrap();
    assert_eq!(registry.log(), ["", "Bearer T-old", "Bearer T-old", "Bearer T-new"]);
    assert_eq!(stack.tokens.sent().len(), 3, "old, old refused, new");
}

#[tokio::test]
async fn a_cached_token_that_is_refused_is_renewed_once_with_the_same_credential() {
    let number = std::sync::atomic::AtomicU32::new(0);
    let tokens = Script::by(move |_| {
        let number = number.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        (200, format!(r#"{{"token":"T{number}"}}"#))
    });
    let d = option("docker-config", &[("u", "p")]);
    let registry = Registry::new(BEARER, &["Bearer T0"]);
    let stack = Stack::new(&[&d], &registry, tokens);
    stack.request().await.unwrap();
    registry.accept_only("Bearer T1");
    stack.request().await.unwrap();
    registry.accept_only("nothing");
    assert_eq!(stack.denied().await.reason, Reason::Refused);
    assert_eq!(registry.log(), ["", "Bearer T0", "Bearer T0", "Bearer T1", "Bearer T1", "Bearer T2"]);
}

#[tokio::test]
async fn t117_trouble_of_the_token_endpoint_is_no_refusal_and_not_remembered() {
    let number = std::sync::atomic::AtomicU32::new(0);
    let tokens = Script::by(move |_| match number.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0 => (500, String::new()),
        1 => (429, String::new()),
        _ => (200, r#"{"token":"T"}"#.into()),
    });
    let d = option("docker-config", &[("u", "p")]);
    let registry = Registry::new(BEARER, &["Bearer T"]);
    let stack = Stack::new(&[&d], &registry, tokens);
    for status in ["500", "429"] {
        let error = stack.request().await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(status), "{source}");
    }
    stack.request().await.unwrap();
    assert!(d.verdicts.lock().iter().all(|(_, outcome)| *outcome == Outcome::Accepted));
}

#[tokio::test(start_paused = true)]
async fn t71_a_pending_request_is_healed_by_news_of_its_registry() {
    let c = option("cri", &[("c", "1")]);
    let registry = Registry::new(BASIC, &["c:2"]);
    let stack = Arc::new(Stack::with_patience(&[&c], &registry, no_tokens(), Duration::from_secs(5)));
    let pending = tokio::spawn({
        let stack = Arc::clone(&stack);
        async move { stack.request().await }
    });
    while registry.log().len() < 2 {
        tokio::task::yield_now().await;
    }
    c.set(vec![basic("c", "2"), basic("c", "1")]);
    stack.auth.board().bump("reg.example");
    pending.await.unwrap().unwrap();
    assert_eq!(registry.log(), ["", "c:1", "c:2"]);
}

#[tokio::test(start_paused = true)]
async fn r37_t71_a_request_that_used_up_its_candidates_is_healed_by_a_pull_of_any_image_of_the_registry() {
    let registry = Registry::forbidding(&["c4:p"], ECR);
    let (store, stack) = over_pulls(&registry, no_tokens(), Duration::from_secs(5));
    let stack = Arc::new(stack);
    let pull = |image: &str, name: &str| store.begin(image, login(name, "p"), None).unwrap().confirm(None);
    for (image, name) in [("team/app:1", "c0"), ("b", "c1"), ("c", "c2"), ("d", "c3")] {
        pull(&format!("reg.example/{image}"), name);
    }
    let pending = tokio::spawn({
        let stack = Arc::clone(&stack);
        async move { stack.request().await }
    });
    while registry.log().len() < 5 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    pull("reg.example/e", "c4");
    pending.await.unwrap().unwrap();
    assert_eq!(registry.log(), ["", "c0:p", "c3:p", "c2:p", "c1:p", "c4:p"], "none twice");
}

#[tokio::test(start_paused = true)]
async fn r36_a_request_that_used_up_its_candidates_fails_when_its_patience_is_over() {
    let pairs: Vec<_> = (0..5).map(|n| basic(&format!("c{n}"), "p")).collect();
    let registry = Registry::new(BASIC, &["c4:p"]);
    let c = ScriptedKeychain::new("cri", pairs);
    let stack = Stack::with_patience(&[&c], &registry, no_tokens(), Duration::from_secs(5));
    let started = Instant::now();
    assert_eq!(stack.denied().await.reason, Reason::Refused);
    assert_eq!(started.elapsed(), Duration::from_secs(5));
    assert_eq!(registry.log(), ["", "c0:p", "c1:p", "c2:p", "c3:p"], "the bound stays without news");
}

#[tokio::test(start_paused = true)]
async fn r37_a_request_that_used_up_its_candidates_takes_the_one_that_another_found() {
    let pairs: Vec<_> = (0..5).map(|n| basic(&format!("c{n}"), "p")).collect();
    let registry = Registry::new(BASIC, &["c4:p"]);
    let c = ScriptedKeychain::new("cri", pairs);
    let stack = Arc::new(Stack::with_patience(&[&c], &registry, no_tokens(), Duration::from_secs(5)));
    let pending = tokio::spawn({
        let stack = Arc::clone(&stack);
        async move { stack.request().await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    stack.request().await.unwrap();
    pending.await.unwrap().unwrap();
    assert_eq!(registry.log().iter().filter(|sent| *sent == "c4:p").count(), 2);
}

#[tokio::test(start_paused = true)]
async fn r37_t71_pulling_the_same_image_again_heals_pending_and_later_requests() {
    for again in ["new", "old"] {
        let registry = Registry::new(BASIC, &["c:old"]);
        let (store, stack) = over_pulls(&registry, no_tokens(), Duration::from_secs(5));
        let stack = Arc::new(stack);
        let pull = |password: &str| store.begin(&stack.image, login("c", password), None).unwrap();
        pull("old").confirm(None);
        stack.request().await.unwrap();
        registry.accept_only("nothing");
        let pending = tokio::spawn({
            let stack = Arc::clone(&stack);
            async move { stack.request().await }
        });
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!pending.is_finished());
        // The same login may have got back its right: then containerd's pull with it went well.
        registry.accept_only(&format!("c:{again}"));
        pull(again).confirm(None);
        pending.await.unwrap().unwrap();
        stack.request().await.unwrap();
        assert_eq!(registry.log().last(), Some(&format!("c:{again}")));
    }
}

#[tokio::test(start_paused = true)]
async fn r37_a_mounted_image_without_any_credential_waits_for_one_and_a_pull_does_not() {
    for (challenge, tokens) in [(BASIC, no_tokens()), (BEARER, token_server(&["c:1"], false))] {
        let c = option("cri", &[]);
        let registry = Registry::new(challenge, &["c:1", "Bearer T-c"]);
        let stack = Arc::new(Stack::with_patience(&[&c], &registry, tokens, Duration::from_secs(5)));
        let started = Instant::now();
        assert_eq!(stack.denied().await.reason, Reason::NoCredential);
        assert_eq!(started.elapsed(), Duration::ZERO, "a pull is told at once");

        let image: soci_oci::ImageRef = stack.image.parse().unwrap();
        let _mounted = stack.auth.board().pin(&image.key());
        assert_eq!(stack.denied().await.reason, Reason::NoCredential);
        assert_eq!(started.elapsed(), Duration::from_secs(5));

        let pending = tokio::spawn({
            let stack = Arc::clone(&stack);
            async move { stack.request().await }
        });
        tokio::time::sleep(Duration::from_secs(2)).await;
        c.set(vec![basic("c", "1")]);
        stack.auth.board().bump("reg.example");
        pending.await.unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn t72_news_of_another_registry_or_port_heal_nothing() {
    let c = option("cri", &[("c", "1")]);
    let registry = Registry::new(BASIC, &[]);
    let stack = Stack::with_patience(&[&c], &registry, no_tokens(), Duration::from_secs(5));
    let started = Instant::now();
    let news = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        stack.auth.board().bump("reg.example:5000");
        std::future::pending::<()>().await;
    };
    let denied = tokio::select! { denied = stack.denied() => denied, () = news => unreachable!() };
    assert_eq!(denied.reason, Reason::Refused);
    assert_eq!(started.elapsed(), Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn r36_a_request_never_waits_past_its_deadline() {
    let c = option("cri", &[("c", "1")]);
    let mut stack =
        Stack::with_patience(&[&c], &Registry::new(BASIC, &[]), no_tokens(), Duration::from_secs(5));
    stack.time = Duration::from_secs(2);
    let started = Instant::now();
    stack.denied().await;
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn r21_a_file_that_is_replaced_while_a_request_waits_heals_it_without_news() {
    let d = option("docker-config", &[("u", "old")]);
    let registry = Registry::new(BASIC, &["u:new"]);
    let stack = Arc::new(Stack::with_patience(&[&d], &registry, no_tokens(), Duration::from_secs(5)));
    let pending = tokio::spawn({
        let stack = Arc::clone(&stack);
        async move { stack.request().await }
    });
    tokio::time::sleep(Duration::from_millis(1500)).await;
    d.set(vec![basic("u", "new")]);
    pending.await.unwrap().unwrap();
}

#[tokio::test]
async fn t47_t48_a_login_and_a_rotated_password_take_effect_within_the_next_request() {
    let registry = Registry::new(BASIC, &["u:1"]);
    let (directory, stack) = over_a_file(&registry, no_tokens(), &[]);
    assert_eq!(stack.denied().await.reason, Reason::NoCredential);
    log_in(&directory, "u", "1");
    stack.request().await.unwrap();
    registry.accept_only("u:2");
    log_in(&directory, "u", "2");
    stack.request().await.unwrap();
    assert_eq!(registry.log(), ["", "u:1", "u:1", "u:2"]);
}

#[tokio::test]
async fn t108_t48_a_rotated_password_behind_a_token_endpoint_takes_effect_within_the_next_request() {
    let registry = Registry::new(BEARER, &["Bearer T-a"]);
    let (directory, stack) = over_a_file(&registry, token_server(&["a:1", "b:2"], true), &[]);
    log_in(&directory, "a", "1");
    stack.request().await.unwrap();
    registry.accept_only("Bearer T-b");
    log_in(&directory, "b", "2");
    stack.request().await.unwrap();
    assert_eq!(registry.log().last().unwrap(), "Bearer T-b");
}

#[tokio::test]
async fn tokens_of_one_image_are_not_used_for_another_repository_or_access() {
    let d = option("docker-config", &[("u", "p")]);
    let tokens = Script::by(|sent| {
        let scope = sent
            .line
            .split("scope=")
            .nth(1)
            .unwrap()
            .replace("%3A", "/")
            .replace("%2C", "/")
            .replace("%2F", "/");
        (200, format!(r#"{{"token":"{scope}"}}"#))
    });
    let registry =
        Registry::new(BEARER, &["Bearer repository/team/app/pull", "Bearer repository/team/other/pull"]);
    let mut stack = Stack::new(&[&d], &registry, tokens);
    stack.request().await.unwrap();
    stack.image = "reg.example/team/other:1".into();
    stack.request().await.unwrap();
    assert_eq!(
        registry.log(),
        ["", "Bearer repository/team/app/pull", "", "Bearer repository/team/other/pull"]
    );
}

#[tokio::test]
async fn t61_fifty_requests_at_once_run_a_helper_once() {
    let registry = Registry::new(BASIC, &["u:p"]);
    let (directory, stack) = over_a_file(&registry, no_tokens(), &[]);
    let config = serde_json::json!({"credHelpers": {"reg.example": "x"}});
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let body = r#"echo run >> runs; echo '{"Username":"u","Secret":"p"}'"#;
    install_helper(directory.path(), "x", body);
    let stack = Arc::new(stack);
    at_once(&stack, 50).await;
    assert_eq!(registry.log().iter().filter(|header| *header == "u:p").count(), 50);
    assert_eq!(std::fs::read_to_string(directory.path().join("runs")).unwrap(), "run\n");
}
