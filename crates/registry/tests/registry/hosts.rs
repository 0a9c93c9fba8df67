//! The list of hosts: mirrors, `hosts.toml`, TLS per host, schemes.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use soci_oci::{FetchErrorKind, media_type};
use soci_registry::Settings;
use soci_registry::settings::{Insecure, Mirror, PlainHttp, Verify};
use soci_testkit::tls::{ClientCertificates, TestCa};
use soci_testkit::{Action, AuthMode, Fault, Listener, Matcher, Options, TestRegistry};

use crate::common::{Client, basic, context, digest, pattern, read, within};

const INDEX: &[u8] = br#"{"schemaVersion":2,"manifests":[]}"#;

/// A registry and a mirror of one authority, both with the same blob and tag.
async fn pair(mirror: Options) -> (TestRegistry, TestRegistry, String) {
    let registry = TestRegistry::start(Options::default()).await.unwrap();
    let ca = Some(Arc::clone(registry.ca()));
    let mirror = TestRegistry::start(Options { ca, ..mirror }).await.unwrap();
    let mut name = String::new();
    for server in [&registry, &mirror] {
        name = server.put_blob("team/app", pattern(10_000));
        server.put_manifest("team/app", "1", media_type::OCI_INDEX, INDEX);
    }
    (registry, mirror, name)
}

fn mirrored(registry: &TestRegistry, address: String) -> Client {
    patiently_mirrored(registry, address, Duration::ZERO)
}

fn patiently_mirrored(registry: &TestRegistry, address: String, patience: Duration) -> Client {
    Client::with_patience(&[registry], patience, |settings, _| {
        let mirror = Mirror::parse(&address, Insecure::No).unwrap();
        settings.mirrors.insert(registry.host(), vec![mirror]);
    })
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_told_for_whom() {
    let (registry, mirror, name) = pair(Options::default()).await;
    let client = mirrored(&registry, mirror.url(Listener::Registry));
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    read(&blob, 0..10, &context()).await.unwrap();
    assert!(registry.log().is_empty());
    let query = mirror.log()[0].request.query.clone();
    assert_eq!(query, format!("ns={}", registry.host().replace(':', "%3A")));
}

#[tokio::test]
async fn that_nothing_refers_to_an_image_is_not_taken_from_a_mirror() {
    let (registry, mirror, _) = pair(Options::default()).await;
    let client = mirrored(&registry, mirror.url(Listener::Registry));
    let subject = digest(&registry.put_manifest("team/app", "1", media_type::OCI_INDEX, INDEX));
    let referrer = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","artifactType":"application/x","config":{{"mediaType":"application/x","digest":"{subject}","size":2}},"layers":[],"subject":{{"mediaType":"{}","digest":"{subject}","size":{}}}}}"#,
        media_type::OCI_MANIFEST,
        media_type::OCI_INDEX,
        INDEX.len(),
    );
    let named = soci_oci::Digest::of(referrer.as_bytes()).to_string();
    registry.put_manifest("team/app", &named, media_type::OCI_MANIFEST, referrer.clone());
    let repository = client.repository(&registry.image("team/app"));
    let found = repository.referrers(&subject, "application/x", &context()).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((mirror.log().len(), registry.log().len()), (1, 1), "the mirror was asked first");
    mirror.put_manifest("team/app", &named, media_type::OCI_MANIFEST, referrer);
    assert_eq!(repository.referrers(&subject, "application/x", &context()).await.unwrap().len(), 1);
    assert_eq!(registry.log().len(), 1, "a mirror that lists some is believed");
}

#[tokio::test]
async fn a_mirror_that_is_down_costs_one_attempt() {
    let (registry, mirror, name) = pair(Options::default()).await;
    let client = mirrored(&registry, mirror.url(Listener::Registry));
    mirror.shutdown().await;
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    for at in 0..5 {
        assert!(read(&blob, at..at + 100, &context()).await.is_ok());
    }
    assert_eq!(registry.log().len(), 5);
}

