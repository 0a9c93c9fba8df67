//! A client of the container runtime interface, as the kubelet would be: images here, pods in [`runtime`].

pub mod cut;
pub mod fake;
pub mod load;
pub mod runtime;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

#[allow(
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    clippy::pedantic,
    clippy::all,
    reason = "generated from proto/cri.proto"
)]
mod api {
    tonic::include_proto!("runtime.v1");
}

use api::image_service_client::ImageServiceClient;
pub use api::{AuthConfig, Image};

/// How long a pull may take: a whole image through a slow machine.
const LIMIT: Duration = Duration::from_secs(300);

/// A channel to a Unix socket, and the thread that drives it.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) channel: Channel,
}

/// Connects to a socket when the first call is made.
pub(crate) fn connect(socket: &Path) -> io::Result<Connection> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let socket: PathBuf = socket.to_owned();
    let entered = runtime.enter();
    let endpoint = Endpoint::from_static("http://localhost").timeout(LIMIT);
    let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    }));
    drop(entered);
    Ok(Connection { runtime, channel })
}

/// A connection to a socket that speaks `runtime.v1.ImageService`. Calls block; not for use on an async thread.
#[derive(Debug)]
pub struct ImageService(Connection);

impl ImageService {
    /// Connects to a socket when the first call is made.
    ///
    /// # Errors
    /// Where no runtime can be made for the calls.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self(connect(socket)?))
    }

    /// Pulls an image, for a pod of `namespace`.
    ///
    /// # Errors
    /// What the service answers.
    pub fn pull(
        &self,
        image: &str,
        auth: Option<AuthConfig>,
        namespace: &str,
    ) -> Result<String, tonic::Status> {
        let request = pull_request(image, auth, namespace);
        let mut client = self.client();
        Ok(self.0.runtime.block_on(client.pull_image(request))?.into_inner().image_ref)
    }

    /// Pulls as [`Self::pull`] does, with metadata of the caller's.
    ///
    /// # Errors
    /// What the service answers.
    ///
    /// # Panics
    /// Where a name or a value is none of HTTP.
    pub fn pull_with(
        &self,
        image: &str,
        auth: Option<AuthConfig>,
        metadata: &[(String, String)],
    ) -> Result<String, tonic::Status> {
        let mut request = tonic::Request::new(pull_request(image, auth, "default"));
        for (name, value) in metadata {
            let name: tonic::metadata::AsciiMetadataKey = name.parse().expect("a name of a header");
            request.metadata_mut().insert(name, value.parse().expect("a value of a header"));
        }
        let mut client = self.client();
        Ok(self.0.runtime.block_on(client.pull_image(request))?.into_inner().image_ref)
    }

    /// Pulls as [`Self::pull`] does, and gives the call up when `patience` has passed; `None` then.
    pub fn pull_within(
        &self,
        patience: Duration,
        image: &str,
        auth: Option<AuthConfig>,
        namespace: &str,
    ) -> Option<Result<String, tonic::Status>> {
        let request = pull_request(image, auth, namespace);
        let mut client = self.client();
        let pulling = async { tokio::time::timeout(patience, client.pull_image(request)).await };
        let pulled = self.0.runtime.block_on(pulling).ok()?;
        Some(pulled.map(|answer| answer.into_inner().image_ref))
    }

    /// Returns what the service knows of an image, if it has it.
    ///
    /// # Errors
    /// What the service answers.
    pub fn status(&self, image: &str) -> Result<Option<Image>, tonic::Status> {
        let request = api::ImageStatusRequest { image: Some(spec(image)) };
        let mut client = self.client();
        Ok(self.0.runtime.block_on(client.image_status(request))?.into_inner().image)
    }

    /// Removes an image.
    ///
    /// # Errors
    /// What the service answers.
    pub fn remove(&self, image: &str) -> Result<(), tonic::Status> {
        let request = api::RemoveImageRequest { image: Some(spec(image)) };
        let mut client = self.client();
        self.0.runtime.block_on(client.remove_image(request))?;
        Ok(())
    }

    fn client(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.0.channel.clone())
    }
}

fn pull_request(image: &str, auth: Option<AuthConfig>, namespace: &str) -> api::PullImageRequest {
    let metadata = api::PodSandboxMetadata {
        name: "pod".to_owned(),
        uid: "uid".to_owned(),
        namespace: namespace.to_owned(),
        attempt: 0,
    };
    api::PullImageRequest {
        image: Some(spec(image)),
        auth,
        sandbox_config: Some(api::PodSandboxConfig {
            metadata: Some(metadata),
            ..api::PodSandboxConfig::default()
        }),
    }
}

fn spec(image: &str) -> api::ImageSpec {
    api::ImageSpec { image: image.to_owned() }
}

/// Returns a user name and password as the kubelet sends them.
pub fn basic(username: &str, password: &str) -> AuthConfig {
    AuthConfig { username: username.to_owned(), password: password.to_owned(), ..AuthConfig::default() }
}
