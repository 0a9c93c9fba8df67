//! One selection of secrets, followed for as long as the connection lasts: listed in pages, then watched from there. The
//! next connection to the same server goes on where this one was.
//!
//! kube's watcher would do it with less code here. It is not used because it bounds neither a list nor an event nor the
//! opening of a watch, wipes nothing, says nothing when a watch goes on without a change, and goes on from its old version
//! when what it had found was dropped meanwhile.
//!
//! What must hold: whenever a watch is open at some version, the store has what the server had at that version. So the
//! version is forgotten, and everything listed anew, when the server has forgotten it (410), when secrets were dropped,
//! and when an answer could not be understood.

use std::collections::HashSet;
use std::error::Error;
use std::fmt;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::AsyncBufRead;
use kube::Client;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::{Request, Status};
use rand::Rng;
use soci_oci::causes;
use tokio::time::timeout;

use crate::answer;
use crate::back_off::BackOff;
use crate::failure::{Failure, Remedy};
use crate::object::{Page, PullSecret};
use crate::reading::{Buffer, Read};
use crate::secret::SecretType;
use crate::settings::Timing;
use crate::store::SecretId;
use crate::synced::Synced;

/// How many secrets a page of a list has, as kubectl asks for them.
const PAGE: u32 = 500;
/// The largest page that is read, in bytes; one that is larger is asked for again in smaller ones.
const MAX_PAGE: usize = 8 << 20;
/// The largest event that is read, in bytes. A secret holds 1 MiB, and that in base64; its annotations a quarter of that.
const MAX_EVENT: usize = 4 << 20;
/// A watch that ends earlier than this is not opened anew at once.
const SHORT: Duration = Duration::from_secs(1);
/// The longest wait that the server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// Secrets of one type, in one namespace or in all.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Selection {
    pub(crate) namespace: Option<Arc<str>>,
    pub(crate) kind: SecretType,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secrets of type {}", self.kind.name())?;
        match &self.namespace {
            Some(namespace) => write!(f, " in {namespace}"),
            None => f.write_str(" in all namespaces"),
        }
    }
}

impl Selection {
    fn request(&self) -> Request {
        Request::new(match &self.namespace {
            Some(namespace) => format!("/api/v1/namespaces/{namespace}/secrets"),
            None => "/api/v1/secrets".to_owned(),
        })
    }

    fn field(&self) -> Option<String> {
        Some(format!("type={}", self.kind.name()))
    }
}

/// What is known of one selection on one server.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// What the store is equal to; nothing while it is to be listed.
    version: Option<String>,
    /// Whether the server sends bookmarks, as all do that keep a cache of secrets: about one a minute. From one that does
    /// silence is soon known to be a lost connection, and a watch resumed at the last bookmark needs no list.
    marked: bool,
}

/// Follows one selection over one connection.
pub(crate) struct Follower<'a> {
    pub(crate) client: &'a Client,
    /// The API server, for messages.
    pub(crate) server: &'a str,
    pub(crate) synced: &'a Synced,
    pub(crate) timing: &'a Timing,
    pub(crate) selection: Selection,
}

