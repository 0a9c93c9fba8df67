//! Ranged reads, and every way in which a registry or its storage can spoil them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use soci_oci::{BlobSource, Descriptor, FetchErrorKind};
use soci_testkit::{Action, Fault, Listener, Matcher, Options, Seen, TestRegistry};

use crate::common::{Client, context, digest, pattern, read, start, within};

const MINUTE: Duration = Duration::from_secs(60);

struct Case {
    registry: TestRegistry,
    client: Client,
    content: Bytes,
    blob: Arc<dyn BlobSource>,
    digest: String,
}

async fn case(options: Options) -> Case {
    let (registry, client) = start(options).await;
    let content = pattern(300_000);
    let digest = registry.put_blob("team/app", content.clone());
    let blob = client.repository(&registry.image("team/app:1")).blob(&self::digest(&digest), 300_000);
    Case { registry, client, content, blob, digest }
}

fn ranges(log: &[Seen]) -> Vec<(u64, u64)> {
    log.iter().filter_map(|seen| seen.request.range.map(|(start, end)| (start, end.unwrap() + 1))).collect()
}

#[tokio::test]
async fn ranges_are_read_exactly() {
    let case = case(Options::default()).await;
    for range in [0..1, 0..300_000, 299_999..300_000, 1_000..200_000, 5..5] {
        let found = read(&case.blob, range.clone(), &context()).await.unwrap();
        let expected =
            &case.content[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        assert!(found == expected, "{range:?}");
    }
    let error = read(&case.blob, 0..300_001, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Local);
    let agent = case.registry.log()[0].header("user-agent").unwrap().to_owned();
    assert!(agent.starts_with("soci-snapshotter/"), "{agent}");
    assert_eq!(case.registry.log()[0].header("accept-encoding"), Some("identity"));
}

#[tokio::test]
async fn blobs_in_files_are_streamed() {
    let (registry, client) = start(Options::plain()).await;
    let content = pattern(3_500_000);
    let path = client.dir.path().join("layer");
    std::fs::write(&path, &content).unwrap();
    let (name, size) = registry.put_blob_file("team/app", &path).unwrap();
    let blob = client.repository(&registry.image("team/app")).blob(&digest(&name), size);
    assert!(read(&blob, 0..size, &context()).await.unwrap() == content);
    assert!(read(&blob, 1_048_570..2_097_160, &context()).await.unwrap() == content[1_048_570..2_097_160]);
}

#[tokio::test]
async fn a_location_is_asked_directly_until_it_is_refused() {
    let case = case(Options::default().storage(MINUTE)).await;
    for start in 0..5 {
        let range = start * 1000..start * 1000 + 500;
        read(&case.blob, range, &context()).await.unwrap();
    }
    assert_eq!(case.registry.log_of(Listener::Registry).len(), 1, "one redirect serves all ranges");
    let storage = case.registry.log_of(Listener::Storage);
    assert_eq!(storage.len(), 5);
    let referer = storage[4].header("referer").unwrap();
    assert!(referer.ends_with(&format!("/blobs/{}", case.digest)), "{referer}");
}

#[tokio::test]
async fn t111_an_expired_location_is_renewed_once_and_the_range_goes_on() {
    let case = case(Options::default().storage(MINUTE)).await;
    read(&case.blob, 0..10, &context()).await.unwrap();
    case.registry.expire_locations();
    let found = read(&case.blob, 10..20_000, &context()).await.unwrap();
    assert!(found == case.content[10..20_000]);
    let statuses: Vec<u16> = case.registry.log_of(Listener::Storage).iter().map(|seen| seen.status).collect();
    assert_eq!(statuses, [206, 403, 206]);
    assert_eq!(case.registry.log_of(Listener::Registry).len(), 2);
}

#[tokio::test]
async fn t111_an_expired_token_of_s3_is_renewed_too() {
    let case = case(Options::default().storage(MINUTE)).await;
    let body = "<?xml version=\"1.0\"?><Error><Code>ExpiredToken</Code></Error>";
    for status in [400, 401, 410] {
        case.registry.clear_log();
        let headers = vec![("content-type".into(), "application/xml; charset=utf-8".into())];
        let action = Action::Status { status, headers, body: body.into() };
        case.registry.fault(Fault::new(Matcher::on(Listener::Storage), action).times(1));
        assert_eq!(read(&case.blob, 7..9_000, &context()).await.unwrap(), case.content[7..9_000], "{status}");
        let statuses: Vec<u16> =
            case.registry.log_of(Listener::Storage).iter().map(|seen| seen.status).collect();
        assert_eq!(statuses, [status, 206]);
        case.registry.clear_faults();
    }
}

#[tokio::test]
async fn t111_a_second_refusal_is_final() {
    let case = case(Options::default().storage(MINUTE)).await;
    read(&case.blob, 0..10, &context()).await.unwrap();
    case.registry.clear_log();
    case.registry.fault(Fault::new(Matcher::on(Listener::Storage), Action::status(403)));
    let error = read(&case.blob, 10..20, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Denied, "{error}");
    assert_eq!(case.registry.log_of(Listener::Storage).len(), 2, "the old location and one fresh one");
    assert!(!error.to_string().contains("X-Amz"), "{error}");
    case.registry.clear_faults();
    assert_eq!(read(&case.blob, 10..20, &context()).await.unwrap(), case.content[10..20]);
}

#[tokio::test]
async fn a_broken_body_is_resumed_where_it_broke() {
    for action in [Action::ShortBody(70_000), Action::Reset(70_000), Action::Stall(70_000)] {
        let case = case(Options::default().storage(MINUTE)).await;
        case.registry
            .fault(Fault::new(Matcher::blobs().and(Matcher::on(Listener::Storage)), action.clone()).times(1));
        let found = read(&case.blob, 1_000..299_000, &context()).await.unwrap();
        assert!(found == case.content[1_000..299_000], "{action:?}");
        let asked = ranges(&case.registry.log_of(Listener::Storage));
        assert_eq!(asked.len(), 2, "{action:?}");
        assert_eq!(asked[0], (1_000, 299_000));
        assert!(asked[1].0 > 1_000 && asked[1].0 <= 71_000 && asked[1].1 == 299_000, "{action:?}: {asked:?}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_again_and_again_makes_progress() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::blobs(), Action::ShortBody(20_000)));
    let found = read(&case.blob, 0..300_000, &context()).await.unwrap();
    assert!(found == case.content);
    assert_eq!(case.registry.log().len(), 15);
}

#[tokio::test]
async fn a_body_without_progress_ends_with_an_error() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::blobs(), Action::ShortBody(0)));
    let error = read(&case.blob, 0..1_000, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("team/app"), "{error}");
    case.registry.clear_faults();
    assert_eq!(read(&case.blob, 0..1_000, &context()).await.unwrap(), case.content[..1_000]);
}

