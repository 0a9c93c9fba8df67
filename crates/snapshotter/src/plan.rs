//! Which way a layer comes into being: pure functions over values.
//!
//! [`intent`] reads the request. [`decide`] takes what is known about the image and chooses the first way to try;
//! [`after`] says what to do when that way failed. The ladder is lazy mount, unpacking this layer alone, containerd. An
//! image without a usable SOCI index goes to containerd at once, since it must download every layer anyway. Under
//! `strict` whatever is not as the image's publisher meant it (no index, a layer that does not mount) is an error with
//! a code of its own; a layer that the index leaves out on purpose is unpacked in either case, and an image whose content
//! is all on this machine is containerd's in either case.

use std::collections::HashMap;
use std::fmt;

use soci_oci::labels::{self, LabelError};
use soci_oci::{Digest, ImageRef, SnapshotLabels};

use crate::provider::SetbackKind;
use crate::{Code, Error};

/// Configured ways of pulling.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullModes {
    /// Layers smaller than this many bytes are not mounted lazily.
    pub min_layer_size: u64,
    /// Whether a fallback is an error.
    pub strict: bool,
}

/// What a Prepare asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// A directory to write to: a container, or an extraction about which nothing is known.
    Writable,
    /// A layer of an image.
    Layer(Box<LayerRequest>),
    /// An extraction whose labels do not say of what: containerd does it.
    Unlabelled {
        /// Which label is missing or malformed, and the setting to change.
        error: LabelError,
    },
}

/// One layer of one pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRequest {
    /// containerd namespace of the pull.
    pub namespace: String,
    /// Name under which containerd looks for the result.
    pub target: String,
    /// The image being pulled.
    pub image: ImageRef,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// The layer.
    pub layer: Digest,
    /// Size of the blob in bytes, where the client says it.
    pub layer_size: Option<u64>,
    /// A SOCI index to use whatever discovery would find.
    pub explicit_index: Option<Digest>,
}

/// What is known about an image and one of its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFacts {
    /// The SOCI index.
    pub index: Digest,
    /// Number of layers of the image.
    pub layers: usize,
    /// The layer asked about.
    pub layer: LayerFacts,
}

/// What is known about a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFacts {
    /// Size of its blob in bytes, from the manifest.
    pub size: Option<u64>,
    /// Whether the index has a zTOC for it.
    pub has_ztoc: bool,
}

/// Why nothing is known about an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ResolveError {
    /// Whether there is none, or it could not be had.
    pub kind: ResolveErrorKind,
    /// What was being done and why it failed, down to the cause.
    pub message: String,
}

/// Kinds of trouble with an image's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResolveErrorKind {
    /// The image has no SOCI index.
    None,
    /// Every way of finding one is switched off.
    Disabled,
    /// The index is named, but not there.
    Missing,
    /// The registry refused.
    Denied,
    /// The network or the registry failed.
    Unavailable,
    /// What was found is not an index, or not this image's.
    Malformed,
    /// This machine failed.
    Local,
    /// It has none that could be had, and needs none: all of its content is on this machine.
    OnMachine,
}

/// The way to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreparePlan {
    /// Mount it lazily.
    Lazy,
    /// Unpack it, this layer alone, because of the reason.
    Unpack(Reason),
    /// Leave it to containerd.
    Leave(Reason),
    /// Fail the pull.
    Refuse(Reason),
}

/// A way that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setback {
    /// The lazy mount.
    Lazy(SetbackKind),
    /// Unpacking.
    Unpack(SetbackKind),
}

/// What follows a setback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Try this way.
    Try(PreparePlan),
    /// Leave it to containerd.
    Leave(Reason),
    /// Fail the pull.
    Refuse(Reason),
}

/// Why a layer is not lazy. The text is the code under which operators find it in logs, metrics and labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// containerd passes no labels that name the image.
    NoLabels,
    /// The image has no SOCI index.
    NoIndex,
    /// Lazy modes are switched off.
    Disabled,
    /// An index is named, but not there.
    IndexMissing,
    /// The registry refused the index.
    IndexDenied,
    /// The index could not be fetched.
    IndexUnavailable,
    /// The index is not usable.
    IndexMalformed,
    /// This machine failed while resolving.
    IndexLocal,
    /// All of the image's content is on this machine already.
    ContentLocal,
    /// The index leaves the layer out.
    NoZtoc,
    /// The layer is smaller than the configured minimum.
    Small,
    /// The lazy mount failed.
    MountFailed,
    /// Unpacking failed.
    UnpackFailed,
}

