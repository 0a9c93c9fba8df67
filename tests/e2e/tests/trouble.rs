//! The registry goes away, the daemon dies: what was there stays, and what comes back works.

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::state::PATIENCE;
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::{Action, AuthMode, Fault, Matcher};

/// A read whose bytes cannot be had ends after this many seconds; the configuration below says so.
const FETCHING: u64 = 5;
/// The same with a margin for a busy machine, less than what a second read of the same bytes would take.
const FAILED: Duration = Duration::from_secs(FETCHING + 4);

fn stage() -> Result<(Stage, Image, Published)> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config.push_str(&format!("[blob]\nfetching_timeout_sec = {FETCHING}\nmax_retries = 1\n"));
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    Ok((stage, image, published))
}

fn down(stage: &Stage) {
    stage.registry.fault(Fault::new(Matcher::any(), Action::Hangup));
}

#[test]
fn what_was_cached_stays_readable_when_the_registry_is_down() -> Result<()> {
    let (stage, image, published) = stage()?;
    let before = stage.probe(KUBELET, &published, "before", &["sum", "/large"])?;
    down(&stage);
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    let large = std::fs::File::open(mounted.path().join("large"))?;
    let mut content = vec![0; images::LARGE];
    large.read_exact_at(&mut content, 0)?;
    assert_eq!(stage.probe(KUBELET, &published, "after", &["sum", "/large"])?, before);

    let start = Instant::now();
    if std::fs::read(mounted.path().join("random")).is_ok() {
        bail!("a file that was never fetched was read");
    }
    let waited = start.elapsed();
    assert!(waited < FAILED, "{waited:?}");
    stage.registry.clear_faults();
    assert_eq!(
        std::fs::read(mounted.path().join("random"))?.len(),
        5 * 1024 * 1024 + 17,
        "the next read tries again"
    );
    Ok(())
}

#[test]
fn a_registry_that_stalls_does_not_hang_a_reader() -> Result<()> {
    let (stage, image, _) = stage()?;
    stage.registry.fault(Fault::new(Matcher::blobs(), Action::Stall(1000)));
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    let start = Instant::now();
    assert!(std::fs::read(mounted.path().join("random")).is_err());
    let waited = start.elapsed();
    assert!(waited < FAILED, "the kernel asks twice, the reader waits once: {waited:?}");
    Ok(())
}

#[test]
fn a_registry_that_lies_is_not_believed() -> Result<()> {
    let (stage, image, _) = stage()?;
    // One byte in the middle of every layer is wrong; no reader may see it.
    stage.registry.fault(Fault::new(Matcher::blobs(), Action::Corrupt(100_000)));
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    if let Ok(read) = std::fs::read(mounted.path().join("large")) {
        let mut expected = vec![0; images::LARGE];
        stage.registry.clear_faults();
        std::fs::File::open(mounted.path().join("large"))?.read_exact_at(&mut expected, 0)?;
        assert!(read == expected, "bytes that do not match their digest were served");
        bail!("the corrupt byte was not in what was asked for: the test proves nothing");
    }
    stage.registry.clear_faults();
    assert_eq!(
        std::fs::read(mounted.path().join("large"))?.len(),
        images::LARGE,
        "the next read tries again"
    );
    Ok(())
}

#[test]
fn layers_come_back_after_the_daemon_was_killed() -> Result<()> {
    let (mut stage, image, published) = stage()?;
    let before = stage.probe(KUBELET, &published, "before", &["sum", "/large"])?;
    stage.snapshotter.daemon().kill();
    stage.start_snapshotter_again()?;
    assert_eq!(stage.lazy_layers()?, 2);
    assert_eq!(stage.probe(KUBELET, &published, "after", &["sum", "/large"])?, before);
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

#[test]
fn a_restart_needs_no_registry() -> Result<()> {
    let (mut stage, _, published) = stage()?;
    let before = stage.probe(KUBELET, &published, "before", &["sum", "/large"])?;
    stage.snapshotter.daemon().kill();
    down(&stage);
    stage.start_snapshotter_again()?;
    assert_eq!(stage.lazy_layers()?, 2);
    assert_eq!(stage.probe(KUBELET, &published, "after", &["sum", "/large"])?, before, "from the span cache");
    Ok(())
}

#[test]
fn an_interrupt_unmounts_and_the_next_start_mounts_again() -> Result<()> {
    let (mut stage, _, published) = stage()?;
    stage.snapshotter.daemon().stop();
    assert_eq!(stage.lazy_layers()?, 0, "SIGINT unmounts");
    stage.start_snapshotter_again()?;
    assert_eq!(stage.lazy_layers()?, 2);
    assert_eq!(stage.probe(KUBELET, &published, "after", &["echo", "again"])?, "again\n");
    Ok(())
}

#[test]
fn a_removed_image_can_be_pulled_again() -> Result<()> {
    let (stage, _, published) = stage()?;
    stage.probe(KUBELET, &published, "before", &["sum", "/large"])?;
    stage.containerd.image_service()?.remove(&published.reference)?;
    let gone =
        soci_testkit::wait::until(Duration::from_secs(30), || (stage.lazy_layers().ok()? == 0).then_some(()));
    assert!(gone.is_some(), "the mounts of a removed image stay: {:?}", stage.snapshotter.fuse_mounts()?);
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    assert_eq!(stage.probe(KUBELET, &published, "again", &["echo", "again"])?, "again\n");
    Ok(())
}

#[test]
fn a_registry_that_says_try_again_at_once_is_not_stormed() -> Result<()> {
    for status in [429, 503] {
        let mut options = StageOptions::new(AuthMode::Basic)?;
        options
            .config
            .push_str("[http]\nMinWaitMsec = 5\nMaxWaitMsec = 50\n[blob]\nfetching_timeout_sec = 20\n");
        let stage = Stage::start(options)?;
        let image = images::odd(Dialect::Oci);
        let published = stage.publish_v1(&image, "team/app", "1")?;
        // Only the daemon asks for referrers.
        stage.registry.clear_log();
        stage.registry.fault(Fault::new(Matcher::path("/referrers/"), Action::retry_after(status, "0")));
        stage.pull_as_kubelet(&published)?;
        assert_eq!(stage.lazy_layers()?, 0, "{status}: the image is left to containerd");
        let refused = || stage.registry.log().iter().filter(|seen| seen.status == status).count();
        assert!((2..=40).contains(&refused()), "{status}: {} requests", refused());
        assert_eq!(stage.probe(KUBELET, &published, "left", &["echo", "left"])?, "left\n");
        stage.registry.clear_faults();
        stage.containerd.image_service()?.remove(&published.reference)?;
        stage.collect()?;
        // That its index could not be had is remembered for a moment.
        let lazy = || {
            stage.pull_as_kubelet(&published).ok()?;
            if stage.lazy_layers().ok()? == 2 {
                return Some(());
            }
            stage.containerd.image_service().ok()?.remove(&published.reference).ok()?;
            stage.collect().ok()?;
            None
        };
        assert!(soci_testkit::wait::until(PATIENCE, lazy).is_some(), "{status}: {}", stage.log_tail());
        // A storm that ends while a reader waits is not seen by it.
        stage.registry.clear_log();
        stage.registry.fault(Fault::new(Matcher::blobs(), Action::retry_after(status, "0")).times(5));
        let printed = stage.probe(KUBELET, &published, "lazy", &["sum", "/large"])?;
        assert!(printed.starts_with(&format!("/large {} ", images::LARGE)), "{status}: {printed}");
        assert_eq!(refused(), 5, "{status}");
    }
    Ok(())
}
