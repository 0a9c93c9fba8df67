//! Authentication end to end: challenges, tokens, expiry, redirects, mirrors.

use std::time::Duration;

use soci_auth::{Credential, Secret};
use soci_oci::{BlobSource, Descriptor, Digest, FetchErrorKind, media_type};
use soci_registry::Repository;
use soci_registry::settings::{Insecure, Mirror, MirrorCredentials};
use soci_testkit::{
    Action, AuthMode, ExpiresIn, Fault, Listener, Matcher, Options, PostSupport, TestRegistry, TokenField,
    TokenOptions,
};

use crate::common::{Client, basic, context, digest, pattern, read, start};

const USER: &str = "u";
const PASSWORD: &str = "hunter2";

struct Case {
    registry: TestRegistry,
    client: Client,
    blob: std::sync::Arc<dyn BlobSource>,
    repository: Repository,
}

async fn case(mode: AuthMode) -> Case {
    with(Options::default().auth(mode, USER, PASSWORD)).await
}

async fn with(options: Options) -> Case {
    let (registry, client) = start(options).await;
    client.keychain.set(&registry.host(), vec![basic(USER, PASSWORD)]);
    let name = registry.put_blob("team/app", pattern(50_000));
    let repository = client.repository(&registry.image("team/app:1"));
    let blob = repository.blob(&digest(&name), 50_000);
    Case { registry, client, blob, repository }
}

impl Case {
    async fn reads(&self, at: u64) {
        let found = read(&self.blob, at..at + 100, &context()).await.unwrap();
        let at = usize::try_from(at).unwrap();
        assert!(found == pattern(50_000)[at..at + 100]);
    }

    fn tokens(&self) -> usize {
        self.registry.log_of(Listener::Token).len()
    }
}

#[tokio::test]
async fn basic_and_bearer_registries_are_served() {
    for mode in [AuthMode::Basic, AuthMode::Bearer, AuthMode::Ecr] {
        let case = case(mode).await;
        case.reads(0).await;
        case.reads(500).await;
        let log = case.registry.log_of(Listener::Registry);
        assert_eq!(log.last().unwrap().user.as_deref(), Some(USER), "{mode:?}");
        let refused = log.iter().filter(|seen| seen.status != 206).count();
        assert!(refused <= 1, "{mode:?}: the challenge is remembered, {refused} refusals");
    }
}

#[tokio::test]
async fn t104_the_strongest_known_challenge_is_answered() {
    let case = case(AuthMode::Basic).await;
    case.registry.set_challenges(vec!["Negotiate".into(), "Basic realm=\"x\"".into()]);
    case.reads(0).await;
    assert_eq!(case.tokens(), 0);

    let case = self::case(AuthMode::Bearer).await;
    let both = "Basic realm=\"x\", Bearer realm=\"{token}\",service=\"s\",scope=\"repository:team/app:pull\"";
    case.registry.set_challenges(vec![both.into()]);
    case.reads(0).await;
    assert_eq!(case.tokens(), 1);
}

#[tokio::test]
async fn t105_the_realms_query_and_the_scopes_comma_survive() {
    let case = case(AuthMode::Bearer).await;
    let challenge =
        "Bearer realm=\"{token}?account=a%20b\",service=\"s s\",scope=\"repository:team/app:pull,push\"";
    case.registry.set_challenges(vec![challenge.into()]);
    case.reads(0).await;
    let query = case.registry.log_of(Listener::Token)[0].request.query.clone();
    assert!(query.starts_with("account=a%20b&"), "{query}");
    let pairs: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let scope = pairs.iter().find(|(key, _)| key == "scope").unwrap();
    assert_eq!(scope.1, "repository:team/app:pull,push", "{query}");
    assert!(pairs.contains(&("service".into(), "s s".into())), "{query}");
}

#[tokio::test]
async fn t106_tokens_without_expiry_and_in_the_other_field_are_used_until_refused() {
    let case = case(AuthMode::Bearer).await;
    case.registry.set_tokens(TokenOptions {
        field: TokenField::AccessToken,
        expires_in: ExpiresIn::Omitted,
        ..TokenOptions::default()
    });
    for at in 0..4 {
        case.reads(at * 100).await;
    }
    assert_eq!(case.tokens(), 1);
    case.registry.revoke_tokens();
    case.reads(1_000).await;
    assert_eq!(case.tokens(), 2);
}

