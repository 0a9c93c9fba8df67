//! A Prepare of one layer of a pull: the job, and what its callers are told.

use std::sync::Arc;

use futures::future::join_all;
use soci_oci::{labels, with_causes};

use super::{Inner, Prepare, Snapshotter, VERDICT_LABEL, blocking, kept, own_like_parent};
use crate::mounts::Mount;
use crate::plan::{self, LayerRequest, Next, PreparePlan, Reason, ResolveErrorKind, Setback};
use crate::provider::Ancestor;
use crate::records::{Kind, Record, Usage};
use crate::store::{Draft, Written};
use crate::verdict::Outcome;
use crate::{Code, Error};

/// What a job is for: namespace, target and parent.
pub(super) type Key = (String, String, String);

/// How a job ended.
#[derive(Debug, Clone)]
pub(super) enum Done {
    /// The layer is committed under its target label.
    Committed,
    /// containerd is to pull it.
    Left(Reason),
    /// The pull fails.
    Failed(Error),
}

impl Snapshotter {
    pub(super) async fn prepare_layer(
        &self,
        layer: LayerRequest,
        request: Prepare,
    ) -> Result<Vec<Mount>, Error> {
        let exists = |target: &str| {
            Error::new(Code::AlreadyExists, format!("target snapshot {target:?}: already exists"))
        };
        let parent = (!request.parent.is_empty()).then_some(request.parent.as_str());
        if let Some(record) = self.0.store.committed(&layer.target, parent) {
            self.0.present(&layer, &record).await;
            return Err(exists(&layer.target));
        }
        let key = (layer.namespace.clone(), layer.target.clone(), request.parent.clone());
        let job = {
            let (inner, layer, request) = (Arc::clone(&self.0), layer.clone(), request.clone());
            move || async move {
                let _making = inner.verdicts.making(&layer);
                let done = match Self(Arc::clone(&inner)).serve_below(&request.parent).await {
                    Ok(()) => inner.make(&layer, &request).await,
                    Err(error) => Err(error),
                };
                done.unwrap_or_else(|error| {
                    inner.verdicts.note(&layer, Outcome::Failed, None, Some(with_causes(&error)));
                    Done::Failed(error)
                })
            }
        };
        match self.0.layers.run(key, job).await {
            Ok(Done::Committed) => Err(exists(&layer.target)),
            Ok(Done::Failed(error)) => Err(error),
            Ok(Done::Left(reason)) => self.create(Kind::Active, request, Some(Outcome::Left(reason))).await,
            Err(lost) => {
                tracing::error!(layer = %layer.layer, error = %lost, "preparing a layer ended without a result");
                let left = Outcome::Left(Reason::MountFailed);
                self.0.verdicts.note(&layer, left, None, Some(lost.to_string()));
                self.create(Kind::Active, request, Some(left)).await
            }
        }
    }
}

impl Snapshotter {
    /// Brings back what is beneath a layer, which after a start may not be mounted yet: the layer asks it about
    /// directories, and nothing can run on it otherwise.
    async fn serve_below(&self, parent: &str) -> Result<(), Error> {
        if parent.is_empty() {
            return Ok(());
        }
        let below = self.0.store.chain(parent)?;
        let served = join_all(below.iter().map(|ancestor| self.serve(ancestor))).await;
        served.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
    }
}

impl Inner {
    /// Makes the layer by the first way of the ladder that works. An error is of this machine, and no verdict yet.
    async fn make(&self, layer: &LayerRequest, request: &Prepare) -> Result<Done, Error> {
        // Another job may have committed it between the caller's look and this one's start.
        let parent = (!request.parent.is_empty()).then(|| request.parent.clone());
        if let Some(record) = self.store.committed(&layer.target, parent.as_deref()) {
            self.present(layer, &record).await;
            return Ok(Done::Committed);
        }
        let facts = self.provider.facts(layer).await;
        let layers = facts.as_ref().ok().map(|facts| facts.layers);
        let mut cause = facts.as_ref().err().map(|error| with_causes(error));
        let unresolved = facts.as_ref().err().map(|error| error.kind);
        let mut plan = plan::decide(layer, &facts, &self.modes);
        let mut place: Option<(Draft, Vec<Ancestor>)> = None;
        loop {
            let outcome = match plan {
                PreparePlan::Leave(reason) => Outcome::Left(reason),
                PreparePlan::Refuse(reason) => Outcome::Refused(reason),
                PreparePlan::Lazy | PreparePlan::Unpack(_) => {
                    let (draft, below) = match place.take() {
                        Some(place) => place,
                        None => self.place(parent.clone()).await?,
                    };
                    match self.attempt(layer, plan, &below, &draft).await {
                        Ok(mut content) => {
                            let outcome = match plan {
                                PreparePlan::Unpack(reason) => Outcome::Unpacked(reason),
                                _ => Outcome::Lazy,
                            };
                            content.labels.insert(VERDICT_LABEL.to_owned(), label(outcome));
                            self.store_layer(layer, request, draft, content).await?;
                            outcome
                        }
                        Err((setback, message)) => {
                            cause.get_or_insert(message);
                            place = Some((draft, below));
                            plan = match plan::after(&plan, setback, &self.modes) {
                                Next::Try(plan) => plan,
                                Next::Leave(reason) => PreparePlan::Leave(reason),
                                Next::Refuse(reason) => PreparePlan::Refuse(reason),
                            };
                            continue;
                        }
                    }
                }
            };
            report(layer, outcome, unresolved, cause.as_deref());
            self.verdicts.note(layer, outcome, layers, cause.clone());
            return Ok(match outcome {
                Outcome::Left(reason) => Done::Left(reason),
                Outcome::Refused(reason) => {
                    Done::Failed(refusal(reason, cause.as_deref().unwrap_or_default()))
                }
                Outcome::Lazy | Outcome::Mounted | Outcome::Present | Outcome::Unpacked(_) => Done::Committed,
                Outcome::Failed => Done::Failed(Error::new(Code::Internal, cause.unwrap_or_default())),
            });
        }
    }

