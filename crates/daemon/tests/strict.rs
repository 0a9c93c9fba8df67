//! `strict`: each cause of a fallback is an error of its own that says what to do, and the same pull falls back without it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::{HashMap, HashSet};

use soci_oci::{Digest, labels};
use soci_testkit::{Action, Fault, Matcher, TestRegistry};
use support::image::{Published, publish, publish_with_garbage};
use support::stage::{CONFIG, Stage, layers, registry};
use tonic::{Code, Status};

const STRICT: &str = "[pull_modes]\nstrict = true\n";

/// A cause, how it comes about, and what is to be said of it.
struct Cause {
    reason: &'static str,
    code: Code,
    says: &'static str,
    config: &'static str,
    image: fn(&TestRegistry) -> Published,
    trouble: fn(&TestRegistry, &Published),
}

fn indexed(registry: &TestRegistry) -> Published {
    publish(registry, "team/app", layers().0, |_| true)
}

fn plain(registry: &TestRegistry) -> Published {
    let published = indexed(registry);
    registry.put_manifest("team/app", "plain", &published.image.media_type, published.image.manifest.clone());
    Published { manifest: published.image.digest.parse::<Digest>().unwrap(), ..published }
}

fn manifest(digest: Digest) -> Matcher {
    Matcher::path(format!("/manifests/{digest}"))
}

const CAUSES: [Cause; 7] = [
    Cause {
        reason: "no-index",
        code: Code::FailedPrecondition,
        says: "soci convert",
        config: "",
        image: plain,
        trouble: |_, _| {},
    },
    Cause {
        reason: "disabled",
        code: Code::FailedPrecondition,
        says: "[pull_modes.soci_v2]",
        config: "[pull_modes.soci_v2]\nenable = false\n",
        image: indexed,
        trouble: |_, _| {},
    },
    Cause {
        reason: "index-missing",
        code: Code::NotFound,
        says: "push the index",
        config: "",
        image: indexed,
        trouble: |registry, published| {
            registry.fault(Fault::new(manifest(published.index), Action::status(404)));
        },
    },
    Cause {
        reason: "index-denied",
        code: Code::FailedPrecondition,
        says: "soci auth explain --daemon",
        config: "",
        image: indexed,
        trouble: |registry, _| registry.rotate_password("reader", "another"),
    },
    Cause {
        reason: "index-unavailable",
        code: Code::Unavailable,
        says: "reaches the registry",
        config: "",
        image: indexed,
        trouble: |registry, _| registry.fault(Fault::new(Matcher::any(), Action::Hangup)),
    },
    Cause {
        reason: "index-malformed",
        code: Code::FailedPrecondition,
        says: "soci create",
        config: "",
        image: |registry| publish_with_garbage(registry, "team/app", layers().0),
        trouble: |_, _| {},
    },
    Cause {
        reason: "mount-failed",
        code: Code::Unavailable,
        says: "doctor",
        config: "",
        image: indexed,
        trouble: |registry, published| {
            assert!(registry.delete_blob("team/app", &published.ztocs[0].to_string()));
        },
    },
];

async fn refusal(stage: &mut Stage, published: &Published) -> Status {
    let (answer, _) = stage.try_pull_layer(published, 0).await;
    answer.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_cause_is_an_error_of_its_own_that_says_what_to_do() {
    let mut said = HashSet::new();
    for cause in &CAUSES {
        let reason = cause.reason;
        let registry = registry().await;
        let published = (cause.image)(&registry);
        let mut stage = Stage::new(&registry, &format!("{CONFIG}{STRICT}{}", cause.config)).await;
        (cause.trouble)(&registry, &published);
        let status = refusal(&mut stage, &published).await;
        let message = status.message();
        assert_eq!(status.code(), cause.code, "{reason}: {message}");
        assert!(message.contains(&format!("({reason})")), "{reason}: {message}");
        assert!(message.contains(cause.says), "{reason}: {message}");
        assert!(said.insert(message.to_owned()));
        assert_eq!(stage.fuse_mounts(), 0, "{reason}");
        let line = stage.wait_for("image ").await;
        assert_eq!((line["verdict"].as_str(), line["reasons"].as_str()), (Some("refused"), Some(reason)));
        let series = format!("soci_pull_verdicts_total{{verdict=\"refused\",reason=\"{reason}\"}}");
        assert_eq!(stage.metric(&series).await, Some(1), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_causes_fall_back_without_strict_and_the_snapshot_says_so() {
    for cause in CAUSES.iter().filter(|cause| cause.reason != "index-denied") {
        let reason = cause.reason;
        let registry = registry().await;
        let published = (cause.image)(&registry);
        let mut stage = Stage::new(&registry, &format!("{CONFIG}{}", cause.config)).await;
        (cause.trouble)(&registry, &published);
        let (code, target) = stage.pull_layer(&published, 0).await;
        let (name, verdict) = match code {
            // Unpacked by us, from what the registry has.
            Some(Code::AlreadyExists) => (target, format!("unpacked: {reason}")),
            None => ("extract-0".to_owned(), format!("left to containerd: {reason}")),
            other => panic!("{reason}: {other:?}"),
        };
        assert_eq!(stage.label(&name, "containerd.io/snapshot/soci.verdict").await, verdict);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_without_labels_is_refused_with_the_setting_of_containerd() {
    let registry = registry().await;
    let mut stage = Stage::new(&registry, &format!("{CONFIG}{STRICT}")).await;
    let only_target = || HashMap::from([(labels::TARGET.to_owned(), "sha256:chain".to_owned())]);
    let status = stage.prepare("extract", "", only_target()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("(no-labels)"), "{}", status.message());
    assert!(status.message().contains("disable_snapshot_annotations = false"), "{}", status.message());
    let series = "soci_pull_verdicts_total{verdict=\"refused\",reason=\"no-labels\"}";
    assert_eq!(stage.metric(series).await, Some(1));

    let mut lenient = Stage::new(&registry, CONFIG).await;
    lenient.prepare("extract", "", only_target()).await.unwrap();
    let verdict = lenient.label("extract", "containerd.io/snapshot/soci.verdict").await;
    assert_eq!(verdict, "left to containerd: no-labels");
    let series = "soci_pull_verdicts_total{verdict=\"left to containerd\",reason=\"no-labels\"}";
    assert_eq!(lenient.metric(series).await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_that_could_not_be_had_once_is_had_by_the_next_pull() {
    let registry = registry().await;
    let published = indexed(&registry);
    let mut stage = Stage::new(&registry, &format!("{CONFIG}{STRICT}")).await;
    let ztocs = |number: usize| format!("/blobs/{}", published.ztocs[number]);
    let asked = |path: &str| {
        let log = registry.log();
        log.iter().filter(|seen| seen.request.path.ends_with(path) && seen.status != 401).count()
    };
    registry.fault(Fault::new(Matcher::path(ztocs(0)), Action::status(404)).times(1));
    let status = refusal(&mut stage, &published).await;
    assert!(status.message().contains("(mount-failed)"), "{}", status.message());
    stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 3);
    assert_eq!((asked(&ztocs(0)), asked(&ztocs(1))), (2, 1), "what came is not fetched again");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_the_publisher_left_out_are_no_fallback() {
    let registry = registry().await;
    let published = publish(&registry, "team/app", layers().0, |number| number == 0);
    let mut stage = Stage::new(&registry, &format!("{CONFIG}{STRICT}")).await;
    stage.pull(&published).await;
    assert_eq!(stage.fuse_mounts(), 1);
    let line = stage.wait_for("because of no-ztoc").await;
    assert_eq!(line["verdict"], "lazy", "{line}");
}
