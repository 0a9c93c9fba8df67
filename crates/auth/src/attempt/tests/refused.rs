//! What a refusal leads to, and what its message says.

use super::*;

#[tokio::test]
async fn t05_a_wrong_password_never_leads_to_the_next_option() {
    let options = daemon(&[("d", "wrong")], &[("c", "right")], &[("k", "right")]);
    let registry = Registry::new(BASIC, &["c:right", "k:right"]);
    let stack = Stack::new(&options.each_ref(), &registry, no_tokens());
    let denied = stack.denied().await;
    assert_eq!(
        (denied.option, denied.status, denied.reason),
        (Some("docker-config"), Some(401), Reason::Refused)
    );
    let text = denied.to_string();
    let who =
        "https://reg.example refuses the credential from docker-config (entry 0) for team/app (status 401)";
    assert!(text.starts_with(who), "{text}");
    assert_eq!(registry.log(), ["", "d:wrong"]);
    assert_eq!((*options[1].lookups.lock(), *options[2].lookups.lock()), (0, 0));
}

#[tokio::test]
async fn t05_nor_does_a_refusal_by_the_token_endpoint() {
    let options = daemon(&[("d", "wrong")], &[("c", "right")], &[]);
    let registry = Registry::new(BEARER, &["Bearer T-c"]);
    let stack = Stack::new(&options.each_ref(), &registry, token_server(&["c:right"], true));
    assert_eq!(stack.denied().await.option, Some("docker-config"));
    assert_eq!(registry.log(), [""], "not anonymous either");
    stack.auth.board().bump("reg.example");
    let text = stack.denied().await.to_string();
    let who = "https://auth.example, the token server of https://reg.example, refuses the credential from docker-config \
               (entry 0) for team/app (status 401)";
    assert!(text.starts_with(who), "{text}");
}

#[tokio::test]
async fn t06_an_expired_credential_of_ecr_fails_with_403_and_stays_with_its_option() {
    let options = daemon(&[("AWS", "old")], &[], &[("k", "k")]);
    let registry = Registry::forbidding(&["k:k"], ECR);
    let denied = Stack::new(&options.each_ref(), &registry, no_tokens()).denied().await;
    assert_eq!((denied.option, denied.status), (Some("docker-config"), Some(403)));
    assert_eq!(registry.log(), ["", "AWS:old"]);
}

#[tokio::test]
async fn t08_an_empty_password_stops_the_chain_and_is_named() {
    for challenge in [BASIC, BEARER] {
        let options = daemon(&[("user", "")], &[("c", "c")], &[]);
        let registry = Registry::new(challenge, &["c:c"]);
        let denied = Stack::new(&options.each_ref(), &registry, no_tokens()).denied().await;
        assert_eq!(denied.reason, Reason::Incomplete("the password is empty"));
        let text = denied.to_string();
        assert!(
            text.starts_with("incomplete credential from docker-config (entry 0) for https://reg.example"),
            "{text}"
        );
        assert_eq!(registry.log(), [""]);
    }
}

#[tokio::test]
async fn t11_the_failure_of_an_option_is_part_of_the_denial() {
    let options = daemon(&[], &[], &[]);
    *options[0].content.lock() = Err("docker-credential-x: exit status: 2".into());
    let stack = Stack::new(&options.each_ref(), &Registry::new(BASIC, &[]), no_tokens());
    let text = stack.denied().await.to_string();
    assert!(text.contains("docker-config: docker-credential-x: exit status: 2"), "{text}");
}

#[tokio::test]
async fn r6_an_option_that_fails_after_its_credential_was_refused_still_holds_the_request() {
    let d = option("docker-config", &[("d", "wrong")]);
    let c = option("cri", &[("c", "right")]);
    let registry = Registry::new(BASIC, &["c:right"]);
    let stack = Stack::new(&[&d, &c], &registry, no_tokens());
    let http: Arc<dyn TokenHttp> = no_tokens();
    let mut attempt = stack.attempt();
    let headers = challenges(BASIC);
    let refusal = Refusal { status: StatusCode::UNAUTHORIZED, headers: &headers, body: b"" };
    assert!(matches!(attempt.refused(refusal, &http).await, Ok(Next::Retry)));
    *d.content.lock() = Err("crashed".into());
    match attempt.refused(refusal, &http).await {
        Ok(Next::Final(denied)) => assert_eq!(denied.option_errors, ["docker-config: crashed"]),
        other => panic!("{other:?}"),
    }
    assert_eq!(*c.lookups.lock(), 0);
}

