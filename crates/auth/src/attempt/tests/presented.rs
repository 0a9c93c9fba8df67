//! What is presented, in which order, and what never is.

use super::*;

#[tokio::test]
async fn t01_to_t03_the_first_option_with_a_credential_is_used() {
    let (d, c, k) = (&[("d", "d")][..], &[("c", "c")][..], &[("k", "k")][..]);
    for (options, expected) in [
        (daemon(d, c, k), "d:d"),
        (daemon(&[], c, k), "c:c"),
        (daemon(&[], &[], k), "k:k"),
        (daemon(d, &[], k), "d:d"),
        (daemon(d, &[], &[]), "d:d"),
        (daemon(d, c, &[]), "d:d"),
        (daemon(&[], c, &[]), "c:c"),
    ] {
        let registry = Registry::new(BASIC, &["d:d", "c:c", "k:k"]);
        let stack = Stack::new(&options.each_ref(), &registry, no_tokens());
        stack.request().await.unwrap();
        assert_eq!(registry.log(), ["", expected]);
    }
}

#[tokio::test]
async fn t04_without_any_credential_the_request_is_anonymous() {
    let options = daemon(&[], &[], &[]);
    let registry = Registry::new(BEARER, &["Bearer T-anonymous"]);
    let stack = Stack::new(&options.each_ref(), &registry, token_server(&[], true));
    stack.request().await.unwrap();
    assert_eq!(registry.log(), ["", "Bearer T-anonymous"]);
    let open = Registry::new(BASIC, &[""]);
    Stack::new(&options.each_ref(), &open, no_tokens()).request().await.unwrap();
    assert_eq!(open.log(), [""]);
}

#[tokio::test]
async fn t04_a_private_image_without_any_credential_is_denied_naming_what_was_looked_at() {
    let options = daemon(&[], &[], &[]);
    for (challenge, tokens) in
        [(BASIC, no_tokens()), (BEARER, token_server(&[], false)), (BEARER, token_server(&[], true))]
    {
        let stack = Stack::new(&options.each_ref(), &Registry::new(challenge, &[]), tokens);
        let denied = stack.denied().await;
        assert_eq!((denied.reason, denied.option, denied.status), (Reason::NoCredential, None, Some(401)));
        let text = denied.to_string();
        for part in [
            "https://reg.example",
            "team/app",
            "docker-config: 0 entries",
            "kubernetes-secrets: 0 entries",
            "401",
        ] {
            assert!(text.contains(part), "{text}");
        }
        // A login in Docker config would outrank what pulls bring, for good.
        assert!(text.ends_with("; pull again; or check the secrets"), "{text}");
    }
}

#[tokio::test]
async fn the_advice_is_about_the_options_that_are_on() {
    let [d, c, k] = daemon(&[], &[], &[]);
    for (options, advice) in [
        (vec![&d], "log in"),
        (vec![&d, &c], "pull again"),
        (vec![&d, &k], "check the secrets"),
        (vec![&d, &c, &k], "pull again; or check the secrets"),
    ] {
        let denied = Stack::new(&options, &Registry::new(BASIC, &[]), no_tokens()).denied().await;
        assert_eq!((denied.reason, denied.advice()), (Reason::NoCredential, advice));
    }
}

#[tokio::test]
async fn t07_an_empty_entry_falls_through() {
    let options = [option("docker-config", &[("", "")]), option("cri", &[("c", "c")])];
    let registry = Registry::new(BASIC, &["c:c"]);
    Stack::new(&options.each_ref(), &registry, no_tokens()).request().await.unwrap();
}

#[tokio::test]
async fn t09_t13_an_option_that_becomes_empty_lets_the_next_one_answer() {
    tokio::time::pause();
    let options = daemon(&[("d", "d")], &[("c", "c")], &[]);
    let registry = Registry::new(BASIC, &["d:d", "c:c"]);
    let stack = Stack::new(&options.each_ref(), &registry, no_tokens());
    stack.request().await.unwrap();
    options[0].set(vec![]);
    tokio::time::advance(Duration::from_secs(2)).await;
    stack.request().await.unwrap();
    assert_eq!(registry.log(), ["", "d:d", "c:c"]);
}