impl Reason {
    /// Returns the code, in lower case with dashes.
    pub fn code(self) -> &'static str {
        match self {
            Self::NoLabels => "no-labels",
            Self::NoIndex => "no-index",
            Self::Disabled => "disabled",
            Self::IndexMissing => "index-missing",
            Self::IndexDenied => "index-denied",
            Self::IndexUnavailable => "index-unavailable",
            Self::IndexMalformed => "index-malformed",
            Self::IndexLocal => "index-local",
            Self::ContentLocal => "content-local",
            Self::NoZtoc => "no-ztoc",
            Self::Small => "small-layer",
            Self::MountFailed => "mount-failed",
            Self::UnpackFailed => "unpack-failed",
        }
    }

    /// Returns what an operator can do about it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NoLabels => {
                "set disable_snapshot_annotations = false in containerd's configuration, or \
                 enable_remote_snapshot_annotations for the transfer service"
            }
            Self::NoIndex => {
                "convert the image with soci convert and push it, or turn on [pull_modes.soci_v1]"
            }
            Self::Disabled => "turn on [pull_modes.soci_v2] or [pull_modes.soci_v1]",
            Self::IndexMissing => "push the index to the image's registry",
            Self::IndexDenied => {
                "renew the credential that was refused, or give one by any option; \
                 soci auth explain --daemon IMAGE shows what each option has"
            }
            Self::IndexUnavailable => "check that this machine reaches the registry",
            Self::IndexMalformed => "make the index again with soci convert or soci create",
            Self::IndexLocal => {
                "check space and permissions of the daemon's root directory and containerd's socket: \
                 soci-snapshotter-grpc doctor looks at them"
            }
            Self::ContentLocal => "nothing: no layer has to be fetched",
            Self::NoZtoc => "make the index with a smaller --min-layer-size",
            Self::Small => "lower [snapshotter] min_layer_size",
            Self::MountFailed => {
                "check that the registry has the zTOCs of the index and that FUSE and disk space are there: \
                 soci-snapshotter-grpc doctor IMAGE looks at both; a damaged index is made again with soci convert"
            }
            Self::UnpackFailed => {
                "check that the registry has the layer and that there is disk space: \
                 soci-snapshotter-grpc doctor IMAGE looks at both"
            }
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// Reads what a Prepare with `labels` asks for.
///
/// # Errors
/// When it is an extraction, but names no namespace.
pub fn intent(namespace: Option<&str>, request: &HashMap<String, String>) -> Result<Intent, Error> {
    let Some(parsed) = SnapshotLabels::parse(request) else { return Ok(Intent::Writable) };
    let Some(namespace) = namespace.filter(|namespace| !namespace.is_empty()) else {
        let message = format!("prepare with {}: context has no namespace attached", labels::TARGET);
        return Err(Error::new(Code::FailedPrecondition, message));
    };
    Ok(match parsed {
        Err(error) => Intent::Unlabelled { error },
        Ok(parsed) => Intent::Layer(Box::new(LayerRequest {
            namespace: namespace.to_owned(),
            target: parsed.target,
            image: parsed.image,
            manifest: parsed.manifest,
            layer: parsed.layer,
            layer_size: parsed.layer_size,
            explicit_index: parsed.explicit_index,
        })),
    })
}

/// Chooses the first way to try for `layer`.
pub fn decide(
    layer: &LayerRequest,
    facts: &Result<ImageFacts, ResolveError>,
    modes: &PullModes,
) -> PreparePlan {
    let facts = match facts {
        Ok(facts) => &facts.layer,
        Err(error) => {
            let reason = match error.kind {
                ResolveErrorKind::None => Reason::NoIndex,
                ResolveErrorKind::Disabled => Reason::Disabled,
                ResolveErrorKind::Missing => Reason::IndexMissing,
                ResolveErrorKind::Denied => Reason::IndexDenied,
                ResolveErrorKind::Unavailable => Reason::IndexUnavailable,
                ResolveErrorKind::Malformed => Reason::IndexMalformed,
                ResolveErrorKind::Local => Reason::IndexLocal,
                // Nothing is fetched, so there is nothing that could be lazy: no fallback, also for `strict`.
                ResolveErrorKind::OnMachine => return PreparePlan::Leave(Reason::ContentLocal),
            };
            return if modes.strict { PreparePlan::Refuse(reason) } else { PreparePlan::Leave(reason) };
        }
    };
    let size = facts.size.or(layer.layer_size);
    if !facts.has_ztoc {
        PreparePlan::Unpack(Reason::NoZtoc)
    } else if size.is_some_and(|size| size < modes.min_layer_size) {
        PreparePlan::Unpack(Reason::Small)
    } else {
        PreparePlan::Lazy
    }
}

