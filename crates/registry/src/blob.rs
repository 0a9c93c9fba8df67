//! Blobs: ranged reads that go on where a connection broke.
//!
//! Registries redirect blobs to storage by addresses that are good for minutes. The address is remembered and asked
//! directly, so that a cold read of a layer costs the registry one request, not one per range. When storage refuses it,
//! the registry is asked for another one, once, and the read goes on with what is still missing: bytes that were handed on
//! are never asked for again. What arrives is passed on as it came from the connection, without a copy; whether it is
//! *right* only its digest can say, which is the reader's part.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{ACCEPT_ENCODING, RANGE, REFERER};
use http::{HeaderMap, HeaderValue, Method};
use parking_lot::Mutex;
use soci_auth::{Origin, policy};
use soci_oci::{BlobSource, BlobStream, Descriptor, Digest, FetchContext, FetchError, FetchErrorKind};
use url::Url;

use crate::location::Location;
use crate::range;
use crate::repository::Repository;
use crate::stack::auth::{self, Refused};
use crate::stack::redirect::{self, Hop};
use crate::stack::retry::Backoff;
use crate::stack::{Body, Call, Expect, Journey, Session, until};
use crate::status::{Operation, Place, Verdict, verdict};
use crate::transport::{Failure, Route, TlsIdentity};

/// Redirects of an address that a descriptor names.
const MAX_FOREIGN_HOPS: usize = 10;

/// A blob in a registry, with the place it was last served from.
#[derive(Debug)]
pub(crate) struct RemoteBlob(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    session: Session,
    digest: Digest,
    size: u64,
    /// Addresses the descriptor names, asked without credentials.
    urls: Vec<String>,
    location: Mutex<Option<Arc<Location>>>,
}

impl RemoteBlob {
    pub(crate) fn new(session: Session, digest: Digest, size: u64, urls: Vec<String>) -> Self {
        Self(Arc::new(Shared { session, digest, size, urls, location: Mutex::new(None) }))
    }

    /// Makes the next read ask the registry where the blob is.
    fn forget_location(&self) {
        *self.0.location.lock() = None;
    }
}

#[async_trait]
impl BlobSource for RemoteBlob {
    async fn open(&self, range: Range<u64>, context: &FetchContext) -> Result<BlobStream, FetchError> {
        let shared = &self.0;
        if range.start > range.end || range.end > shared.size {
            return Err(FetchError::new(
                FetchErrorKind::Local,
                format!("bytes {range:?} of {} are outside of its {} bytes", shared.digest, shared.size),
            ));
        }
        if range.is_empty() {
            return Ok(Box::pin(futures::stream::empty()));
        }
        let blob = &shared.session.inner.settings.blob;
        let deadline = until(blob.fetching_timeout, context.deadline);
        let context = FetchContext { deadline, ..context.clone() };
        let mut reader = Reader {
            backoff: Backoff::new(&blob.retries),
            blob: Arc::clone(shared),
            at: range.start,
            end: range.end,
            body: None,
            journey: Journey::default(),
            context,
        };
        reader.connect().await?;
        Ok(Box::pin(futures::stream::unfold(Some(reader), |reader| async move {
            let mut reader = reader?;
            match reader.next().await {
                Ok(None) => None,
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
                Err(error) => Some((Err(error), None)),
            }
        })))
    }
}

/// One ranged read.
struct Reader {
    blob: Arc<Shared>,
    /// The next byte wanted; everything before it was handed on.
    at: u64,
    end: u64,
    body: Option<Body>,
    context: FetchContext,
    journey: Journey,
    backoff: Backoff,
}