#[tokio::test]
async fn r6c_t94_candidates_of_one_option_are_tried_in_order_and_judged() {
    let k = option("kubernetes-secrets", &[("k1", "x"), ("k2", "x")]);
    let registry = Registry::new(BASIC, &["k2:x"]);
    Stack::new(&[&k], &registry, no_tokens()).request().await.unwrap();
    assert_eq!(registry.log(), ["", "k1:x", "k2:x"]);
    let verdicts: Vec<_> =
        k.verdicts.lock().iter().map(|(id, outcome)| (id.entry.clone(), *outcome)).collect();
    assert_eq!(verdicts, [("entry 0".into(), Outcome::Rejected), ("entry 1".into(), Outcome::Accepted)]);
}

#[tokio::test]
async fn a_request_presents_no_more_candidates_than_the_option_allows() {
    let pairs: Vec<String> = (0..9).map(|n| format!("u{n}")).collect();
    let c = ScriptedKeychain::new("cri", pairs.iter().map(|name| basic(name, "x")).collect());
    let registry = Registry::new(BASIC, &["u8:x"]);
    let denied = Stack::new(&[&c], &registry, no_tokens()).denied().await;
    assert_eq!(registry.log(), ["", "u0:x", "u1:x", "u2:x", "u3:x"]);
    assert_eq!(denied.reason, Reason::Refused);
}

#[tokio::test(start_paused = true)]
async fn t94_the_next_request_goes_on_with_candidates_that_were_not_refused_lately() {
    let pairs: Vec<String> = (0..9).map(|n| format!("u{n}")).collect();
    let k = ScriptedKeychain::new("kubernetes-secrets", pairs.iter().map(|name| basic(name, "x")).collect());
    for news in [false, true] {
        let registry = Registry::new(BASIC, &["u8:x"]);
        let stack = Stack::new(&[&k], &registry, no_tokens());
        for first in [0, 4] {
            let before = registry.log().len();
            assert_eq!(stack.denied().await.reason, Reason::Refused);
            let expected: Vec<String> = (first..first + 4).map(|n| format!("u{n}:x")).collect();
            assert_eq!(
                registry.log()[before..].iter().filter(|sent| !sent.is_empty()).cloned().collect::<Vec<_>>(),
                expected
            );
            // Longer than a refused credential rests, or what ends its rest.
            tokio::time::advance(Duration::from_secs(9)).await;
            if news {
                stack.auth.board().bump("reg.example");
            }
        }
        stack.request().await.unwrap();
        assert_eq!(registry.log().last().unwrap(), "u8:x");
        let first_again = "u0:x".to_owned();
        tokio::time::advance(Duration::from_secs(60)).await;
        registry.accept_only(&first_again);
        stack.request().await.unwrap();
        assert_eq!(registry.log().last(), Some(&first_again), "a minute later their rank counts again");
    }
}

#[tokio::test]
async fn t70_t109_a_403_rejects_the_candidate_and_a_changed_one_is_tried_once() {
    for body in [ECR, "no"] {
        let d = option("docker-config", &[("AWS", "old")]);
        let registry = Registry::forbidding(&["AWS:old"], body);
        let stack = Stack::new(&[&d], &registry, no_tokens());
        stack.request().await.unwrap();
        registry.accept_only("AWS:new");
        d.set(vec![basic("AWS", "new")]);
        stack.request().await.unwrap();
        assert_eq!(registry.log(), ["", "AWS:old", "AWS:old", "AWS:new"]);
    }
}

#[tokio::test]
async fn t110_a_403_with_an_unchanged_credential_is_final_at_once() {
    let d = option("docker-config", &[("u", "p")]);
    let registry = Registry::forbidding(&[], "no");
    let denied = Stack::new(&[&d], &registry, no_tokens()).denied().await;
    assert_eq!((denied.status, denied.reason), (Some(403), Reason::Refused));
    assert_eq!(registry.log(), ["", "u:p"]);
}

#[tokio::test]
async fn a_403_without_a_challenge_before_is_not_answered_with_a_credential_nor_with_advice_to_log_in() {
    let d = option("docker-config", &[("u", "p")]);
    let stack = Stack::new(&[&d], &Registry::new(BASIC, &[]), no_tokens());
    let mut attempt = stack.attempt();
    let http = Arc::clone(&stack.tokens) as Arc<dyn TokenHttp>;
    assert_eq!(attempt.authorization(&http).await.unwrap(), None);
    let refusal = Refusal { status: StatusCode::FORBIDDEN, headers: &HeaderMap::new(), body: b"blocked" };
    let Ok(Next::Final(denied)) = attempt.refused(refusal, &http).await else { panic!("it goes on") };
    assert_eq!((denied.status, denied.reason), (Some(403), Reason::NoChallenge));
    assert!(!denied.to_string().contains("log in"), "{denied}");
}

