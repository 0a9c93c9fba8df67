//! Fault scripts: what a server does wrong, to which requests, how often; and the log of what was asked.
//!
//! A [`Fault`] pairs a [`Matcher`] with an [`Action`]. Faults are tried in the order they were set; the first whose
//! matcher fits and that has turns left is used. [`Fault::skip`] lets the first requests pass unharmed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ::http::{HeaderMap, Method};
use bytes::Bytes;
use parking_lot::Mutex;

/// Which of the servers of a test registry a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// The registry itself.
    Registry,
    /// The storage that blobs are redirected to.
    Storage,
    /// The token server.
    Token,
}

/// A request as matchers see it.
#[derive(Debug, Clone)]
pub struct RequestInfo {
    /// The server it came to.
    pub listener: Listener,
    /// Its method.
    pub method: Method,
    /// Its path, without the query.
    pub path: String,
    /// Its query, empty when there is none.
    pub query: String,
    /// First and last byte asked for by `Range`, if there is one; the last is absent in `bytes=5-`.
    pub range: Option<(u64, Option<u64>)>,
    /// All its headers.
    pub headers: HeaderMap,
}

/// Decides which requests a fault hits.
#[derive(Clone)]
pub struct Matcher(Arc<dyn Fn(&RequestInfo) -> bool + Send + Sync>);

/// What goes wrong.
#[derive(Debug, Clone)]
pub enum Action {
    /// Answers this instead.
    Status {
        /// The status code.
        status: u16,
        /// Header names and values.
        headers: Vec<(String, String)>,
        /// The body.
        body: Bytes,
    },
    /// Waits before it answers as usual.
    Delay(Duration),
    /// Sends this many bytes of the body, then closes the connection though more was announced.
    ShortBody(u64),
    /// Announces and sends the range that starts this many bytes later.
    WrongRange(u64),
    /// Answers `200` with the whole content.
    IgnoreRange,
    /// Sends this many bytes of the body, then resets the connection (RST).
    Reset(u64),
    /// Sends this many bytes of the body, then nothing more; the connection stays open.
    Stall(u64),
    /// Flips the bits of the byte at this offset of the content, where the answer contains it.
    Corrupt(u64),
    /// Redirects (307) to this address; `{self}` stands for the request's own address.
    Redirect(String),
    /// Answers as usual, but with these headers set too.
    Headers(Vec<(String, String)>),
    /// Closes the connection before anything is done.
    Hangup,
    /// Does what was asked for, then closes the connection instead of answering.
    LoseAnswer,
}

/// A fault, its aim and its turns.
#[derive(Clone)]
pub struct Fault {
    matcher: Matcher,
    action: Action,
    skip: u64,
    times: Option<u64>,
}

/// A request that was answered, or is being answered.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The request.
    pub request: RequestInfo,
    /// Who asked, as far as the credential says; nothing for a request without one.
    pub user: Option<String>,
    /// The form or JSON body of a token request, empty elsewhere.
    pub body: Bytes,
    /// The status answered, 0 when the connection was closed instead.
    pub status: u16,
    /// Bytes of body handed to the connection so far.
    pub bytes: u64,
}

impl Seen {
    /// Returns the value of a request header, if it is there and is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.request.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

impl Matcher {
    /// Hits requests for which `test` says so.
    pub fn new(test: impl Fn(&RequestInfo) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(test))
    }

    /// Hits everything.
    pub fn any() -> Self {
        Self::new(|_| true)
    }

    /// Hits requests to `listener`.
    pub fn on(listener: Listener) -> Self {
        Self::new(move |request| request.listener == listener)
    }

    /// Hits requests with this method.
    pub fn method(method: Method) -> Self {
        Self::new(move |request| request.method == method)
    }

    /// Hits requests to the registry whose path contains `text`.
    pub fn path(text: impl Into<String>) -> Self {
        let text = text.into();
        Self::new(move |request| request.listener == Listener::Registry && request.path.contains(&text))
    }

    /// Hits blob downloads, at the registry or the storage.
    pub fn blobs() -> Self {
        Self::new(|request| {
            request.method == Method::GET
                && (request.listener == Listener::Storage || request.path.contains("/blobs/sha"))
        })
    }

    /// Hits what this and `other` both hit.
    #[must_use]
    pub fn and(self, other: Matcher) -> Self {
        Self::new(move |request| self.hits(request) && other.hits(request))
    }

    /// Whether `request` is hit.
    pub fn hits(&self, request: &RequestInfo) -> bool {
        (self.0)(request)
    }
}

impl Action {
    /// Answers `status` with no headers and no body.
    pub fn status(status: u16) -> Self {
        Self::Status { status, headers: Vec::new(), body: Bytes::new() }
    }

    /// Answers `status` with a `Retry-After` header.
    pub fn retry_after(status: u16, value: impl Into<String>) -> Self {
        Self::Status { status, headers: vec![("retry-after".into(), value.into())], body: Bytes::new() }
    }

    /// Redirects a request to itself, for ever.
    pub fn redirect_loop() -> Self {
        Self::Redirect("{self}".into())
    }
}

impl Fault {
    /// Makes `action` happen to whatever `matcher` hits, every time.
    pub fn new(matcher: Matcher, action: Action) -> Self {
        Self { matcher, action, skip: 0, times: None }
    }

    /// Ends after `times` hits.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }

    /// Lets the first `count` requests pass.
    #[must_use]
    pub fn skip(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }
}

/// The faults in force and the log, shared by the servers of one test registry.
#[derive(Debug, Default)]
pub(crate) struct Script {
    faults: Mutex<Vec<Fault>>,
    log: Mutex<Vec<Entry>>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    seen: Seen,
    bytes: Arc<AtomicU64>,
}

impl Script {
    pub(crate) fn add(&self, fault: Fault) {
        self.faults.lock().push(fault);
    }

    pub(crate) fn clear(&self) {
        self.faults.lock().clear();
    }

    /// Returns the actions for `request` and uses up one turn of each: at most one of every kind.
    pub(crate) fn actions(&self, request: &RequestInfo) -> Vec<Action> {
        let mut actions: Vec<Action> = Vec::new();
        for fault in self.faults.lock().iter_mut() {
            if !fault.matcher.hits(request) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            let taken = actions
                .iter()
                .any(|action| std::mem::discriminant(action) == std::mem::discriminant(&fault.action));
            match &mut fault.times {
                _ if taken => {}
                Some(0) => {}
                Some(times) => {
                    *times -= 1;
                    actions.push(fault.action.clone());
                }
                None => actions.push(fault.action.clone()),
            }
        }
        actions
    }

    pub(crate) fn record(&self, seen: Seen, bytes: Arc<AtomicU64>) {
        self.log.lock().push(Entry { seen, bytes });
    }

    pub(crate) fn log(&self) -> Vec<Seen> {
        let entries = self.log.lock();
        entries
            .iter()
            .map(|entry| Seen { bytes: entry.bytes.load(Ordering::Relaxed), ..entry.seen.clone() })
            .collect()
    }

    pub(crate) fn clear_log(&self) {
        self.log.lock().clear();
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Matcher")
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fault")
            .field("action", &self.action)
            .field("times", &self.times)
            .finish_non_exhaustive()
    }
}