/// Says what to do after `setback`, which ended `plan`.
pub fn after(plan: &PreparePlan, setback: Setback, modes: &PullModes) -> Next {
    let reason = match (setback, plan) {
        // What made us unpack stays the reason, so that the verdict names the first cause.
        (Setback::Unpack(_), PreparePlan::Unpack(Reason::MountFailed)) => Reason::MountFailed,
        (Setback::Unpack(_), _) => Reason::UnpackFailed,
        (Setback::Lazy(_), _) => Reason::MountFailed,
    };
    match setback {
        _ if modes.strict => Next::Refuse(reason),
        Setback::Lazy(_) => Next::Try(PreparePlan::Unpack(reason)),
        Setback::Unpack(_) => Next::Leave(reason),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn layer() -> LayerRequest {
        LayerRequest {
            namespace: "k8s.io".into(),
            target: "sha256:chain".into(),
            image: "reg.example/a:1".parse().unwrap(),
            manifest: Digest::of(b"manifest"),
            layer: Digest::of(b"layer"),
            layer_size: None,
            explicit_index: None,
        }
    }

    fn facts(size: Option<u64>, has_ztoc: bool) -> Result<ImageFacts, ResolveError> {
        Ok(ImageFacts { index: Digest::of(b"index"), layers: 1, layer: LayerFacts { size, has_ztoc } })
    }

    const LENIENT: PullModes = PullModes { min_layer_size: 100, strict: false };
    const STRICT: PullModes = PullModes { min_layer_size: 100, strict: true };

    #[test]
    fn the_first_way_is_chosen_by_index_ztoc_and_size() {
        use PreparePlan::{Lazy, Unpack};
        for (size, has_ztoc, label, expected) in [
            (Some(100), true, None, Lazy),
            (Some(99), true, None, Unpack(Reason::Small)),
            (Some(100), true, Some(1), Lazy),
            (None, true, Some(99), Unpack(Reason::Small)),
            (None, true, None, Lazy),
            (Some(1000), false, None, Unpack(Reason::NoZtoc)),
            (Some(1), false, None, Unpack(Reason::NoZtoc)),
        ] {
            let layer = LayerRequest { layer_size: label, ..layer() };
            for modes in [LENIENT, STRICT] {
                assert_eq!(
                    decide(&layer, &facts(size, has_ztoc), &modes),
                    expected,
                    "{size:?} {has_ztoc} {label:?}"
                );
            }
        }
    }

    #[test]
    fn without_an_index_containerd_pulls_unless_strict() {
        use ResolveErrorKind as K;
        for (kind, reason) in [
            (K::None, Reason::NoIndex),
            (K::Disabled, Reason::Disabled),
            (K::Missing, Reason::IndexMissing),
            (K::Denied, Reason::IndexDenied),
            (K::Unavailable, Reason::IndexUnavailable),
            (K::Malformed, Reason::IndexMalformed),
            (K::Local, Reason::IndexLocal),
        ] {
            let error = Err(ResolveError { kind, message: "x".into() });
            assert_eq!(decide(&layer(), &error, &LENIENT), PreparePlan::Leave(reason));
            assert_eq!(decide(&layer(), &error, &STRICT), PreparePlan::Refuse(reason));
        }
        let here = Err(ResolveError { kind: K::OnMachine, message: "x".into() });
        for modes in [LENIENT, STRICT] {
            let left = PreparePlan::Leave(Reason::ContentLocal);
            assert_eq!(decide(&layer(), &here, &modes), left, "what is here is no fallback");
        }
    }

    #[test]
    fn a_setback_goes_one_step_down_the_ladder() {
        use SetbackKind::Unavailable;
        let lazy = after(&PreparePlan::Lazy, Setback::Lazy(Unavailable), &LENIENT);
        assert_eq!(lazy, Next::Try(PreparePlan::Unpack(Reason::MountFailed)));
        for (plan, reason) in [
            (PreparePlan::Unpack(Reason::MountFailed), Reason::MountFailed),
            (PreparePlan::Unpack(Reason::NoZtoc), Reason::UnpackFailed),
            (PreparePlan::Unpack(Reason::Small), Reason::UnpackFailed),
        ] {
            assert_eq!(after(&plan, Setback::Unpack(Unavailable), &LENIENT), Next::Leave(reason));
            assert_eq!(after(&plan, Setback::Unpack(Unavailable), &STRICT), Next::Refuse(reason));
        }
        let strict = after(&PreparePlan::Lazy, Setback::Lazy(Unavailable), &STRICT);
        assert_eq!(strict, Next::Refuse(Reason::MountFailed));
    }

    #[test]
    fn an_extraction_needs_a_namespace() {
        let labels = HashMap::from([(labels::TARGET.to_owned(), "t".to_owned())]);
        assert_eq!(intent(None, &HashMap::new()).unwrap(), Intent::Writable);
        assert_eq!(intent(None, &labels).unwrap_err().code(), Code::FailedPrecondition);
        assert!(matches!(intent(Some("k8s.io"), &labels).unwrap(), Intent::Unlabelled { .. }));
    }

    #[test]
    fn codes_are_distinct() {
        use Reason::*;
        let all = [
            NoLabels,
            NoIndex,
            Disabled,
            IndexMissing,
            IndexDenied,
            IndexUnavailable,
            IndexMalformed,
            IndexLocal,
            ContentLocal,
            NoZtoc,
            Small,
            MountFailed,
            UnpackFailed,
        ];
        let codes: std::collections::HashSet<_> = all.iter().map(|reason| reason.code()).collect();
        assert_eq!(codes.len(), all.len());
        for reason in all {
            let advice = reason.advice();
            assert!(!advice.is_empty() && !advice.contains("cause"), "{reason} says nothing to do: {advice}");
        }
    }
}
