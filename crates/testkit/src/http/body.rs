//! Bodies of answers: a piece of some content, paced and broken as the fault script says.
//!
//! Content in memory is handed on without a copy. Content in a file is read ahead by a blocking task in pieces of 1 MiB,
//! so that a layer of any size is served at the speed of the page cache with two pieces in memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Counter, Line};

/// How much of a file is read at a time.
const CHUNK: u64 = 1 << 20;
/// How much is sent at a time when the bandwidth is limited: small enough to be smooth.
const PACED_CHUNK: u64 = 64 << 10;

/// Some stored content.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Memory(Bytes),
    File(Arc<File>, u64),
}

impl Content {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(_, len) => *len,
        }
    }

    /// Reads all of it; for manifests.
    pub(crate) fn read(&self) -> io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone()),
            Self::File(file, len) => read_at(file, 0..*len),
        }
    }
}

fn read_at(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
    let mut buffer = vec![0; len];
    file.read_exact_at(&mut buffer, range.start)?;
    Ok(Bytes::from(buffer))
}

/// A part of some content: what a body sends.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) content: Content,
    pub(crate) range: Range<u64>,
}

impl Piece {
    pub(crate) fn empty() -> Self {
        Self::all(Content::Memory(Bytes::new()))
    }

    pub(crate) fn all(content: Content) -> Self {
        let range = 0..content.len();
        Self { content, range }
    }

    pub(crate) fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }
}

/// How a body ends before its time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Break {
    Close(u64),
    Reset(u64),
    Stall(u64),
}

/// What is done to a body on its way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Treatment {
    pub(crate) breaks: Option<Break>,
    pub(crate) corrupt: Option<u64>,
    /// The narrow link that it goes through.
    pub(crate) link: Option<Arc<Link>>,
}

/// How far in the past the link may have become free, for the next bytes to be let in as if they had come then. A timer
/// fires up to two milliseconds late; without this each piece that waited for the one before would pay for that, and a
/// lone body would get less than half of the bandwidth.
const LATE: Duration = Duration::from_millis(3);

/// A link of limited bandwidth, shared by all bodies that are sent at a time.
#[derive(Debug)]
pub(crate) struct Link {
    /// Bytes per second.
    rate: u64,
    /// When the bytes that were let in are through.
    free_at: Mutex<Instant>,
}