    /// Takes notice of a pull that finds its layer here: from now on the layer's bytes may come from that image too, so
    /// that they can still be had when the image it was mounted for loses its credential or its registry.
    async fn present(&self, layer: &LayerRequest, record: &Record) {
        let outcome = if record.lazy.is_some() { Outcome::Mounted } else { Outcome::Present };
        self.verdicts.note(layer, outcome, None, None);
        if record.lazy.is_none() {
            return;
        }
        let (store, name, reference) = (Arc::clone(&self.store), record.name.clone(), layer.into());
        match blocking(move || store.share(&name, reference)).await {
            Ok(true) => self.provider.share(layer, &self.store.dir(record.id)).await,
            Ok(false) => {}
            Err(error) => tracing::warn!(
                layer = %layer.layer,
                image = %layer.image,
                error = %with_causes(&error),
                "cannot note that another image has the layer; it is served all the same"
            ),
        }
    }

    async fn place(&self, parent: Option<String>) -> Result<(Draft, Vec<Ancestor>), Error> {
        let store = Arc::clone(&self.store);
        blocking(move || {
            let draft = store.draft(parent.as_deref())?;
            own_like_parent(&store, &draft)?;
            let below = match &parent {
                Some(parent) => store.chain(parent)?,
                None => Vec::new(),
            };
            Ok((draft, below))
        })
        .await
    }

    async fn attempt(
        &self,
        layer: &LayerRequest,
        plan: PreparePlan,
        below: &[Ancestor],
        draft: &Draft,
    ) -> Result<Written, (Setback, String)> {
        let dir = draft.dir();
        let mountpoint = dir.fs();
        if plan == PreparePlan::Lazy {
            tracing::debug!(layer = %layer.layer, "preparing filesystem mount at mountpoint={}", mountpoint.display());
            return match self.provider.mount_lazy(layer, below, dir).await {
                Ok(record) => {
                    Ok(Written { usage: Some(Usage::default()), lazy: Some(record), ..Written::default() })
                }
                Err(error) => {
                    let message = with_causes(&error);
                    tracing::warn!(
                        "remote-snapshot-prepared" = "false",
                        layer = %layer.layer,
                        image = %layer.image,
                        error = message,
                        "failed to prepare remote snapshot"
                    );
                    Err((Setback::Lazy(error.kind), message))
                }
            };
        }
        if let PreparePlan::Unpack(reason) = plan {
            let what = match reason {
                Reason::Small => {
                    "layer size less than runtime min_layer_size, skipping remote snapshot preparation"
                }
                Reason::NoZtoc => "skipping mounting layer as FUSE mount: no ztoc for layer",
                _ => "preparing snapshot as local snapshot",
            };
            tracing::debug!(layer = %layer.layer, reason = %reason, "{what}");
        }
        tracing::debug!(layer = %layer.layer, "preparing local filesystem at mountpoint={}", mountpoint.display());
        match self.provider.unpack(layer, below, dir).await {
            Ok(usage) => Ok(Written { usage: Some(usage), ..Written::default() }),
            Err(error) => Err((Setback::Unpack(error.kind), with_causes(&error))),
        }
    }