#[tokio::test]
async fn t10_t12_an_option_that_fails_is_no_credential_and_is_warned_about_once() {
    let (log, _guard) = soci_testkit::log::capture();
    let options = daemon(&[], &[("c", "c")], &[]);
    *options[0].content.lock() = Err("docker-credential-x: exit status: 2".into());
    let registry = Registry::new(BASIC, &["c:c"]);
    let stack = Stack::new(&options.each_ref(), &registry, no_tokens());
    for _ in 0..3 {
        stack.request().await.unwrap();
    }
    assert_eq!(log.warnings("docker-credential-x: exit status: 2"), 1);
}

#[tokio::test]
async fn t35_a_registry_token_goes_out_with_the_first_request() {
    let d = ScriptedKeychain::new("docker-config", vec![Credential::RegistryToken(Secret::new("B"))]);
    let registry = Registry::new(BEARER, &["Bearer B"]);
    let stack = Stack::new(&[&d], &registry, no_tokens());
    stack.request().await.unwrap();
    assert_eq!(registry.log(), ["Bearer B"]);
    registry.accept_only("Bearer C");
    assert_eq!(stack.denied().await.reason, Reason::Refused, "it is never exchanged");
}

#[tokio::test]
async fn a_credential_over_plain_http_is_warned_about_once_also_when_it_goes_out_unasked() {
    for credential in [Credential::RegistryToken(Secret::new("B")), basic("u", "p")] {
        let (log, _guard) = soci_testkit::log::capture();
        let d = ScriptedKeychain::new("docker-config", vec![credential]);
        let stack = Stack::new(&[&d], &Registry::new(BASIC, &["Bearer B", "u:p"]), no_tokens());
        let image: soci_oci::ImageRef = stack.image.parse().unwrap();
        for host in ["reg.example", "reg.example", "127.0.0.1"] {
            let scope = CredentialScope::new(Origin::new(Scheme::Http, host, None), image.clone());
            let deadline = Instant::now() + stack.time;
            let mut attempt = stack.auth.attempt(scope, Access::Pull, deadline.into_std());
            stack.ask(&mut attempt).await.unwrap();
        }
        assert_eq!(log.warnings("host=\"http://reg.example\""), 1, "{}", log.text());
        assert_eq!(log.warnings("sent over plain http"), 1, "{}", log.text());
    }
}

