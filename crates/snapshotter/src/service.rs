//! The operations of containerd's snapshot service, as values in and values out.
//!
//! A Prepare that names a target is a layer being pulled. If the target is there already (a committed snapshot with this
//! target label on this parent, which is how containerd looks for it), the answer is "already exists" before any work.
//! Otherwise one task per (namespace, target, parent) makes the layer; see [`crate::plan`] for the ladder. Only when the
//! layer is left to containerd does the caller's key become an active snapshot.
//!
//! Mounts are composed anew at each call. A lazily mounted layer that this process does not serve (after a restart, or
//! because its mount was taken away) is brought back first, from local state.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use parking_lot::Mutex;
use soci_oci::{labels, with_causes};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::jobs::Jobs;
use crate::mounts::{self, Mount, Parts};
use crate::plan::{self, Intent, PullModes, Reason};
use crate::provider::{Ancestor, LayerProvider, RestoreError, SnapshotDir};
use crate::records::{Info, Kind, Record, Usage};
use crate::store::{Draft, Finding, OpenError, Store, Written};
use crate::verdict::{Observer, Outcome, Verdicts};
use crate::{Code, Error, Filter, Subject, reclaim, usage};

mod layer;

/// Set on each snapshot of a pull, and kept when containerd commits it: what became of the layer.
pub const VERDICT_LABEL: &str = "containerd.io/snapshot/soci.verdict";
/// How many mounts are brought back at once at start.
const RESTORE_AT_ONCE: usize = 16;
/// Pauses between attempts to bring back mounts that failed: the first, and the longest.
const RESTORE_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// What the operations depend on.
pub struct Settings {
    /// Configured ways of pulling.
    pub modes: PullModes,
    /// Whether overlay is mounted inside a user namespace.
    pub userxattr: bool,
    /// Told each verdict.
    pub observer: Observer,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { modes, userxattr, observer: _ } = self;
        f.debug_struct("Settings").field("modes", modes).field("userxattr", userxattr).finish_non_exhaustive()
    }
}

/// A Prepare or View.
#[derive(Debug, Clone, Default)]
pub struct Prepare {
    /// containerd namespace of the call.
    pub namespace: Option<String>,
    /// Name of the new snapshot.
    pub key: String,
    /// What it builds on; empty for nothing.
    pub parent: String,
    /// Its labels.
    pub labels: HashMap<String, String>,
}

/// A Commit.
#[derive(Debug, Clone, Default)]
pub struct Commit {
    /// The active snapshot.
    pub key: String,
    /// Its name from then on.
    pub name: String,
    /// A parent, for one that has none; empty for nothing.
    pub parent: String,
    /// Its labels from then on.
    pub labels: HashMap<String, String>,
}

/// An Update.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// The snapshot.
    pub name: String,
    /// New labels.
    pub labels: HashMap<String, String>,
    /// Which fields to change: `labels`, `labels.<key>`; none for all that can be.
    pub fields: Vec<String>,
}

/// How bringing back the mounts of an earlier process went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restored {
    /// Lazily mounted snapshots there are.
    pub total: usize,
    /// Those that could not be brought back and are tried again in the background.
    pub degraded: usize,
}

/// The snapshot service of one root. Cheap to clone.
#[derive(Clone)]
pub struct Snapshotter(Arc<Inner>);

struct Inner {
    store: Arc<Store>,
    provider: Arc<dyn LayerProvider>,
    modes: PullModes,
    userxattr: bool,
    layers: Jobs<layer::Key, layer::Done>,
    restores: Jobs<u64, Result<(), RestoreError>>,
    /// By snapshot: mounts that could not be brought back, until they are. Each was logged when it came here.
    degraded: Mutex<BTreeMap<u64, Arc<Record>>>,
    /// Told when one more is degraded.
    degrading: Notify,
    verdicts: Verdicts,
    removed: Notify,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl std::fmt::Debug for Snapshotter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshotter").field("store", &self.0.store).finish_non_exhaustive()
    }
}

