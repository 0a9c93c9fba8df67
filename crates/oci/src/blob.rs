//! How bytes of a blob are asked for and arrive, wherever they come from.
//!
//! The registry client and the local stores implement [`BlobSource`]; the layer reader, the index and the unpacker
//! consume it. A stream yields exactly the range that was asked for, in order, or ends with an error: a consumer never
//! has to count bytes to notice a short body, and nothing here says the bytes are *right*. Digests do.

use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use event_listener::Event;
use futures::Stream;

/// Bytes of a blob in order: exactly the range asked for, or an error as the last item.
pub type BlobStream = Pin<Box<dyn Stream<Item = Result<Bytes, FetchError>> + Send>>;

/// Some content of which ranges can be read.
#[async_trait]
pub trait BlobSource: Send + Sync + fmt::Debug {
    /// Opens the half-open `range` of the blob. An empty range yields an empty stream.
    ///
    /// # Errors
    /// [`FetchError`] when the first byte cannot be had; later trouble is the stream's last item.
    async fn open(&self, range: Range<u64>, context: &FetchContext) -> Result<BlobStream, FetchError>;
}

/// What a fetch may cost and who waits for it.
#[derive(Debug, Clone)]
pub struct FetchContext {
    /// When the result is of no use any more. Every wait below it ends by then.
    pub deadline: Instant,
    /// How urgent it is; shared, so that a reader who joins a background fetch raises it.
    pub priority: Priority,
    /// Since when the time counts for which it may wait for better credentials. It counts for all that are asked, together:
    /// sources, hosts, tries. With `None` whoever is refused says so at once.
    pub patient_since: Option<Instant>,
}

impl FetchContext {
    /// Returns a context for `class` that begins now and ends at `deadline`.
    pub fn new(deadline: Instant, class: FetchClass) -> Self {
        Self { deadline, priority: Priority::new(class), patient_since: Some(Instant::now()) }
    }

    /// Returns the same fetch for one of several that may be asked: it does not wait for better credentials there.
    #[must_use]
    pub fn impatient(&self) -> Self {
        Self { patient_since: None, ..self.clone() }
    }

    /// Returns the time that is left, zero when the deadline has passed.
    pub fn remaining(&self) -> std::time::Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// Why something is fetched, most urgent last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FetchClass {
    /// To complete a layer when nothing else is to do.
    Background = 0,
    /// Listed by a prefetch artifact.
    Prefetch = 1,
    /// Ahead of a sequential reader.
    ReadAhead = 2,
    /// A reader, a mount or a command waits for it.
    OnDemand = 3,
}

/// The class of a fetch, which only ever rises. Clones are one.
#[derive(Debug, Clone)]
pub struct Priority(Arc<Class>);

#[derive(Debug)]
struct Class {
    present: AtomicU8,
    risen: Event,
}

impl Priority {
    /// Returns a priority that starts at `class`.
    pub fn new(class: FetchClass) -> Self {
        Self(Arc::new(Class { present: AtomicU8::new(class as u8), risen: Event::new() }))
    }

    /// Raises the priority to `class` unless it is higher already.
    pub fn raise(&self, class: FetchClass) {
        if self.0.present.fetch_max(class as u8, Ordering::SeqCst) < class as u8 {
            self.0.risen.notify(usize::MAX);
        }
    }

    /// Returns the present class.
    pub fn class(&self) -> FetchClass {
        match self.0.present.load(Ordering::SeqCst) {
            0 => FetchClass::Background,
            1 => FetchClass::Prefetch,
            2 => FetchClass::ReadAhead,
            _ => FetchClass::OnDemand,
        }
    }

    /// Waits until the priority is `class` or higher.
    pub async fn reaches(&self, class: FetchClass) {
        while self.class() < class {
            let risen = self.0.risen.listen();
            // It may have risen before it was listened for.
            if self.class() < class {
                risen.await;
            }
        }
    }
}

/// What a caller can do about a failed fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FetchErrorKind {
    /// The content is not there.
    NotFound,
    /// Every credential candidate was refused, or there was none and one is needed.
    Denied,
    /// The deadline passed, the network or the other side failed: later may help.
    Unavailable,
    /// The other side answered what the protocol does not allow.
    Protocol,
    /// The bytes are not those that were asked for.
    Integrity,
    /// This machine failed: disk, memory, permissions.
    Local,
}

/// A fetch that failed. Cheap to clone, since all who wait for one fetch get its error.
///
/// The message names host, repository and what to do next; it never holds a secret or a query string.
#[derive(Clone)]
pub struct FetchError(Arc<Inner>);

struct Inner {
    kind: FetchErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl FetchError {
    /// Returns an error of `kind` that says `message`.
    pub fn new(kind: FetchErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: None }))
    }

    /// Returns an error of `kind` that says what was being done, because of `source`.
    pub fn because(
        kind: FetchErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: Some(source.into()) }))
    }

    /// Returns what can be done about it.
    pub fn kind(&self) -> FetchErrorKind {
        self.0.kind
    }
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.0.message)
    }
}

impl std::error::Error for FetchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn priority_only_rises() {
        let priority = Priority::new(FetchClass::Background);
        priority.clone().raise(FetchClass::OnDemand);
        priority.raise(FetchClass::Prefetch);
        assert_eq!(priority.class(), FetchClass::OnDemand);
    }

    #[test]
    fn who_waits_for_a_class_hears_of_it_and_of_a_higher_one() {
        let priority = Priority::new(FetchClass::Prefetch);
        assert!(priority.reaches(FetchClass::Prefetch).now_or_never().is_some());
        let mut waiting = Box::pin(priority.reaches(FetchClass::ReadAhead));
        priority.raise(FetchClass::Background);
        assert!(waiting.as_mut().now_or_never().is_none());
        priority.raise(FetchClass::OnDemand);
        assert!(waiting.now_or_never().is_some());
    }
}
