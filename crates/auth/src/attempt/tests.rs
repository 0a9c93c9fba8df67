//! The state machine against a scripted registry: what is presented, in which order, and what is not.

use std::collections::HashSet;
use std::time::Duration;

use parking_lot::Mutex;

use super::*;
use crate::testing::{Script, ScriptedKeychain, challenges};
use crate::{AuthBoard, Credential, Keychain, KeychainChain, Origin, Scheme, Secret};

const BASIC: &[&str] = &["Basic realm=\"r\""];
const BEARER: &[&str] = &["Bearer realm=\"https://auth.example/token\",service=\"reg.example\""];
const ECR: &str = r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate and try again."}]}"#;

fn basic(name: &str, password: &str) -> Credential {
    Credential::basic(name, password)
}

/// What a header says, in clear: `user:password`, `Bearer T`, or nothing.
fn clear(header: Option<&HeaderValue>) -> String {
    use base64::Engine as _;
    let text = header.map_or("", |header| header.to_str().unwrap());
    match text.strip_prefix("Basic ") {
        Some(pair) => {
            String::from_utf8(base64::engine::general_purpose::STANDARD.decode(pair).unwrap()).unwrap()
        }
        None => text.to_owned(),
    }
}

/// A registry that accepts a set of headers.
struct Registry {
    accepts: Mutex<HashSet<String>>,
    challenge: &'static [&'static str],
    refuses_with: (u16, &'static str),
    log: Mutex<Vec<String>>,
}

impl Registry {
    fn new(challenge: &'static [&'static str], accepts: &[&str]) -> Arc<Self> {
        let accepts = Mutex::new(accepts.iter().map(|text| (*text).to_owned()).collect());
        Arc::new(Self { accepts, challenge, refuses_with: (401, ""), log: Mutex::default() })
    }

    /// Answers a presented credential that it does not accept with 403 and `body`, as ECR does.
    fn forbidding(accepts: &[&str], body: &'static str) -> Arc<Self> {
        let accepts = Mutex::new(accepts.iter().map(|text| (*text).to_owned()).collect());
        Arc::new(Self { accepts, challenge: BASIC, refuses_with: (403, body), log: Mutex::default() })
    }

    fn accept_only(&self, header: &str) {
        *self.accepts.lock() = HashSet::from([header.to_owned()]);
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().clone()
    }

    fn answer(&self, header: Option<&HeaderValue>) -> (u16, HeaderMap, &'static str) {
        assert!(header.is_none_or(HeaderValue::is_sensitive));
        let shown = clear(header);
        self.log.lock().push(shown.clone());
        match self.accepts.lock().contains(&shown) {
            true => (200, HeaderMap::new(), ""),
            false if header.is_none() => (401, challenges(self.challenge), ""),
            false => match self.refuses_with {
                (401, body) => (401, challenges(self.challenge), body),
                (status, body) => (status, HeaderMap::new(), body),
            },
        }
    }
}

struct Stack {
    auth: Arc<Authenticator>,
    registry: Arc<Registry>,
    tokens: Arc<Script>,
    image: String,
    time: Duration,
}