impl Follower<'_> {
    /// Keeps the store equal to what the server has, until the server does not accept the connection any more.
    pub(crate) async fn follow(self, Known { version, marked }: &mut Known) {
        let mut back_off = BackOff::new(self.timing);
        loop {
            let begun = Instant::now();
            let ended = self.list_and_watch(version, marked).await;
            back_off.lasted(begun.elapsed());
            let Err(failure) = ended else {
                if begun.elapsed() < SHORT {
                    tokio::time::sleep(back_off.next()).await;
                }
                continue;
            };
            let (mut least, mut longest) = (Duration::ZERO, self.timing.back_off.1);
            match failure.remedy() {
                Remedy::ConnectAnew => {
                    self.synced.failed(&self.selection, self.server, &failure);
                    return;
                }
                Remedy::WaitForPermission => {
                    if self.synced.denied(&self.selection, self.server) {
                        *version = None;
                    }
                    longest = self.timing.denied;
                }
                Remedy::ListAnew => {
                    // That the server forgets a version is usual; that a list fails, or makes no sense, is not.
                    if version.take().is_none() || !matches!(failure, Failure::Status { .. }) {
                        self.synced.failed(&self.selection, self.server, &failure);
                    }
                }
                Remedy::TryAgain { after } => {
                    self.synced.failed(&self.selection, self.server, &failure);
                    least = after.min(LONGEST_WAIT);
                }
            }
            tokio::time::sleep(back_off.next_up_to(longest).max(least)).await;
        }
    }

    /// Lists where there is no version, and watches until the watch ends; `version` is always what the store has.
    async fn list_and_watch(&self, version: &mut Option<String>, marked: &mut bool) -> Result<(), Failure> {
        if version.is_none() {
            *version = Some(self.list().await?);
        }
        match version {
            Some(version) => self.watch(version, marked).await,
            None => Ok(()),
        }
    }

    async fn list(&self) -> Result<String, Failure> {
        let mut params =
            ListParams { field_selector: self.selection.field(), limit: Some(PAGE), ..ListParams::default() };
        let mut seen: HashSet<SecretId> = HashSet::new();
        let mut buffer = Buffer::new(MAX_PAGE);
        loop {
            let request = self.selection.request().list(&params)?;
            let page = async {
                let mut answer = pin!(answer::to(request, self.client).await?);
                Ok(buffer.read_all(&mut answer).await.map_err(kube::Error::ReadEvents)?)
            };
            if self.answered("list", page).await? == Read::TooLarge {
                match params.limit {
                    Some(more @ 2..) => params.limit = Some(more / 4 + 1),
                    _ => return Err(Failure::TooLarge { limit: MAX_PAGE }),
                }
                continue;
            }
            let page: Page = serde_json::from_slice(buffer.bytes()).map_err(Failure::unreadable)?;
            seen.extend(
                page.items.into_iter().filter_map(|object| self.synced.apply(object, &self.selection)),
            );
            params.continue_token = page.metadata.further.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                self.synced.listed(&self.selection, &seen);
                return page
                    .metadata
                    .resource_version
                    .filter(|version| !version.is_empty())
                    .ok_or(Failure::NoVersion);
            }
        }
    }

    async fn watch(&self, version: &mut String, marked: &mut bool) -> Result<(), Failure> {
        let (shortest, longest) = self.timing.watch;
        let seconds = rand::rng().random_range(shortest.as_secs()..=longest.as_secs());
        let params = WatchParams {
            field_selector: self.selection.field(),
            timeout: Some(u32::try_from(seconds).unwrap_or(u32::MAX)),
            ..WatchParams::default()
        };
        let ends = Duration::from_secs(seconds) + self.timing.silence;
        let request = self.selection.request().watch(&params, version)?;
        let events = self.answered("watch", answer::to(request, self.client)).await?;
        self.synced.well(&self.selection);
        let mut events = pin!(events);
        let mut buffer = Buffer::new(MAX_EVENT);
        loop {
            let silence = if *marked { ends.min(self.timing.quiet) } else { ends };
            let event = match timeout(silence, next_event(&mut events, &mut buffer)).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(failure)) => return Err(failure),
                Err(_) => return Err(Failure::Silent { what: self.selection.to_string(), limit: silence }),
            };
            let newer = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    let newer = object.metadata.resource_version.clone();
                    self.synced.apply(object, &self.selection);
                    newer
                }
                WatchEvent::Deleted(object) => {
                    self.synced.delete(&object, &self.selection);
                    object.metadata.resource_version
                }
                WatchEvent::Bookmark(bookmark) => {
                    *marked = true;
                    Some(bookmark.metadata.resource_version)
                }
                WatchEvent::Error(status) => return Err(Failure::Status { status, after: None }),
            };
            *version = newer.filter(|version| !version.is_empty()).ok_or(Failure::NoVersion)?;
            self.synced.well(&self.selection);
        }
    }

    /// Waits for an answer of the server, which may take so long.
    async fn answered<T>(
        &self,
        verb: &'static str,
        answer: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let limit = self.timing.answer;
        match timeout(limit, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::NoAnswer { what: format!("{verb} {}", self.selection), limit }),
        }
    }
}

/// Returns the next event of a watch; nothing when it has ended, also where it broke off.
async fn next_event(
    events: &mut (impl AsyncBufRead + Unpin),
    buffer: &mut Buffer,
) -> Result<Option<WatchEvent<PullSecret>>, Failure> {
    match buffer.read_line(events).await {
        Ok(Read::Whole | Read::Ended) => {}
        Ok(Read::TooLarge) => return Err(Failure::TooLarge { limit: MAX_EVENT }),
        Err(error) if is_end(&error) => return Ok(None),
        Err(error) => return Err(kube::Error::ReadEvents(error).into()),
    }
    let line = buffer.bytes();
    match serde_json::from_slice(line) {
        Ok(event) => Ok(Some(event)),
        // The last line may be half an event.
        Err(error) if error.is_eof() => Ok(None),
        Err(error) => match serde_json::from_slice::<Status>(line) {
            Ok(status) => Err(Failure::Status { status: Box::new(status), after: None }),
            Err(_) => Err(Failure::unreadable(error)),
        },
    }
}

/// Whether a connection ended where more should come, as one does that a proxy or a server closes with no regard.
fn is_end(error: &io::Error) -> bool {
    let kind = |cause: &(dyn Error + 'static)| cause.downcast_ref::<io::Error>().map(io::Error::kind);
    causes(error).any(|cause| kind(cause) == Some(io::ErrorKind::UnexpectedEof))
}
