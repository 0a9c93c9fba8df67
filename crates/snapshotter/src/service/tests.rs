use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use parking_lot::Mutex;
use soci_oci::Digest;
use tokio::sync::{Notify, Semaphore};

use super::*;
use crate::plan::{ImageFacts, LayerFacts, LayerRequest, ResolveError, ResolveErrorKind};
use crate::provider::{
    LazyError, Lower, MAX_REFERENCES, MountRecord, ReleaseError, SetbackKind, UnpackError,
};
use crate::records::tests::mount_record;
use crate::verdict::Verdict;

/// A provider that does what its script says and counts.
#[derive(Debug, Default)]
struct Script {
    no_index: Mutex<Option<ResolveErrorKind>>,
    no_ztoc: Mutex<bool>,
    lazy_fails: Mutex<bool>,
    unpack_fails: Mutex<bool>,
    restore_fails: Mutex<bool>,
    /// Restores wait for a permit.
    restore_gate: Option<Semaphore>,
    lost: Mutex<bool>,
    told: Mutex<Option<usize>>,
    /// Lazy mounts wait for a permit.
    gate: Option<Semaphore>,
    mounted: Mutex<HashSet<u64>>,
    /// Told when mounts broke, and which.
    breaking: Notify,
    broken: Mutex<Vec<u64>>,
    facts: AtomicUsize,
    mounts: AtomicUsize,
    unpacks: AtomicUsize,
    restores: AtomicUsize,
    releases: AtomicUsize,
    /// How many snapshot directories there were at each release.
    dirs_at_release: Mutex<Vec<usize>>,
    shared: Mutex<Vec<(String, u64)>>,
}

#[async_trait]
impl LayerProvider for Script {
    async fn facts(&self, _: &LayerRequest) -> Result<ImageFacts, ResolveError> {
        self.facts.fetch_add(1, Ordering::Relaxed);
        if let Some(kind) = *self.no_index.lock() {
            return Err(ResolveError { kind, message: "scripted".into() });
        }
        let layer = LayerFacts { size: Some(100), has_ztoc: !*self.no_ztoc.lock() };
        Ok(ImageFacts { index: Digest::of(b"index"), layers: 2, layer })
    }

    async fn mount_lazy(
        &self,
        _: &LayerRequest,
        _: &[Ancestor],
        at: &SnapshotDir,
    ) -> Result<MountRecord, LazyError> {
        self.mounts.fetch_add(1, Ordering::Relaxed);
        if let Some(gate) = &self.gate {
            let _ = gate.acquire().await;
        }
        assert!(at.fs().is_dir());
        if *self.lazy_fails.lock() {
            return Err(LazyError { kind: SetbackKind::Malformed, message: "scripted".into() });
        }
        self.mounted.lock().insert(at.id());
        Ok(mount_record())
    }

    async fn unpack(&self, _: &LayerRequest, _: &[Ancestor], at: &SnapshotDir) -> Result<Usage, UnpackError> {
        self.unpacks.fetch_add(1, Ordering::Relaxed);
        if *self.unpack_fails.lock() {
            return Err(UnpackError { kind: SetbackKind::Unavailable, message: "scripted".into() });
        }
        std::fs::write(at.fs().join("file"), b"unpacked").unwrap();
        Ok(Usage { size: 8, inodes: 2 })
    }

    async fn share(&self, layer: &LayerRequest, at: &SnapshotDir) {
        self.shared.lock().push((layer.image.to_string(), at.id()));
    }

    async fn restore(&self, _: &MountRecord, at: &SnapshotDir) -> Result<(), RestoreError> {
        self.restores.fetch_add(1, Ordering::Relaxed);
        if let Some(gate) = &self.restore_gate {
            gate.acquire().await.unwrap().forget();
        }
        if *self.restore_fails.lock() {
            return Err(RestoreError { message: "scripted".into() });
        }
        self.mounted.lock().insert(at.id());
        Ok(())
    }