#[tokio::test]
async fn a_mirror_that_refuses_our_credentials_is_asked_last_for_a_while() {
    let (registry, mirror, name) = pair(Options::default().auth(AuthMode::Basic, "m", "right")).await;
    let client = mirrored(&registry, mirror.url(Listener::Registry));
    client.keychain.set(&mirror.host(), vec![basic("m", "wrong")]);
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    read(&blob, 0..10, &context()).await.unwrap();
    let asked = mirror.log().len();
    read(&blob, 10..20, &context()).await.unwrap();
    assert_eq!(mirror.log().len(), asked);
    assert_eq!(registry.log().len(), 2);
}

#[tokio::test]
async fn nobody_waits_for_a_mirror_that_refuses_while_the_registry_may_serve() {
    // Longer than the test lasts: a request that waits at the mirror fails by its deadline.
    let patience = Duration::from_secs(60);
    let refuses = Options::default().auth(AuthMode::Basic, "m", "right");
    let (registry, mirror, name) = pair(refuses).await;
    let client = patiently_mirrored(&registry, mirror.url(Listener::Registry), patience);
    client.keychain.set(&mirror.host(), vec![basic("m", "wrong")]);
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    read(&blob, 0..10, &within(Duration::from_secs(20))).await.unwrap();
    assert!(mirror.log().iter().any(|seen| seen.status == 401), "the mirror was asked");
}

#[tokio::test]
async fn r36_a_request_that_all_hosts_refuse_waits_once_for_all_of_them() {
    const PATIENCE: Duration = Duration::from_secs(3);
    let refuses = || Options::default().auth(AuthMode::Basic, "u", "right");
    let registry = TestRegistry::start(refuses()).await.unwrap();
    let options = Options { ca: Some(Arc::clone(registry.ca())), ..refuses() };
    let mirrors =
        [TestRegistry::start(options.clone()).await.unwrap(), TestRegistry::start(options).await.unwrap()];
    let client = Client::with_patience(&[&registry], PATIENCE, |settings, _| {
        let mirror =
            |host: &TestRegistry| Mirror::parse(&host.url(Listener::Registry), Insecure::No).unwrap();
        settings.mirrors.insert(registry.host(), mirrors.iter().map(mirror).collect());
    });
    for host in mirrors.iter().chain([&registry]) {
        client.keychain.set(&host.host(), vec![basic("u", "wrong")]);
    }
    let name = registry.put_blob("team/app", pattern(10));
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10);
    let begun = Instant::now();
    let error = read(&blob, 0..10, &within(Duration::from_secs(60))).await.unwrap_err();
    let waited = begun.elapsed();
    assert_eq!(error.kind(), FetchErrorKind::Denied);
    assert!(waited >= PATIENCE && waited < PATIENCE * 2, "{waited:?}");
    for host in mirrors.iter().chain([&registry]) {
        assert!(error.to_string().contains(&host.host()), "{error}");
        assert!(
            host.log().len() <= 3,
            "a host that refused is not asked again without news: {:?}",
            host.log()
        );
    }
}

#[tokio::test]
async fn r37_news_of_any_host_heal_a_request_that_all_refuse_and_other_hosts_are_left_alone() {
    let refuses = || Options::default().auth(AuthMode::Basic, "u", "right");
    let registry = TestRegistry::start(refuses()).await.unwrap();
    let ca = || Some(Arc::clone(registry.ca()));
    let mirror = TestRegistry::start(Options { ca: ca(), ..refuses() }).await.unwrap();
    let empty = TestRegistry::start(Options { ca: ca(), ..Options::default() }).await.unwrap();
    let content = pattern(10_000);
    let name = registry.put_blob("team/app", content.clone());
    mirror.put_blob("team/app", content);
    for heals in [&registry, &mirror] {
        let client = Client::with_patience(&[&registry], Duration::from_secs(60), |settings, _| {
            let hosts = [&mirror, &empty].map(|host| host.url(Listener::Registry));
            let mirrors = hosts.iter().map(|url| Mirror::parse(url, Insecure::No).unwrap()).collect();
            settings.mirrors.insert(registry.host(), mirrors);
        });
        for host in [&registry, &mirror] {
            client.keychain.set(&host.host(), vec![basic("u", "wrong")]);
        }
        [&registry, &mirror, &empty].iter().for_each(|host| host.clear_log());
        let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
        let news = async {
            while registry.log().iter().filter(|seen| seen.status == 401).count() < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            client.keychain.set(&heals.host(), vec![basic("u", "right")]);
            client.board.bump(&heals.host());
        };
        let context = within(Duration::from_secs(20));
        let (read, ()) = tokio::join!(read(&blob, 0..10, &context), news);
        read.unwrap();
        assert!(heals.log().last().is_some_and(|seen| seen.status == 206));
        assert_eq!(empty.log().len(), 1, "a host that has not got it is not asked again while waiting");
    }
}

