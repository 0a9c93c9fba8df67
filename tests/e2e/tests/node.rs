//! A node's life with a real containerd: what is on the machine needs no registry, what is removed is gone, and a containerd
//! that restarts or collects at the wrong moment loses nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use soci_e2e::publish::{BUILD, Published};
use soci_e2e::pull::KUBELET;
use soci_e2e::{Stage, StageOptions, containerd2, images};
use soci_testkit::containerd::Programs;
use soci_testkit::cri::runtime::RuntimeService;
use soci_testkit::image::{Dialect, Image};
use soci_testkit::snapshots::Snapshots;
use soci_testkit::{Action, AuthMode, Fault, Matcher, wait};

const PATIENCE: Duration = Duration::from_secs(60);

fn options() -> Result<StageOptions> {
    StageOptions::new(AuthMode::Basic)
}

/// Brings an image into a namespace as a file does, without unpacking it, and makes the registry unreachable.
fn import(stage: &Stage, published: &Published, namespace: &str) -> Result<()> {
    let file = stage.path().join("image.tar");
    let file = file.to_str().context("a path is not UTF-8")?;
    stage.fetch(&published.reference)?;
    stage.containerd.run(BUILD, &["images", "export", file, &published.reference])?;
    stage.forget(&published.reference)?;
    stage.registry.fault(Fault::new(Matcher::any(), Action::Hangup));
    stage.containerd.run(namespace, &["images", "import", "--no-unpack", file])?;
    Ok(())
}

fn a_pod_on_an_imported_pause_image(programs: Option<Programs>) -> Result<()> {
    let mut options = options()?;
    if let Some(programs) = programs {
        options.containerd = programs;
    }
    options.sandbox_image = Some("team/pause:1".to_owned());
    options.config.push_str("[pull_modes]\nstrict = true\n");
    let stage = Stage::start(options)?;
    let pause = stage.publish(&images::pause(), "team/pause", "1");
    let app = images::odd(Dialect::Oci);
    let published = stage.publish(&app, "team/app", "1");
    import(&stage, &published, KUBELET)?;
    stage.registry.clear_faults();
    import(&stage, &pause, KUBELET)?;
    let service = stage.containerd.image_service()?;
    // containerd's image service hears of imported images by an event.
    for image in [&pause, &published] {
        let known = wait::until(PATIENCE, || service.status(&image.reference).ok().flatten());
        assert!(known.is_some(), "containerd does not know {} by itself", image.reference);
    }
    let logs = stage.path().join("pods");
    std::fs::create_dir_all(&logs)?;
    let runtime = RuntimeService::connect(&stage.containerd.socket())?;
    let pod = runtime.run_pod("soci-node", &logs).context("RunPodSandbox")?;
    let (code, printed) = pod.run("c", &published.reference, &["/probe", "echo", "from a pod"])?;
    assert_eq!((code, printed.as_str()), (0, "from a pod\n"));
    Ok(())
}

#[test]
fn a_pod_starts_on_imported_images_with_the_registry_blocked_on_containerd_1() -> Result<()> {
    a_pod_on_an_imported_pause_image(None)
}

#[test]
fn a_pod_starts_on_imported_images_with_the_registry_blocked_on_containerd_2() -> Result<()> {
    a_pod_on_an_imported_pause_image(Some(containerd2::programs()?))
}

/// Asks for the lowest layer as a pull does; returns the line that says why it is containerd's.
fn prepare(stage: &Stage, published: &Published, image: &Image) -> Result<String> {
    let layer = &image.layers[0];
    let labels = [
        ("containerd.io/snapshot.ref", layer.diff_id.as_str()),
        ("containerd.io/snapshot/cri.image-ref", published.reference.as_str()),
        ("containerd.io/snapshot/cri.manifest-digest", image.digest.as_str()),
        ("containerd.io/snapshot/cri.layer-digest", layer.digest.as_str()),
    ];
    let snapshots = Snapshots::connect(&stage.snapshotter.socket())?;
    if let Err(status) = snapshots.prepare("default", "extract", "", &labels) {
        bail!("{status}");
    }
    stage.wait_log("defer-snapshot-runtime", PATIENCE)
}

#[test]
fn content_that_is_here_is_used_whatever_the_registry_says() -> Result<()> {
    let mut options = options()?;
    // The registry would have to be asked for referrers, and a fallback would be refused.
    options.config.push_str("[pull_modes]\nstrict = true\n");
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish(&image, "team/app", "1");
    import(&stage, &published, "default")?;
    let line = prepare(&stage, &published, &image)?;
    assert!(line.contains("content-local"), "{line}");
    Ok(())
}