/// What a remembered address gave.
enum Direct {
    Body(Body),
    /// It is not good any more.
    Refused,
    /// Something else: the registry may know better.
    Trouble(String),
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        loop {
            if self.at == self.end {
                return Ok(None);
            }
            let Some(body) = &mut self.body else {
                self.connect().await?;
                continue;
            };
            let failure = match body.chunk().await {
                Ok(Some(chunk)) if chunk.is_empty() => continue,
                Ok(Some(chunk)) => {
                    let left = self.end - self.at;
                    if chunk.len() as u64 > left {
                        return Err(self.error(
                            FetchErrorKind::Protocol,
                            "the body is longer than the range that was asked for",
                        ));
                    }
                    self.at += chunk.len() as u64;
                    self.blob.session.inner.meters.received(chunk.len());
                    self.backoff.reset();
                    if self.at == self.end {
                        self.body = None;
                    }
                    return Ok(Some(chunk));
                }
                Ok(None) => "the body ended early".to_owned(),
                Err(failure) => failure.to_string(),
            };
            self.body = None;
            self.pause(&failure).await?;
        }
    }

    /// Waits before the read goes on after a broken body.
    async fn pause(&mut self, failure: &str) -> Result<(), FetchError> {
        let first = self.backoff.attempts() == 1;
        let wait = match self.backoff.next(None) {
            Some(wait) if wait < self.context.remaining() => wait,
            Some(_) => {
                let why = format!("{failure}, and no time is left to go on");
                return Err(self.error(FetchErrorKind::Unavailable, &why));
            }
            None => {
                let why = format!("{failure}, {} times without a byte in between", self.backoff.attempts());
                return Err(self.error(FetchErrorKind::Unavailable, &why));
            }
        };
        if first {
            // What came before went well: this is another stretch of the way, with its own refusals and faults.
            self.journey = Journey::default();
            self.context.patient_since = Some(Instant::now());
        } else {
            *self.blob.location.lock() = None;
        }
        let session = &self.blob.session;
        let inner = &session.inner;
        inner.meters.retried(Operation::Blob);
        tracing::debug!(blob = %self.blob.digest, at = self.at, failure, "resuming a broken read");
        tokio::time::sleep(wait.max(inner.pace.take(session.image.registry())).min(self.context.remaining()))
            .await;
        Ok(())
    }

    /// Opens the part that is still missing.
    async fn connect(&mut self) -> Result<(), FetchError> {
        let blob = Arc::clone(&self.blob);
        let wanted = self.at..self.end;
        let known = blob.location.lock().clone().filter(|location| location.is_fresh());
        if let Some(location) = known {
            match self.direct(&location, &wanted).await {
                Direct::Body(body) => {
                    self.body = Some(body);
                    return Ok(());
                }
                Direct::Refused => {
                    // The registry is asked for one fresh address; when that is refused too, it is over.
                    self.journey.relocated = true;
                    blob.session.inner.meters.location_lost();
                    blob.forget(&location);
                }
                Direct::Trouble(why) => {
                    tracing::debug!(blob = %blob.digest, why, "the registry is asked where the blob is");
                    blob.forget(&location);
                }
            }
        }
        let mut call = Call::read(Operation::Blob, Method::GET, format!("blobs/{}", blob.digest));
        call.blob = Some(blob.digest);
        call.headers = ranged(&wanted);
        call.expect = Expect::Range(wanted.clone(), blob.size);
        let reply = match blob.session.call(&call, &mut self.journey, &self.context).await {
            Ok(reply) => reply,
            Err(error) if error.error.kind() == FetchErrorKind::NotFound && !blob.urls.is_empty() => {
                self.body = Some(self.foreign(&wanted, error.into()).await?);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        if reply.place == Place::Target
            && let Some(location) = Location::new(reply.url.clone(), &reply.asked, Arc::clone(&reply.host))
        {
            blob.session.inner.meters.located();
            *blob.location.lock() = Some(Arc::new(location));
        }
        self.body = Some(reply.body);
        Ok(())
    }

    /// Asks a remembered address, without a credential.
    async fn direct(&self, location: &Location, wanted: &Range<u64>) -> Direct {
        let session = &self.blob.session;
        let mut headers = ranged(wanted);
        if let Some(referer) = &location.referer {
            headers.insert(REFERER, referer.clone());
        }
        let hop = Hop {
            operation: Operation::Blob,
            blob: Some(self.blob.digest),
            method: Method::GET,
            url: location.url.clone(),
            origin: location.origin.clone(),
            headers,
            body: &None,
            route: Route {
                identity: Arc::new(session.inner.hosts.trust_at(&location.host, &location.origin).await),
                dial_timeout: location.host.dial_timeout,
                guard: None,
            },
            deadline: session.exchange_deadline(&location.host, &self.context),
        };
        let answer = match auth::send(session, &location.host, &hop, None, &self.context).await {
            Ok(answer) => answer,
            Err(refused) => return Direct::Trouble(why(refused)),
        };
        match verdict(Operation::Blob, answer.status.as_u16(), Place::Target) {
            Verdict::Done => match range::check(answer.status, &answer.headers, wanted, self.blob.size) {
                Ok(()) => Direct::Body(answer.body),
                Err(fault) => Direct::Trouble(fault.to_string()),
            },
            Verdict::Relocate => Direct::Refused,
            Verdict::NextHost(_) | Verdict::Later | Verdict::Unsupported | Verdict::Final(_) => {
                Direct::Trouble(format!("{}", answer.status))
            }
        }
    }

    /// Asks the addresses of the descriptor. A credential is never sent there, and no address of this machine is asked on
    /// behalf of a manifest from elsewhere.
    async fn foreign(&self, wanted: &Range<u64>, missing: FetchError) -> Result<Body, FetchError> {
        let mut said = missing.to_string();
        for text in &self.blob.urls {
            let Ok(url) = Url::parse(text) else { continue };
            let Some(origin) = Origin::of_url(&url) else { continue };
            match self.foreign_at(url, wanted).await {
                Ok(body) => return Ok(body),
                Err(why) => said.push_str(&format!("; {origin} (named by the manifest): {why}")),
            }
        }
        Err(FetchError::new(missing.kind(), said))
    }

    async fn foreign_at(&self, mut url: Url, wanted: &Range<u64>) -> Result<Body, String> {
        let session = &self.blob.session;
        let registry = Origin::of_registry(soci_auth::Scheme::Https, session.image.registry());
        let hosts =
            session.inner.hosts.of(session.image.registry()).await.map_err(|error| error.to_string())?;
        let host = hosts.last().ok_or("no host")?;
        for _ in 0..MAX_FOREIGN_HOPS {
            let origin = Origin::of_url(&url).ok_or("neither http nor https")?;
            if let Some(address) = origin.address() {
                policy::check_address(&registry, address).map_err(|error| error.to_string())?;
            }
            let hop = Hop {
                operation: Operation::Blob,
                blob: Some(self.blob.digest),
                method: Method::GET,
                url: url.clone(),
                origin: origin.clone(),
                headers: ranged(wanted),
                body: &None,
                route: Route {
                    identity: Arc::new(TlsIdentity::default()),
                    dial_timeout: None,
                    guard: Some(registry.clone()),
                },
                deadline: self.context.deadline,
            };
            let answer = auth::send(session, host, &hop, None, &self.context).await.map_err(why)?;
            if answer.status.is_redirection()
                && let Some(location) = answer.headers.get(http::header::LOCATION)
            {
                let next =
                    location.to_str().ok().and_then(|to| url.join(to).ok()).ok_or("redirected nowhere")?;
                redirect::allowed(Operation::Blob, &origin, &next).map_err(|failure| failure.to_string())?;
                url = next;
                continue;
            }
            if !answer.status.is_success() {
                return Err(crate::error::status_text(answer.status.as_u16()));
            }
            return match range::check(answer.status, &answer.headers, wanted, self.blob.size) {
                Ok(()) => Ok(answer.body),
                Err(fault) => Err(fault.to_string()),
            };
        }
        Err(format!("redirected more than {MAX_FOREIGN_HOPS} times"))
    }

    fn error(&self, kind: FetchErrorKind, why: &str) -> FetchError {
        FetchError::new(
            kind,
            format!(
                "reading bytes {}..{} of blob {} of {}: {why}",
                self.at,
                self.end,
                self.blob.digest,
                self.blob.session.image.name()
            ),
        )
    }
}

impl Shared {
    /// Drops `location` unless another reader has replaced it already.
    fn forget(&self, location: &Arc<Location>) {
        let mut known = self.location.lock();
        if known.as_ref().is_some_and(|known| Arc::ptr_eq(known, location)) {
            *known = None;
        }
    }
}

fn why(refused: Refused) -> String {
    match refused {
        Refused::Failed(failure) => Failure::to_string(&failure),
        Refused::Auth { message, .. } => message,
    }
}

fn ranged(wanted: &Range<u64>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(RANGE, range::header(wanted));
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers
}

impl Repository {
    /// Returns a whole blob, verified; for small ones, which `max` bounds.
    ///
    /// A blob that arrives wrong is read once more from a fresh location.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::Protocol`] when it is larger than `max`, [`FetchErrorKind::Integrity`] when it is
    /// not what its digest names.
    pub async fn blob_bytes(
        &self,
        descriptor: &Descriptor,
        max: u64,
        ctx: &FetchContext,
    ) -> Result<Bytes, FetchError> {
        let name = || format!("blob {} of {}", descriptor.digest, self.image().name());
        let too_large = || {
            let message = format!("{} has {} bytes, more than the limit of {max}", name(), descriptor.size);
            FetchError::new(FetchErrorKind::Protocol, message)
        };
        if descriptor.size > max {
            return Err(too_large());
        }
        let size = usize::try_from(descriptor.size).map_err(|_| too_large())?;
        let urls = descriptor.urls.clone();
        let blob = RemoteBlob::new(self.session.clone(), descriptor.digest, descriptor.size, urls);
        for _ in 0..2 {
            let mut stream = blob.open(0..descriptor.size, ctx).await?;
            let mut whole = BytesMut::with_capacity(size);
            while let Some(chunk) = stream.next().await {
                whole.extend_from_slice(&chunk?);
            }
            let whole = whole.freeze();
            if descriptor.digest.verifies(&whole) {
                return Ok(whole);
            }
            tracing::warn!(blob = %descriptor.digest, "a blob arrived with another digest, it is read once more");
            blob.forget_location();
        }
        Err(FetchError::new(
            FetchErrorKind::Integrity,
            format!(
                "{} is not what its digest names; a proxy, mirror or the registry's storage is damaged",
                name()
            ),
        ))
    }

    /// Whether the registry has a blob; the host that pushes go to is asked.
    ///
    /// # Errors
    /// [`FetchError`] when that cannot be told.
    pub async fn has_blob(&self, digest: &Digest, ctx: &FetchContext) -> Result<bool, FetchError> {
        self.exists(format!("blobs/{digest}"), ctx).await
    }

    /// Whether the registry has a manifest; the host that pushes go to is asked.
    ///
    /// # Errors
    /// [`FetchError`] when that cannot be told.
    pub async fn has_manifest(&self, digest: &Digest, ctx: &FetchContext) -> Result<bool, FetchError> {
        self.exists(format!("manifests/{digest}"), ctx).await
    }

    async fn exists(&self, path: String, ctx: &FetchContext) -> Result<bool, FetchError> {
        let call = crate::manifest::accepting(Call::read(Operation::Exists, Method::HEAD, path));
        match self.session.call(&call, &mut Journey::default(), ctx).await {
            Ok(_) => Ok(true),
            Err(error) if error.error.kind() == FetchErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