#[tokio::test]
async fn whatever_a_mirror_refuses_the_next_host_is_asked() {
    for status in [400, 401, 403, 404, 429, 500, 503] {
        let (registry, mirror, name) = pair(Options::default()).await;
        let client = mirrored(&registry, mirror.url(Listener::Registry));
        mirror.fault(Fault::new(Matcher::any(), Action::status(status)));
        let repository = client.repository(&registry.image("team/app:1"));
        let blob = repository.blob(&digest(&name), 10_000);
        assert!(read(&blob, 0..100, &context()).await.is_ok(), "{status}");
        assert!(repository.resolve("1", &context()).await.is_ok(), "{status}");
        assert!(repository.manifest_by_tag("1", &context()).await.is_ok(), "{status}");
        assert!(!mirror.log().is_empty());
    }
}

#[tokio::test]
async fn a_mirror_that_spoils_ranges_is_passed_over() {
    for action in [Action::IgnoreRange, Action::WrongRange(3), Action::redirect_loop(), Action::Hangup] {
        let (registry, mirror, name) = pair(Options::default()).await;
        let client = mirrored(&registry, mirror.url(Listener::Registry));
        mirror.fault(Fault::new(Matcher::any(), action.clone()));
        let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
        let found = read(&blob, 5..100, &context()).await.unwrap();
        assert!(found == pattern(10_000)[5..100], "{action:?}");
    }
}

#[tokio::test]
async fn a_slow_mirror_is_given_up_by_its_own_limit() {
    let (registry, mirror, name) = pair(Options::default()).await;
    let client = Client::new(&[&registry], |settings, _| {
        let parsed = Mirror::parse(&mirror.url(Listener::Registry), Insecure::No).unwrap();
        settings.mirrors.insert(registry.host(), vec![parsed.request_timeout(1)]);
    });
    mirror.fault(Fault::new(Matcher::any(), Action::Delay(Duration::from_secs(60))));
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    read(&blob, 0..10, &within(Duration::from_secs(20))).await.unwrap();
    assert_eq!(registry.log().len(), 1);
}

#[tokio::test]
async fn all_hosts_are_named_when_all_fail() {
    let (registry, mirror, name) = pair(Options::default()).await;
    let client = mirrored(&registry, mirror.url(Listener::Registry));
    mirror.fault(Fault::new(Matcher::any(), Action::status(500)));
    registry.delete_blob("team/app", &name);
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    let error = read(&blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::NotFound, "the registry decides: {error}");
    for host in [mirror.host(), registry.host()] {
        assert!(error.to_string().contains(&host), "{error}");
    }
    assert_eq!(mirror.log().len(), 1, "a definite answer is not retried");
}

#[tokio::test]
async fn capabilities_decide_who_is_asked_for_what() {
    let (registry, mirror, name) = pair(Options::default()).await;
    let client = Client::new(&[&registry], |_, _| {});
    client.hosts_toml(
        &registry.host(),
        &format!("[host.\"{}\"]\ncapabilities = [\"pull\"]\n", mirror.url(Listener::Registry)),
    );
    let repository = client.repository(&registry.image("team/app:1"));
    repository.resolve("1", &context()).await.unwrap();
    assert!(mirror.log().is_empty(), "no tags are resolved at a host that only pulls");
    read(&repository.blob(&digest(&name), 10_000), 0..5, &context()).await.unwrap();
    assert_eq!(mirror.log().len(), 1);
    repository.referrers(&digest(&name), "x", &context()).await.unwrap();
    assert!(!repository.has_blob(&digest(&format!("sha256:{}", "0".repeat(64))), &context()).await.unwrap());
    assert_eq!(mirror.log().len(), 1, "neither referrers nor what belongs to pushing");
}