#[tokio::test]
async fn t107_a_hundred_refusals_make_one_token_request() {
    let case = case(AuthMode::Bearer).await;
    case.registry.shape(Duration::from_millis(20), None);
    let reads = (0..100).map(|at| case.reads(at * 100));
    futures::future::join_all(reads).await;
    assert_eq!(case.tokens(), 1);
}

#[tokio::test]
async fn t108_a_token_that_expires_after_the_password_was_rotated_is_renewed() {
    let case = case(AuthMode::Bearer).await;
    case.reads(0).await;
    case.registry.rotate_password(USER, "new");
    case.registry.revoke_tokens();
    case.client.keychain.set(&case.registry.host(), vec![basic(USER, "new")]);
    case.client.board.bump(&case.registry.host());
    case.reads(100).await;
}

#[tokio::test]
async fn t109_an_expired_ecr_password_is_looked_up_again() {
    let case = case(AuthMode::Ecr).await;
    case.reads(0).await;
    case.registry.expire_password(USER);
    case.registry.rotate_password("AWS", "fresh");
    case.client.keychain.set(&case.registry.host(), vec![basic("AWS", "fresh")]);
    case.registry.clear_log();
    case.reads(100).await;
    let log = case.registry.log_of(Listener::Registry);
    assert_eq!(log.iter().map(|seen| seen.status).collect::<Vec<_>>(), [403, 206]);
}

#[tokio::test]
async fn t110_a_403_with_nothing_else_to_present_is_returned() {
    let case = case(AuthMode::Basic).await;
    case.registry.restrict(USER, "other", &["pull"]);
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Denied, "{error}");
    let statuses: Vec<u16> = case.registry.log().iter().map(|seen| seen.status).collect();
    assert_eq!(statuses, [401, 403]);
}

#[tokio::test]
async fn t112_no_credential_leaves_its_origin() {
    let case =
        with(Options::default().auth(AuthMode::Bearer, USER, PASSWORD).storage(Duration::from_secs(60)))
            .await;
    case.reads(0).await;
    let storage = case.registry.log_of(Listener::Storage);
    assert_eq!(storage.len(), 1, "another port of the same host");
    assert_eq!((storage[0].header("authorization"), storage[0].status), (None, 206));

    let options = Options {
        ca: Some(case.registry.ca().clone()),
        host_name: Some("localhost".to_owned()),
        ..Options::default()
    };
    let elsewhere = TestRegistry::start(options).await.unwrap();
    let name = elsewhere.put_blob("team/app", pattern(50_000));
    case.registry.fault(
        Fault::new(
            Matcher::blobs().and(Matcher::on(Listener::Registry)),
            Action::Redirect(format!("{}/v2/team/app/blobs/{name}", elsewhere.url(Listener::Registry))),
        )
        .times(1),
    );
    let other = case.repository.blob(&digest(&name), 50_000);
    assert!(read(&other, 0..10, &context()).await.unwrap() == pattern(50_000)[..10]);
    let found = elsewhere.log();
    assert_eq!(found.len(), 1, "another host");
    assert_eq!((found[0].header("authorization"), found[0].status), (None, 206));

    let plain = TestRegistry::start(Options::plain()).await.unwrap();
    let other = case.repository.blob(&Digest::of(&pattern(50_000)), 50_000);
    case.registry.fault(Fault::new(
        Matcher::blobs().and(Matcher::on(Listener::Registry)),
        Action::Redirect(format!("{}/x", plain.url(Listener::Registry))),
    ));
    let error = read(&other, 0..10, &context()).await.unwrap_err();
    assert!(error.to_string().contains("plain http"), "{error}");
    assert!(plain.log().is_empty(), "nothing was sent there");
}

#[tokio::test]
async fn t112_what_was_dropped_is_not_sent_again_when_the_chain_comes_back() {
    let case = case(AuthMode::Basic).await;
    case.reads(0).await;
    let detour = TestRegistry::start(Options { ca: Some(case.registry.ca().clone()), ..Options::default() })
        .await
        .unwrap();
    let home = format!(
        "{}/v2/team/app/blobs/{}",
        case.registry.url(Listener::Registry),
        Digest::of(&pattern(50_000))
    );
    case.registry.clear_log();
    let authorised = Matcher::new(|request| request.headers.contains_key("authorization"));
    case.registry.fault(Fault::new(
        Matcher::blobs().and(authorised),
        Action::Redirect(format!("{}/x", detour.url(Listener::Registry))),
    ));
    detour.fault(Fault::new(Matcher::any(), Action::Redirect(home)));
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Denied, "{error}");
    assert_eq!(detour.log()[0].header("authorization"), None);
    let back = case.registry.log_of(Listener::Registry);
    assert!(back[0].header("authorization").is_some());
    assert_eq!(back[1].header("authorization"), None, "the way back is not home");
}

