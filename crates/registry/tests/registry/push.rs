//! Pushing.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use soci_oci::{
    BlobSource, BlobStream, Descriptor, Digest, FetchContext, FetchError, FetchErrorKind, Index, media_type,
};
use soci_registry::{Pushed, Repository};
use soci_testkit::{Action, AuthMode, Fault, Listener, Matcher, Options, Referrers, TestRegistry};

use crate::common::{Client, basic, context, pattern, start};

#[derive(Debug)]
struct Memory(Bytes);

#[async_trait]
impl BlobSource for Memory {
    async fn open(&self, range: std::ops::Range<u64>, _: &FetchContext) -> Result<BlobStream, FetchError> {
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        let part = self.0.slice(range);
        let chunks: Vec<_> = part.chunks(10_000).map(|chunk| Ok(part.slice_ref(chunk))).collect();
        Ok(Box::pin(futures::stream::iter(chunks)))
    }
}

struct Case {
    registry: TestRegistry,
    client: Client,
    repository: Repository,
}

async fn case(options: Options) -> Case {
    let registry = TestRegistry::start(options).await.unwrap();
    let client = Client::new(&[&registry], |settings, _| settings.push_chunk = 50_000);
    client.keychain.set(&registry.host(), vec![basic("u", "p")]);
    let repository = client.repository(&registry.image("team/app:1"));
    Case { registry, client, repository }
}

impl Case {
    async fn push(&self, content: &Bytes, from: Option<&str>) -> Result<Pushed, FetchError> {
        let descriptor = Descriptor::of("x", content);
        self.repository.push_blob(&descriptor, &Memory(content.clone()), from, &context()).await
    }

    fn holds(&self, content: &Bytes) -> bool {
        self.registry.blob("team/app", &Digest::of(content).to_string()).as_ref() == Some(content)
    }

    fn methods(&self) -> Vec<String> {
        self.registry.log().iter().map(|seen| format!("{} {}", seen.request.method, seen.status)).collect()
    }
}

#[tokio::test]
async fn a_small_blob_goes_in_one_request() {
    let case = case(Options::default()).await;
    for len in [0, 1, 50_000] {
        let content = pattern(len);
        case.registry.clear_log();
        assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded);
        assert!(case.holds(&content));
        assert_eq!(case.methods(), ["HEAD 404", "POST 202", "PUT 201"]);
        assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Existed);
    }
}

#[tokio::test]
async fn a_large_blob_goes_in_pieces() {
    let case = case(Options::default().auth(AuthMode::Bearer, "u", "p")).await;
    let content = pattern(170_000);
    assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded);
    assert!(case.holds(&content));
    let patches: Vec<_> = case
        .registry
        .log()
        .iter()
        .filter_map(|seen| Some(seen.header("content-range")?.to_owned()))
        .collect();
    assert_eq!(patches, ["0-49999", "50000-99999", "100000-149999", "150000-169999"]);
}

#[tokio::test]
async fn the_registrys_smallest_piece_is_respected() {
    let case = case(Options::default()).await;
    case.registry.set_chunk_min(Some(120_000));
    let content = pattern(170_000);
    case.push(&content, None).await.unwrap();
    assert!(case.holds(&content));
    let patches =
        case.registry.log().iter().filter(|seen| seen.request.method == http::Method::PATCH).count();
    assert_eq!(patches, 2);
}

#[tokio::test]
async fn a_broken_piece_is_sent_again_and_the_upload_goes_on() {
    let patch = || Matcher::method(http::Method::PATCH);
    for action in [Action::Hangup, Action::status(500), Action::status(429), Action::Reset(0)] {
        let case = case(Options::default()).await;
        case.registry.fault(Fault::new(patch(), action.clone()).skip(1).times(1));
        let content = pattern(170_000);
        assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded, "{action:?}");
        assert!(case.holds(&content), "{action:?}");
    }
}

#[tokio::test]
async fn an_answer_lost_after_the_piece_arrived_is_found_out_by_asking() {
    let case = case(Options::default()).await;
    let patch = Matcher::method(http::Method::PATCH);
    case.registry.fault(Fault::new(patch, Action::LoseAnswer).skip(1).times(1));
    let content = pattern(120_000);
    assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded);
    assert!(case.holds(&content));
    let tail = ["PATCH 202", "PATCH 0", "PATCH 416", "GET 204", "PATCH 202", "PUT 201"];
    assert_eq!(case.methods()[2..], tail);
}