impl Snapshotter {
    /// Opens the snapshots beneath `root`. Blocks on the disk. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`OpenError`] when the directory is unusable, or of a later version.
    pub fn open(
        root: &Path,
        provider: Arc<dyn LayerProvider>,
        settings: Settings,
    ) -> Result<(Self, Vec<Finding>), OpenError> {
        let (store, findings) = Store::open(root)?;
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let inner = Arc::new(Inner {
            store,
            provider,
            modes: settings.modes,
            userxattr: settings.userxattr,
            layers: Jobs::new(tracker.clone()),
            restores: Jobs::new(tracker.clone()),
            degraded: Mutex::default(),
            degrading: Notify::new(),
            verdicts: Verdicts::new(settings.observer, tracker.clone(), stop.clone()),
            removed: Notify::new(),
            tracker,
            stop,
        });
        let this = Self(inner);
        let reclaimer = this.clone();
        this.0.tracker.spawn(async move { reclaimer.reclaim_when_removed().await });
        let restorer = this.clone();
        this.0.tracker.spawn(async move { restorer.restore_degraded().await });
        let replacer = this.clone();
        this.0.tracker.spawn(async move { replacer.replace_broken().await });
        Ok((this, findings))
    }

    /// Prepare: makes an active snapshot, or the layer that the labels name.
    ///
    /// # Errors
    /// [`Code::AlreadyExists`] is the success of a layer: containerd finds it under its target label.
    pub async fn prepare(&self, request: Prepare) -> Result<Vec<Mount>, Error> {
        check_name("key", &request.key)?;
        match plan::intent(request.namespace.as_deref(), &request.labels)? {
            Intent::Writable => {
                check_id_mapping(&request.labels)?;
                self.expect_start(&request.parent);
                self.create(Kind::Active, request, None).await
            }
            Intent::Layer(layer) => self.prepare_layer(*layer, request).await,
            Intent::Unlabelled { error } => {
                // One per layer; the verdict says it once.
                tracing::debug!(
                    key = %request.key,
                    error = %with_causes(&error),
                    reason = %Reason::NoLabels,
                    "failed to prepare remote snapshot; deferring to container runtime"
                );
                if !self.goes_on_unlabelled(&request.parent) {
                    let outcome =
                        if self.0.modes.strict { Outcome::Refused } else { Outcome::Left }(Reason::NoLabels);
                    let namespace = request.namespace.as_deref();
                    self.0.verdicts.unlabelled(namespace, outcome, with_causes(&error));
                }
                if self.0.modes.strict {
                    return Err(layer::refusal(Reason::NoLabels, &with_causes(&error)));
                }
                self.create(Kind::Active, request, Some(Outcome::Left(Reason::NoLabels))).await
            }
        }
    }

    /// Whether a layer on `parent` goes on with a pull whose labels do not name the image. containerd prepares it right
    /// after that one was committed; an image pulled later on the same base is told of itself.
    fn goes_on_unlabelled(&self, parent: &str) -> bool {
        let Ok(parent) = self.0.store.get(parent) else { return false };
        let said = parent.labels.get(VERDICT_LABEL);
        said.is_some_and(|said| *said == layer::label(Outcome::Left(Reason::NoLabels)))
            && parent.created.system().elapsed().is_ok_and(|age| age < crate::verdict::IDLE)
    }

    /// View: makes a read-only snapshot.
    ///
    /// # Errors
    /// containerd's.
    pub async fn view(&self, request: Prepare) -> Result<Vec<Mount>, Error> {
        check_name("key", &request.key)?;
        self.create(Kind::View, request, None).await
    }

