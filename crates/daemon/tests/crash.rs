//! Killed at any moment, its files cut at any byte, its disk full or read-only: what was promised is there, what cannot be
//! trusted is fetched again, and the daemon starts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::Signal;
use soci_snapshotter_grpc::proto::snapshots as wire;
use soci_testkit::layer_gen::Numbers;
use soci_testkit::{Action, Fault, Matcher};
use support::image::{Published, publish};
use support::stage::{CONFIG, Stage, chains, layers, pull_layer, refused, registry};
use support::{Client, until};
use tonic::Code;

/// Makes a container of the image and compares its files with those of the layers.
async fn check(stage: &mut Stage, published: &Published, big: &[u8]) {
    let top = chains(published).pop().unwrap();
    let merged = stage.run("container", &top).await;
    let big = big.to_vec();
    let compare = move || {
        let text = |path: &str| fs::read_to_string(merged.join(path)).unwrap();
        assert_eq!(text("etc/keep") + &text("etc/added") + &text("etc/top"), "kept\nadded\ntop\n");
        assert!(!merged.join("etc/gone").exists());
        assert!(fs::read(merged.join("big")).unwrap() == big, "the large file differs");
    };
    tokio::task::spawn_blocking(compare).await.unwrap();
    stage.unmount();
    stage.remove(&["container".to_owned()]).await;
}