#[tokio::test]
async fn another_range_than_asked_for_is_refused() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::blobs(), Action::WrongRange(1)).times(1));
    assert_eq!(read(&case.blob, 5..50, &context()).await.unwrap(), case.content[5..50], "once is forgiven");
    case.registry.fault(Fault::new(Matcher::blobs(), Action::WrongRange(1)));
    let error = read(&case.blob, 5..50, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Protocol, "{error}");
    assert!(error.to_string().contains("6..51"), "{error}");
}

#[tokio::test]
async fn a_200_counts_only_for_the_whole_blob() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::blobs(), Action::IgnoreRange));
    let error = read(&case.blob, 5..50, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Protocol, "{error}");
    assert!(error.to_string().contains("ranged requests are not supported"), "{error}");
    assert!(read(&case.blob, 0..300_000, &context()).await.unwrap() == case.content);
}

#[tokio::test]
async fn an_encoded_body_is_refused() {
    let case = case(Options::default()).await;
    let headers = vec![("content-encoding".to_owned(), "gzip".to_owned())];
    case.registry.fault(Fault::new(Matcher::blobs(), Action::Headers(headers)));
    let error = read(&case.blob, 0..50, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Protocol);
    assert!(error.to_string().contains("gzip"), "{error}");
}

#[tokio::test]
async fn a_blob_that_changed_its_length_is_refused() {
    let case = case(Options::default()).await;
    let blob = case.client.repository(&case.registry.image("team/app")).blob(&digest(&case.digest), 300_001);
    let error = read(&blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Protocol, "{error}");
    let error = read(&blob, 300_000..300_001, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Integrity, "{error}");
}

#[tokio::test]
async fn a_corrupt_blob_is_read_once_more_and_then_refused() {
    let case = case(Options::default()).await;
    let repository = case.client.repository(&case.registry.image("team/app"));
    let descriptor = Descriptor::new("x", digest(&case.digest), 300_000);
    case.registry.fault(Fault::new(Matcher::blobs(), Action::Corrupt(1_234)).times(1));
    assert!(repository.blob_bytes(&descriptor, 1 << 20, &context()).await.unwrap() == case.content);
    case.registry.fault(Fault::new(Matcher::blobs(), Action::Corrupt(1_234)));
    let error = repository.blob_bytes(&descriptor, 1 << 20, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Integrity, "{error}");
    let error = repository.blob_bytes(&descriptor, 1_000, &context()).await.unwrap_err();
    assert!(error.to_string().contains("1000"), "{error}");
}

