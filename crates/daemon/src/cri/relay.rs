//! The service that forwards image calls.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use soci_auth::keychain::cri::{CriStore, PullTicket};
use soci_oci::with_causes;

use super::backend::{Backend, RelayBody};
use super::tap::{self, Unread};
use crate::metrics::Metrics;
use crate::metrics::auth::Call;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The largest request that is looked into; the kubelet's and containerd's own limit for a message.
const MAX_MESSAGE: usize = 16 << 20;

/// The most metadata of a call that is forwarded, in bytes as HTTP/2 counts them; callers send a few hundred.
const MAX_METADATA: usize = 64 << 10;
/// What HTTP/2 counts for a header beside its name and value.
const HEADER: usize = 32;

/// Forwards `runtime.v1.ImageService` and `runtime.v1alpha2.ImageService`.
#[derive(Debug, Clone)]
pub(crate) struct Relay {
    backend: Arc<Backend>,
    store: Arc<CriStore>,
    metrics: Metrics,
}

/// What is to be done with the answer of a call.
enum Expect {
    Nothing,
    Pulled(Option<PullTicket>),
    Removed(Option<String>),
}

impl Relay {
    /// Returns a relay to `backend` that teaches `store` and counts in `metrics`.
    pub(crate) fn new(backend: Arc<Backend>, store: Arc<CriStore>, metrics: Metrics) -> Self {
        Self { backend, store, metrics }
    }

    /// Forwards one call; never fails as a service, since a failure is a gRPC status.
    pub(crate) async fn call<B>(self, request: Request<B>) -> Response<RelayBody>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let mut call = Call::begin(&self.metrics, method);
        match self.forward(request).await {
            Ok(response) => response.map(|mut watched| {
                watched.call = Some(call);
                watched.boxed_unsync()
            }),
            Err(status) => {
                call.end(Some(usize::from(status.code)));
                status.response()
            }
        }
    }

    async fn forward<B>(&self, request: Request<B>) -> Result<Response<Watched>, Status>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let started = Instant::now();
        check_metadata(request.headers())?;
        let limit = request.headers().get("grpc-timeout").and_then(parse_timeout);
        let (parts, body) = request.into_parts();
        let method = parts.uri.path().rsplit('/').next().unwrap_or_default();
        let (body, expect): (RelayBody, Expect) = match method {
            "PullImage" => {
                let bytes = collect(method, body).await?;
                let ticket = read(method, tap::pull(&bytes)).and_then(|pull| {
                    let namespace = Some(pull.namespace).filter(|namespace| !namespace.is_empty());
                    self.store.begin(&pull.image, pull.auth, namespace)
                });
                (whole(bytes), Expect::Pulled(ticket))
            }
            "RemoveImage" => {
                let bytes = collect(method, body).await?;
                let image = read(method, tap::removed(&bytes));
                (whole(bytes), Expect::Removed(image))
            }
            _ => (body.map_err(Into::into).boxed_unsync(), Expect::Nothing),
        };
        let mut forwarded = Request::new(body);
        *forwarded.method_mut() = parts.method;
        *forwarded.version_mut() = http::Version::HTTP_2;
        *forwarded.uri_mut() = target(&parts.uri)?;
        *forwarded.headers_mut() = forwardable(parts.headers);
        let response = self.send(forwarded, limit.map(|limit| (limit, started))).await?;
        let (mut parts, body) = response.into_parts();
        parts.headers = forwardable(parts.headers);
        // An answer without a body carries its status in the headers.
        let body = Watched {
            inner: body.map_err(Into::into).boxed_unsync(),
            seen: BytesMut::new(),
            status: parts.headers.get("grpc-status").cloned(),
            expect,
            store: self.store.clone(),
            call: None,
        };
        Ok(Response::from_parts(parts, body))
    }
}

impl Relay {
    /// Sends a call to the backend, with what is left of its limit since it came. A connection can end between being looked
    /// at and being used: a call that did not get onto it goes onto the next one.
    async fn send(
        &self,
        mut call: Request<RelayBody>,
        limit: Option<(Duration, Instant)>,
    ) -> Result<Response<Incoming>, Status> {
        let path = self.backend.path().display();
        let left = || limit.map(|(limit, since)| limit.saturating_sub(since.elapsed()));
        let mut again = true;
        loop {
            let mut connection = self.backend.ready(left()).await.ok_or_else(|| {
                Status::new(
                    14,
                    format!(
                        "containerd image service not reachable at {path}; start containerd, or correct image_service_path"
                    ),
                )
            })?;
            if let Some(left) = left() {
                call.headers_mut().insert("grpc-timeout", timeout_value(left));
            }
            let mut error = match connection.try_send_request(call).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            call = match error.take_message() {
                Some(unsent) if std::mem::take(&mut again) => unsent,
                _ => {
                    let error = with_causes(error.error());
                    return Err(Status::new(
                        14,
                        format!(
                            "containerd image service at {path}: {error}; look at containerd's log, the next call connects anew"
                        ),
                    ));
                }
            };
        }
    }
}

fn check_metadata(headers: &HeaderMap) -> Result<(), Status> {
    let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER).sum();
    if size <= MAX_METADATA {
        return Ok(());
    }
    Err(Status::new(
        8,
        format!(
            "metadata of {size} bytes is over the limit of {MAX_METADATA}; send less, or look which interceptor or \
             tracer of the caller adds to it"
        ),
    ))
}