#[tokio::test]
async fn t113_a_redirect_target_is_never_answered_a_challenge() {
    let case =
        with(Options::default().auth(AuthMode::Basic, USER, PASSWORD).storage(Duration::from_secs(60))).await;
    let headers = vec![("www-authenticate".to_owned(), "Basic realm=\"give me\"".to_owned())];
    let challenge = Action::Status { status: 401, headers, body: Default::default() };
    case.registry.fault(Fault::new(Matcher::on(Listener::Storage), challenge));
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Denied);
    let storage = case.registry.log_of(Listener::Storage);
    assert!(!storage.is_empty());
    assert!(storage.iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn t114_hostile_realms_get_nothing() {
    let case = case(AuthMode::Bearer).await;
    let elsewhere = TestRegistry::start(Options::plain()).await.unwrap();
    for realm in [
        "http://169.254.169.254/latest".to_owned(),
        format!("{}/token", elsewhere.url(Listener::Token)),
        format!("https://user:pw@{}/token", case.registry.host()),
        "https://[::ffff:169.254.169.254]/token".to_owned(),
        "file:///etc/passwd".to_owned(),
    ] {
        case.registry.set_challenges(vec![format!("Bearer realm=\"{realm}\",service=\"s\"")]);
        let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Denied, "{realm}: {error}");
        assert!(!format!("{error:?}").contains(PASSWORD));
    }
    assert!(elsewhere.log().is_empty());
    assert_eq!(case.tokens(), 0);
}

#[tokio::test]
async fn token_requests_follow_no_redirect_to_another_origin() {
    let case = case(AuthMode::Bearer).await;
    let thief = TestRegistry::start(Options { ca: Some(case.registry.ca().clone()), ..Options::default() })
        .await
        .unwrap();
    case.registry.fault(Fault::new(
        Matcher::on(Listener::Token),
        Action::Redirect(format!("{}/token", thief.url(Listener::Token))),
    ));
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert!(error.to_string().contains("another origin"), "{error}");
    assert!(thief.log().is_empty());
}

#[tokio::test]
async fn t115_addresses_of_a_descriptor_are_asked_anonymously() {
    let case = case(AuthMode::Basic).await;
    let foreign = TestRegistry::start(Options::plain()).await.unwrap();
    let content = pattern(1_000);
    let name = foreign.put_blob("f", content.clone());
    let mut descriptor = Descriptor::new("x", digest(&name), 1_000);
    descriptor.urls = vec![format!("{}/v2/f/blobs/{name}", foreign.url(Listener::Registry))];
    assert!(case.repository.blob_bytes(&descriptor, 4_096, &context()).await.unwrap() == content);
    assert_eq!(foreign.log()[0].header("authorization"), None);

    foreign.clear_log();
    foreign.set_auth(AuthMode::Basic);
    let error = case.repository.blob_bytes(&descriptor, 4_096, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("401"), "{error}");
    assert_eq!(foreign.log().len(), 1);
    assert_eq!(foreign.log()[0].header("authorization"), None);
}

#[tokio::test]
async fn t117_a_token_endpoint_that_fails_once_is_asked_again() {
    let case = case(AuthMode::Bearer).await;
    case.registry.fault(Fault::new(Matcher::on(Listener::Token), Action::status(500)).times(1));
    case.reads(0).await;
    assert_eq!(case.tokens(), 2);
}

#[tokio::test]
async fn identity_tokens_are_exchanged_by_post_and_never_sent_as_a_password() {
    let case = case(AuthMode::Bearer).await;
    case.registry.add_identity_token("refresh-me", USER);
    let identity = || Credential::IdentityToken(Secret::new("refresh-me"));
    case.client.keychain.set(&case.registry.host(), vec![identity()]);
    case.reads(0).await;
    let seen = &case.registry.log_of(Listener::Token)[0];
    assert_eq!(seen.request.method, http::Method::POST);
    assert!(String::from_utf8_lossy(&seen.body).contains("grant_type=refresh_token"));
    assert_eq!(seen.header("authorization"), None);

    let case = self::case(AuthMode::Bearer).await;
    case.registry.set_tokens(TokenOptions { post: PostSupport::Refused(405), ..TokenOptions::default() });
    case.client.keychain.set(&case.registry.host(), vec![identity()]);
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert!(!error.to_string().contains("refresh-me"), "{error}");
    assert!(case.registry.log_of(Listener::Token).iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn a_refused_credential_is_named_by_its_option_and_never_shown() {
    for mode in [AuthMode::Basic, AuthMode::Bearer] {
        let case = case(mode).await;
        case.registry.rotate_password(USER, "other");
        let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Denied);
        let text = error.to_string();
        for part in [case.registry.host().as_str(), "team/app", "script", "401"] {
            assert!(text.contains(part), "{mode:?} {part}: {text}");
        }
        assert!(!format!("{error:?} {error}").contains(PASSWORD), "{text}");
    }
}

#[tokio::test]
async fn without_any_credential_the_message_says_what_to_do() {
    let case = case(AuthMode::Bearer).await;
    case.client.keychain.set(&case.registry.host(), Vec::new());
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Denied, "{error}");
    assert!(error.to_string().contains("log in"), "{error}");
}

