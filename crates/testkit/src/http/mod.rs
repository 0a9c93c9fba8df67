//! The small HTTP server under the registry, the storage and the token server.

pub(crate) mod body;
pub(crate) mod serve;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use bytes::Bytes;

pub(crate) use body::{Content, Piece, ReplyBody};

/// An answer before faults, shaping and the log have had their turn.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) piece: Piece,
    /// Who asked.
    pub(crate) user: Option<String>,
    /// What a token request said.
    pub(crate) said: Bytes,
}

impl Answer {
    pub(crate) fn new(status: u16) -> Self {
        Self {
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            headers: HeaderMap::new(),
            piece: Piece::empty(),
            user: None,
            said: Bytes::new(),
        }
    }

    pub(crate) fn bytes(mut self, media_type: &str, bytes: impl Into<Bytes>) -> Self {
        self.piece = Piece::all(Content::Memory(bytes.into()));
        self.header("content-type", media_type)
    }

    pub(crate) fn header(mut self, name: &str, value: impl AsRef<str>) -> Self {
        self.set(name, value.as_ref());
        self
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            self.headers.append(name, value);
        }
    }

    /// Answers an error in the registry's own form.
    pub(crate) fn error(status: u16, code: &str, message: &str) -> Self {
        let body = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
        Self::new(status).bytes("application/json", body.to_string())
    }
}

/// What a handler may know of the connection: enough to break it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line {
    /// Set to reset the connection when it is dropped.
    pub(crate) reset: Arc<AtomicBool>,
    /// Bytes written to the socket so far.
    pub(crate) written: Arc<AtomicU64>,
    /// The certificate that the client showed, in DER.
    pub(crate) client: Option<Arc<[u8]>>,
}

impl Line {
    /// Waits until nothing more is written: everything is, or the other side does not read.
    pub(crate) async fn settle(&self) {
        let mut quiet = 0;
        let mut seen = u64::MAX;
        while quiet < 3 {
            tokio::time::sleep(Duration::from_millis(4)).await;
            let written = self.written.load(Ordering::Relaxed);
            quiet = if written == seen { quiet + 1 } else { 0 };
            seen = written;
        }
    }
}

pub(crate) fn into_response(answer: Answer, body: ReplyBody) -> Response<ReplyBody> {
    let mut response = Response::new(body);
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    response
}

/// Counts the bytes of one answer.
pub(crate) type Counter = Arc<AtomicU64>;