#[tokio::test]
async fn nobody_with_the_capability_is_an_error_that_says_where_to_look() {
    let (registry, _mirror, _) = pair(Options::default()).await;
    let client = Client::new(&[&registry], |_, _| {});
    let server = registry.url(Listener::Registry);
    client.hosts_toml(&registry.host(), &format!("server = \"{server}\"\ncapabilities = [\"pull\"]\n"));
    let error = client.repository(&registry.image("team/app:1")).resolve("1", &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Local);
    assert!(error.to_string().contains("hosts.toml"), "{error}");
}

#[tokio::test]
async fn hosts_toml_is_reloaded_without_restart() {
    let (registry, mirror, name) = pair(Options::default()).await;
    let client = Client::new(&[&registry], |_, _| {});
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    read(&blob, 0..5, &context()).await.unwrap();
    client.hosts_toml(&registry.host(), &format!("[host.\"{}\"]\n", mirror.url(Listener::Registry)));
    read(&blob, 0..5, &context()).await.unwrap();
    assert_eq!((registry.log().len(), mirror.log().len()), (1, 1));
    client.hosts_toml(&registry.host(), "[host.\"x\"]\n[host.\"x\"]\n");
    read(&blob, 0..5, &context()).await.unwrap();
    assert_eq!((registry.log().len(), mirror.log().len()), (2, 1), "an unusable file leaves the registry");
}

#[tokio::test]
async fn docker_hub_is_served_by_whom_hosts_toml_names() {
    let (registry, _mirror, name) = pair(Options::default()).await;
    let client = Client::new(&[&registry], |_, _| {});
    client.hosts_toml("docker.io", &format!("server = \"{}\"\n", registry.url(Listener::Registry)));
    let blob = client.repository("docker.io/team/app").blob(&digest(&name), 10_000);
    read(&blob, 0..5, &context()).await.unwrap();
    assert_eq!(registry.log()[0].request.query, "ns=docker.io");
}

#[tokio::test]
async fn tls_is_per_host_with_authority_and_client_certificate() {
    let options = Options { client_certificates: ClientCertificates::Required, ..Options::default() };
    let registry = TestRegistry::start(options.auth(AuthMode::Bearer, "u", "p")).await.unwrap();
    registry.set_storage(Some(Duration::from_secs(60)));
    let name = registry.put_blob("team/app", pattern(1_000));
    let client = Client::new(&[], |_, _| {});
    client.keychain.set(&registry.host(), vec![basic("u", "p")]);
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 1_000);
    let error = read(&blob, 0..5, &context()).await.unwrap_err();
    assert!(error.to_string().contains("TLS"), "{error}");

    let directory = client.dir.path().join("certs.d").join(registry.host().replace(':', "_") + "_");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("ca.crt"), registry.ca_pem()).unwrap();
    assert!(read(&blob, 0..5, &context()).await.is_err(), "the registry wants to know us");
    let identity = registry.ca().issue(&[]).unwrap();
    std::fs::write(directory.join("us.cert"), identity.certificate_pem).unwrap();
    std::fs::write(directory.join("us.key"), identity.key_pem).unwrap();
    read(&blob, 0..5, &context()).await.unwrap();
}

/// Writes a client certificate as `<name>.cert` and `<name>.key`.
fn write_identity(directory: &Path, name: &str, ca: &TestCa) {
    let identity = ca.issue(&[]).unwrap();
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join(format!("{name}.cert")), identity.certificate_pem).unwrap();
    std::fs::write(directory.join(format!("{name}.key")), identity.key_pem).unwrap();
}

#[tokio::test]
async fn of_several_client_certificates_the_one_that_the_server_takes_is_shown() {
    let options = Options { client_certificates: ClientCertificates::Required, ..Options::default() };
    let registry = TestRegistry::start(options).await.unwrap();
    let name = registry.put_blob("team/app", pattern(1_000));
    let other = TestCa::new("another authority").unwrap();
    let server = registry.url(Listener::Registry);
    let toml = |pairs: &str| format!("server = \"{server}\"\nca = \"ca.crt\"\nclient = [{pairs}]\n");
    let (good, bad) = ("[\"good.cert\", \"good.key\"]", "[\"bad.cert\", \"bad.key\"]");
    // By a file, in each place; and by Docker's layout, where the names decide the order.
    for (right, wrong, text) in [
        ("good", "bad", Some(toml(&format!("{good}, {bad}")))),
        ("good", "bad", Some(toml(&format!("{bad}, {good}")))),
        ("a", "z", None),
        ("z", "a", None),
    ] {
        let client = Client::new(&[], |_, _| {});
        let directory = client.dir.path().join("certs.d").join(registry.host());
        write_identity(&directory, right, registry.ca());
        write_identity(&directory, wrong, &other);
        std::fs::write(directory.join("ca.crt"), registry.ca_pem()).unwrap();
        if let Some(text) = &text {
            client.hosts_toml(&registry.host(), text);
        }
        let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 1_000);
        read(&blob, 0..5, &context()).await.unwrap_or_else(|error| panic!("{right} {text:?}: {error}"));
    }
}