fn whole(bytes: Bytes) -> RelayBody {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// Returns what a request says that is forwarded all the same, and tells what is lost when it cannot be read.
fn read<T>(method: &str, request: Result<T, Unread>) -> Option<T> {
    let lost = "nothing is learnt from an image call";
    match request {
        Ok(said) => return Some(said),
        Err(Unread::Compressed) => {
            tracing::warn!(
                method,
                advice = "have its caller send it uncompressed, as the kubelet does",
                "{lost}"
            );
        }
        Err(Unread::Malformed) => {
            tracing::debug!(method, "{lost}: its request is cut off, or not one of this method");
        }
    }
    None
}

async fn collect<B>(method: &str, body: B) -> Result<Bytes, Status>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<BoxError>,
{
    let limited = http_body_util::Limited::new(body, MAX_MESSAGE + 5);
    match limited.collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Status::new(
            8,
            format!(
                "request is larger than {MAX_MESSAGE} bytes, which no kubelet sends; look at who calls this socket"
            ),
        )),
        Err(error) => {
            let error = with_causes(&*error);
            tracing::debug!(method, error, "an image call ended before its request was whole");
            Err(Status::new(
                1,
                format!(
                    "the request ended before it was whole: {error}; send it again, and look whether the caller's deadline is \
                     too short"
                ),
            ))
        }
    }
}

/// The URI to send: containerd is addressed as `localhost`, since a socket path is no authority.
fn target(uri: &Uri) -> Result<Uri, Status> {
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let built = Uri::builder().scheme("http").authority("localhost").path_and_query(path).build();
    built.map_err(|_| Status::new(12, "malformed method".into()))
}

/// Everything but what belongs to one connection.
fn forwardable(mut headers: HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "host"] {
        headers.remove(name);
    }
    headers
}

/// Parses gRPC's `grpc-timeout`: up to eight digits and a unit.
fn parse_timeout(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

fn timeout_value(left: Duration) -> HeaderValue {
    let millis = left.as_millis();
    let text = if millis < 100_000_000 {
        format!("{millis}m")
    } else {
        format!("{}S", left.as_secs().min(99_999_999))
    };
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("1m"))
}

/// A status that this relay gives by itself.
struct Status {
    code: u8,
    message: String,
}

impl Status {
    fn new(code: u8, message: String) -> Self {
        Self { code, message }
    }

    fn response(self) -> Response<RelayBody> {
        let mut response = Response::new(whole(Bytes::new()));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(u16::from(self.code)));
        let message = percent_encode(&self.message);
        headers.insert(
            "grpc-message",
            HeaderValue::try_from(message).unwrap_or(HeaderValue::from_static("error")),
        );
        response
    }
}

fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// An answer that is passed on unchanged while its first message and its status are noted.
struct Watched {
    inner: RelayBody,
    seen: BytesMut,
    status: Option<HeaderValue>,
    expect: Expect,
    store: Arc<CriStore>,
    call: Option<Call>,
}

impl Body for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let frame = std::task::ready!(Pin::new(&mut this.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref()
                    && !matches!(this.expect, Expect::Nothing)
                {
                    // The answers of these two calls are tiny; of a larger one nothing is learnt.
                    if this.seen.len() + data.len() <= 64 << 10 {
                        this.seen.extend_from_slice(data);
                    }
                }
                if let Some(status) = frame.trailers_ref().and_then(|trailers| trailers.get("grpc-status")) {
                    this.status = Some(status.clone());
                    this.settle();
                }
            }
            Some(Err(_)) => {}
            None => this.settle(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Watched {
    /// Tells the store how the call ended. A call that is dropped before its status came counts as failed.
    fn settle(&mut self) {
        let code = self.status.as_ref().and_then(|status| status.to_str().ok()?.parse::<usize>().ok());
        if let (Some(call), Some(code)) = (&mut self.call, code) {
            call.end(Some(code));
        }
        let succeeded = code == Some(0);
        match std::mem::replace(&mut self.expect, Expect::Nothing) {
            Expect::Pulled(Some(ticket)) if succeeded => {
                ticket.confirm(tap::pulled(&self.seen.split().freeze()))
            }
            Expect::Removed(Some(image)) if succeeded => self.store.removed(&image),
            Expect::Pulled(_) | Expect::Removed(_) | Expect::Nothing => {}
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Returns the status that says where a call to the runtime service belongs.
pub(super) fn runtime_hint() -> Response<RelayBody> {
    let message =
        "this socket serves images only; point the kubelet's --container-runtime-endpoint at containerd";
    Status::new(12, message.into()).response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_and_written_as_grpc_has_them() {
        for (text, expected) in [
            ("3S", Some(Duration::from_secs(3))),
            ("250m", Some(Duration::from_millis(250))),
            ("2H", Some(Duration::from_secs(7200))),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("3x", None),
        ] {
            assert_eq!(parse_timeout(&HeaderValue::from_str(text).unwrap()), expected, "{text}");
        }
        assert_eq!(timeout_value(Duration::from_millis(2999)), "2999m");
        assert_eq!(timeout_value(Duration::from_secs(1 << 40)), "99999999S");
    }

    #[test]
    fn connection_headers_stay_behind_and_all_else_goes_on() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-hop, close"),
            ("x-hop", "1"),
            ("te", "trailers"),
            ("traceparent", "00-1"),
            ("grpc-status-details-bin", "AAA"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let left = forwardable(headers);
        let mut names: Vec<&str> = left.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["grpc-status-details-bin", "te", "traceparent"]);
    }
}