#[tokio::test]
async fn t34_an_identity_token_is_exchanged_and_cannot_answer_basic() {
    let d = ScriptedKeychain::new("docker-config", vec![Credential::IdentityToken(Secret::new("R"))]);
    let tokens = Script::by(|sent| match sent.body.contains("refresh_token=R&") {
        true => (200, r#"{"access_token":"T"}"#.into()),
        false => (401, String::new()),
    });
    let registry = Registry::new(BEARER, &["Bearer T"]);
    Stack::new(&[&d], &registry, tokens).request().await.unwrap();
    let denied = Stack::new(&[&d], &Registry::new(BASIC, &[]), no_tokens()).denied().await;
    assert_eq!(denied.reason, Reason::Incomplete("an identity token cannot answer a Basic challenge"));
}

#[tokio::test]
async fn t104_a_host_that_changes_its_scheme_is_answered_in_the_new_one() {
    let d = option("docker-config", &[("u", "p")]);
    let registry = Registry::new(BASIC, &["u:p"]);
    let stack = Stack::new(&[&d], &registry, token_server(&["u:p"], true));
    stack.request().await.unwrap();
    let bearer = Registry::new(BEARER, &["Bearer T-u"]);
    let stack = Stack { registry: Arc::clone(&bearer), ..stack };
    stack.request().await.unwrap();
    assert_eq!(bearer.log(), ["u:p", "Bearer T-u"]);
    assert!(d.verdicts.lock().iter().all(|(_, outcome)| *outcome == Outcome::Accepted));
}

#[tokio::test]
async fn t114_a_realm_that_gets_no_credential_is_not_asked() {
    let d = option("docker-config", &[("u", "p")]);
    for challenge in [
        &["Bearer realm=\"http://169.254.169.254/\""][..],
        &["Bearer realm=\"http://auth.example/\""],
        &["Bearer realm=\"https://x:y@auth.example/\""],
    ] {
        let stack = Stack::new(&[&d], &Registry::new(challenge, &[]), no_tokens());
        assert!(matches!(stack.request().await, Err(AuthError::Policy(_))), "{challenge:?}");
    }
}

#[tokio::test]
async fn r5_to_r9_the_order_is_that_of_the_chain() {
    let options = daemon(&[], &[], &[]);
    let chain = KeychainChain::new(options.iter().map(|option| Arc::clone(option) as _).collect());
    assert_eq!(chain.names(), ["docker-config", "cri", "kubernetes-secrets"]);
}

#[tokio::test]
async fn t49_a_file_that_cannot_be_read_lets_the_next_option_answer() {
    let registry = Registry::new(BASIC, &["c:c"]);
    let c = option("cri", &[("c", "c")]);
    let (directory, stack) = over_a_file(&registry, no_tokens(), &[&c]);
    // A directory in its place cannot be read by anybody, root included.
    std::fs::create_dir(directory.path().join("config.json")).unwrap();
    stack.request().await.unwrap();
    assert_eq!(registry.log(), ["", "c:c"]);
    registry.accept_only("nobody:x");
    let denied = stack.denied().await.to_string();
    assert!(denied.contains("docker-config") && denied.contains("not a regular file"), "{denied}");
}

#[tokio::test]
async fn t10_an_option_that_fails_does_not_stop_a_public_image() {
    let d = ScriptedKeychain::failing("docker-config", "docker-credential-x: exit status: 2");
    let registry = Registry::new(BEARER, &["Bearer T-anonymous"]);
    Stack::new(&[&d], &registry, token_server(&[], true)).request().await.unwrap();
}

proptest::proptest! {
    #[test]
    fn r5_r6_only_credentials_of_the_first_option_that_has_any_are_presented(
        sizes in proptest::array::uniform3(0usize..4),
        failing in proptest::array::uniform3(proptest::bool::weighted(0.2)),
        accepted in 0usize..4,
        owner in 0usize..3,
        forbids in proptest::bool::ANY,
    ) {
        let names = ["docker-config", "cri", "kubernetes-secrets"];
        let options: Vec<_> = (0..3).map(|at| {
            if failing[at] {
                return ScriptedKeychain::failing(names[at], "broken");
            }
            ScriptedKeychain::new(names[at], (0..sizes[at]).map(|n| basic(&format!("{at}-{n}"), "x")).collect())
        }).collect();
        let accepts = format!("{owner}-{accepted}:x");
        let registry = match forbids {
            true => Registry::forbidding(&[&accepts], "no"),
            false => Registry::new(BASIC, &[&accepts]),
        };
        let stack = Stack::new(&options.iter().collect::<Vec<_>>(), &registry, no_tokens());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(stack.request());
        let first = (0..3).find(|at| !failing[*at] && sizes[*at] > 0);
        let presented: Vec<_> = registry.log().into_iter().filter(|header| !header.is_empty()).collect();
        let expected: Vec<_> = match first {
            None => Vec::new(),
            Some(at) if at == owner && accepted < sizes[at] => (0..=accepted).map(|n| format!("{at}-{n}:x")).collect(),
            Some(at) => (0..sizes[at]).map(|n| format!("{at}-{n}:x")).collect(),
        };
        proptest::prop_assert_eq!(presented, expected);
        let served = first == Some(owner) && accepted < sizes[owner];
        proptest::prop_assert_eq!(result.is_ok(), served);
        if let Err(AuthError::Denied(denied)) = result {
            proptest::prop_assert_eq!(denied.option, first.map(|at| names[at]));
        }
    }
}