#[tokio::test]
async fn an_unknown_authority_is_an_error_with_the_next_step_and_never_plain_http() {
    let (registry, _mirror, name) = pair(Options::default()).await;
    let client = Client::new(&[], |_, _| {});
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    let error = read(&blob, 0..5, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable);
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    assert!(error.to_string().contains("add its authority"), "{error}");
}

#[tokio::test]
async fn skip_verify_is_only_for_the_host_that_says_so() {
    let (registry, mirror, name) = pair(Options::default()).await;
    let client = Client::new(&[], |_, _| {});
    let address = mirror.url(Listener::Registry);
    client.hosts_toml(&registry.host(), &format!("[host.\"{address}\"]\nskip_verify = true\n"));
    let repository = client.repository(&registry.image("team/app"));
    read(&repository.blob(&digest(&name), 10_000), 0..5, &context()).await.unwrap();
    mirror.delete_blob("team/app", &name);
    let error = read(&repository.blob(&digest(&name), 10_000), 0..5, &context()).await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
}

/// A registry reached as `127.0.0.1`, whose certificate no client trusts, with a token server and a storage that it calls
/// `localhost`: another host.
async fn self_signed(auth: AuthMode) -> (TestRegistry, TestRegistry, String) {
    let registry = TestRegistry::start(Options::default().auth(auth, "u", "hunter2")).await.unwrap();
    let storage = Options { ca: Some(Arc::clone(registry.ca())), ..Options::default() };
    let storage = TestRegistry::start(storage).await.unwrap();
    registry.put_blob("team/app", pattern(10_000));
    let name = storage.put_blob("team/app", pattern(10_000));
    (registry, storage, name)
}

/// Returns a client that does not check the registry's own certificate, and whatever else `hosts.toml` says.
fn unchecked(registry: &TestRegistry, more: &str) -> Client {
    let client = Client::new(&[], |_, _| {});
    std::fs::write(client.dir.path().join("ca.pem"), registry.ca_pem()).unwrap();
    let server = registry.url(Listener::Registry);
    client.hosts_toml(&registry.host(), &format!("server = \"{server}\"\nskip_verify = true\n{more}"));
    client.keychain.set(&registry.host(), vec![basic("u", "hunter2")]);
    client
}

/// An authority that the operator added for the registry.
const WITH_CA: &str = "ca = \"../../ca.pem\"\n";

fn called_localhost(address: &str) -> String {
    address.replace("127.0.0.1", "localhost")
}

#[tokio::test]
async fn skip_verify_of_a_registry_sends_no_password_to_an_unchecked_token_server() {
    let (registry, _storage, name) = self_signed(AuthMode::Bearer).await;
    let token = registry.url(Listener::Token);
    let elsewhere = format!("Bearer realm=\"{}/token\",service=\"s\"", called_localhost(&token));
    registry.set_challenges(vec![elsewhere]);
    let tried = async |more: &str| {
        let client = unchecked(&registry, more);
        let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
        read(&blob, 0..5, &context()).await
    };
    let error = tried("").await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    assert!(registry.log_of(Listener::Token).is_empty(), "nothing was sent there");
    tried(WITH_CA).await.unwrap();
    // A token server can be configured as a registry is, whatever registry leads to it.
    let client = unchecked(&registry, "");
    let host = called_localhost(&token).replace("https://", "");
    client.hosts_toml(&host, "skip_verify = true\n");
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    read(&blob, 0..5, &context()).await.unwrap();
    registry.set_challenges(vec![format!("Bearer realm=\"{token}/token\",service=\"s\"")]);
    tried("").await.unwrap();
}

