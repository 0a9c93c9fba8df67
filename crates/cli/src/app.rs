//! What all commands share: the flags of the program, containerd, the content store, the lease.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use soci_index::{Image, Platforms};
use soci_oci::{FetchClass, FetchContext, ImageRef};
use soci_store::{Containerd, ContentStore, Lease, LocalStore};
use tokio::sync::OnceCell;

use crate::cli::{Global, PlatformFlags};
use crate::output::Output;

/// How long a command may talk to a registry unless `--timeout` says otherwise.
const NO_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Which content store artifacts are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreKind {
    /// The layout below the program's root.
    Soci,
    /// containerd's.
    Containerd,
}

/// A run of the program.
pub(crate) struct App {
    pub(crate) global: Global,
    pub(crate) output: Arc<Output>,
    /// The lease of this run, taken by the first command part that writes to containerd.
    lease: OnceCell<Lease>,
}

impl App {
    pub(crate) fn new(global: Global, output: Arc<Output>) -> Self {
        Self { global, output, lease: OnceCell::new() }
    }

    /// Gives the lease back. What could not be given back ends by itself.
    pub(crate) async fn end(self) {
        if let Some(lease) = self.lease.into_inner()
            && let Err(error) = lease.end().await
        {
            tracing::debug!(%error, "the lease is left to expire");
        }
    }

    /// Returns containerd, not connected yet.
    pub(crate) fn containerd(&self) -> Containerd {
        let containerd = Containerd::connect(Path::new(&self.global.address), &self.global.namespace);
        match self.global.timeout {
            Some(timeout) if !timeout.is_zero() => containerd.with_timeout(timeout),
            _ => containerd,
        }
    }

    /// Returns containerd with a lease: what is written is kept until the command ends.
    pub(crate) async fn leased(&self) -> anyhow::Result<Containerd> {
        let containerd = self.containerd();
        let lease = self.lease.get_or_try_init(|| containerd.lease()).await?;
        Ok(containerd.with_lease(lease))
    }

    /// Returns which content store was chosen.
    pub(crate) fn kind(&self) -> anyhow::Result<StoreKind> {
        match self.global.content_store.as_str() {
            "" | "containerd" => Ok(StoreKind::Containerd),
            "soci" => Ok(StoreKind::Soci),
            other => {
                bail!("unknown content store type: {other}; must be one of [soci containerd]")
            }
        }
    }

    /// Returns the soci content store, created where it is absent.
    pub(crate) fn soci_store(&self) -> anyhow::Result<LocalStore> {
        ensure_root(&self.global.root)?;
        Ok(LocalStore::open(&self.global.root)?)
    }

    /// Returns the chosen content store, for reading.
    pub(crate) fn artifacts(&self) -> anyhow::Result<Arc<dyn ContentStore>> {
        Ok(match self.kind()? {
            StoreKind::Containerd => self.containerd().content(),
            StoreKind::Soci => Arc::new(self.soci_store()?),
        })
    }

    /// Returns the image record `name`, which may be written short.
    pub(crate) async fn image(&self, name: &str) -> anyhow::Result<soci_store::Image> {
        let images = self.containerd().images();
        if let Some(image) = images.get(name).await? {
            return Ok(image);
        }
        let full = name.parse::<ImageRef>().map(|reference| reference.to_string());
        if let Ok(full) = full
            && full != name
            && let Some(image) = images.get(&full).await?
        {
            return Ok(image);
        }
        bail!(
            "image {name:?}: not found in containerd's namespace {:?}; pull it first",
            self.global.namespace
        )
    }

    /// Returns the image manifests of an image record, read from containerd.
    pub(crate) async fn load(&self, image: &soci_store::Image) -> anyhow::Result<Image> {
        Ok(Image::load(&image.target, &*self.containerd().content()).await?)
    }

    /// Returns until when registries may be talked to.
    pub(crate) fn context(&self) -> FetchContext {
        let limit = self.global.timeout.filter(|limit| !limit.is_zero()).unwrap_or(NO_LIMIT);
        FetchContext::new(Instant::now() + limit, FetchClass::OnDemand)
    }
}

impl PlatformFlags {
    /// Returns the platforms that the flags mean, `default` where there are none.
    pub(crate) fn platforms(&self, default: Platforms) -> Platforms {
        match (self.all_platforms, self.platform.as_slice()) {
            (true, _) => Platforms::All,
            (false, []) => default,
            (false, these) => Platforms::These(these.to_vec()),
        }
    }
}

/// Creates the root directory, but not those above it.
fn ensure_root(root: &Path) -> anyhow::Result<()> {
    if root.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().mode(0o700).create(root).with_context(|| format!("creating {}", root.display()))
}
