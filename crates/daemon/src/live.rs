//! Live layers.

use async_trait::async_trait;
use soci_snapshotter::plan::ResolveErrorKind;
use soci_snapshotter::provider::SetbackKind;
use soci_snapshotter::{
    Ancestor, ImageFacts, LayerProvider, LayerRequest, LazyError, Lower, MountRecord, ReleaseError,
    ResolveError, RestoreError, SnapshotDir, UnpackError, Usage,
};

/// A provider for machines that pull nothing lazily: every image is left to containerd.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disabled;

const OFF: &str = "lazy loading is switched off";

#[async_trait]
impl LayerProvider for Disabled {
    async fn facts(&self, _: &LayerRequest) -> Result<ImageFacts, ResolveError> {
        Err(ResolveError { kind: ResolveErrorKind::Disabled, message: OFF.to_owned() })
    }

    async fn mount_lazy(
        &self,
        _: &LayerRequest,
        _: &[Ancestor],
        _: &SnapshotDir,
    ) -> Result<MountRecord, LazyError> {
        Err(LazyError { kind: SetbackKind::Local, message: OFF.to_owned() })
    }

    async fn unpack(&self, _: &LayerRequest, _: &[Ancestor], _: &SnapshotDir) -> Result<Usage, UnpackError> {
        Err(UnpackError { kind: SetbackKind::Local, message: OFF.to_owned() })
    }

    async fn restore(&self, _: &MountRecord, _: &SnapshotDir) -> Result<(), RestoreError> {
        Err(RestoreError { message: OFF.to_owned() })
    }

    fn lower(&self, at: &SnapshotDir) -> Lower {
        Lower { path: at.fs(), served: false }
    }

    async fn release(&self, _: &SnapshotDir) -> Result<(), ReleaseError> {
        Ok(())
    }
}
