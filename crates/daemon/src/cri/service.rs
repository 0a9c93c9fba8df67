//! The relay as services that the gRPC server can mount, one for each version of CRI.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::relay::{self, Relay};
use crate::front::Answer;

/// A service of CRI that a kubelet may call on our socket.
pub(crate) trait Called: Clone + Send + Sync + 'static {
    /// Its name on the wire.
    const NAME: &'static str;

    /// Answers a call: with what containerd answers.
    fn answer(relay: &Relay, request: Request<Body>) -> Answer {
        let relay = relay.clone();
        Box::pin(async move { Ok(relay.call(request).await.map(Body::new)) })
    }
}

/// `runtime.v1.ImageService`.
#[derive(Debug, Clone)]
pub(crate) struct ImageV1;

/// `runtime.v1alpha2.ImageService`, which kubelets before 1.26 speak.
#[derive(Debug, Clone)]
pub(crate) struct ImageV1Alpha2;

/// `runtime.v1.RuntimeService`, which is containerd's alone: a kubelet that calls it here has a wrong endpoint.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeV1;

impl Called for ImageV1 {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl Called for ImageV1Alpha2 {
    const NAME: &'static str = "runtime.v1alpha2.ImageService";
}

impl Called for RuntimeV1 {
    const NAME: &'static str = "runtime.v1.RuntimeService";

    fn answer(_: &Relay, _: Request<Body>) -> Answer {
        Box::pin(async { Ok(relay::runtime_hint().map(Body::new)) })
    }
}

/// The relay as the service `C`.
#[derive(Debug, Clone)]
pub(crate) struct Relayed<C>(Relay, PhantomData<C>);

impl<C> Relayed<C> {
    pub(crate) fn by(relay: Relay) -> Self {
        Self(relay, PhantomData)
    }
}

impl<C: Called> NamedService for Relayed<C> {
    const NAME: &'static str = C::NAME;
}

impl<C: Called> Service<Request<Body>> for Relayed<C> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        C::answer(&self.0, request)
    }
}