    /// Commits a finished layer under its target, or beside it where the target has another parent.
    async fn store_layer(
        &self,
        layer: &LayerRequest,
        request: &Prepare,
        draft: Draft,
        mut content: Written,
    ) -> Result<(), Error> {
        content.labels.extend(kept(request.labels.clone()));
        let mut set = |label: &str, value: &str| content.labels.insert(label.to_owned(), value.to_owned());
        set(labels::NAMESPACE, &layer.namespace);
        set(labels::HAS_INDEX, "true");
        if content.lazy.is_some() {
            set(labels::REMOTE, labels::REMOTE_VALUE);
        }
        let (target, dir) = (layer.target.clone(), draft.dir().clone());
        let store = Arc::clone(&self.store);
        let written = blocking(move || write_layer(&store, draft, &target, content).map(drop)).await;
        if written.is_err() {
            // The draft is gone; what was mounted on its directory must not outlive it.
            if let Err(error) = self.provider.release(&dir).await {
                tracing::warn!(layer = %layer.layer, error = %with_causes(&error), "cannot unmount an unrecorded layer");
            }
            self.removed.notify_one();
        }
        match written {
            // Somebody else committed the same layer meanwhile, which is as good.
            Err(error) if error.code() == Code::AlreadyExists => {
                let parent = (!request.parent.is_empty()).then_some(request.parent.as_str());
                if let Some(record) = self.store.committed(&layer.target, parent) {
                    self.present(layer, &record).await;
                }
                Ok(())
            }
            other => other,
        }
    }
}

fn write_layer(
    store: &crate::Store,
    draft: Draft,
    target: &str,
    content: Written,
) -> Result<Arc<Record>, Error> {
    let parent = draft.parent().map(str::to_owned);
    let Err(taken) = store.get(target) else {
        if store.committed(target, parent.as_deref()).is_some() {
            return Err(Error::exists(target));
        }
        // containerd finds snapshots by label and parent, so the name is free to choose.
        let name = format!("{target}/{}", draft.dir().id());
        return draft.write(&name, Kind::Committed, content).map_err(|(_, error)| error);
    };
    debug_assert_eq!(taken.code(), Code::NotFound);
    draft.write(target, Kind::Committed, content).map_err(|(_, error)| error)
}

/// The value of [`VERDICT_LABEL`].
pub(super) fn label(outcome: Outcome) -> String {
    match outcome {
        Outcome::Lazy | Outcome::Mounted => "lazy".to_owned(),
        Outcome::Present => "present".to_owned(),
        Outcome::Unpacked(reason) => format!("unpacked: {reason}"),
        Outcome::Left(reason) => format!("left to containerd: {reason}"),
        Outcome::Refused(reason) => format!("refused: {reason}"),
        Outcome::Failed => "failed".to_owned(),
    }
}

/// The error of a pull that `strict` does not let fall back.
pub(super) fn refusal(reason: Reason, cause: &str) -> Error {
    let code = match reason {
        Reason::IndexUnavailable | Reason::MountFailed | Reason::UnpackFailed | Reason::IndexLocal => {
            Code::Unavailable
        }
        Reason::IndexMissing => Code::NotFound,
        Reason::NoLabels
        | Reason::NoIndex
        | Reason::ContentLocal
        | Reason::Disabled
        | Reason::IndexDenied
        | Reason::IndexMalformed
        | Reason::NoZtoc
        | Reason::Small => Code::FailedPrecondition,
    };
    let advice = reason.advice();
    Error::new(code, format!("strict mode refuses a pull that is not lazy ({reason}): {cause}; {advice}"))
}

/// Logs what became of one layer in the lines that tools know by their keys.
///
/// One per layer, so they are for level debug, at which the tests of the reference run its daemon; at info an image has one
/// line, its verdict. What went wrong with this layer alone stays a warning.
fn report(layer: &LayerRequest, outcome: Outcome, unresolved: Option<ResolveErrorKind>, cause: Option<&str>) {
    let (digest, image) = (layer.layer, &layer.image);
    let cause = cause.unwrap_or_default();
    match outcome {
        Outcome::Lazy => tracing::debug!(
            "remote-snapshot-prepared" = "true",
            layer = %digest,
            image = %image,
            "remote snapshot successfully prepared."
        ),
        Outcome::Unpacked(reason) => tracing::debug!(
            "local-snapshot-prepared" = "true",
            layer = %digest,
            image = %image,
            reason = %reason,
            "local snapshot successfully prepared"
        ),
        Outcome::Left(reason @ Reason::ContentLocal) => tracing::debug!(
            "defer-snapshot-runtime" = "true",
            layer = %digest,
            image = %image,
            reason = %reason,
            cause,
            "the image is on this machine; deferring to container runtime"
        ),
        Outcome::Left(reason) if unresolved.is_some() => tracing::debug!(
            "defer-snapshot-runtime" = "true",
            layer = %digest,
            image = %image,
            reason = %reason,
            error = format!("unable to fetch SOCI artifacts for image \"{image}\": no valid SOCI index found: {cause}"),
            "no valid SOCI index found; deferring to container runtime"
        ),
        Outcome::Left(reason) => tracing::warn!(
            "defer-snapshot-runtime" = "true",
            layer = %digest,
            image = %image,
            reason = %reason,
            error = cause,
            "failed to prepare local snapshot; deferring to container runtime"
        ),
        Outcome::Refused(reason) => tracing::error!(
            layer = %digest,
            image = %image,
            reason = %reason,
            error = cause,
            "strict mode refuses a pull that is not lazy"
        ),
        Outcome::Mounted | Outcome::Present | Outcome::Failed => {}
    }
}
