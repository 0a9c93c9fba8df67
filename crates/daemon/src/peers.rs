//! Who may speak to the daemon's sockets: root and the daemon's own user.
//!
//! The file modes of sockets we make say so already, but a socket that the service manager hands over has the mode of its
//! unit, and whoever can connect can plant credentials and mount. The kernel tells who the peer is, so a stranger gets a
//! clear refusal instead of a service.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use futures::future::Either;
use http::{HeaderValue, Request, Response, header};
use tonic::body::Body;
use tonic::transport::server::UdsConnectInfo;
use tower::{Layer, Service};

/// What a stranger is told.
pub const REFUSAL: &str = "only root may use this socket: run the command as root";
/// gRPC's `PERMISSION_DENIED`.
const PERMISSION_DENIED: HeaderValue = HeaderValue::from_static("7");

/// Whether a peer of this user id may speak to us. Nothing where the kernel does not say, which is refused.
pub fn is_trusted(uid: Option<u32>) -> bool {
    uid.is_some_and(|uid| uid == 0 || uid == rustix::process::geteuid().as_raw())
}

/// Refuses every call of a peer that is not trusted.
#[derive(Debug, Clone, Copy)]
pub struct TrustedOnly;

/// A service behind [`TrustedOnly`].
#[derive(Debug, Clone)]
pub struct Guarded<S>(S);

impl<S> Layer<S> for TrustedOnly {
    type Service = Guarded<S>;

    fn layer(&self, service: S) -> Guarded<S> {
        Guarded(service)
    }
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        match is_trusted(peer.map(|peer| peer.uid())) {
            true => Either::Left(self.0.call(request)),
            false => Either::Right(ready(Ok(refusal()))),
        }
    }
}

fn refusal() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", PERMISSION_DENIED);
    headers.insert("grpc-message", HeaderValue::from_static(REFUSAL));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_our_own_user_are_trusted_and_nobody_else() {
        let own = rustix::process::geteuid().as_raw();
        assert!(is_trusted(Some(0)) && is_trusted(Some(own)));
        assert!(!is_trusted(Some(own + 4711)) && !is_trusted(None));
    }

    #[tokio::test]
    async fn a_call_without_a_known_peer_is_refused_in_grpcs_words() {
        let inner = tower::service_fn(|_: Request<Body>| async { Ok(Response::new(Body::empty())) });
        let mut guarded = TrustedOnly.layer(inner);
        let answer = guarded.call(Request::new(Body::empty())).await.unwrap();
        assert_eq!(answer.headers()["grpc-status"], "7");
        assert_eq!(answer.headers()["grpc-message"], REFUSAL);
    }
}
