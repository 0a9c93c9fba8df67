//! The relay as services that the gRPC server can mount, one for each version of CRI.

use std::convert::Infallible;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::relay::{self, Relay};
use crate::front::Answer;

/// `runtime.v1.ImageService`.
#[derive(Debug, Clone)]
pub(crate) struct ImageServiceV1(pub(crate) Relay);

/// `runtime.v1alpha2.ImageService`, which kubelets before 1.26 speak.
#[derive(Debug, Clone)]
pub(crate) struct ImageServiceV1Alpha2(pub(crate) Relay);

/// `runtime.v1.RuntimeService`, which is containerd's alone: a kubelet that calls it here has a wrong endpoint.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeService;

impl NamedService for ImageServiceV1 {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl NamedService for ImageServiceV1Alpha2 {
    const NAME: &'static str = "runtime.v1alpha2.ImageService";
}

impl NamedService for RuntimeService {
    const NAME: &'static str = "runtime.v1.RuntimeService";
}

fn forward(relay: &Relay, request: Request<Body>) -> Answer {
    let relay = relay.clone();
    Box::pin(async move { Ok(relay.call(request).await.map(Body::new)) })
}

impl Service<Request<Body>> for ImageServiceV1 {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        forward(&self.0, request)
    }
}

impl Service<Request<Body>> for ImageServiceV1Alpha2 {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        forward(&self.0, request)
    }
}

impl Service<Request<Body>> for RuntimeService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Answer {
        Box::pin(async { Ok(relay::runtime_hint().map(Body::new)) })
    }
}
