//! A prefetch list is fetched first, by a later process too: one that was killed before it had the list, or before it had what
//! the list names, with the registry away when the next one starts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use rustix::process::Signal;
use soci_testkit::{Action, Fault, Matcher, TestRegistry};
use support::image::{Published, publish_with_prefetch};
use support::stage::{CONFIG, Stage, layers, registry};
use support::until;

/// No containerd; layers are completed in the background.
const BACKGROUND: &str = "[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n[blob]\nfetching_timeout_sec = 5\n[http]\nMaxRetries = 1\n";
const PREFETCH: &str = "[prefetch]\nenable = true\n";

/// A layer that is mounted; nothing that `away` says was fetched of it.
async fn pulled(config: &str, away: impl FnOnce(&Published) -> String) -> (TestRegistry, Published, Stage) {
    let registry = registry().await;
    let published = publish_with_prefetch(&registry, "team/app", layers().0, &[(3, 3)]);
    let away = away(&published);
    registry.fault(Fault::new(Matcher::new(move |request| request.path.ends_with(&away)), Action::Hangup));
    let mut stage = Stage::new(&registry, &format!("{config}{PREFETCH}")).await;
    assert_eq!(stage.pull_layer(&published, 0).await.0, Some(tonic::Code::AlreadyExists));
    (registry, published, stage)
}

fn layer(published: &Published) -> String {
    published.image.layers[0].digest.clone()
}

fn artifact(published: &Published) -> String {
    published.prefetch.unwrap().to_string()
}

fn requests(registry: &TestRegistry, blob: &str) -> usize {
    registry.log().iter().filter(|seen| seen.request.path.ends_with(blob)).count()
}

fn is_kept(stage: &Stage) -> bool {
    stage.files().iter().any(|(path, _)| path.ends_with("prefetch"))
}

async fn fetched(stage: &Stage, published: &Published, class: &str) -> u64 {
    let layer = layer(published);
    let series = format!("soci_layer_fetched_bytes_total{{layer=\"{layer}\",class=\"{class}\"}}");
    stage.metric(&series).await.unwrap()
}

/// Waits until what the list names is fetched: a span of a megabyte.
async fn until_prefetched(stage: &Stage, published: &Published) {
    until("it is fetched", async || fetched(stage, published, "prefetch").await > 900_000).await;
}

/// Kills the daemon and starts it with the registry away; it is back when the daemon has asked for `blob` in vain.
async fn restart(registry: &TestRegistry, stage: &mut Stage, blob: &str) {
    stage.end(Signal::KILL);
    registry.clear_faults();
    registry.clear_log();
    registry.fault(Fault::new(Matcher::any(), Action::Hangup));
    stage.start_again().await;
    until("it asks", async || requests(registry, blob) > 0).await;
    assert_eq!(stage.fuse_mounts(), 1);
    registry.clear_log();
    registry.clear_faults();
}

/// The first range of the layer that is fetched is the one that the list names.
fn was_first(registry: &TestRegistry, published: &Published) {
    let log = registry.log();
    let ranges: Vec<_> = log
        .iter()
        .filter(|seen| seen.request.path.ends_with(&layer(published)))
        .filter_map(|seen| seen.request.range)
        .collect();
    // The layer does not compress and its spans are a megabyte: the fourth starts near the third megabyte.
    assert!((2_900_000..3_500_000).contains(&ranges.first().unwrap().0), "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_list_names_is_fetched_first_after_a_restart_too() {
    for config in [BACKGROUND, CONFIG] {
        let (registry, published, mut stage) = pulled(config, layer).await;
        until("the list is kept", async || is_kept(&stage)).await;
        restart(&registry, &mut stage, &layer(&published)).await;
        until_prefetched(&stage, &published).await;
        assert_eq!(requests(&registry, &artifact(&published)), 0, "the list is here");
        // With background work two ranges are on their way at once, of which the registry may see the other one first.
        if config == CONFIG {
            was_first(&registry, &published);
            until("nothing is left", async || stage.inspect().await["background_queue"] == 0).await;
            assert_eq!(fetched(&stage, &published, "background").await, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_had_not_come_is_fetched_after_a_restart() {
    let (registry, published, mut stage) = pulled(CONFIG, artifact).await;
    assert!(!is_kept(&stage));
    restart(&registry, &mut stage, &artifact(&published)).await;
    until_prefetched(&stage, &published).await;
    was_first(&registry, &published);
    assert!(is_kept(&stage));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_whose_file_is_damaged_is_fetched_again() {
    let (registry, published, mut stage) = pulled(CONFIG, layer).await;
    until("the list is kept", async || is_kept(&stage)).await;
    let path = stage.files().into_iter().map(|(path, _)| path).find(|path| path.ends_with("prefetch"));
    let path = stage.state().join(path.unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[10] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    restart(&registry, &mut stage, &artifact(&published)).await;
    until_prefetched(&stage, &published).await;
    was_first(&registry, &published);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_list_costs_no_request_after_a_restart_and_goes_with_its_snapshot() {
    let registry = registry().await;
    let published = publish_with_prefetch(&registry, "team/app", layers().0, &[(3, 3)]);
    let mut stage = Stage::new(&registry, &format!("{CONFIG}{PREFETCH}")).await;
    let before = stage.files();
    let (code, name) = stage.pull_layer(&published, 0).await;
    assert_eq!(code, Some(tonic::Code::AlreadyExists));
    until_prefetched(&stage, &published).await;
    until("it is stored", async || stage.inspect().await["jobs"] == 0 && is_kept(&stage)).await;
    stage.end(Signal::KILL);
    registry.clear_log();
    stage.start_again().await;
    until("it is mounted", async || stage.fuse_mounts() == 1).await;
    until("it is idle", async || stage.inspect().await["background_queue"] == 0).await;
    assert_eq!(registry.log().len(), 0);
    stage.remove(&[name]).await;
    stage.wait_for_files(&before).await;
}
