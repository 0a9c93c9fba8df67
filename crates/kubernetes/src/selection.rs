//! One selection of secrets, followed for as long as the connection lasts: listed in pages, then watched from there.
//!
//! kube's watcher would do it with less code here. It is not used because it bounds neither a list nor the opening of a
//! watch, says nothing when a watch goes on without a change, and goes on from its old version when what it had found was
//! dropped meanwhile.
//!
//! What must hold: whenever a watch is open at some version, the store has what the server had at that version. So the
//! version is forgotten, and everything listed anew, when the server has forgotten it (410), when secrets were dropped,
//! and when an answer could not be understood.

use std::collections::HashSet;
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use kube::Client;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use rand::Rng;
use tokio::time::timeout;
use zeroize::Zeroizing;

use crate::back_off::BackOff;
use crate::failure::{Failure, Remedy};
use crate::object::{Page, PullSecret};
use crate::secret::SecretType;
use crate::settings::Timing;
use crate::store::SecretId;
use crate::synced::Synced;

/// How many secrets a page of a list has, as kubectl asks for them.
const PAGE: u32 = 500;
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
    pub(crate) async fn follow(self) {
        let mut back_off = BackOff::new(self.timing);
        // What the store is equal to; nothing while it is to be listed.
        let mut version = None;
        loop {
            let begun = Instant::now();
            let ended = self.list_and_watch(&mut version).await;
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
                        version = None;
                    }
                    longest = self.timing.denied;
                }
                Remedy::ListAnew => {
                    // That the server forgets a version is usual; that a list fails, or makes no sense, is not.
                    if version.take().is_none() || !matches!(failure, Failure::Status(_)) {
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
    async fn list_and_watch(&self, version: &mut Option<String>) -> Result<(), Failure> {
        if version.is_none() {
            *version = Some(self.list().await?);
        }
        match version {
            Some(version) => self.watch(version).await,
            None => Ok(()),
        }
    }

    async fn list(&self) -> Result<String, Failure> {
        let mut params =
            ListParams { field_selector: self.selection.field(), limit: Some(PAGE), ..ListParams::default() };
        let mut seen: HashSet<SecretId> = HashSet::new();
        loop {
            let request = self.selection.request().list(&params)?;
            let text = self.answered("list", self.client.request_text(request)).await?;
            let page: Page = serde_json::from_str(&Zeroizing::new(text)).map_err(Failure::unreadable)?;
            seen.extend(
                page.items.into_iter().filter_map(|object| self.synced.apply(object, &self.selection)),
            );
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
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

    async fn watch(&self, version: &mut String) -> Result<(), Failure> {
        let (shortest, longest) = self.timing.watch;
        let seconds = rand::rng().random_range(shortest.as_secs()..=longest.as_secs());
        let params = WatchParams {
            field_selector: self.selection.field(),
            timeout: Some(u32::try_from(seconds).unwrap_or(u32::MAX)),
            ..WatchParams::default()
        };
        let silence = Duration::from_secs(seconds) + self.timing.silence;
        let request = self.selection.request().watch(&params, version)?;
        let events = self.answered("watch", self.client.request_events::<PullSecret>(request)).await?;
        self.synced.well(&self.selection);
        let mut events = pin!(events);
        loop {
            let event = match timeout(silence, events.try_next()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(error)) => return Err(error.into()),
                Err(_) => {
                    tracing::debug!(server = self.server, ?silence, "a watch of pull secrets fell silent");
                    return Ok(());
                }
            };
            let newer = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    let newer = object.metadata.resource_version.clone();
                    self.synced.apply(object, &self.selection);
                    newer
                }
                WatchEvent::Deleted(object) => {
                    self.synced.delete(&object);
                    object.metadata.resource_version
                }
                WatchEvent::Bookmark(bookmark) => Some(bookmark.metadata.resource_version),
                WatchEvent::Error(status) => return Err(Failure::Status(status)),
            };
            *version = newer.filter(|version| !version.is_empty()).ok_or(Failure::NoVersion)?;
            self.synced.well(&self.selection);
        }
    }

    /// Waits for an answer of the server, which may take so long.
    async fn answered<T>(
        &self,
        verb: &'static str,
        answer: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Failure> {
        let limit = self.timing.answer;
        match timeout(limit, answer).await {
            Ok(answer) => answer.map_err(Failure::from),
            Err(_) => Err(Failure::NoAnswer { what: format!("{verb} {}", self.selection), limit }),
        }
    }
}