    /// Mounts: what to mount for the active snapshot or view `key`.
    ///
    /// # Errors
    /// [`Code::FailedPrecondition`] for a committed one, [`Code::Unavailable`] when a layer cannot be brought back.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.0.store.get(key)?;
        if record.kind == Kind::Committed {
            let message = format!("requested snapshot {key:?} not active or view");
            return Err(Error::new(Code::FailedPrecondition, message));
        }
        self.compose(&record).await
    }

    /// Commit: makes an active snapshot a committed one, with its disk usage measured.
    ///
    /// # Errors
    /// containerd's.
    pub async fn commit(&self, request: Commit) -> Result<(), Error> {
        check_name("name", &request.name)?;
        let store = Arc::clone(&self.0.store);
        blocking(move || {
            let record = store.get(&request.key).map_err(|error| {
                Error::new(
                    error.code(),
                    format!("failed to get active snapshot {:?}: not found", request.key),
                )
            })?;
            let usage = measure(&store.dir(record.id))?;
            let parent = (!request.parent.is_empty()).then_some(request.parent.as_str());
            let mut labels = kept(request.labels);
            // containerd sends the labels that it knows, and it was not told of these.
            for ours in [VERDICT_LABEL, labels::NAMESPACE] {
                if let Some(value) = record.labels.get(ours) {
                    labels.entry(ours.to_owned()).or_insert_with(|| value.clone());
                }
            }
            store.commit(&request.key, &request.name, parent, labels, usage).map(drop)
        })
        .await
    }

    /// Remove: the snapshot is gone when this returns, its directory soon after.
    ///
    /// # Errors
    /// [`Code::NotFound`], [`Code::FailedPrecondition`] while others build on it.
    pub async fn remove(&self, key: &str) -> Result<(), Error> {
        let (inner, key) = (Arc::clone(&self.0), key.to_owned());
        // Told where it is done: a caller that goes away does not stop it.
        blocking(move || inner.store.remove(&key).map(|_| inner.removed.notify_one())).await
    }

    /// Stat.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn stat(&self, key: &str) -> Result<Info, Error> {
        Ok(self.0.store.get(key)?.info())
    }

    /// Update: changes labels.
    ///
    /// # Errors
    /// [`Code::NotFound`], [`Code::InvalidArgument`] for other fields.
    pub async fn update(&self, request: Update) -> Result<Info, Error> {
        let store = Arc::clone(&self.0.store);
        blocking(move || {
            let Update { name, labels, fields } = request;
            let change =
                |present: &mut BTreeMap<String, String>| change_labels(&name, labels, &fields, present);
            store.update(&name, change).map(|record| record.info())
        })
        .await
    }

    /// List: everything that any of `filters` selects, ordered by name.
    ///
    /// What builds on a snapshot that was lost is listed as building on none: containerd's collector only comes to what it
    /// finds from there, and would leave the others for good.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] for a filter that does not parse.
    pub fn list(&self, filters: &[String]) -> Result<Vec<Info>, Error> {
        let filter = Filter::parse(filters)?;
        let records = self.0.store.list();
        let names: HashSet<&str> = records.iter().map(|record| record.name.as_str()).collect();
        let listed = records.iter().filter_map(|record| {
            let parent = record.parent.as_deref().filter(|parent| names.contains(parent));
            let subject = Subject { name: &record.name, parent, kind: record.kind, labels: &record.labels };
            // Cloned only when it is selected: a pull asks for one, and a label may be kilobytes long.
            filter.matches(&subject).then(|| Info { parent: parent.map(str::to_owned), ..record.info() })
        });
        Ok(listed.collect())
    }

    /// Usage: what a snapshot itself takes on disk; for a lazy layer, what of it is cached.
    ///
    /// # Errors
    /// [`Code::NotFound`], [`Code::Internal`] about the disk.
    pub async fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.0.store.get(key)?;
        let dir = self.0.store.dir(record.id);
        if record.lazy.is_some() {
            return Ok(self.0.provider.cached(&dir).or(record.usage).unwrap_or_default());
        }
        match record.kind {
            Kind::Active => blocking(move || measure(&dir)).await,
            Kind::View | Kind::Committed => Ok(record.usage.unwrap_or_default()),
        }
    }

    /// Cleanup: deletes directories of removed snapshots.
    pub async fn cleanup(&self) {
        reclaim::run(&self.0.store, &*self.0.provider).await;
    }

    /// Brings back the mounts of an earlier process, several at once, while calls are served. Those that fail, or of which
    /// something was lost, are tried again in the background.
    pub async fn restore(&self) -> Restored {
        let lazy = self.0.store.list().into_iter().filter(|record| record.lazy.is_some());
        let at_hand =
            |record: &Arc<Record>| record.lazy.as_ref().is_none_or(|lazy| self.0.provider.at_hand(lazy));
        let (whole, lost): (Vec<_>, Vec<_>) = lazy.partition(at_hand);
        let total = whole.len() + lost.len();
        for record in &lost {
            let key = &record.name;
            tracing::warn!(
                key,
                "something of remote snapshot {key} was lost; it is fetched again in the background"
            );
        }
        let failed = self.bring_all_back(whole).await;
        let restored = Restored { total, degraded: failed + lost.len() };
        Arc::clone(&self.0.provider).told_all(lost.clone()).await;
        if !lost.is_empty() {
            let this = self.clone();
            self.0.tracker.spawn(async move { this.bring_all_back_until_stopped(lost).await });
        }
        restored
    }

    /// Brings back what it can of `records`, and returns how many it could not.
    async fn bring_all_back(&self, records: Vec<Arc<Record>>) -> usize {
        let restoring =
            futures::stream::iter(records).map(|record| async move { self.bring_back(&record).await });
        let failed =
            restoring.buffer_unordered(RESTORE_AT_ONCE).filter(|done| std::future::ready(done.is_err()));
        failed.count().await
    }

    async fn bring_all_back_until_stopped(&self, records: Vec<Arc<Record>>) {
        self.0.stop.run_until_cancelled(self.bring_all_back(records)).await;
    }

    /// Ends all background work of this service, and unmounts every layer first when `unmount`.
    pub async fn shutdown(&self, unmount: Unmount) {
        self.0.stop.cancel();
        self.0.tracker.close();
        self.0.tracker.wait().await;
        if unmount == Unmount::Yes {
            let lazy = self.0.store.list().into_iter().filter(|record| record.lazy.is_some());
            let unmounted = lazy.map(|record| async move {
                if let Err(error) = self.0.provider.unmount(&self.0.store.dir(record.id)).await {
                    tracing::warn!(key = %record.name, error = %with_causes(&error), "cannot unmount a layer");
                }
            });
            join_all(unmounted).await;
        }
        self.0.provider.shutdown().await;
    }

    async fn reclaim_when_removed(&self) {
        loop {
            tokio::select! {
                () = self.0.removed.notified() => {}
                () = self.0.stop.cancelled() => return,
            }
            reclaim::run(&self.0.store, &*self.0.provider).await;
        }
    }

    /// Tries again and again to bring back what is degraded, with pauses that grow until there is news.
    async fn restore_degraded(&self) {
        let (first, longest) = RESTORE_PAUSE;
        let mut pause = first;
        loop {
            let idle = self.0.degraded.lock().is_empty();
            tokio::select! {
                () = self.0.degrading.notified() => {
                    pause = first;
                    continue;
                }
                () = tokio::time::sleep(pause), if !idle => {}
                () = self.0.stop.cancelled() => return,
            }
            pause = (pause * 2).min(longest);
            let degraded = {
                let mut degraded = self.0.degraded.lock();
                degraded.retain(|_, record| self.0.exists(record));
                degraded.values().cloned().collect()
            };
            self.bring_all_back_until_stopped(degraded).await;
        }
    }

    /// Brings back mounts that broke.
    async fn replace_broken(&self) {
        loop {
            let broken = tokio::select! {
                broken = self.0.provider.broken() => broken,
                () = self.0.stop.cancelled() => return,
            };
            let records = self.0.store.list().into_iter().filter(|record| broken.contains(&record.id));
            self.bring_all_back_until_stopped(records.collect()).await;
            // So that one that breaks again at once is not all that is done here.
            tokio::select! {
                () = tokio::time::sleep(RESTORE_PAUSE.0) => {}
                () = self.0.stop.cancelled() => return,
            }
        }
    }

    /// Tells the layers beneath a writable snapshot that a container is about to start.
    fn expect_start(&self, parent: &str) {
        // A parent that is not there fails the call in its own words.
        let below = self.0.store.chain(parent).unwrap_or_default();
        for ancestor in below.iter().filter(|ancestor| ancestor.record.lazy.is_some()) {
            self.0.provider.starting(&ancestor.dir);
        }
    }

    /// Makes a writable or read-only snapshot and says how to mount it.
    async fn create(
        &self,
        kind: Kind,
        request: Prepare,
        outcome: Option<Outcome>,
    ) -> Result<Vec<Mount>, Error> {
        let store = Arc::clone(&self.0.store);
        let record = blocking(move || {
            if store.get(&request.key).is_ok() {
                return Err(Error::exists(&request.key));
            }
            let draft = store.draft((!request.parent.is_empty()).then_some(request.parent.as_str()))?;
            own_like_parent(&store, &draft)?;
            let mut labels = kept(request.labels);
            if let Some(outcome) = outcome {
                labels.insert(VERDICT_LABEL.to_owned(), layer::label(outcome));
                labels.extend(request.namespace.map(|namespace| (labels::NAMESPACE.to_owned(), namespace)));
            }
            let content = Written { labels, ..Written::default() };
            draft.write(&request.key, kind, content).map_err(|(_, error)| error)
        })
        .await?;
        match self.compose(&record).await {
            Ok(mounts) => Ok(mounts),
            Err(error) => {
                // The caller was told that there is no such snapshot, so there must be none.
                if let Err(left) = self.remove(&record.name).await {
                    tracing::warn!(key = %record.name, error = %with_causes(&left), "cannot remove an unusable snapshot");
                }
                Err(error)
            }
        }
    }

    async fn compose(&self, record: &Record) -> Result<Vec<Mount>, Error> {
        let below = match &record.parent {
            Some(parent) => self.0.store.chain(parent)?,
            None => Vec::new(),
        };
        for Ancestor { record, .. } in &below {
            let what = match record.lazy {
                Some(_) => "checking mount point",
                None => "layer is normal snapshot(overlayfs)",
            };
            tracing::debug!(key = record.name, "{what}");
        }
        let served = join_all(below.iter().map(|ancestor| self.serve(ancestor))).await;
        let lower = served.into_iter().collect::<Result<Vec<_>, _>>()?;
        let dir = self.0.store.dir(record.id);
        let parts = Parts { kind: record.kind, upper: &dir.fs(), work: &dir.work(), lower: &lower };
        Ok(mounts::compose(&parts, self.0.userxattr))
    }

    /// Returns the directory of a lower layer, mounted.
    pub(crate) async fn serve(&self, ancestor: &Ancestor) -> Result<std::path::PathBuf, Error> {
        if ancestor.record.lazy.is_none() {
            return Ok(ancestor.dir.fs());
        }
        let lower = self.0.provider.lower(&ancestor.dir);
        if lower.served {
            return Ok(lower.path);
        }
        self.bring_back(&ancestor.record).await.map_err(|error| {
            let id = ancestor.dir.id();
            tracing::debug!(key = %ancestor.record.name, error = %with_causes(&error), "layer is unavailable");
            Error::because(Code::Unavailable, format!("layer \"{id}\" unavailable: unavailable"), error)
        })?;
        Ok(self.0.provider.lower(&ancestor.dir).path)
    }

    async fn bring_back(&self, record: &Arc<Record>) -> Result<(), RestoreError> {
        let (inner, record) = (Arc::clone(&self.0), Arc::clone(record));
        let id = record.id;
        let restore = move || async move {
            let dir = inner.store.dir(id);
            let restored = match &record.lazy {
                Some(lazy) if !inner.provider.lower(&dir).served => inner.provider.restore(lazy, &dir).await,
                _ => Ok(()),
            };
            // Removed meanwhile: what was released then is there again now.
            if !inner.exists(&record) {
                if let Err(error) = inner.provider.release(&dir).await {
                    tracing::warn!(key = %record.name, error = %with_causes(&error), "cannot unmount a removed layer");
                }
                inner.degraded.lock().remove(&id);
                inner.removed.notify_one();
                return restored;
            }
            inner.note_restored(record, &restored);
            restored
        };
        let lost = |_| RestoreError { message: "restoring the mount ended without a result".to_owned() };
        self.0.restores.run(id, restore).await.map_err(lost)?
    }
}

