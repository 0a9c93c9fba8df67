//! Manifests and referrers.

use soci_oci::{Digest, FetchErrorKind, media_type};
use soci_testkit::{Action, Fault, Matcher, Options, Referrers, TestRegistry};

use crate::common::{Client, context, digest, start};

const INDEX: &[u8] = br#"{"schemaVersion":2,"manifests":[]}"#;
const TYPE: &str = media_type::SOCI_INDEX_V1;

fn referring(subject: &str, artifact_type: &str, number: usize) -> String {
    let empty = Digest::of(b"{}");
    format!(
        "{{\"schemaVersion\":2,\"mediaType\":\"{}\",\"config\":{{\"mediaType\":\"{artifact_type}\",\"digest\":\"{empty}\",\
         \"size\":2}},\"layers\":[],\"subject\":{{\"mediaType\":\"{}\",\"digest\":\"{subject}\",\"size\":1}},\
         \"annotations\":{{\"n\":\"{number}\"}}}}",
        media_type::OCI_MANIFEST,
        media_type::OCI_MANIFEST
    )
}

/// Puts `count` SOCI indexes and one other artifact beside a subject.
fn fill(registry: &TestRegistry, count: usize) -> String {
    registry.put_blob("team/app", "{}");
    let subject = registry.put_manifest("team/app", "1", media_type::OCI_INDEX, INDEX);
    for number in 0..count {
        let manifest = referring(&subject, TYPE, number);
        let own = Digest::of(manifest.as_bytes()).to_string();
        registry.put_manifest("team/app", &own, media_type::OCI_MANIFEST, manifest);
    }
    let other = referring(&subject, "application/vnd.other", 0);
    let own = Digest::of(other.as_bytes()).to_string();
    registry.put_manifest("team/app", &own, media_type::OCI_MANIFEST, other);
    subject
}

async fn count(client: &Client, registry: &TestRegistry, subject: &str) -> usize {
    let repository = client.repository(&registry.image("team/app:1"));
    let found = repository.referrers(&digest(subject), TYPE, &context()).await.unwrap();
    assert!(found.iter().all(|found| found.artifact_type.as_deref() == Some(TYPE)));
    found.len()
}

#[tokio::test]
async fn a_tag_is_resolved_by_head() {
    let (registry, client) = start(Options::default()).await;
    let name = registry.put_manifest("team/app", "1", media_type::OCI_INDEX, INDEX);
    let repository = client.repository(&registry.image("team/app:1"));
    let found = repository.resolve("1", &context()).await.unwrap();
    assert_eq!((found.digest.to_string(), found.size), (name.clone(), INDEX.len() as u64));
    assert_eq!(found.media_type, media_type::OCI_INDEX);
    assert_eq!(registry.log().len(), 1);
    assert_eq!(registry.log()[0].request.method, http::Method::HEAD);
    assert!(registry.log()[0].header("accept").unwrap().contains(media_type::DOCKER_MANIFEST));
    assert_eq!(repository.resolve(&name, &context()).await.unwrap(), found);
    let error = repository.resolve("2", &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::NotFound);
}

#[tokio::test]
async fn where_head_is_refused_or_says_too_little_the_manifest_is_read() {
    let (registry, client) = start(Options::default()).await;
    let name = registry.put_manifest("team/app", "1", media_type::OCI_INDEX, INDEX);
    let repository = client.repository(&registry.image("team/app:1"));
    let head = || Matcher::method(http::Method::HEAD);
    let poor = vec![("docker-content-digest".to_owned(), String::new())];
    for action in [Action::status(405), Action::status(400), Action::Headers(poor)] {
        registry.clear_faults();
        registry.fault(Fault::new(head(), action.clone()));
        let found = repository.resolve("1", &context()).await.unwrap();
        assert_eq!(found.digest.to_string(), name, "{action:?}");
    }
}

#[tokio::test]
async fn manifests_are_verified_and_bounded() {
    let (registry, client) = start(Options::default()).await;
    let name = registry.put_manifest("team/app", "1", media_type::OCI_INDEX, INDEX);
    let repository = client.repository(&registry.image("team/app:1"));
    assert_eq!(repository.manifest(&digest(&name), &context()).await.unwrap(), INDEX);
    let (descriptor, bytes) = repository.manifest_by_tag("1", &context()).await.unwrap();
    assert_eq!((descriptor.digest.to_string(), bytes.as_ref()), (name.clone(), INDEX));

    registry.fault(Fault::new(Matcher::path("/manifests/"), Action::Corrupt(3)));
    let error = repository.manifest(&digest(&name), &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Integrity, "{error}");
    let error = repository.manifest_by_tag("1", &context()).await.unwrap_err();
    assert_eq!(
        error.kind(),
        FetchErrorKind::Integrity,
        "the digest header is held against the bytes: {error}"
    );
    registry.clear_faults();

    let huge = vec![b' '; (4 << 20) + 1];
    let name = registry.put_manifest("team/app", "huge", media_type::OCI_INDEX, huge);
    let error = repository.manifest(&digest(&name), &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Protocol);
    assert!(error.to_string().contains("4194304"), "{error}");
}