    fn at_hand(&self, _: &MountRecord) -> bool {
        !*self.lost.lock()
    }

    async fn told_all(self: Arc<Self>, later: Vec<Arc<Record>>) {
        *self.told.lock() = Some(later.len());
    }

    fn lower(&self, at: &SnapshotDir) -> Lower {
        Lower { path: at.fs(), served: self.mounted.lock().contains(&at.id()) }
    }

    async fn broken(&self) -> Vec<u64> {
        self.breaking.notified().await;
        std::mem::take(&mut self.broken.lock())
    }

    async fn unmount(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        self.release(at).await
    }

    async fn release(&self, at: &SnapshotDir) -> Result<(), ReleaseError> {
        self.releases.fetch_add(1, Ordering::Relaxed);
        let beside = at.path().parent().unwrap().read_dir().unwrap().count();
        self.dirs_at_release.lock().push(beside);
        self.mounted.lock().remove(&at.id());
        Ok(())
    }
}

struct Bench {
    root: tempfile::TempDir,
    script: Arc<Script>,
    snapshotter: Snapshotter,
    verdicts: Arc<Mutex<Vec<Verdict>>>,
}

impl Bench {
    fn new(script: Script, modes: PullModes) -> Self {
        Self::reopen(tempfile::tempdir().unwrap(), Arc::new(script), modes)
    }

    fn reopen(root: tempfile::TempDir, script: Arc<Script>, modes: PullModes) -> Self {
        let verdicts = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&verdicts);
        let observer: Observer = Arc::new(move |verdict| sink.lock().push(verdict.clone()));
        let settings = Settings { modes, userxattr: false, observer };
        let (snapshotter, findings) = Snapshotter::open(root.path(), script.clone(), settings).unwrap();
        assert!(findings.is_empty());
        Self { root, script, snapshotter, verdicts }
    }

    async fn prepare(&self, key: &str, parent: &str, target: Option<&str>) -> Result<Vec<Mount>, Error> {
        self.snapshotter.prepare(request("k8s.io", key, parent, target)).await
    }

    async fn pull(&self, key: &str, parent: &str, target: &str) {
        let error = self.prepare(key, parent, Some(target)).await.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
    }

    fn path(&self, inner: &str) -> String {
        self.root.path().join("snapshots").join(inner).display().to_string()
    }
}

fn request(namespace: &str, key: &str, parent: &str, target: Option<&str>) -> Prepare {
    let mut labels = HashMap::new();
    if let Some(target) = target {
        let layer = Digest::of(target.as_bytes()).to_string();
        for (label, value) in [
            (labels::TARGET, target),
            (labels::IMAGE_REF, "reg.example/a:1"),
            (labels::MANIFEST_DIGEST, &Digest::of(b"manifest").to_string()),
            (labels::LAYER_DIGEST, &layer),
        ] {
            labels.insert(label.to_owned(), value.to_owned());
        }
    }
    Prepare { namespace: Some(namespace.into()), key: key.into(), parent: parent.into(), labels }
}

#[tokio::test]
async fn a_lazy_layer_is_committed_and_found_as_containerd_looks_for_it() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.pull("k2", "sha256:one", "sha256:two").await;
    let filter = r#"labels."containerd.io/snapshot.ref"==sha256:two,parent=="sha256:one""#.to_owned();
    let found = bench.snapshotter.list(&[filter]).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), found[0].kind), ("sha256:two", Kind::Committed));
    let label = |label: &str| found[0].labels.get(label).map(String::as_str);
    assert_eq!(label(labels::REMOTE), Some("remote snapshot"));
    assert_eq!(label(labels::NAMESPACE), Some("k8s.io"));
    assert_eq!(label(labels::HAS_INDEX), Some("true"));
    assert_eq!(label(VERDICT_LABEL), Some("lazy"));
    assert!(bench.snapshotter.stat("k2").is_err(), "the key is not used");
    let mounts = bench.prepare("container", "sha256:two", None).await.unwrap();
    let options = format!(
        "workdir={},upperdir={},lowerdir={}:{}",
        bench.path("3/work"),
        bench.path("3/fs"),
        bench.path("2/fs"),
        bench.path("1/fs")
    );
    assert_eq!(
        mounts,
        [Mount {
            kind: "overlay",
            source: "overlay".into(),
            options: options.split(',').map(str::to_owned).collect()
        }]
    );
    assert_eq!(bench.verdicts.lock().len(), 1);
    assert_eq!(bench.verdicts.lock()[0].to_string(), "image reg.example/a:1: lazy (2 lazy)");
}

