//! The stream of an open watch, and the ways in which it ends before its time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::Stream;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Asked, Moved, Shared, status_object};
use crate::http::Line;

/// How open watches break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WatchBreak {
    /// They end, cleanly.
    #[default]
    Close,
    /// They send an `ERROR` event with this code and end.
    Error(u16),
    /// They end within a line.
    Cut,
    /// The connection is reset within a line.
    Reset,
    /// They stay open and send nothing any more, not even their end.
    Stall,
}

struct Open {
    shared: Arc<Shared>,
    asked: Asked,
    line: Line,
    ends: Instant,
    moved: watch::Receiver<Moved>,
    /// How often watches were broken when this one was opened.
    breaks: u64,
    seen: u64,
    /// What is left is nothing, or an error.
    ended: Option<WatchBreak>,
}

/// Sends what happened after the version asked for, line by line, until `ends`.
pub(super) fn events(
    shared: Arc<Shared>,
    asked: Asked,
    line: Line,
    ends: Instant,
) -> impl Stream<Item = io::Result<Bytes>> {
    let moved = shared.moved.subscribe();
    let breaks = moved.borrow().breaks;
    let seen = asked.version;
    let open = Open { shared, asked, line, ends, moved, breaks, seen, ended: None };
    futures::stream::unfold(open, Open::next)
}

impl Open {
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        if let Some(how) = self.ended {
            return self.end(how).await;
        }
        loop {
            let Moved { version, breaks, how } = *self.moved.borrow_and_update();
            let lines = self.shared.lines_after(self.seen, &self.asked);
            if breaks != self.breaks {
                self.ended = Some(how);
                return match self.last_words(how, &lines) {
                    Some(text) => Some((Ok(Bytes::from(text)), self)),
                    None => self.end(how).await,
                };
            }
            self.seen = self.seen.max(version);
            if !lines.is_empty() {
                return Some((Ok(Bytes::from(lines)), self));
            }
            match tokio::time::timeout_at(self.ends, self.moved.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return None,
            }
        }
    }

    fn last_words(&self, how: WatchBreak, due: &str) -> Option<String> {
        match how {
            WatchBreak::Close | WatchBreak::Stall => None,
            WatchBreak::Error(code) => {
                Some(format!("{}\n", json!({ "type": "ERROR", "object": status_object(code, None) })))
            }
            WatchBreak::Cut | WatchBreak::Reset => {
                let line = due.lines().next().unwrap_or(r#"{"type":"ADDED","object":{"kind":"Secret"}}"#);
                Some(line.get(..line.len() / 2).unwrap_or_default().to_owned())
            }
        }
    }

    async fn end(self, how: WatchBreak) -> Option<(io::Result<Bytes>, Self)> {
        match how {
            WatchBreak::Close | WatchBreak::Error(_) | WatchBreak::Cut => None,
            WatchBreak::Reset => {
                // The half of a line shall arrive: an error discards what is not written yet.
                self.line.settle().await;
                self.line.reset.store(true, Ordering::Relaxed);
                Some((Err(io::Error::other("this watch is reset")), self))
            }
            WatchBreak::Stall => std::future::pending().await,
        }
    }
}