#[tokio::test]
async fn skip_verify_of_a_registry_leaves_the_storage_it_redirects_to_checked() {
    let (registry, storage, name) = self_signed(AuthMode::None).await;
    let there = format!("{}/v2/team/app/blobs/{name}", storage.url(Listener::Registry));
    let redirect = |to: String| {
        registry.clear_faults();
        registry.fault(Fault::new(Matcher::blobs(), Action::Redirect(to)));
    };
    let repository = |client: &Client| client.repository(&registry.image("team/app"));
    redirect(called_localhost(&there));
    let client = unchecked(&registry, "");
    let blob = repository(&client).blob(&digest(&name), 10_000);
    let error = read(&blob, 0..5, &context()).await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    assert!(storage.log().is_empty(), "nothing was sent there");

    let trusting = unchecked(&registry, WITH_CA);
    let blob = repository(&trusting).blob(&digest(&name), 10_000);
    for at in [0, 5] {
        read(&blob, at..at + 5, &context()).await.unwrap();
    }
    assert_eq!(
        (registry.log().len(), storage.log().len()),
        (2, 2),
        "the place is remembered, with its trust"
    );

    redirect(there.clone());
    let blob = repository(&client).blob(&digest(&name), 10_000);
    for at in [0, 5] {
        read(&blob, at..at + 5, &context()).await.unwrap();
    }
    assert_eq!(storage.log().len(), 4, "another port of the same name is the same host");

    // A storage can be configured as a registry is.
    redirect(called_localhost(&there));
    let configured = unchecked(&registry, "");
    let address = storage.url(Listener::Registry);
    configured.hosts_toml(&called_localhost(&address).replace("https://", ""), "ca = \"../../ca.pem\"\n");
    read(&repository(&configured).blob(&digest(&name), 10_000), 0..5, &context()).await.unwrap();
}

#[tokio::test]
async fn the_command_lines_skip_verify_works() {
    let (registry, storage, name) = self_signed(AuthMode::None).await;
    let client = Client::new(&[], |settings: &mut Settings, _| settings.tls.verify = Verify::Skip);
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 10_000);
    read(&blob, 0..5, &context()).await.unwrap();
    let there = format!("{}/v2/team/app/blobs/{name}", called_localhost(&storage.url(Listener::Registry)));
    registry.fault(Fault::new(Matcher::blobs(), Action::Redirect(there)));
    read(&blob, 0..5, &context()).await.unwrap();
    assert_eq!(storage.log().len(), 1, "it is for the whole command, not for one host");
}

#[tokio::test]
async fn headers_of_a_host_go_to_that_host_only() {
    let registry = TestRegistry::start(Options::default().storage(Duration::from_secs(60))).await.unwrap();
    let name = registry.put_blob("team/app", pattern(1_000));
    let client = Client::new(&[&registry], |_, _| {});
    let server = registry.url(Listener::Registry);
    client.hosts_toml(&registry.host(), &format!("server = \"{server}\"\n[header]\nx-team = \"secret\"\n"));
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), 1_000);
    read(&blob, 0..5, &context()).await.unwrap();
    assert_eq!(registry.log_of(Listener::Registry)[0].header("x-team"), Some("secret"));
    assert_eq!(registry.log_of(Listener::Storage)[0].header("x-team"), None);
}

#[tokio::test]
async fn a_loopback_registry_is_tried_by_https_and_then_by_http() {
    let plain = TestRegistry::start(Options::plain()).await.unwrap();
    let name = plain.put_blob("team/app", pattern(1_000));
    let client = Client::new(&[], |_, _| {});
    let blob = client.repository(&plain.image("team/app")).blob(&digest(&name), 1_000);
    for _ in 0..3 {
        read(&blob, 0..5, &context()).await.unwrap();
    }
    assert_eq!(plain.log().len(), 3);
}

#[tokio::test]
async fn plain_http_when_told_so() {
    let plain = TestRegistry::start(Options { host_name: Some("localhost".into()), ..Options::plain() })
        .await
        .unwrap();
    let name = plain.put_blob("team/app", pattern(1_000));
    let client = Client::new(&[], |settings: &mut Settings, _| settings.plain_http = PlainHttp::Always);
    let blob = client.repository(&plain.image("team/app")).blob(&digest(&name), 1_000);
    read(&blob, 0..5, &context()).await.unwrap();
}