/// A token endpoint that gives `T-<user>` to the pairs it knows, `T-anonymous` to nobody in particular.
fn token_server(known: &'static [&'static str], anonymous: bool) -> Arc<Script> {
    Script::by(move |sent| match &sent.authorization {
        None if anonymous => (200, r#"{"token":"T-anonymous","expires_in":300}"#.into()),
        None => (401, String::new()),
        Some(header) => {
            let pair = clear(Some(&header.parse().unwrap()));
            match known.contains(&pair.as_str()) {
                true => {
                    (200, format!(r#"{{"token":"T-{}","expires_in":300}}"#, pair.split(':').next().unwrap()))
                }
                false => (401, String::new()),
            }
        }
    })
}

impl Stack {
    fn new(options: &[&Arc<ScriptedKeychain>], registry: &Arc<Registry>, tokens: Arc<Script>) -> Self {
        Self::with_patience(options, registry, tokens, Duration::ZERO)
    }

    fn with_patience(
        options: &[&Arc<ScriptedKeychain>],
        registry: &Arc<Registry>,
        tokens: Arc<Script>,
        patience: Duration,
    ) -> Self {
        let options = options.iter().map(|option| Arc::clone(option) as Arc<dyn Keychain>).collect();
        let settings = Settings { patience, ..Settings::default() };
        let auth = Authenticator::new(KeychainChain::new(options), Arc::new(AuthBoard::new()), settings);
        let (image, time) = ("reg.example/team/app:1".to_owned(), Duration::from_secs(30));
        Self { auth, registry: Arc::clone(registry), tokens, image, time }
    }

    fn attempt(&self) -> AuthAttempt {
        let image: soci_oci::ImageRef = self.image.parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        self.auth.attempt(scope, Access::Pull, (Instant::now() + self.time).into_std())
    }

    /// Sends one request as the registry client does, which asks again as long as that is worth while.
    async fn request(&self) -> Result<(), AuthError> {
        let (begun, mut attempt) = (Instant::now(), self.attempt());
        loop {
            let since = self.auth.board().latest();
            let result = self.ask(&mut attempt).await;
            let (patient, deadline) = (Some(begun.into_std()), (begun + self.time).into_std());
            if !attempt.may_heal() || !self.auth.wait_for_news(since, patient, deadline).await {
                return result;
            }
        }
    }

    async fn ask(&self, attempt: &mut AuthAttempt) -> Result<(), AuthError> {
        let http: Arc<dyn TokenHttp> = Arc::clone(&self.tokens) as _;
        loop {
            let header = attempt.authorization(&http).await?;
            let (status, headers, body) = self.registry.answer(header.as_ref());
            tokio::task::yield_now().await;
            if status == 200 {
                attempt.accepted(StatusCode::OK);
                return Ok(());
            }
            let status = StatusCode::from_u16(status).unwrap();
            match attempt.refused(Refusal { status, headers: &headers, body: body.as_bytes() }, &http).await?
            {
                Next::Retry => {}
                Next::Final(denied) => return Err(denied.into()),
            }
        }
    }

    async fn denied(&self) -> Denied {
        match self.request().await {
            Err(AuthError::Denied(denied)) => denied,
            other => panic!("{other:?}"),
        }
    }
}

fn no_tokens() -> Arc<Script> {
    Arc::new(Script::new([]))
}

fn option(name: &'static str, pairs: &[(&str, &str)]) -> Arc<ScriptedKeychain> {
    ScriptedKeychain::new(name, pairs.iter().map(|(name, password)| basic(name, password)).collect())
}

/// The three options of the daemon, each with the pairs given.
fn daemon(d: &[(&str, &str)], c: &[(&str, &str)], k: &[(&str, &str)]) -> [Arc<ScriptedKeychain>; 3] {
    [option("docker-config", d), option("cri", c), option("kubernetes-secrets", k)]
}

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
            "docker login",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}

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
async fn t07_an_empty_entry_falls_through() {
    let options = [option("docker-config", &[("", "")]), option("cri", &[("c", "c")])];
    let registry = Registry::new(BASIC, &["c:c"]);
    Stack::new(&options.each_ref(), &registry, no_tokens()).request().await.unwrap();
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
            text.starts_with("incomplete credential from docker-config for https://reg.example"),
            "{text}"
        );
        assert_eq!(registry.log(), [""]);
    }
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
async fn t107_a_hundred_requests_at_once_fetch_one_token() {
    let d = option("docker-config", &[("u", "p")]);
    let registry = Registry::new(BEARER, &["Bearer T-u"]);
    let stack = Arc::new(Stack::new(&[&d], &registry, token_server(&["u:p"], true)));
    let requests: Vec<_> = (0..100)
        .map(|_| {
            let stack = Arc::clone(&stack);
            tokio::spawn(async move { stack.request().await })
        })
        .collect();
    for request in requests {
        request.await.unwrap().unwrap();
    }
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

#[tokio::test(start_paused = true)]
async fn a_refused_credential_rests_so_that_many_requests_do_not_lock_an_account() {
    let d = option("docker-config", &[("u", "wrong")]);
    let registry = Registry::new(BASIC, &[]);
    let stack = Stack::new(&[&d], &registry, no_tokens());
    for _ in 0..1000 {
        stack.denied().await;
    }
    assert_eq!(registry.log().iter().filter(|header| *header == "u:wrong").count(), 1);
    assert_eq!(stack.denied().await.reason, Reason::Resting);
    tokio::time::advance(Duration::from_secs(2)).await;
    stack.denied().await;
    assert_eq!(registry.log().iter().filter(|header| *header == "u:wrong").count(), 2);
    stack.auth.board().bump("reg.example");
    stack.denied().await;
    assert_eq!(registry.log().iter().filter(|header| *header == "u:wrong").count(), 3, "news end the rest");
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
async fn r5_to_r9_the_order_is_that_of_the_chain() {
    let options = daemon(&[], &[], &[]);
    let chain = KeychainChain::new(options.iter().map(|option| Arc::clone(option) as _).collect());
    assert_eq!(chain.names(), ["docker-config", "cri", "kubernetes-secrets"]);
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

/// A stack over a real `config.json` in a directory of its own.
fn over_a_file(registry: &Arc<Registry>, tokens: Arc<Script>) -> (tempfile::TempDir, Stack) {
    use crate::keychain::docker_config::{self, DockerConfigKeychain, Environment};
    let directory = tempfile::TempDir::new().unwrap();
    let docker_config = Some(directory.path().to_owned());
    let board = Arc::new(AuthBoard::new());
    let environment = Environment { docker_config, ..Environment::default() };
    let keychain =
        DockerConfigKeychain::new(environment, Arc::clone(&board), docker_config::Settings::default());
    let settings = Settings { patience: Duration::ZERO, ..Settings::default() };
    let auth = Authenticator::new(KeychainChain::new(vec![Arc::new(keychain)]), board, settings);
    (directory, Stack { auth, ..Stack::new(&[], registry, tokens) })
}

fn log_in(directory: &tempfile::TempDir, name: &str, password: &str) {
    let json = serde_json::json!({"auths": {"reg.example:443": {"username": name, "password": password}}});
    let new = directory.path().join("new");
    std::fs::write(&new, json.to_string()).unwrap();
    std::fs::rename(new, directory.path().join("config.json")).unwrap();
}

#[tokio::test]
async fn t47_t48_a_login_and_a_rotated_password_take_effect_within_the_next_request() {
    let registry = Registry::new(BASIC, &["u:1"]);
    let (directory, stack) = over_a_file(&registry, no_tokens());
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
    let (directory, stack) = over_a_file(&registry, token_server(&["a:1", "b:2"], true));
    log_in(&directory, "a", "1");
    stack.request().await.unwrap();
    registry.accept_only("Bearer T-b");
    log_in(&directory, "b", "2");
    stack.request().await.unwrap();
    assert_eq!(registry.log().last().unwrap(), "Bearer T-b");
}

#[tokio::test]
async fn t10_an_option_that_fails_does_not_stop_a_public_image() {
    let d = ScriptedKeychain::failing("docker-config", "docker-credential-x: exit status: 2");
    let registry = Registry::new(BEARER, &["Bearer T-anonymous"]);
    Stack::new(&[&d], &registry, token_server(&[], true)).request().await.unwrap();
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