#[tokio::test]
async fn names_that_would_change_the_address_are_refused() {
    let (registry, client) = start(Options::default()).await;
    let repository = client.repository(&registry.image("team/app:1"));
    for object in ["../../x", "a?b", "", "a b"] {
        let error = repository.resolve(object, &context()).await.unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Local, "{object}");
    }
    assert!(registry.log().is_empty());
}

#[tokio::test]
async fn referrers_are_listed_by_the_api_in_pages_and_filtered() {
    for (page, filters) in [(0, true), (0, false), (2, true), (2, false), (1, false)] {
        let options = Options { referrers: Referrers::Api { page, filters }, ..Options::default() };
        let (registry, client) = start(options).await;
        let subject = fill(&registry, 5);
        assert_eq!(count(&client, &registry, &subject).await, 5, "{page} {filters}");
        assert!(registry.log()[0].request.query.contains("artifactType=application%2Fvnd.amazon.soci"));
        assert_eq!(count(&client, &registry, &Digest::of(b"lonely").to_string()).await, 0);
    }
}

#[tokio::test]
async fn without_the_api_the_tag_schema_is_used() {
    let (registry, client) = start(Options { referrers: Referrers::Unsupported, ..Options::default() }).await;
    let subject = fill(&registry, 0);
    assert_eq!(count(&client, &registry, &subject).await, 0, "no tag, no referrers");
    let list = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":\"m\",\"digest\":\"{subject}\",\"size\":1,\
         \"artifactType\":\"{TYPE}\"}},{{\"mediaType\":\"m\",\"digest\":\"{subject}\",\"size\":1}}]}}"
    );
    registry.put_manifest("team/app", &subject.replace(':', "-"), media_type::OCI_INDEX, list);
    assert_eq!(count(&client, &registry, &subject).await, 1);
}

#[tokio::test]
async fn answers_that_are_no_list_mean_that_there_is_no_api() {
    let (registry, client) = start(Options::default()).await;
    let elsewhere =
        TestRegistry::start(Options { ca: Some(registry.ca().clone()), ..Options::default() }).await.unwrap();
    let subject = fill(&registry, 2);
    let html = vec![("content-type".to_owned(), "text/html".to_owned())];
    let login = format!("{}/login", elsewhere.url(soci_testkit::Listener::Registry));
    for action in [
        Action::Status { status: 200, headers: html, body: "<html>".into() },
        Action::Redirect(login),
        Action::status(405),
        Action::status(501),
    ] {
        registry.clear_faults();
        registry.fault(Fault::new(Matcher::path("/referrers/"), action.clone()));
        assert_eq!(count(&client, &registry, &subject).await, 0, "{action:?}");
    }
    assert!(elsewhere.log().is_empty(), "no page for people is asked for");
}

#[tokio::test]
async fn a_repository_that_is_not_there_and_a_broken_list_are_errors() {
    let (registry, client) = start(Options::default()).await;
    let subject = fill(&registry, 1);
    let repository = client.repository(&registry.image("team/app:1"));
    let name_unknown = r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no"}]}"#;
    let action = Action::Status { status: 404, headers: vec![], body: name_unknown.into() };
    registry.fault(Fault::new(Matcher::path("/referrers/"), action).times(1));
    let error = repository.referrers(&digest(&subject), TYPE, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::NotFound, "{error}");

    for body in [
        "{",
        "[]",
        "{\"schemaVersion\":1,\"manifests\":[]}",
        "{\"schemaVersion\":2,\"manifests\":[{\"size\":-1}]}",
    ] {
        let headers = vec![("content-type".to_owned(), media_type::OCI_INDEX.to_owned())];
        let action = Action::Status { status: 200, headers, body: body.into() };
        registry.fault(Fault::new(Matcher::path("/referrers/"), action).times(1));
        let error = repository.referrers(&digest(&subject), TYPE, &context()).await.unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Protocol, "{body}: {error}");
    }
}

#[tokio::test]
async fn pages_that_never_end_or_lead_away_are_bounded() {
    let (registry, client) = start(Options::default()).await;
    let subject = fill(&registry, 1);
    let own = format!("</v2/team/app/referrers/{subject}?next=0>; rel=\"next\"");
    registry.fault(Fault::new(Matcher::path("/referrers/"), Action::Headers(vec![("link".into(), own)])));
    assert_eq!(count(&client, &registry, &subject).await, 64, "as many pages as are read at most");
    registry.clear_faults();
    registry.clear_log();
    let away = "<https://169.254.169.254/next>; rel=\"next\"".to_owned();
    registry.fault(Fault::new(Matcher::path("/referrers/"), Action::Headers(vec![("link".into(), away)])));
    assert_eq!(count(&client, &registry, &subject).await, 1);
}