#[tokio::test]
async fn t118_a_mirror_gets_the_registrys_credentials_only_when_told_so() {
    for (credentials, expected) in
        [(MirrorCredentials::Own, None), (MirrorCredentials::Forwarded, Some(USER))]
    {
        let registry =
            TestRegistry::start(Options::default().auth(AuthMode::Basic, USER, PASSWORD)).await.unwrap();
        let ca = Some(registry.ca().clone());
        let mirror =
            TestRegistry::start(Options { ca, ..Options::default().auth(AuthMode::Basic, USER, PASSWORD) })
                .await
                .unwrap();
        let content = pattern(1_000);
        registry.put_blob("team/app", content.clone());
        let name = mirror.put_blob("team/app", content.clone());
        let client = Client::new(&[&registry], |settings, _| {
            let address = mirror.url(Listener::Registry);
            let parsed = Mirror::parse(&address, Insecure::No).unwrap().credentials(credentials);
            settings.mirrors.insert(registry.host(), vec![parsed]);
        });
        client.keychain.set(&registry.host(), vec![basic(USER, PASSWORD)]);
        let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 1_000);
        assert!(read(&blob, 0..1_000, &context()).await.unwrap() == content);
        let users: Vec<Option<String>> = mirror.log().into_iter().map(|seen| seen.user).collect();
        assert!(
            users.iter().flatten().all(|user| Some(user.as_str()) == expected),
            "{credentials:?} {users:?}"
        );
        assert_eq!(users.iter().any(Option::is_some), expected.is_some(), "{credentials:?}");
        assert_eq!(registry.log().is_empty(), expected.is_some(), "{credentials:?}");
    }
}

#[tokio::test]
async fn a_mirrors_own_credentials_stay_there() {
    let registry =
        TestRegistry::start(Options::default().auth(AuthMode::Basic, USER, PASSWORD)).await.unwrap();
    let ca = Some(registry.ca().clone());
    let mirror = TestRegistry::start(Options { ca, ..Options::default().auth(AuthMode::Basic, "m", "m") })
        .await
        .unwrap();
    let name = registry.put_blob("team/app", pattern(1_000));
    let client = Client::new(&[&registry], |settings, _| {
        let parsed = Mirror::parse(&mirror.url(Listener::Registry), Insecure::No).unwrap();
        settings.mirrors.insert(registry.host(), vec![parsed]);
    });
    client.keychain.set(&registry.host(), vec![basic(USER, PASSWORD)]);
    client.keychain.set(&mirror.host(), vec![basic("m", "m")]);
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 1_000);
    // The mirror lets us in and does not have the blob.
    read(&blob, 0..1_000, &context()).await.unwrap();
    assert!(mirror.log().iter().filter_map(|seen| seen.user.as_deref()).all(|user| user == "m"));
    assert!(mirror.log().iter().any(|seen| seen.status == 404));
    assert!(registry.log().iter().filter_map(|seen| seen.user.as_deref()).all(|user| user == USER));
}

#[tokio::test]
async fn a_manifest_and_its_referrers_use_the_same_credentials() {
    let case = case(AuthMode::Bearer).await;
    let index = br#"{"schemaVersion":2,"manifests":[]}"#;
    let name = case.registry.put_manifest("team/app", "1", media_type::OCI_INDEX, index.as_slice());
    let found = case.repository.resolve("1", &context()).await.unwrap();
    assert_eq!(found.digest.to_string(), name);
    assert!(case.repository.referrers(&found.digest, "x", &context()).await.unwrap().is_empty());
    assert_eq!(case.tokens(), 1, "one scope, one token");
}