#[tokio::test]
async fn an_existing_target_is_answered_before_any_work() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.pull("other", "", "sha256:one").await;
    let error = bench.snapshotter.prepare(request("other", "x", "", Some("sha256:one"))).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "another namespace shares it");
    assert_eq!(bench.script.facts.load(Ordering::Relaxed), 1);
    assert_eq!(bench.snapshotter.list(&[]).unwrap().len(), 1);
}

#[tokio::test]
async fn a_layer_remembers_each_image_that_has_it_up_to_a_bound() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.pull("again", "", "sha256:one").await;
    assert!(bench.script.shared.lock().is_empty(), "the same image is known");
    let namespaces: Vec<String> = (0..MAX_REFERENCES).map(|number| format!("other-{number}")).collect();
    for namespace in namespaces.iter().chain(&namespaces) {
        bench.snapshotter.prepare(request(namespace, "x", "", Some("sha256:one"))).await.unwrap_err();
    }
    let shared = bench.script.shared.lock().len();
    assert_eq!(shared, MAX_REFERENCES, "each is told once");
    let Bench { root, script, snapshotter, .. } = bench;
    drop(snapshotter);
    let again = Bench::reopen(root, script, PullModes::default());
    let record = again.snapshotter.0.store.get("sha256:one").unwrap();
    let kept = record.lazy.as_ref().unwrap().references.iter().map(|reference| &reference.namespace);
    assert!(kept.eq(&namespaces), "the oldest goes");
}