#[tokio::test]
async fn an_answer_lost_after_the_end_is_found_out_by_looking() {
    for len in [1_000, 120_000] {
        let case = case(Options::default()).await;
        let put = Matcher::method(http::Method::PUT);
        case.registry.fault(Fault::new(put, Action::LoseAnswer).times(1));
        let content = pattern(len);
        assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded);
        assert!(case.holds(&content));
        let posts = case.methods().iter().filter(|method| method.starts_with("POST")).count();
        assert_eq!(posts, 1, "it is not sent twice");
    }
}

#[tokio::test]
async fn a_lost_session_is_begun_anew() {
    let case = case(Options::default()).await;
    case.registry
        .fault(Fault::new(Matcher::method(http::Method::PATCH), Action::status(404)).skip(1).times(1));
    let content = pattern(120_000);
    assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded);
    assert!(case.holds(&content));
}

#[tokio::test]
async fn content_that_is_not_what_it_is_called_is_never_finished() {
    for len in [1_000, 120_000] {
        let case = case(Options::default()).await;
        let descriptor = Descriptor::new("x", Digest::of(b"other"), len as u64);
        let error = case
            .repository
            .push_blob(&descriptor, &Memory(pattern(len)), None, &context())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Integrity, "{error}");
        assert!(case.registry.log().iter().all(|seen| seen.request.method != http::Method::PUT));
    }
}

#[tokio::test]
async fn a_blob_of_another_repository_is_mounted() {
    let case = case(Options::default().auth(AuthMode::Bearer, "u", "p")).await;
    let content = pattern(1_000);
    case.registry.put_blob("base/image", content.clone());
    assert_eq!(case.push(&content, Some("base/image")).await.unwrap(), Pushed::Mounted);
    assert!(case.holds(&content));

    let other = pattern(1_001);
    assert_eq!(case.push(&other, Some("base/image")).await.unwrap(), Pushed::Uploaded, "it was not there");
    case.registry.set_mount(false);
    let third = pattern(1_002);
    case.registry.put_blob("base/image", third.clone());
    assert_eq!(case.push(&third, Some("base/image")).await.unwrap(), Pushed::Uploaded);
}

#[tokio::test]
async fn t124_a_denied_mount_source_is_uploaded_instead() {
    let case = case(Options::default().auth(AuthMode::Bearer, "u", "p")).await;
    case.registry.restrict("u", "team/app", &["pull", "push"]);
    let content = pattern(1_000);
    case.registry.put_blob("secret/image", content.clone());
    let denied = r#"{"errors":[{"code":"DENIED","message":"no access to the source"}]}"#;
    let mounts = || Matcher::new(|request| request.query.contains("mount="));
    let action = Action::Status { status: 403, headers: vec![], body: denied.into() };
    case.registry.fault(Fault::new(mounts(), action));
    assert_eq!(case.push(&content, Some("secret/image")).await.unwrap(), Pushed::Uploaded);
    assert!(case.holds(&content));
    // Or a name that the registry does not know, or does not like.
    for status in [400, 404, 405] {
        case.registry.clear_faults();
        case.registry.fault(Fault::new(mounts(), Action::status(status)));
        let content = pattern(1_000 + usize::from(status));
        assert_eq!(case.push(&content, Some("gone/image")).await.unwrap(), Pushed::Uploaded, "{status}");
        assert!(case.holds(&content));
    }
}

#[tokio::test]
async fn t116_an_upload_continued_on_another_host_is_sent_without_credentials() {
    let case = case(Options::default().auth(AuthMode::Basic, "u", "p")).await;
    let other =
        TestRegistry::start(Options { ca: Some(Arc::clone(case.registry.ca())), ..Options::default() })
            .await
            .unwrap();
    let content = pattern(1_000);
    let away = format!("{}/v2/team/app/blobs/uploads/x", other.url(Listener::Registry));
    other.fault(Fault::new(Matcher::any(), Action::status(201)));
    case.registry
        .fault(Fault::new(Matcher::path("/uploads/"), Action::Headers(vec![("location".into(), away)])));
    assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded);
    assert_eq!(other.log().len(), 1);
    assert_eq!(other.log()[0].header("authorization"), None);
    assert!(other.log()[0].request.query.starts_with("digest=sha256%3A"));
}

#[tokio::test]
async fn t116_http_for_https_on_the_same_host_is_read_as_https() {
    let case = case(Options::default().auth(AuthMode::Basic, "u", "p")).await;
    let content = pattern(1_000);
    let start = Matcher::method(http::Method::POST);
    let plain = format!("http://{}/v2/team/app/blobs/uploads/upload-1", case.registry.host());
    case.registry.fault(Fault::new(start, Action::Headers(vec![("location".into(), plain)])));
    assert_eq!(case.push(&content, None).await.unwrap(), Pushed::Uploaded);
    assert!(case.holds(&content));
}