impl Link {
    pub(crate) fn new(rate: u64) -> Self {
        Self { rate: rate.max(1), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` are through.
    async fn pass(&self, bytes: usize) {
        let through = {
            let mut free_at = self.free_at.lock();
            let time = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            let now = Instant::now();
            *free_at = (*free_at).max(now.checked_sub(LATE).unwrap_or(now)) + time;
            *free_at
        };
        tokio::time::sleep_until(through).await;
    }
}

/// The body type of every answer.
pub(crate) struct ReplyBody {
    chunks: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>,
    /// `None` for a stream without known end.
    remaining: Option<u64>,
}

impl ReplyBody {
    /// Returns a body that sends `piece` as `treatment` says and counts what it sent.
    pub(crate) fn new(piece: Piece, treatment: Treatment, line: Line, counter: Counter) -> Self {
        let remaining = piece.len();
        let start = piece.range.start;
        let source = source(piece, treatment.link.is_some());
        let state = State { source, treatment, line, counter, at: start, start };
        Self { chunks: Box::pin(futures::stream::unfold(state, State::next)), remaining: Some(remaining) }
    }

    pub(crate) fn empty() -> Self {
        Self { chunks: Box::pin(futures::stream::empty()), remaining: Some(0) }
    }

    /// Returns a body that sends `chunks` as they come, chunked, until they end.
    pub(crate) fn stream(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Self {
        Self { chunks: Box::pin(chunks), remaining: None }
    }
}

struct State {
    source: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>,
    treatment: Treatment,
    line: Line,
    counter: Counter,
    start: u64,
    at: u64,
}

impl State {
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        use futures::StreamExt;
        let sent = self.at - self.start;
        let allowed = match self.treatment.breaks {
            Some(Break::Close(limit) | Break::Reset(limit) | Break::Stall(limit)) => {
                limit.saturating_sub(sent)
            }
            None => u64::MAX,
        };
        if allowed == 0 {
            // The bytes before the break shall arrive: an error here discards what is not written yet.
            self.line.settle().await;
            match self.treatment.breaks {
                Some(Break::Stall(_)) => futures::future::pending::<()>().await,
                Some(Break::Reset(_)) => self.line.reset.store(true, Ordering::Relaxed),
                _ => {}
            }
            return Some((Err(io::Error::other("the fault script ends this body")), self));
        }
        let mut chunk = match self.source.next().await? {
            Ok(chunk) => chunk,
            Err(error) => return Some((Err(error), self)),
        };
        if chunk.len() as u64 > allowed {
            chunk.truncate(usize::try_from(allowed).unwrap_or(usize::MAX));
            self.source = Box::pin(futures::stream::pending());
        }
        let end = self.at + chunk.len() as u64;
        if let Some(offset) = self.treatment.corrupt
            && (self.at..end).contains(&offset)
        {
            let mut bytes = chunk.to_vec();
            if let Some(byte) = usize::try_from(offset - self.at).ok().and_then(|at| bytes.get_mut(at)) {
                *byte = !*byte;
            }
            chunk = Bytes::from(bytes);
        }
        if let Some(link) = &self.treatment.link {
            link.pass(chunk.len()).await;
        }
        self.at = end;
        self.counter.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        Some((Ok(chunk), self))
    }
}

fn source(piece: Piece, paced: bool) -> Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>> {
    let size = if paced { PACED_CHUNK } else { CHUNK };
    match piece.content {
        Content::Memory(bytes) => {
            let clamp = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
            let mut rest = bytes.slice(clamp(piece.range.start)..clamp(piece.range.end));
            let step = if paced { usize::try_from(size).unwrap_or(usize::MAX) } else { rest.len() };
            Box::pin(futures::stream::iter(std::iter::from_fn(move || {
                (!rest.is_empty()).then(|| Ok(rest.split_to(step.min(rest.len()))))
            })))
        }
        Content::File(file, _) => {
            let (sender, receiver) = mpsc::channel(2);
            tokio::task::spawn_blocking(move || {
                let mut at = piece.range.start;
                while at < piece.range.end {
                    let end = piece.range.end.min(at + size);
                    let chunk = read_at(&file, at..end);
                    let failed = chunk.is_err();
                    if sender.blocking_send(chunk).is_err() || failed {
                        return;
                    }
                    at = end;
                }
            });
            Box::pin(futures::stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|chunk| (chunk, receiver))
            }))
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.chunks.as_mut().poll_next(cx).map(|item| {
            item.map(|chunk| {
                chunk.map(|chunk| {
                    self.remaining = self.remaining.map(|left| left.saturating_sub(chunk.len() as u64));
                    Frame::data(chunk)
                })
            })
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    fn is_end_stream(&self) -> bool {
        self.remaining == Some(0)
    }
}

impl std::fmt::Debug for ReplyBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplyBody").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_lone_body_gets_the_whole_link_and_two_share_it() {
        let link = Link::new(100_000_000);
        let body = async || {
            for _ in 0..1000 {
                link.pass(50_000).await;
            }
        };
        let began = Instant::now();
        body().await;
        let alone = began.elapsed().as_millis();
        assert!((490..=510).contains(&alone), "50 MB took {alone} ms");
        let began = Instant::now();
        tokio::join!(body(), body());
        let both = began.elapsed().as_millis();
        assert!((985..=1015).contains(&both), "twice 50 MB took {both} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_link_saves_nothing_up() {
        let link = Link::new(1_000_000);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let began = Instant::now();
        link.pass(100_000).await;
        let took = began.elapsed().as_millis();
        assert!((97..=102).contains(&took), "100 kB took {took} ms");
    }
}
