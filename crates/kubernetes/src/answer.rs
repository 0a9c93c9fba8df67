//! What comes back for one request: a stream of bytes, or what the server says is wrong.
//!
//! kube can do this in one call, which is not used: of an answer that is an error it reads the body without a bound and
//! prints it to the log, and it drops the headers, of which one says when to come back. A body that is no [`Status`] is a
//! page of whoever stands before the API server. It may repeat the request, and with it our token, so it is not quoted.

use std::io;
use std::pin::pin;
use std::time::Duration;

use futures::{AsyncBufRead, TryStreamExt as _};
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use kube::core::Status;

use crate::failure::Failure;
use crate::reading::Buffer;

/// The most that is read of an answer that is an error, in bytes.
const MAX_ERROR: usize = 64 << 10;

/// Sends a request and returns the bytes of its answer.
///
/// # Errors
/// [`Failure`], of the connection or as the server says.
pub(crate) async fn to(
    request: http::Request<Vec<u8>>,
    client: &Client,
) -> Result<impl AsyncBufRead + use<>, Failure> {
    let answer = client.send(request.map(Body::from)).await?;
    let code = answer.status();
    let after = answer.headers().get(http::header::RETRY_AFTER).and_then(seconds);
    let body = answer.into_body().into_data_stream().map_err(io::Error::other).into_async_read();
    if !code.is_client_error() && !code.is_server_error() {
        return Ok(body);
    }
    let mut buffer = Buffer::new(MAX_ERROR);
    // An error whose words do not come is one all the same.
    let _ = buffer.read_all(&mut pin!(body)).await;
    let status = serde_json::from_slice::<Status>(buffer.bytes()).ok().filter(|status| status.code != 0);
    let status = status.unwrap_or_else(|| {
        Status::failure("not in the words of an API server", code.canonical_reason().unwrap_or_default())
            .with_code(code.as_u16())
    });
    Err(Failure::Status { status: Box::new(status), after })
}

/// Parses `Retry-After` as API servers send it. A date, which HTTP also allows, counts as nothing said.
fn seconds(value: &http::HeaderValue) -> Option<Duration> {
    value.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}