#[test]
fn an_image_removed_in_the_middle_of_its_fetches_gives_the_disk_back() -> Result<()> {
    let mut options = options()?;
    // The background is far from done when the pull is.
    options.config =
        "[blob]\nfetching_timeout_sec = 60\n[background_fetch]\nmax_bytes_per_second = 50000\n".to_owned();
    let stage = Stage::start(options)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/app", "1")?;
    let before = stage.files();
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    assert!(!stage.is_complete(), "it came too fast");
    stage.containerd.image_service()?.remove(&published.reference)?;
    stage.collect()?;
    let gone = wait::until(PATIENCE, || (stage.lazy_layers().ok()? == 0).then_some(()));
    assert!(gone.is_some(), "{}", stage.log_tail());
    stage.wait_for_files(&before)?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    assert_eq!(stage.probe(KUBELET, &published, "again", &["echo", "again"])?, "again\n");
    Ok(())
}

#[test]
fn a_containerd_restarted_in_the_middle_of_a_pull_pulls_again_and_leaks_nothing() -> Result<()> {
    let mut stage = Stage::start(options()?)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/app", "1")?;
    let before = stage.files();
    stage.registry.clear_log();
    // The pull hangs at a layer that is small enough not to be lazy, or at a zTOC, whichever comes first.
    stage.registry.fault(Fault::new(Matcher::blobs(), Action::Stall(100)).skip(2));
    let service = stage.containerd.image_service()?;
    let reference = published.reference.clone();
    let pulling = std::thread::spawn(move || {
        let login = soci_testkit::cri::basic(soci_e2e::stage::USER, soci_e2e::stage::PASSWORD);
        service.pull(&reference, Some(login), "default").is_ok()
    });
    let blobs = || {
        let log = stage.registry.log();
        (log.iter().filter(|seen| seen.request.path.contains("/blobs/")).count() > 2).then_some(())
    };
    assert!(wait::until(PATIENCE, blobs).is_some(), "the pull asks for no blobs");
    stage.containerd.restart(Signal::TERM)?;
    stage.registry.clear_faults();
    assert!(!pulling.join().unwrap_or(true), "the pull ended before containerd did");
    // A pull that meets containerd's collection of what the first one left loses a parent, with any snapshotter.
    stage.collect()?;
    stage.pull_as_kubelet(&published)?;
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    stage.containerd.image_service()?.remove(&published.reference)?;
    stage.end_leases()?;
    stage.collect()?;
    stage.wait_for_files(&before)?;
    assert_eq!(stage.lazy_layers()?, 0);
    Ok(())
}

#[test]
fn containerds_collector_between_any_two_steps_loses_nothing() -> Result<()> {
    let stage = Stage::start(options()?)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v1(&image, "team/app", "1")?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let collecting = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                stage.collect()?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let pulled = (|| {
            for round in 0..3 {
                stage.pull_as_kubelet(&published)?;
                // Those of the round before may still be on their way out.
                let both = || (stage.lazy_layers().ok()? == 2).then_some(());
                assert!(wait::until(PATIENCE, both).is_some(), "round {round}");
                stage.probe(KUBELET, &published, "c", &["sum", "/large", "/random"])?;
                stage.containerd.image_service()?.remove(&published.reference)?;
            }
            stage.pull_as_kubelet(&published)
        })();
        done.store(true, Ordering::Relaxed);
        let rounds = collecting.join().expect("the collecting thread panicked")?;
        assert!(rounds > 3, "the collector ran {rounds} times");
        pulled
    })?;
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

#[test]
fn a_daemon_ended_by_any_signal_comes_back_with_its_images() -> Result<()> {
    let mut stage = Stage::start(options()?)?;
    let published = stage.publish_v1(&images::odd(Dialect::Oci), "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    let before = stage.probe(KUBELET, &published, "before", &["sum", "/large"])?;
    stage.registry.fault(Fault::new(Matcher::any(), Action::Hangup));
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let daemon = stage.snapshotter.daemon();
        daemon.signal(signal);
        daemon.wait_end(PATIENCE).with_context(|| format!("the daemon ignores {signal:?}"))?;
        stage.start_snapshotter_again()?;
        assert_eq!(stage.lazy_layers()?, 2, "{signal:?}");
        let after = stage.probe(KUBELET, &published, "after", &["sum", "/large"])?;
        assert_eq!(after, before, "{signal:?}: from the span cache");
    }
    Ok(())
}