/// Pulls what is not there; layers that are count as well.
async fn pull_again(stage: &mut Stage, published: &Published) {
    for number in 0..published.image.layers.len() {
        let (code, _) = stage.pull_layer(published, number).await;
        assert_eq!(code, Some(Code::AlreadyExists), "layer {number}: {:#?}", stage.log.lock().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_cut_at_any_byte_are_fetched_again() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::new(&registry, CONFIG).await;
    let mut numbers = Numbers::new(11);
    for round in 0..6 {
        pull_again(&mut stage, &published).await;
        check(&mut stage, &published, &big).await;
        stage.end(Signal::KILL);
        for (path, size) in stage.files() {
            if size == 0 {
                continue;
            }
            // Every file in the first round, about every third later, so that whole and cut ones meet.
            if round > 0 && !numbers.next_u64().is_multiple_of(3) {
                continue;
            }
            let file = fs::OpenOptions::new().write(true).open(stage.state().join(&path)).unwrap();
            file.set_len(numbers.next_u64() % size).unwrap();
        }
        stage.start_again().await;
    }
    pull_again(&mut stage, &published).await;
    check(&mut stage, &published, &big).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_of_a_pull_nothing_temporary_stays() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = Arc::new(publish(&registry, "team/app", layers, |number| number != 1));
    let mut stage =
        Stage::new(&registry, "[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n").await;
    let before = stage.files();
    for turn in 0..8_u64 {
        // The next pull is held up at another of its requests each time.
        registry.fault(Fault::new(Matcher::any(), Action::Stall(1000 * turn)).skip(turn));
        let pull = tokio::spawn(pull_anyhow(stage.client.clone(), Arc::clone(&published)));
        let seen = registry.log().len();
        until("the pull is under way", async || {
            registry.log().len() as u64 > seen as u64 + turn || pull.is_finished()
        })
        .await;
        stage.end(Signal::KILL);
        pull.abort();
        registry.clear_faults();
        stage.start_again().await;
        let names: Vec<String> = list(&mut stage).await;
        // What was not answered may be there or not; what is there goes from the top.
        stage.remove(&names).await;
        stage.wait_for_files(&before).await;
    }
    pull_again(&mut stage, &published).await;
    check(&mut stage, &published, &big).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_ztoc_is_fetched_again_and_the_rest_is_served_meanwhile() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.pull(&published).await;
    check(&mut stage, &published, &big).await;
    let cached = stage.inspect().await["cache_bytes"].clone();
    stage.end(Signal::KILL);
    fs::remove_file(stage.state().join("ztocs/sha256").join(published.ztocs[1].hex())).unwrap();
    registry.fault(Fault::new(Matcher::any(), Action::Hangup));
    stage.start_again().await;
    let line = stage.wait_for("mounted again").await;
    assert_eq!((line["total"].as_str(), line["degraded"].as_str()), (Some("3"), Some("1")), "{line}");
    assert_eq!(stage.inspect().await["cache_bytes"], cached, "cached spans of a lost zTOC are kept");
    // The layers beside it serve.
    let below = chains(&published)[0].clone();
    let merged = stage.run("below", &below).await;
    assert_eq!(fs::read_to_string(merged.join("etc/keep")).unwrap(), "kept\n");
    stage.unmount();
    registry.clear_faults();
    until("it is back", async || stage.fuse_mounts() == 3).await;
    stage.remove(&["below".to_owned()]).await;
    check(&mut stage, &published, &big).await;
    assert_eq!(stage.messages("was lost; it is fetched again").len(), 1, "said once");
}

#[tokio::test(flavor = "multi_thread")]
async fn ztocs_damaged_under_the_daemon_are_fetched_again_when_they_are_needed() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.pull(&published).await;
    let file = |ztoc: &soci_oci::Digest| stage.state().join("ztocs/sha256").join(ztoc.hex());
    let whole: Vec<Vec<u8>> = published.ztocs.iter().map(|ztoc| fs::read(file(ztoc)).unwrap()).collect();
    for (ztoc, bytes) in published.ztocs.iter().zip(&whole) {
        let damaged: Vec<u8> = bytes.iter().map(|byte| byte ^ 1).collect();
        fs::write(file(ztoc), damaged).unwrap();
    }
    let files: Vec<PathBuf> = published.ztocs.iter().map(file).collect();
    check(&mut stage, &published, &big).await;
    let again = stage.messages("a lost or damaged zTOC was fetched again").len();
    assert!(again > 0, "nothing needed one: {:#?}", stage.log.lock().unwrap());
    let mended = files.iter().zip(&whole).filter(|(file, bytes)| fs::read(file).unwrap() == **bytes);
    assert_eq!(mended.count(), again, "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_that_were_aborted_are_mounted_again_without_a_pull() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |_| true);
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.pull(&published).await;
    let mounts = soci_testkit::mounts::fuse(stage.dir.path()).unwrap();
    let mounts: Vec<PathBuf> = mounts.into_iter().map(|mount| mount.at).collect();
    assert_eq!(mounts.len(), 3);
    for at in &mounts {
        // Their connections end, they stay because they are in use: dead.
        let _in_use = fs::File::open(at).unwrap();
        let forced = rustix::mount::unmount(at, UnmountFlags::FORCE);
        assert_eq!(forced, Err(rustix::io::Errno::BUSY));
    }
    until("all serve again", async || {
        let mounts = mounts.clone();
        // A dead one can be opened; its first name is an error.
        let lists = |at: &PathBuf| {
            fs::read_dir(at).is_ok_and(|mut names| names.next().is_some_and(|name| name.is_ok()))
        };
        let listed = move || mounts.iter().all(lists);
        tokio::task::spawn_blocking(listed).await.unwrap()
    })
    .await;
    assert_eq!(stage.messages("the layer is no longer served").len(), 3, "each is told of once");
    assert_eq!(stage.fuse_mounts(), 3, "the dead ones are gone");
    check(&mut stage, &published, &big).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restarts_by_each_signal_keep_what_was_pulled() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.pull(&published).await;
    check(&mut stage, &published, &big).await;
    registry.shutdown().await;
    for signal in [Signal::INT, Signal::TERM, Signal::KILL, Signal::TERM, Signal::INT] {
        stage.end(signal);
        assert_eq!(stage.fuse_mounts(), if signal == Signal::INT { 0 } else { 2 }, "{signal:?}");
        stage.start_again().await;
        check(&mut stage, &published, &big).await;
        assert_eq!(stage.wait_for("mounted again").await["degraded"], "0");
        assert_eq!(stage.fuse_mounts(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_of_a_newer_version_is_refused_and_left_alone() {
    let registry = registry().await;
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.end(Signal::TERM);
    let version = stage.state().join("version");
    fs::write(&version, "soci-snapshotter-grpc state 7\n").unwrap();
    let before = stage.files();
    let line = refused(stage.dir.path());
    let said = line["msg"].as_str().unwrap();
    assert!(said.contains("format 7") && said.contains("newer"), "{line}");
    assert_eq!(stage.files(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_state_is_refused_and_names_the_first() {
    let registry = registry().await;
    let mut stage = Stage::new(&registry, CONFIG).await;
    let line = refused(stage.dir.path());
    let said = line["msg"].as_str().unwrap();
    assert!(said.contains(&format!("process {}", stage.child.id())), "{line}");
    assert!(list(&mut stage).await.is_empty(), "the first one serves on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_state_directory_is_refused_with_what_to_do() {
    let registry = registry().await;
    let mut stage = Stage::new(&registry, CONFIG).await;
    stage.end(Signal::TERM);
    let state = stage.state();
    rustix::mount::mount_bind(&state, &state).unwrap();
    rustix::mount::mount_remount(&state, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
    let line = refused(stage.dir.path());
    rustix::mount::unmount(&state, UnmountFlags::DETACH).unwrap();
    let said = line["msg"].as_str().unwrap();
    assert!(said.contains("can be written to") && said.contains(&*state.to_string_lossy()), "{line}");
}

/// A state directory that is a file system in memory.
fn tmpfs(state: &Path, options: &str) {
    fs::create_dir_all(state).unwrap();
    let options = CString::new(options).unwrap();
    rustix::mount::mount("tmpfs", state, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_may_be_in_memory() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::on(&registry, CONFIG, |state| tmpfs(state, "size=64m")).await;
    stage.pull(&published).await;
    check(&mut stage, &published, &big).await;
    stage.end(Signal::KILL);
    stage.start_again().await;
    check(&mut stage, &published, &big).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_full_in_any_write_path_costs_speed_and_not_content() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::on(&registry, CONFIG, |state| tmpfs(state, "size=32m")).await;
    let filler = stage.state().join("filler");
    let before = stage.files();
    let mut whole = 0;
    for free in [0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 1024, 2048, 8192_u64] {
        fill(&filler, free << 10);
        let pulled = pull_what_fits(&mut stage, &published).await;
        if pulled == published.image.layers.len() {
            whole += 1;
            // Spans that cannot be stored are served from memory.
            let top = chains(&published).pop().unwrap();
            fs::write(&filler, b"").unwrap();
            let answer = stage.prepare("container", &top, Default::default()).await.unwrap();
            fill(&filler, free << 10);
            let merged = stage.mount(&answer);
            let expected = big.clone();
            let same = tokio::task::spawn_blocking(move || fs::read(merged.join("big")).unwrap() == expected);
            assert!(same.await.unwrap(), "{free} KiB were free");
            stage.unmount();
        }
        stage.end(Signal::KILL);
        fill(&filler, 0);
        stage.start_again().await;
        // Removing is what makes room, so that it must not need any.
        let names = list(&mut stage).await;
        stage.remove(&names).await;
        fs::remove_file(&filler).unwrap();
        stage.wait_for_files(&before).await;
    }
    assert!(whole >= 1, "at least with megabytes free all layers fit");
    pull_again(&mut stage, &published).await;
    check(&mut stage, &published, &big).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_inodes_is_as_a_full_one() {
    let registry = registry().await;
    let (layers, big) = layers();
    let published = publish(&registry, "team/app", layers, |number| number != 1);
    let mut stage = Stage::on(&registry, CONFIG, |state| tmpfs(state, "size=64m,nr_inodes=200")).await;
    let before = stage.files();
    let fillers = stage.state().join("filler");
    let snapshots = stage.state().join("snapshotter/snapshots");
    for free in [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30] {
        fs::create_dir(&fillers).unwrap();
        let mut made = 0;
        while fs::write(fillers.join(made.to_string()), b"").is_ok() {
            made += 1;
        }
        (0..free).for_each(|number| fs::remove_file(fillers.join(number.to_string())).unwrap());
        pull_what_fits(&mut stage, &published).await;
        stage.end(Signal::KILL);
        while fs::write(fillers.join(made.to_string()), b"").is_ok() {
            made += 1;
        }
        stage.start_again().await;
        stage.wait_for("no room to try overlay").await;
        let names = list(&mut stage).await;
        stage.remove(&names).await;
        fs::remove_dir_all(&fillers).unwrap();
        until("no snapshot is left", async || fs::read_dir(&snapshots).unwrap().count() == 0).await;
    }
    pull_again(&mut stage, &published).await;
    check(&mut stage, &published, &big).await;
    let names = list(&mut stage).await;
    stage.remove(&names).await;
    stage.wait_for_files(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_says_try_again_at_once_is_not_stormed() {
    for status in [429, 503] {
        let registry = registry().await;
        let (layers, big) = layers();
        let published = publish(&registry, "team/app", layers, |_| true);
        let config = "[background_fetch]\ndisable = true\n[content_store]\ncontainerd_address = '/nonexistent/c.sock'\n\
                      [http]\nMinWaitMsec = 5\nMaxWaitMsec = 50\n[blob]\nfetching_timeout_sec = 20\n";
        let mut stage = Stage::new(&registry, config).await;
        registry.fault(Fault::new(Matcher::any(), Action::retry_after(status, "0")));
        let (code, _) = stage.pull_layer(&published, 0).await;
        assert_eq!(code, None, "{status}: the image is left to containerd");
        let requests = registry.log().len();
        assert!((2..=40).contains(&requests), "{status}: {requests} requests");
        stage.remove(&["extract-0".to_owned()]).await;
        registry.clear_faults();
        let mut stage = Stage::new(&registry, config).await;
        stage.pull(&published).await;
        // A storm that ends while a reader waits is not seen by it.
        registry.clear_log();
        registry.fault(Fault::new(Matcher::blobs(), Action::retry_after(status, "0")).times(5));
        check(&mut stage, &published, &big).await;
        let refused = registry.log().iter().filter(|seen| seen.status == status).count();
        assert_eq!(refused, 5);
    }
}

/// Pulls as far as it goes.
async fn pull_anyhow(mut client: Client, published: Arc<Published>) {
    for number in 0..published.image.layers.len() {
        let _ = pull_layer(&mut client, &published, number).await;
    }
}

/// Leaves `free` bytes of the file system.
fn fill(filler: &PathBuf, free: u64) {
    let _ = fs::remove_file(filler);
    let stat = rustix::fs::statvfs(filler.parent().unwrap()).unwrap();
    let length = (stat.f_bavail * stat.f_frsize).saturating_sub(free);
    let file = fs::File::create(filler).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length.max(1)).unwrap();
}

/// Pulls layers until one is left to containerd or refused; returns how many came.
async fn pull_what_fits(stage: &mut Stage, published: &Published) -> usize {
    for number in 0..published.image.layers.len() {
        match stage.try_pull_layer(published, number).await.0 {
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => {
                // As containerd spells an internal error.
                assert_eq!(status.code(), Code::Unknown, "{status}");
                assert!(status.message().contains("No space left"), "{status}");
                return number;
            }
            Ok(_) => return number,
        }
    }
    published.image.layers.len()
}

/// Returns the names of all snapshots, those first that others do not build on.
async fn list(stage: &mut Stage) -> Vec<String> {
    let mut answers = stage.client.list(wire::ListSnapshotsRequest::default()).await.unwrap().into_inner();
    let mut infos = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        infos.extend(answer.info);
    }
    let mut names = Vec::new();
    while !infos.is_empty() {
        let parents: Vec<String> = infos.iter().map(|info| info.parent.clone()).collect();
        let (inner, tops): (Vec<_>, Vec<_>) =
            infos.into_iter().partition(|info| parents.contains(&info.name));
        names.extend(tops.into_iter().map(|info| info.name));
        infos = inner;
    }
    names
}
