//! A whole layer, uncompressed, in order: what unpacking consumes, wherever the bytes come from.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::Stream;

use crate::ReadError;

/// The bytes of a tar in order. An error is the last item.
pub struct TarStream(Pin<Box<dyn Stream<Item = Result<Bytes, ReadError>> + Send>>);

impl TarStream {
    /// Returns a tar whose bytes are those of `stream`.
    pub fn new(stream: impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl Stream for TarStream {
    type Item = Result<Bytes, ReadError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(context)
    }
}

impl fmt::Debug for TarStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TarStream")
    }
}
