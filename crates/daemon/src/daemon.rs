//! The running daemon: everything wired, started and stopped in order.
//!
//! Start: lock the root directory, look at its version, try overlay, open the snapshots, listen, say that we are ready, and only then bring
//! mounts of an earlier process back, several at once while calls are served. Nothing here needs a registry or containerd.
//!
//! Stop: no new calls, those under way get [`DRAIN`], background work ends, and, on request, mounts are taken away.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use http::header::DATE;
use http::{HeaderName, HeaderValue, Response};
use soci_auth::keychain::cri::CriStore;
use soci_snapshotter::service::{Restored, Unmount};
use soci_snapshotter::verdict::Observer;
use soci_snapshotter::{LayerProvider, PullModes, Settings, Snapshotter, Verdict};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tower_http::sensitive_headers::SetSensitiveResponseHeadersLayer;
use tower_http::set_header::SetResponseHeaderLayer;

use crate::config::Config;
use crate::cri::{Backend, ImageV1, ImageV1Alpha2, Relay, Relayed, RuntimeV1};
use crate::disk;
use crate::front::{Behind, Front};
use crate::grpc::Service;
use crate::lock::RootLock;
use crate::metrics::Metrics;
use crate::overlay;
use crate::peers::TrustedOnly;
use crate::proto::snapshots::snapshots_server::SnapshotsServer;
use crate::serve::{self, Address};
use crate::version;

/// How long calls under way may take at shutdown.
const DRAIN: Duration = Duration::from_secs(5);
/// The largest message accepted, in bytes, as containerd has it.
const MAX_MESSAGE: usize = 16 << 20;
/// Calls at once on one connection: pulls wait for the snapshot calls that they cause.
const MAX_CALLS: u32 = 4096;
/// HTTP/2 window: a list of images may be 16 MiB.
const WINDOW: u32 = 16 << 20;
/// The largest header list that HTTP/2 takes, in bytes: enough to answer a call that has too much with a status that says
/// so, where HTTP/2 itself would only drop it.
const MAX_HEADERS: u32 = 2 << 20;

/// Headers that are hardly the same twice: an error's message, with which nearly every Prepare of a pull ends and which names
/// another snapshot each time, and the time. Sent as sensitive ones they drive nothing out of the connection's table of
/// headers, and are not kept there.
const CHANGING: [HeaderName; 2] = [HeaderName::from_static("grpc-message"), DATE];

/// What a daemon is made of.
#[derive(Debug)]
pub struct Options {
    /// Where to listen.
    pub address: Address,
    /// State directory.
    pub root: PathBuf,
    /// Configuration.
    pub config: Config,
    /// What is counted.
    pub metrics: Metrics,
}

/// What a daemon is wired to.
#[derive(Debug)]
pub struct Wiring {
    /// Makes layers appear.
    pub provider: Arc<dyn LayerProvider>,
    /// What the kubelet's pulls leave their credentials in, where that option is on.
    pub pulls: Option<Arc<CriStore>>,
}

impl From<Arc<dyn LayerProvider>> for Wiring {
    fn from(provider: Arc<dyn LayerProvider>) -> Self {
        Self { provider, pulls: None }
    }
}

/// A daemon that serves.
#[derive(Debug)]
pub struct Daemon {
    snapshotter: Snapshotter,
    stop: Option<oneshot::Sender<()>>,
    server: Front<anyhow::Result<()>>,
    restore: JoinHandle<Restored>,
    socket: PathBuf,
    _lock: RootLock,
}

impl Daemon {
    /// Starts a daemon whose layers come from what `wire` returns.
    ///
    /// # Errors
    /// With the step that failed and what to do about it.
    pub async fn start<F>(options: Options, wire: F) -> anyhow::Result<Self>
    where
        F: FnOnce(&Options) -> anyhow::Result<Wiring>,
    {
        let (lock, snapshotter, pulls) =
            open(&options, wire).map_err(|error| disk::advised(&options.root, error))?;
        let listener = serve::listen(&options.address)?;
        let socket = serve::path_of(&options.address, &listener);
        let (stop, stopped) = oneshot::channel::<()>();
        let service =
            SnapshotsServer::new(Service(snapshotter.clone())).max_decoding_message_size(MAX_MESSAGE);
        let service = Behind::here(service);
        let relay = pulls.zip(options.config.cri.as_deref()).map(|(store, backend)| {
            tracing::info!(backend = %backend.display(), "image calls are forwarded to containerd");
            Relay::new(Arc::new(Backend::new(backend)), store, options.metrics.clone())
        });
        let router = tonic::transport::Server::builder()
            .layer(TrustedOnly)
            .layer(SetSensitiveResponseHeadersLayer::new(CHANGING))
            .layer(SetResponseHeaderLayer::if_not_present(DATE, date))
            .max_concurrent_streams(MAX_CALLS)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_max_header_list_size(MAX_HEADERS)
            .add_service(service)
            .add_optional_service(relay.clone().map(Relayed::<ImageV1>::by))
            .add_optional_service(relay.clone().map(Relayed::<ImageV1Alpha2>::by))
            .add_optional_service(relay.map(Relayed::<RuntimeV1>::by));
        let server = Front::start(move || async move {
            let listener = UnixListenerStream::new(UnixListener::from_std(listener)?);
            let stopped = async {
                let _ = stopped.await;
            };
            anyhow::Ok(router.serve_with_incoming_shutdown(listener, stopped).await?)
        })
        .context("listen")?;
        let restorer = snapshotter.clone();
        let restore = tokio::spawn(async move {
            let restored = restorer.restore().await;
            if restored.total > 0 {
                let Restored { total, degraded } = restored;
                tracing::info!(total, degraded, "layers of an earlier process are mounted again");
            }
            // Directories of snapshots that were removed while nobody was there to delete them.
            restorer.cleanup().await;
            restored
        });
        Ok(Self { snapshotter, stop: Some(stop), server, restore, socket, _lock: lock })
    }