#[tokio::test]
async fn a_403_to_an_anonymous_token_is_final() {
    let registry = Arc::new(Registry {
        refuses_with: (403, "no"),
        challenge: BEARER,
        ..Arc::into_inner(Registry::new(BEARER, &[])).unwrap()
    });
    let denied = Stack::new(&[], &registry, token_server(&[], true)).denied().await;
    assert_eq!((denied.status, denied.reason), (Some(403), Reason::NoCredential));
    assert_eq!(registry.log().len(), 2);
}

#[tokio::test]
async fn a_429_never_counts_against_a_credential() {
    let d = option("docker-config", &[("u", "p")]);
    let stack = Stack::new(&[&d], &Registry::new(BASIC, &[]), no_tokens());
    let http: Arc<dyn TokenHttp> = no_tokens();
    let (mut attempt, headers) = (stack.attempt(), challenges(BASIC));
    let refusal = Refusal { status: StatusCode::UNAUTHORIZED, headers: &headers, body: b"" };
    assert!(matches!(attempt.refused(refusal, &http).await, Ok(Next::Retry)));
    let busy = Refusal { status: StatusCode::TOO_MANY_REQUESTS, headers: &headers, body: b"" };
    match attempt.refused(busy, &http).await {
        Ok(Next::Final(denied)) => assert_eq!(denied.reason, Reason::NotAuthentication),
        other => panic!("{other:?}"),
    }
    assert!(d.verdicts.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_refused_credential_rests_so_that_many_requests_do_not_lock_an_account() {
    let d = option("docker-config", &[("u", "wrong")]);
    let registry = Registry::new(BASIC, &[]);
    let stack = Stack::new(&[&d], &registry, no_tokens());
    for _ in 0..1000 {
        stack.denied().await;
    }
    assert_eq!(registry.log().iter().filter(|header| *header == "u:wrong").count(), 1);
    let resting = stack.denied().await;
    assert_eq!((resting.reason, resting.entry.as_deref()), (Reason::Resting, Some("entry 0")));
    tokio::time::advance(Duration::from_secs(2)).await;
    stack.denied().await;
    assert_eq!(registry.log().iter().filter(|header| *header == "u:wrong").count(), 2);
    stack.auth.board().bump("reg.example");
    stack.denied().await;
    assert_eq!(registry.log().iter().filter(|header| *header == "u:wrong").count(), 3, "news end the rest");
}

#[tokio::test]
async fn t120_a_wrong_explicit_credential_never_leads_to_docker_config() {
    let image: soci_oci::ImageRef = "reg.example/team/app:1".parse().unwrap();
    let user = crate::keychain::explicit::ExplicitKeychain::new(basic("u", "wrong"), image.registry());
    let d = option("docker-config", &[("d", "right")]);
    let registry = Registry::new(BASIC, &["d:right"]);
    let stack = Stack::new(&[], &registry, no_tokens());
    let chain = KeychainChain::new(vec![Arc::new(user), Arc::clone(&d) as _]);
    let settings = Settings { patience: Duration::ZERO, ..Settings::default() };
    let auth = Authenticator::new(chain, Arc::new(AuthBoard::new()), settings);
    let denied = Stack { auth, ..stack }.denied().await;
    assert_eq!((denied.option, *d.lookups.lock()), (Some("--user"), 0));
    assert_eq!(registry.log(), ["", "u:wrong"]);
}

#[tokio::test]
async fn t123_no_message_and_no_debug_holds_a_secret() {
    let (log, _guard) = soci_testkit::log::capture();
    let secret = "hunter2";
    let d = option("docker-config", &[("user", secret), ("other", secret)]);
    let registry = Registry::forbidding(&[], "no");
    let stack = Stack::new(&[&d], &registry, no_tokens());
    let denied = stack.denied().await;
    let http: Arc<dyn TokenHttp> = token_server(&["user:hunter2"], true);
    let bearer = Stack::new(&[&d], &Registry::new(BEARER, &[]), no_tokens());
    let (mut attempt, headers) = (bearer.attempt(), challenges(BEARER));
    let refusal = Refusal { status: StatusCode::UNAUTHORIZED, headers: &headers, body: b"" };
    attempt.refused(refusal, &http).await.unwrap();
    let header = attempt.authorization(&http).await.unwrap();
    let board = stack.auth.board().ledger("reg.example", "team/app");
    let shown = format!(
        "{denied} {denied:?} {attempt:?} {:?} {:?} {header:?} {board:?} {d:?} {refusal:?} {:?} {}",
        stack.auth,
        bearer.auth,
        basic("user", secret),
        log.text(),
    );
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode("user:hunter2");
    for needle in [secret, "T-user", &encoded] {
        assert!(!shown.contains(needle), "{needle} in {shown}");
    }
}