#[tokio::test]
async fn pushing_without_the_right_to_is_denied() {
    let case = case(Options::default().auth(AuthMode::Bearer, "u", "p")).await;
    case.registry.restrict("u", "team/app", &["pull"]);
    let error = case.push(&pattern(10), None).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Denied, "{error}");
}

fn manifest(subject: Option<&str>, number: usize) -> Bytes {
    let subject = subject
        .map(|digest| format!(",\"subject\":{{\"mediaType\":\"m\",\"digest\":\"{digest}\",\"size\":1}}"))
        .unwrap_or_default();
    let config = Digest::of(b"{}");
    Bytes::from(format!(
        "{{\"schemaVersion\":2,\"config\":{{\"mediaType\":\"{}\",\"digest\":\"{config}\",\"size\":2}},\"layers\":[]{subject},\
         \"annotations\":{{\"n\":\"{number}\"}}}}",
        media_type::SOCI_INDEX_V1
    ))
}

async fn put(repository: &Repository, bytes: &Bytes) -> bool {
    let name = Digest::of(bytes).to_string();
    let pushed =
        repository.push_manifest(&name, media_type::OCI_MANIFEST, bytes.clone(), &context()).await.unwrap();
    pushed.subject_processed
}

#[tokio::test]
async fn manifests_are_pushed_and_listed_by_the_registry() {
    let (registry, client) = start(Options::default()).await;
    let repository = client.repository(&registry.image("team/app:1"));
    registry.put_blob("team/app", "{}");
    let subject = Digest::of(b"subject");
    assert!(!put(&repository, &manifest(None, 0)).await);
    assert!(put(&repository, &manifest(Some(&subject.to_string()), 1)).await);
    assert!(registry.log().iter().all(|seen| !seen.request.path.contains("manifests/sha256-")));
    assert_eq!(repository.referrers(&subject, media_type::SOCI_INDEX_V1, &context()).await.unwrap().len(), 1);
    let digest = Digest::of(&manifest(None, 0));
    assert!(repository.has_manifest(&digest, &context()).await.unwrap());
    repository.delete_manifest(&digest, &context()).await.unwrap();
    assert!(!repository.has_manifest(&digest, &context()).await.unwrap());
}

#[tokio::test]
async fn without_the_api_the_list_under_the_subjects_tag_is_kept() {
    let (registry, client) = start(Options { referrers: Referrers::Unsupported, ..Options::default() }).await;
    let repository = client.repository(&registry.image("team/app:1"));
    registry.put_blob("team/app", "{}");
    let subject = Digest::of(b"subject");
    let tag = subject.to_string().replace(':', "-");
    let mut lists = Vec::new();
    for number in [0, 1, 1] {
        assert!(!put(&repository, &manifest(Some(&subject.to_string()), number)).await);
        lists.push(registry.manifest("team/app", &tag).unwrap());
    }
    let index = Index::decode(&lists[2]).unwrap();
    assert_eq!(index.manifests.len(), 2, "the same one is listed once");
    assert_eq!(index.manifests[0].artifact_type.as_deref(), Some(media_type::SOCI_INDEX_V1));
    assert_eq!(index.manifests[1].annotation("n"), Some("1"));
    assert_eq!(lists[1], lists[2]);
    let replaced = Digest::of(&lists[0]).to_string();
    assert!(registry.manifest("team/app", &replaced).is_none(), "the replaced list is deleted");
    let found = repository.referrers(&subject, media_type::SOCI_INDEX_V1, &context()).await.unwrap();
    assert_eq!(found.len(), 2);
}

#[tokio::test]
async fn referrers_pushed_at_once_are_all_listed() {
    let (registry, client) = start(Options { referrers: Referrers::Unsupported, ..Options::default() }).await;
    let repository = client.repository(&registry.image("team/app:1"));
    registry.put_blob("team/app", "{}");
    let subject = Digest::of(b"subject").to_string();
    let pushes: Vec<_> = (0..8).map(|number| manifest(Some(&subject), number)).collect();
    futures::future::join_all(pushes.iter().map(|bytes| put(&repository, bytes))).await;
    let found =
        repository.referrers(&Digest::of(b"subject"), media_type::SOCI_INDEX_V1, &context()).await.unwrap();
    assert_eq!(found.len(), 8);
}

#[tokio::test]
async fn a_registry_that_refuses_a_manifest_is_quoted() {
    let case = case(Options::default()).await;
    let bytes = manifest(None, 0);
    let error =
        case.repository.push_manifest("1", media_type::OCI_MANIFEST, bytes, &context()).await.unwrap_err();
    assert!(error.to_string().contains("MANIFEST_BLOB_UNKNOWN"), "{error}");
    assert_eq!(case.client.registry.settings().push_chunk, 50_000);
}