    /// Returns the socket that it is reached at.
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// Waits until the mounts of an earlier process are back, or known to be degraded.
    pub async fn restored(&mut self) -> Restored {
        (&mut self.restore).await.unwrap_or_default()
    }

    /// Waits until the server ends by itself, which it does only when it fails.
    ///
    /// # Errors
    /// Why it failed.
    pub async fn failed(&mut self) -> anyhow::Error {
        match self.server.ended().await {
            Some(Ok(())) => anyhow::anyhow!("the server ended"),
            Some(Err(error)) => error.context("serve"),
            None => anyhow::anyhow!("the thread that serves ended"),
        }
    }

    /// Stops serving and ends all work; unmounts every layer when `unmount` says so.
    pub async fn stop(mut self, unmount: Unmount) {
        drop(self.stop.take());
        if tokio::time::timeout(DRAIN, self.server.ended()).await.is_err() {
            tracing::warn!("calls were under way for {} s after the stop and are cut", DRAIN.as_secs());
            self.server.cut();
        }
        self.restore.abort();
        self.snapshotter.shutdown(unmount).await;
    }
}

/// Opens what is beneath the root directory.
fn open<F>(options: &Options, wire: F) -> anyhow::Result<(RootLock, Snapshotter, Option<Arc<CriStore>>)>
where
    F: FnOnce(&Options) -> anyhow::Result<Wiring>,
{
    let root = options.root.join("snapshotter");
    make_private(&options.root).with_context(|| format!("root directory {:?}", options.root))?;
    let lock = RootLock::take(&options.root)?;
    version::check(&options.root)?;
    let userxattr = overlay::in_user_namespace();
    if options.config.check_overlay {
        make_private(&root).with_context(|| format!("directory {root:?}"))?;
        match overlay::check(&root, userxattr) {
            Ok(()) => tracing::debug!("snapshotter is supported"),
            Err(error) if error.is_full() => {
                let error = soci_oci::with_causes(&error);
                tracing::warn!(error, "no room to try overlay: remove images to make some");
            }
            Err(error) => return Err(error.into()),
        }
    } else {
        tracing::warn!("skipped snapshotter is supported check");
    }
    let Wiring { provider, pulls } = wire(options)?;
    let settings = Settings {
        modes: PullModes { min_layer_size: options.config.min_layer_size, strict: options.config.strict },
        userxattr,
        observer: observer(options.metrics.clone()),
    };
    let (snapshotter, findings) = Snapshotter::open(&root, provider, settings).context("open snapshots")?;
    for finding in &findings {
        let error = soci_oci::with_causes(finding);
        let advice = "to have it again, remove the containers and the image that use it (crictl rm, crictl rmi) and pull";
        if finding.kept {
            tracing::warn!(error, advice, "a damaged snapshot is left out; its directory is kept");
        } else {
            tracing::warn!(error, advice, "a damaged snapshot is left out");
        }
    }
    Ok((lock, snapshotter, pulls))
}

fn make_private(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Returns the time for an answer. Set here, since what the HTTP library adds by itself is added behind all layers.
fn date<B>(_: &Response<B>) -> Option<HeaderValue> {
    HeaderValue::try_from(httpdate::fmt_http_date(SystemTime::now())).ok()
}

fn observer(metrics: Metrics) -> Observer {
    Arc::new(move |verdict: &Verdict| {
        metrics.verdict(verdict);
        let reasons: Vec<&str> = verdict.reasons.iter().map(|reason| reason.code()).collect();
        let elapsed_ms = u64::try_from(verdict.elapsed.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(
            image = verdict.image,
            namespace = verdict.namespace,
            digest = verdict.manifest.map(|manifest| manifest.to_string()).unwrap_or_default(),
            verdict = verdict.word(),
            reasons = reasons.join(","),
            cause = verdict.cause.as_deref().unwrap_or_default(),
            advice = verdict.reasons.first().map(|reason| reason.advice()).unwrap_or_default(),
            elapsed_ms,
            "{verdict}"
        );
    })
}