impl Inner {
    /// Whether the snapshot of `record` was not removed.
    fn exists(&self, record: &Record) -> bool {
        self.store.get(&record.name).is_ok_and(|now| now.id == record.id)
    }

    /// Notes whether a mount is degraded, and says so when that changes.
    fn note_restored(&self, record: Arc<Record>, restored: &Result<(), RestoreError>) {
        let key = record.name.clone();
        match restored {
            Ok(()) if self.degraded.lock().remove(&record.id).is_some() => {
                tracing::info!(key, "remote snapshot {key} that had failed is restored");
            }
            Ok(()) => {}
            Err(error) => {
                let error = with_causes(error);
                if self.degraded.lock().insert(record.id, record).is_none() {
                    self.degrading.notify_one();
                    tracing::warn!(
                        key,
                        error,
                        "failed to restore remote snapshot {key}; it is tried again in the background"
                    );
                } else {
                    tracing::debug!(key, error, "still not restored");
                }
            }
        }
    }
}

/// Whether mounts go or stay at shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// They go.
    Yes,
    /// They stay, for the next process to replace.
    No,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::because(Code::Internal, "the operation ended without a result", error)),
    }
}

fn check_name(what: &str, name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::new(Code::InvalidArgument, format!("snapshot {what} is empty")));
    }
    Ok(())
}

