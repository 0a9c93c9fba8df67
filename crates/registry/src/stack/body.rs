//! The body of an answer as it arrives, bounded in time, holding its place in the limiter until it is dropped.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::limit::Permit;
use crate::transport::{Failure, FailureKind};

/// Error bodies are read up to this size; the rest is of no interest and closes the connection.
pub(crate) const MAX_ERROR: usize = 64 << 10;

/// The body of an answer.
#[derive(Debug)]
pub(crate) struct Body {
    response: reqwest::Response,
    _permit: Permit,
    deadline: Instant,
    stall: Duration,
}

/// A body that could not be read whole.
#[derive(Debug)]
pub(crate) enum BodyError {
    Failed(Failure),
    TooLarge(u64),
}

impl Body {
    pub(crate) fn new(
        response: reqwest::Response,
        permit: Permit,
        deadline: Instant,
        stall: Duration,
    ) -> Self {
        Self { response, _permit: permit, deadline, stall }
    }

    /// Returns the next bytes as they came from the connection, nothing at the end.
    ///
    /// Waits no longer than a stalled body may stand still, and never past the deadline; when little time is left, half
    /// of it is kept for another attempt.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let patience = if left <= self.stall { left / 2 } else { self.stall };
        match tokio::time::timeout(patience, self.response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(Failure::of_reqwest(error)),
            Err(_) => Err(Failure::new(
                FailureKind::Timeout,
                format!("no byte of the body for {:.1} s", patience.as_secs_f64()),
            )),
        }
    }

    /// Reads everything, at most `max` bytes.
    pub(crate) async fn collect(mut self, max: u64) -> Result<Bytes, BodyError> {
        if self.response.content_length().is_some_and(|len| len > max) {
            return Err(BodyError::TooLarge(max));
        }
        let Some(first) = self.chunk().await.map_err(BodyError::Failed)? else {
            return Ok(Bytes::new());
        };
        let mut all: Option<BytesMut> = None;
        let mut len = first.len() as u64;
        while let Some(chunk) = self.chunk().await.map_err(BodyError::Failed)? {
            len += chunk.len() as u64;
            if len > max {
                break;
            }
            all.get_or_insert_with(|| BytesMut::from(first.as_ref())).extend_from_slice(&chunk);
        }
        if len > max {
            return Err(BodyError::TooLarge(max));
        }
        Ok(all.map_or(first, BytesMut::freeze))
    }

    /// Reads the start of an error's body; whatever goes wrong, that is all there is.
    pub(crate) async fn excerpt(mut self) -> Bytes {
        let mut all = BytesMut::new();
        while let Ok(Some(chunk)) = self.chunk().await {
            let room = MAX_ERROR.saturating_sub(all.len());
            all.extend_from_slice(chunk.get(..room.min(chunk.len())).unwrap_or_default());
            if all.len() >= MAX_ERROR {
                break;
            }
        }
        all.freeze()
    }
}