#[tokio::test]
async fn a_redirect_loop_ends() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::blobs(), Action::redirect_loop()));
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert!(error.to_string().contains("more than 10 times"), "{error}");
    assert_eq!(case.registry.log().len(), 11);
}

#[tokio::test]
async fn busy_registries_are_asked_again_whatever_their_retry_after() {
    let case = case(Options::default()).await;
    for value in ["0", "Thu, 01 Jan 1970 00:00:00 GMT", "86400", "soon", "-1"] {
        for status in [429, 503] {
            case.registry.clear_log();
            case.registry.fault(Fault::new(Matcher::blobs(), Action::retry_after(status, value)).times(2));
            assert_eq!(read(&case.blob, 0..10, &context()).await.unwrap(), case.content[..10], "{value}");
            assert_eq!(case.registry.log().len(), 3, "{value}");
        }
    }
}

#[tokio::test]
async fn a_registry_that_stays_broken_is_given_up_with_a_message_that_says_so() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::any(), Action::status(502)));
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable);
    let text = error.to_string();
    for part in ["team/app", &case.registry.host(), "status 502", "gave up after 4 attempts"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(case.registry.log().len(), 4);
}

#[tokio::test]
async fn hangups_before_the_answer_are_retried() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::blobs(), Action::Hangup).times(2));
    assert_eq!(read(&case.blob, 3..10, &context()).await.unwrap(), case.content[3..10]);
}

#[tokio::test]
async fn a_flaky_network_only_costs_time() {
    let case = case(Options::default().storage(MINUTE)).await;
    for (skip, action) in [
        (0, Action::Hangup),
        (1, Action::status(500)),
        (2, Action::Reset(10_000)),
        (4, Action::retry_after(503, "0")),
        (5, Action::ShortBody(30_000)),
        (7, Action::status(403)),
    ] {
        case.registry.fault(Fault::new(Matcher::on(Listener::Storage), action).skip(skip).times(1));
    }
    for at in 0..6 {
        let range = at * 50_000..at * 50_000 + 50_000;
        let expected =
            &case.content[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        assert!(read(&case.blob, range, &context()).await.unwrap() == expected);
    }
}

#[tokio::test]
async fn a_stalled_registry_costs_no_more_than_the_deadline() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::any(), Action::Delay(MINUTE)));
    let soon = within(Duration::from_millis(400));
    let read = read(&case.blob, 0..10, &soon);
    let error = tokio::time::timeout(Duration::from_secs(20), read).await.expect("bounded").unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_stalled_body_costs_no_more_than_the_deadline() {
    let case = case(Options::default()).await;
    case.registry.fault(Fault::new(Matcher::any(), Action::Stall(10)));
    let soon = within(Duration::from_millis(600));
    let read = read(&case.blob, 0..100_000, &soon);
    let error = tokio::time::timeout(Duration::from_secs(20), read).await.expect("bounded").unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_registry_that_is_down_is_named() {
    let case = case(Options::default()).await;
    let host = case.registry.host();
    case.registry.shutdown().await;
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable);
    assert!(error.to_string().contains(&host) && error.to_string().contains("cannot connect"), "{error}");
}

#[tokio::test]
async fn a_missing_blob_is_not_found_and_says_that_nobody_was_named() {
    let case = case(Options::default()).await;
    case.registry.delete_blob("team/app", &case.digest);
    let error = read(&case.blob, 0..10, &context()).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::NotFound);
    assert!(error.to_string().contains("BLOB_UNKNOWN"), "{error}");
    assert!(error.to_string().contains("without a credential"), "{error}");
    assert_eq!(case.registry.log().len(), 1, "not retried");
}

#[tokio::test]
async fn many_readers_share_one_location() {
    let case = case(Options::default().storage(MINUTE)).await;
    read(&case.blob, 0..1, &context()).await.unwrap();
    let readers = (0..40u64).map(|at| {
        let blob = Arc::clone(&case.blob);
        async move { read(&blob, at * 5_000..(at + 1) * 5_000, &context()).await.unwrap() }
    });
    let parts = futures::future::join_all(readers).await;
    assert!(parts.concat() == case.content[..200_000]);
    assert_eq!(case.registry.log_of(Listener::Registry).len(), 1);
}