#[tokio::test]
async fn a_target_on_another_parent_is_another_snapshot() {
    let bench = Bench::new(Script::default(), PullModes::default());
    for base in ["a", "b"] {
        bench.prepare(base, "", None).await.unwrap();
        let commit = Commit { key: base.into(), name: format!("{base}-done"), ..Commit::default() };
        bench.snapshotter.commit(commit).await.unwrap();
        bench.pull("k", &format!("{base}-done"), "sha256:top").await;
        let filter = format!(r#"labels."containerd.io/snapshot.ref"==sha256:top,parent=="{base}-done""#);
        assert_eq!(bench.snapshotter.list(&[filter]).unwrap().len(), 1, "{base}");
    }
}

#[tokio::test]
async fn the_ladder_ends_in_a_container_that_starts() {
    for (no_index, lazy_fails, no_ztoc, unpack_fails, expected, word) in [
        (None, false, true, false, Code::AlreadyExists, "unpacked: no-ztoc"),
        (None, true, false, false, Code::AlreadyExists, "unpacked: mount-failed"),
        (None, true, false, true, Code::NotFound, "left to containerd: mount-failed"),
        (None, false, true, true, Code::NotFound, "left to containerd: unpack-failed"),
        (Some(ResolveErrorKind::None), false, false, false, Code::NotFound, "left to containerd: no-index"),
        (
            Some(ResolveErrorKind::Denied),
            false,
            false,
            false,
            Code::NotFound,
            "left to containerd: index-denied",
        ),
    ] {
        let script = Script {
            no_index: Mutex::new(no_index),
            lazy_fails: Mutex::new(lazy_fails),
            no_ztoc: Mutex::new(no_ztoc),
            unpack_fails: Mutex::new(unpack_fails),
            ..Script::default()
        };
        let bench = Bench::new(script, PullModes::default());
        let result = bench.prepare("key", "", Some("sha256:one")).await;
        let name = match &result {
            Ok(mounts) => {
                assert_eq!(expected, Code::NotFound, "{word}");
                assert_eq!(mounts[0].kind, "bind");
                let upper = std::path::PathBuf::from(&mounts[0].source);
                assert_eq!(std::fs::read_dir(upper).unwrap().count(), 0, "nothing partial is handed over");
                "key"
            }
            Err(error) => {
                assert_eq!(error.code(), expected, "{error:?}");
                "sha256:one"
            }
        };
        let info = bench.snapshotter.stat(name).unwrap();
        assert_eq!(info.labels.get(VERDICT_LABEL).map(String::as_str), Some(word));
        assert!(!info.labels.contains_key(labels::REMOTE), "{word}");
        assert!(bench.script.mounted.lock().is_empty());
    }
}

#[tokio::test]
async fn the_verdict_outlives_the_commit_of_a_layer_that_containerd_unpacked() {
    let script = Script { no_index: Mutex::new(Some(ResolveErrorKind::None)), ..Script::default() };
    let bench = Bench::new(script, PullModes::default());
    bench.prepare("key", "", Some("sha256:one")).await.unwrap();
    // containerd sends the labels that it knows.
    let mut labels = request("k8s.io", "", "", Some("sha256:one")).labels;
    let commit =
        Commit { key: "key".into(), name: "sha256:one".into(), labels: labels.clone(), ..Commit::default() };
    bench.snapshotter.commit(commit).await.unwrap();
    for (label, value) in [(VERDICT_LABEL, "left to containerd: no-index"), (labels::NAMESPACE, "k8s.io")] {
        labels.insert(label.to_owned(), value.to_owned());
    }
    assert_eq!(bench.snapshotter.stat("sha256:one").unwrap().labels, labels.into_iter().collect());
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_is_there_unpacked_makes_no_pull_lazy() {
    for (no_ztoc, word) in [(false, "lazy"), (true, "present")] {
        let script = Script { no_ztoc: Mutex::new(no_ztoc), ..Script::default() };
        let bench = Bench::new(script, PullModes::default());
        bench.pull("k", "", "sha256:one").await;
        bench.snapshotter.prepare(request("other", "x", "", Some("sha256:one"))).await.unwrap_err();
        let of_other = || bench.verdicts.lock().iter().find(|verdict| verdict.namespace == "other").cloned();
        tokio::time::sleep(crate::verdict::IDLE * 3).await;
        assert_eq!(of_other().unwrap().word(), word);
    }
}

#[tokio::test]
async fn a_pull_without_labels_has_its_verdict_on_whatever_it_builds() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k", "", "sha256:base").await;
    let unlabelled = |key: &str, parent: &str| {
        let mut request = request("k8s.io", key, parent, Some("sha256:x"));
        request.labels.remove(labels::IMAGE_REF);
        request
    };
    let told = || bench.verdicts.lock().iter().filter(|verdict| verdict.image.is_empty()).count();
    let mut parent = "sha256:base".to_owned();
    for name in ["sha256:one", "sha256:two"] {
        bench.snapshotter.prepare(unlabelled(&format!("key of {name}"), &parent)).await.unwrap();
        assert_eq!(told(), 1, "once, for the lowest layer that was missing");
        let commit = Commit {
            key: format!("key of {name}"),
            name: name.into(),
            parent: parent.clone(),
            ..Commit::default()
        };
        bench.snapshotter.commit(commit).await.unwrap();
        parent = name.to_owned();
    }
    bench.snapshotter.prepare(unlabelled("other", "sha256:base")).await.unwrap();
    assert_eq!(told(), 2, "another pull on the same base");
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_stop_a_removal_half_way() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    let mut removing = Box::pin(bench.snapshotter.remove("sha256:one"));
    assert!(futures::poll!(removing.as_mut()).is_pending());
    drop(removing);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while bench.script.releases.load(Ordering::Relaxed) == 0 {
        assert!(std::time::Instant::now() < end, "its layer stays mounted");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_unpacked_layer_reports_what_it_takes() {
    let script = Script { no_ztoc: Mutex::new(true), ..Script::default() };
    let bench = Bench::new(script, PullModes::default());
    bench.pull("k", "", "t").await;
    assert_eq!(bench.snapshotter.usage("t").await.unwrap(), Usage { size: 8, inodes: 2 });
}

#[tokio::test]
async fn strict_refuses_each_fallback_with_its_code() {
    let strict = PullModes { strict: true, ..PullModes::default() };
    for (no_index, lazy_fails, unlabelled, code, reason) in [
        (Some(ResolveErrorKind::None), false, false, Code::FailedPrecondition, "(no-index)"),
        (Some(ResolveErrorKind::Missing), false, false, Code::NotFound, "(index-missing)"),
        (Some(ResolveErrorKind::Unavailable), false, false, Code::Unavailable, "(index-unavailable)"),
        (None, true, false, Code::Unavailable, "(mount-failed)"),
        (None, false, true, Code::FailedPrecondition, "(no-labels)"),
    ] {
        let script = Script {
            no_index: Mutex::new(no_index),
            lazy_fails: Mutex::new(lazy_fails),
            ..Script::default()
        };
        let bench = Bench::new(script, strict.clone());
        let mut request = request("k8s.io", "key", "", Some("sha256:one"));
        if unlabelled {
            request.labels.remove(labels::IMAGE_REF);
        }
        let error = bench.snapshotter.prepare(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(bench.snapshotter.list(&[]).unwrap().is_empty());
        assert_eq!(bench.script.unpacks.load(Ordering::Relaxed), 0);
    }
}

#[tokio::test]
async fn a_hundred_concurrent_prepares_with_cancels_mount_once() {
    let script = Script { gate: Some(Semaphore::new(0)), ..Script::default() };
    let bench = Bench::new(script, PullModes::default());
    let calls: Vec<_> = (0..100)
        .map(|number| {
            let snapshotter = bench.snapshotter.clone();
            let request = request("k8s.io", &format!("k{number}"), "", Some("sha256:one"));
            tokio::spawn(async move { snapshotter.prepare(request).await })
        })
        .collect();
    while bench.script.mounts.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    for call in calls.iter().step_by(3) {
        call.abort();
    }
    bench.script.gate.as_ref().unwrap().close();
    for call in calls {
        match call.await {
            Ok(result) => assert_eq!(result.unwrap_err().code(), Code::AlreadyExists),
            Err(cancelled) => assert!(cancelled.is_cancelled()),
        }
    }
    assert_eq!(bench.script.mounts.load(Ordering::Relaxed), 1);
    assert_eq!(bench.snapshotter.list(&[]).unwrap().len(), 1);
    assert!(bench.snapshotter.0.layers.is_empty());
}

#[tokio::test]
async fn a_restart_serves_at_once_and_mounts_again_without_resolving() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.pull("k2", "sha256:one", "sha256:two").await;
    bench.prepare("container", "sha256:two", None).await.unwrap();
    bench.snapshotter.shutdown(Unmount::No).await;
    let Bench { root, script, .. } = bench;
    assert_eq!(script.releases.load(Ordering::Relaxed), 0, "mounts stay for the next process");
    let script = Arc::new(Script::default());
    let bench = Bench::reopen(root, script, PullModes::default());
    assert_eq!(
        bench.snapshotter.mounts("container").await.unwrap()[0].kind,
        "overlay",
        "brought back on demand"
    );
    assert_eq!(bench.snapshotter.restore().await, Restored { total: 2, degraded: 0 });
    assert_eq!(bench.script.restores.load(Ordering::Relaxed), 2, "each once");
    assert_eq!(bench.script.facts.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_mount_that_cannot_be_restored_is_unavailable_until_it_can() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.snapshotter.shutdown(Unmount::Yes).await;
    assert_eq!(bench.script.releases.load(Ordering::Relaxed), 1);
    let script = Script { restore_fails: Mutex::new(true), ..Script::default() };
    let bench = Bench::reopen(bench.root, Arc::new(script), PullModes::default());
    assert_eq!(bench.snapshotter.restore().await, Restored { total: 1, degraded: 1 });
    let error = bench.prepare("container", "sha256:one", None).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(bench.snapshotter.stat("container").is_err(), "a refused key does not exist");
    assert!(bench.prepare("plain", "", None).await.is_ok(), "others are served");
    *bench.script.restore_fails.lock() = false;
    while bench.script.mounted.lock().is_empty() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(bench.prepare("container", "sha256:one", None).await.is_ok());
}

impl Script {
    fn breaks(&self, id: u64) {
        self.mounted.lock().remove(&id);
        self.broken.lock().push(id);
        self.breaking.notify_one();
    }
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_mount_that_breaks_is_replaced_without_being_asked_for() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.pull("k2", "sha256:one", "sha256:two").await;
    let restores = || bench.script.restores.load(Ordering::Relaxed);
    bench.script.breaks(1);
    until(|| bench.script.mounted.lock().len() == 2).await;
    assert_eq!(restores(), 1);
    // Again, and what stands against it passes.
    *bench.script.restore_fails.lock() = true;
    bench.script.breaks(2);
    until(|| restores() > 3).await;
    assert!(!bench.script.mounted.lock().contains(&2));
    *bench.script.restore_fails.lock() = false;
    until(|| bench.script.mounted.lock().len() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_mount_that_breaks_and_is_removed_meanwhile_is_not_tried_again() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    *bench.script.restore_fails.lock() = true;
    bench.script.breaks(1);
    until(|| bench.script.restores.load(Ordering::Relaxed) > 1).await;
    bench.snapshotter.remove("sha256:one").await.unwrap();
    until(|| bench.snapshotter.0.degraded.lock().is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_logged_once_however_often_it_is_met() {
    let (log, _guard) = soci_testkit::log::capture();
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    for outage in 1..=2 {
        *bench.script.restore_fails.lock() = true;
        bench.script.mounted.lock().clear();
        for number in 0..5 {
            let error = bench.prepare(&format!("container-{number}"), "sha256:one", None).await.unwrap_err();
            assert_eq!(error.code(), Code::Unavailable);
        }
        let tried = bench.script.restores.load(Ordering::Relaxed);
        until(|| bench.script.restores.load(Ordering::Relaxed) > tried + 2).await;
        assert_eq!(log.warnings(""), outage, "{}", log.text());
        assert_eq!(log.warnings("failed to restore remote snapshot sha256:one"), outage);
        *bench.script.restore_fails.lock() = false;
        until(|| !bench.script.mounted.lock().is_empty()).await;
    }
    assert_eq!(log.text().matches("sha256:one that had failed is restored").count(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_was_lost_is_restored_in_the_background_and_not_swept_before() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.snapshotter.shutdown(Unmount::Yes).await;
    let script = Script { lost: Mutex::new(true), ..Script::default() };
    let bench = Bench::reopen(bench.root, Arc::new(script), PullModes::default());
    assert_eq!(bench.snapshotter.restore().await, Restored { total: 1, degraded: 1 });
    assert_eq!(*bench.script.told.lock(), Some(1));
    while bench.script.mounted.lock().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(bench.script.restores.load(Ordering::Relaxed), 1, "at once, and once");
}

#[tokio::test]
async fn a_layer_removed_while_it_is_restored_is_released_again() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.snapshotter.shutdown(Unmount::Yes).await;
    let script = Script { restore_gate: Some(Semaphore::new(0)), ..Script::default() };
    let bench = Bench::reopen(bench.root, Arc::new(script), PullModes::default());
    let restoring = {
        let snapshotter = bench.snapshotter.clone();
        tokio::spawn(async move { snapshotter.restore().await })
    };
    while bench.script.restores.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    bench.snapshotter.remove("sha256:one").await.unwrap();
    bench.snapshotter.cleanup().await;
    bench.script.restore_gate.as_ref().unwrap().add_permits(1);
    restoring.await.unwrap();
    assert!(bench.script.mounted.lock().is_empty(), "a mount of a removed layer stays");
}

#[tokio::test]
async fn a_layer_waits_for_those_below_to_be_mounted_again() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.snapshotter.shutdown(Unmount::Yes).await;
    let bench = Bench::reopen(bench.root, Arc::default(), PullModes::default());
    // Nothing was restored yet when the next layer of the image comes.
    bench.pull("k2", "sha256:one", "sha256:two").await;
    assert_eq!(bench.script.restores.load(Ordering::Relaxed), 1);
    assert_eq!(bench.script.mounted.lock().len(), 2);
}

#[tokio::test]
async fn a_removed_layer_is_released_and_its_directory_deleted() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.prepare("container", "sha256:one", None).await.unwrap();
    assert_eq!(bench.snapshotter.remove("sha256:one").await.unwrap_err().code(), Code::FailedPrecondition);
    bench.snapshotter.remove("container").await.unwrap();
    bench.snapshotter.remove("sha256:one").await.unwrap();
    assert_eq!(bench.snapshotter.remove("sha256:one").await.unwrap_err().code(), Code::NotFound);
    bench.snapshotter.cleanup().await;
    assert!(bench.script.mounted.lock().is_empty());
    let snapshots = bench.root.path().join("snapshots");
    while std::fs::read_dir(&snapshots).unwrap().count() > 0 {
        tokio::task::yield_now().await;
    }
}

/// Deleting a large directory takes time, in which nothing more may be fetched for the others.
#[tokio::test]
async fn all_removed_layers_are_released_before_anything_is_deleted() {
    let root = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(root.path()).unwrap();
    for name in ["a", "b", "c"] {
        store.draft(None).unwrap().write(name, Kind::Active, Written::default()).unwrap();
        store.remove(name).unwrap();
    }
    let script = Script::default();
    assert_eq!(reclaim::run(&store, &script).await, 3);
    assert_eq!(*script.dirs_at_release.lock(), [3, 3, 3]);
    assert_eq!(store.reclaimable().unwrap().len(), 0);
}

#[tokio::test]
async fn a_pull_on_a_lost_parent_fails_with_a_verdict_and_advice() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.pull("k2", "sha256:one", "sha256:two").await;
    std::fs::write(bench.path("1/record"), b"").unwrap();
    let (snapshotter, findings) = {
        let sink = Arc::clone(&bench.verdicts);
        let observer: Observer = Arc::new(move |verdict| sink.lock().push(verdict.clone()));
        let settings = Settings { modes: PullModes::default(), userxattr: false, observer };
        Snapshotter::open(bench.root.path(), bench.script.clone(), settings).unwrap()
    };
    assert_eq!(findings.len(), 1);
    let listed = snapshotter.list(&[]).unwrap();
    assert_eq!((listed.len(), listed[0].parent.as_deref()), (1, None), "for containerd's collector");
    assert_eq!(snapshotter.stat("sha256:two").unwrap().parent.as_deref(), Some("sha256:one"));
    let request = request("k8s.io", "k3", "sha256:two", Some("sha256:three"));
    let error = snapshotter.prepare(request).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.to_string().contains("sha256:one") && error.to_string().contains("crictl rmi"), "{error}");
    let last = bench.verdicts.lock().last().unwrap().clone();
    assert_eq!((last.word(), last.failed), ("failed", 1));
}

#[tokio::test]
async fn labels_change_by_field_mask() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.prepare("a", "", None).await.unwrap();
    let update = |fields: &[&str], labels: &[(&str, &str)]| Update {
        name: "a".into(),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        fields: fields.iter().map(|field| (*field).to_owned()).collect(),
    };
    let labels = |info: Info| -> Vec<String> {
        info.labels.iter().map(|(key, value)| format!("{key}={value}")).collect()
    };
    for (fields, wanted, expected) in [
        (&[][..], &[("x", "1"), ("y", "2"), ("empty", "")][..], &["x=1", "y=2"][..]),
        (&["labels.x"], &[("x", "3"), ("y", "9")], &["x=3", "y=2"]),
        (&["labels.y"], &[], &["x=3"]),
        (&["labels.a.b", "labels.x"], &[("a.b", "dot")], &["a.b=dot"]),
        (&["labels"], &[("z", "1")], &["z=1"]),
    ] {
        let info = bench.snapshotter.update(update(fields, wanted)).await.unwrap();
        assert_eq!(labels(info), expected, "{fields:?}");
    }
    let error = bench.snapshotter.update(update(&["name"], &[])).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(labels(bench.snapshotter.stat("a").unwrap()), ["z=1"], "a refused update changes nothing");
}

#[tokio::test]
async fn errors_are_containerds() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.prepare("active", "", None).await.unwrap();
    let code = |result: Result<Vec<Mount>, Error>| result.unwrap_err().code();
    assert_eq!(code(bench.prepare("active", "", None).await), Code::AlreadyExists);
    assert_eq!(code(bench.prepare("x", "missing", None).await), Code::NotFound);
    assert_eq!(code(bench.prepare("x", "active", None).await), Code::InvalidArgument);
    assert_eq!(code(bench.prepare("", "", None).await), Code::InvalidArgument);
    assert_eq!(code(bench.snapshotter.mounts("missing").await), Code::NotFound);
    let commit = |key: &str, name: &str| Commit { key: key.into(), name: name.into(), ..Commit::default() };
    assert_eq!(bench.snapshotter.commit(commit("missing", "n")).await.unwrap_err().code(), Code::NotFound);
    bench.snapshotter.commit(commit("active", "done")).await.unwrap();
    assert_eq!(code(bench.snapshotter.mounts("done").await), Code::FailedPrecondition);
    assert_eq!(
        bench.snapshotter.commit(commit("done", "n")).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let mut mapped = request("k8s.io", "m", "", None);
    for label in [labels::UID_MAPPING, labels::GID_MAPPING] {
        mapped.labels.insert(label.into(), "0:1000:10".into());
    }
    assert_eq!(code(bench.snapshotter.prepare(mapped).await), Code::Unimplemented);
    let mut nowhere = request("", "n", "", Some("t"));
    nowhere.namespace = None;
    let error = bench.snapshotter.prepare(nowhere).await.unwrap_err();
    assert!(error.to_string().contains("context has no namespace attached"), "{error}");
}

#[tokio::test]
async fn a_container_on_a_lazy_layer_has_the_owner_the_record_says() {
    use std::os::unix::fs::MetadataExt;
    if !rustix::process::geteuid().is_root() {
        panic!("needs root: directories get the owner of the layer below");
    }
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.pull("k1", "", "sha256:one").await;
    bench.prepare("container", "sha256:one", None).await.unwrap();
    let found = std::fs::metadata(bench.path("2/fs")).unwrap();
    assert_eq!((found.uid(), found.gid()), (1, 2));
}

#[tokio::test]
async fn usage_of_an_active_snapshot_is_what_its_files_take() {
    let bench = Bench::new(Script::default(), PullModes::default());
    bench.prepare("a", "", None).await.unwrap();
    std::fs::write(std::path::PathBuf::from(bench.path("1/fs")).join("f"), vec![1; 8192]).unwrap();
    let usage = bench.snapshotter.usage("a").await.unwrap();
    assert_eq!(usage.inodes, 2);
    assert!(usage.size >= 8192);
    bench
        .snapshotter
        .commit(Commit { key: "a".into(), name: "c".into(), ..Commit::default() })
        .await
        .unwrap();
    assert_eq!(bench.snapshotter.usage("c").await.unwrap(), usage);
}