/// Mapped owners come with user namespaces; until then a client that relies on them must hear so.
fn check_id_mapping(request: &HashMap<String, String>) -> Result<(), Error> {
    let mapped = |label| request.get(label).is_some_and(|mapping| !mapping.is_empty());
    if mapped(labels::UID_MAPPING) && mapped(labels::GID_MAPPING) {
        let message = "snapshots with mapped owners are not supported: remove the capabilities \"remap-ids\" and \
                       \"multi-remap-ids\" of the proxy plugin from containerd's configuration";
        return Err(Error::new(Code::Unimplemented, message));
    }
    Ok(())
}

/// containerd's stores drop labels with an empty value.
fn kept(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

fn change_labels(
    name: &str,
    mut wanted: HashMap<String, String>,
    fields: &[String],
    present: &mut BTreeMap<String, String>,
) -> Result<(), Error> {
    if fields.is_empty() {
        *present = kept(wanted);
        return Ok(());
    }
    for field in fields {
        if field == "labels" {
            *present = kept(wanted.clone());
        } else if let Some(key) = field.strip_prefix("labels.") {
            match wanted.remove(key).filter(|value| !value.is_empty()) {
                Some(value) => present.insert(key.to_owned(), value),
                None => present.remove(key),
            };
        } else {
            let message = format!("cannot update {field:?} field on snapshot {name:?}");
            return Err(Error::new(Code::InvalidArgument, message));
        }
    }
    Ok(())
}

fn measure(dir: &SnapshotDir) -> Result<Usage, Error> {
    usage::of(&dir.fs())
        .map_err(|error| Error::because(Code::Internal, format!("measure snapshot {}", dir.id()), error))
}

/// Gives the new directory the owner of the layer below, as containerd's overlay does.
fn own_like_parent(store: &Store, draft: &Draft) -> Result<(), Error> {
    let Some(parent) = draft.parent() else { return Ok(()) };
    let record = store.get(parent)?;
    let fs = store.dir(record.id).fs();
    let error =
        |error| Error::because(Code::Internal, format!("owner of snapshot {}", draft.dir().id()), error);
    let (uid, gid) = match &record.lazy {
        // Never asked of the mount itself.
        Some(lazy) => (lazy.root.uid, lazy.root.gid),
        None => {
            use std::os::unix::fs::MetadataExt;
            let found = std::fs::symlink_metadata(&fs).map_err(error)?;
            (found.uid(), found.gid())
        }
    };
    std::os::unix::fs::lchown(draft.dir().fs(), Some(uid), Some(gid)).map_err(error)
}

#[cfg(test)]
mod tests;
