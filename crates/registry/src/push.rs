//! Pushing: blobs in one request or in pieces, mounted where the registry already has them, manifests, and the list of
//! referrers where the registry does not keep it itself.
//!
//! An upload belongs to one host from its first request to its last. The addresses it is continued at come from that host:
//! on its own origin they are authorised, elsewhere they are not, and http is never taken for https.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{CONTENT_RANGE, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, Method};
use serde::Deserialize;
use soci_auth::{Access, Origin, Scheme};
use soci_oci::{BlobSource, Descriptor, Digest, FetchContext, FetchError, FetchErrorKind, Hasher};
use soci_oci::{Index, media_type};
use url::Url;

use crate::hosts::Host;
use crate::manifest::path;
use crate::referrers::tag;
use crate::repository::Repository;
use crate::stack::{Call, Journey, Reply};
use crate::status::Operation;

/// Times an upload is begun anew after its session was lost.
const MAX_STARTS: u32 = 3;
/// A registry may ask for larger pieces than ours, up to this, in bytes.
const MAX_CHUNK: u64 = 512 << 20;

/// What became of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It was sent.
    Uploaded,
    /// The registry took it from another repository.
    Mounted,
    /// It was there.
    Existed,
}

/// What became of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestPushed {
    /// Whether the registry said that it lists the manifest under its subject. Where it did not, and the manifest has a
    /// subject, the list under the subject's tag was updated.
    pub subject_processed: bool,
}

/// An upload under way.
struct Upload {
    host: Arc<Host>,
    origin: Origin,
    url: Url,
    /// The smallest piece the registry takes, but for the last one.
    chunk_min: u64,
    journey: Journey,
}

/// What starting an upload gave.
enum Started {
    Mounted,
    Upload(Box<Upload>),
}

/// What a piece gave.
enum Sent {
    /// The upload has this many bytes.
    Have(u64),
    /// The session is gone.
    Lost(FetchError),
}

impl Repository {
    /// Makes the registry have the blob: looks for it, mounts it from the repository `mount_from` of the same registry, or
    /// sends it. Bytes are hashed on the way, so that content which is not what the descriptor names is never finished.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::Integrity`] when `source` does not give what `descriptor` names.
    pub async fn push_blob(
        &self,
        descriptor: &Descriptor,
        source: &dyn BlobSource,
        mount_from: Option<&str>,
        ctx: &FetchContext,
    ) -> Result<Pushed, FetchError> {
        if self.has_blob(&descriptor.digest, ctx).await? {
            return Ok(Pushed::Existed);
        }
        let mut mount = mount_from.filter(|&from| from != self.image().repository());
        let mut lost = None;
        for _ in 0..MAX_STARTS {
            let mut upload = match self.start(descriptor, mount, ctx).await {
                Ok(Started::Mounted) => return Ok(Pushed::Mounted),
                Ok(Started::Upload(upload)) => upload,
                // No right to read the other repository, or none of that name: no reason not to write this one.
                Err(error) if mount.is_some() && refuses(error.kind()) => {
                    mount = None;
                    tracing::debug!(%error, "a blob cannot be mounted, it is uploaded");
                    match self.start(descriptor, None, ctx).await? {
                        Started::Mounted => return Ok(Pushed::Mounted),
                        Started::Upload(upload) => upload,
                    }
                }
                Err(error) => return Err(error),
            };
            match self.send(&mut upload, descriptor, source, ctx).await? {
                None => return Ok(Pushed::Uploaded),
                Some(error) => {
                    // The answer to the last request may have been lost after it took effect.
                    if self.has_blob(&descriptor.digest, ctx).await? {
                        return Ok(Pushed::Uploaded);
                    }
                    lost = Some(error);
                }
            }
        }
        Err(lost.unwrap_or_else(|| {
            FetchError::new(
                FetchErrorKind::Unavailable,
                format!("uploading {}: no session lasts", descriptor.digest),
            )
        }))
    }

    async fn start(
        &self,
        descriptor: &Descriptor,
        mount: Option<&str>,
        ctx: &FetchContext,
    ) -> Result<Started, FetchError> {
        let mut call = Call::read(Operation::UploadStart, Method::POST, "blobs/uploads/".to_owned());
        call.body = Some(Bytes::new());
        call.access = match mount {
            Some(from) => {
                call.query.push(("mount", descriptor.digest.to_string()));
                call.query.push(("from", from.to_owned()));
                Access::PushMount { from: from.to_owned() }
            }
            None => Access::Push,
        };
        let mut journey = Journey::default();
        let reply = self.session.call(&call, &mut journey, ctx).await?;
        if mount.is_some() && reply.status.as_u16() == 201 {
            return Ok(Started::Mounted);
        }
        let chunk_min = header(&reply.headers, "oci-chunk-min-length")
            .and_then(|value| value.parse().ok())
            .unwrap_or(0)
            .min(MAX_CHUNK);
        let url = continued(&reply).ok_or_else(|| self.no_location(&reply))?;
        let (host, origin) = (reply.host, reply.origin);
        Ok(Started::Upload(Box::new(Upload { host, origin, url, chunk_min, journey })))
    }

    /// Sends a blob in one piece or several; returns the error when the session was lost on the way.
    async fn send(
        &self,
        upload: &mut Upload,
        descriptor: &Descriptor,
        source: &dyn BlobSource,
        ctx: &FetchContext,
    ) -> Result<Option<FetchError>, FetchError> {
        let size = descriptor.size;
        let chunk = self.session.inner.settings.push_chunk.max(upload.chunk_min);
        let mut hashed = Hashed { hasher: descriptor.digest.hasher(), to: 0 };
        if size <= chunk {
            let bytes = gather(source, 0, size, &mut hashed, ctx).await?;
            self.check(descriptor, hashed)?;
            return self.finish(upload, descriptor, Some(bytes), ctx).await;
        }
        let mut have = 0;
        let mut stuck = 0;
        while have < size {
            let end = size.min(have.saturating_add(chunk));
            let bytes = gather(source, have, end, &mut hashed, ctx).await?;
            match self.piece(upload, have, bytes, ctx).await? {
                Sent::Have(now) if now > size => {
                    return Err(self.breach(upload, &format!("says it has {now} bytes of a blob of {size}")));
                }
                Sent::Have(now) => {
                    stuck = if now > have { 0 } else { stuck + 1 };
                    if stuck > self.session.inner.settings.http.retries.max {
                        return Err(self.breach(upload, "takes no more bytes of an upload"));
                    }
                    have = now;
                }
                Sent::Lost(error) => return Ok(Some(error)),
            }
        }
        self.check(descriptor, hashed)?;
        self.finish(upload, descriptor, None, ctx).await
    }

    /// Sends the bytes from `start` on.
    async fn piece(
        &self,
        upload: &mut Upload,
        start: u64,
        bytes: Bytes,
        ctx: &FetchContext,
    ) -> Result<Sent, FetchError> {
        let end = start + bytes.len() as u64;
        let mut call = Call::read(Operation::UploadChunk, Method::PATCH, String::new());
        call.access = Access::Push;
        call.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if let Ok(range) = HeaderValue::try_from(format!("{start}-{}", end.saturating_sub(1))) {
            call.headers.insert(CONTENT_RANGE, range);
        }
        call.body = Some(bytes);
        let url = upload.url.clone();
        let sent = self.session.at(&upload.host, &upload.origin, url, &call, &mut upload.journey, ctx).await;
        match sent {
            Ok(reply) => {
                let have = received(&reply.headers).unwrap_or(end);
                upload.url = continued(&reply).ok_or_else(|| self.no_location(&reply))?;
                Ok(Sent::Have(have))
            }
            // Offsets do not fit: a repeated request whose first answer was lost. Its state tells where to go on.
            Err(error) if error.unsupported => self.state(upload, ctx).await,
            Err(error) if error.status == Some(404) => Ok(Sent::Lost(error.into())),
            Err(error) => Err(error.into()),
        }
    }

    async fn state(&self, upload: &mut Upload, ctx: &FetchContext) -> Result<Sent, FetchError> {
        let mut call = Call::read(Operation::UploadStatus, Method::GET, String::new());
        call.access = Access::Push;
        let url = upload.url.clone();
        match self.session.at(&upload.host, &upload.origin, url, &call, &mut upload.journey, ctx).await {
            Ok(reply) => {
                let have = received(&reply.headers).unwrap_or(0);
                if let Some(url) = continued(&reply) {
                    upload.url = url;
                }
                Ok(Sent::Have(have))
            }
            Err(error) if error.error.kind() == FetchErrorKind::NotFound => Ok(Sent::Lost(error.into())),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends an upload, with all bytes or none; returns the error when the session was lost.
    async fn finish(
        &self,
        upload: &mut Upload,
        descriptor: &Descriptor,
        bytes: Option<Bytes>,
        ctx: &FetchContext,
    ) -> Result<Option<FetchError>, FetchError> {
        let mut call = Call::read(Operation::UploadFinish, Method::PUT, String::new());
        call.access = Access::Push;
        call.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        call.body = Some(bytes.unwrap_or_default());
        let mut url = upload.url.clone();
        url.query_pairs_mut().append_pair("digest", &descriptor.digest.to_string());
        match self.session.at(&upload.host, &upload.origin, url, &call, &mut upload.journey, ctx).await {
            Ok(_) => Ok(None),
            Err(error) if error.error.kind() == FetchErrorKind::NotFound => Ok(Some(error.into())),
            // A repeated last piece appends to what is there already; the registry then sees another digest.
            Err(error) if error.code.as_deref() == Some("DIGEST_INVALID") => Ok(Some(error.into())),
            Err(error) => Err(error.into()),
        }
    }

    fn check(&self, descriptor: &Descriptor, hashed: Hashed) -> Result<(), FetchError> {
        let found = hashed.hasher.finish();
        if found == descriptor.digest {
            return Ok(());
        }
        Err(FetchError::new(
            FetchErrorKind::Integrity,
            format!(
                "the local content of {} is {found}, it is not pushed; build the index again",
                descriptor.digest
            ),
        ))
    }

    fn no_location(&self, reply: &Reply) -> FetchError {
        FetchError::new(
            FetchErrorKind::Protocol,
            format!(
                "{}: answered {} to an upload to {} without a Location that can be used",
                reply.origin,
                reply.status,
                self.image().name()
            ),
        )
    }

    fn breach(&self, upload: &Upload, what: &str) -> FetchError {
        let message = format!("{}: {what} ({})", upload.origin, self.image().name());
        FetchError::new(FetchErrorKind::Protocol, message)
    }

    /// Pushes a manifest or index under `object`, a tag or its own digest. Where the manifest has a subject and the
    /// registry does not say that it lists it, the list under the subject's tag is updated too.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::Denied`] without the right to push.
    pub async fn push_manifest(
        &self,
        object: &str,
        media_type: &str,
        bytes: Bytes,
        ctx: &FetchContext,
    ) -> Result<ManifestPushed, FetchError> {
        let headers = self.put(object, media_type, bytes.clone(), ctx).await?;
        let listed: Option<Digest> = header(&headers, "oci-subject").and_then(|value| value.parse().ok());
        let Ok(Referring { subject: Some(subject), config, artifact_type, annotations }) =
            serde_json::from_slice::<Referring>(&bytes)
        else {
            return Ok(ManifestPushed { subject_processed: listed.is_some() });
        };
        if listed == Some(subject.digest) {
            return Ok(ManifestPushed { subject_processed: true });
        }
        let mut entry = Descriptor::of(media_type, &bytes);
        entry.artifact_type = artifact_type.or(config.map(|config| config.media_type));
        entry.annotations = annotations.unwrap_or_default();
        self.list_by_tag(&subject.digest, entry, ctx).await?;
        Ok(ManifestPushed { subject_processed: false })
    }

    async fn put(
        &self,
        object: &str,
        media_type: &str,
        bytes: Bytes,
        ctx: &FetchContext,
    ) -> Result<HeaderMap, FetchError> {
        let mut call = Call::read(Operation::ManifestPut, Method::PUT, path(object)?);
        call.access = Access::Push;
        call.body = Some(bytes);
        let value = HeaderValue::try_from(media_type).map_err(|_| {
            FetchError::new(FetchErrorKind::Local, format!("{media_type:?} is not a media type"))
        })?;
        call.headers.insert(CONTENT_TYPE, value);
        Ok(self.session.call(&call, &mut Journey::default(), ctx).await?.headers)
    }

    /// Adds `entry` to the index under the subject's tag. Two tools that do this at once may lose one entry, which the
    /// protocol cannot prevent; what this process does is one after another.
    async fn list_by_tag(
        &self,
        subject: &Digest,
        entry: Descriptor,
        ctx: &FetchContext,
    ) -> Result<(), FetchError> {
        let _turn = self.session.inner.referrers_tag.lock().await;
        let tag = tag(subject);
        let old = self.by_tag(subject, ctx).await?;
        let (replaced, old) = old.map_or((None, None), |(digest, index)| (Some(digest), Some(index)));
        let mut index = old.unwrap_or_else(|| Index {
            schema_version: 2,
            media_type: media_type::OCI_INDEX.to_owned(),
            artifact_type: None,
            manifests: Vec::new(),
            subject: None,
            annotations: Default::default(),
        });
        if index.manifests.iter().any(|known| known.digest == entry.digest) {
            return Ok(());
        }
        index.manifests.push(entry);
        let bytes = Bytes::from(index.encode());
        self.put(&tag, media_type::OCI_INDEX, bytes, ctx).await?;
        if let Some(replaced) = replaced
            && let Err(error) = self.delete_manifest(&replaced, ctx).await
        {
            // Many registries keep untagged manifests or forbid deletion; the list itself is right.
            tracing::debug!(%error, "the replaced list of referrers was not deleted");
        }
        Ok(())
    }

    /// Deletes a manifest by digest.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::NotFound`] when it is not there.
    pub async fn delete_manifest(&self, digest: &Digest, ctx: &FetchContext) -> Result<(), FetchError> {
        let mut call = Call::read(Operation::Delete, Method::DELETE, format!("manifests/{digest}"));
        call.access = Access::Push;
        self.session.call(&call, &mut Journey::default(), ctx).await?;
        Ok(())
    }
}

/// What of a manifest decides about the list of referrers.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Referring {
    subject: Option<Descriptor>,
    config: Option<Descriptor>,
    artifact_type: Option<String>,
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// A digest over the bytes up to `to`; bytes that are read twice are hashed once.
struct Hashed {
    hasher: Hasher,
    to: u64,
}

/// Reads the bytes `start..end` of the source.
async fn gather(
    source: &dyn BlobSource,
    start: u64,
    end: u64,
    hashed: &mut Hashed,
    ctx: &FetchContext,
) -> Result<Bytes, FetchError> {
    let len = usize::try_from(end - start).map_err(|_| {
        FetchError::new(FetchErrorKind::Local, format!("{} bytes do not fit into memory", end - start))
    })?;
    let mut stream = source.open(start..end, ctx).await?;
    let mut bytes = BytesMut::with_capacity(len);
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    if bytes.len() != len {
        let message = format!("the local content ends after {} of {len} bytes", bytes.len());
        return Err(FetchError::new(FetchErrorKind::Integrity, message));
    }
    let known = hashed.to.saturating_sub(start).min(len as u64);
    let fresh = usize::try_from(known).ok().and_then(|known| bytes.get(known..)).unwrap_or_default();
    hashed.hasher.update(fresh);
    hashed.to = hashed.to.max(end);
    Ok(bytes.freeze())
}

/// Whether a registry that answers so does not do what it was asked for, as against: cannot be asked.
fn refuses(kind: FetchErrorKind) -> bool {
    matches!(kind, FetchErrorKind::Denied | FetchErrorKind::NotFound | FetchErrorKind::Protocol)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Returns how many bytes an upload has, from `Range: 0-<last>`.
fn received(headers: &HeaderMap) -> Option<u64> {
    let (first, last) = header(headers, "range")?.trim_start_matches("bytes=").split_once('-')?;
    let last: u64 = last.parse().ok()?;
    // `0-0` is written for one byte and for none; nothing of a piece is lost by taking it for none.
    (first == "0").then(|| if last == 0 { 0 } else { last.saturating_add(1) })
}

/// Returns where an upload goes on. On the registry's own host plain http is taken for the https it was reached by: a
/// registry behind a proxy often does not know its own scheme.
fn continued(reply: &Reply) -> Option<Url> {
    let url = reply.url.join(reply.headers.get(LOCATION)?.to_str().ok()?).ok()?;
    on_https(url, &reply.origin)
}

fn on_https(mut url: Url, origin: &Origin) -> Option<Url> {
    let target = Origin::of_url(&url)?;
    if origin.scheme() == Scheme::Https && target.scheme() == Scheme::Http {
        if target.host() != origin.host() {
            return None;
        }
        let port = if target.port() == 80 { origin.port() } else { target.port() };
        url.set_scheme("https").ok()?;
        url.set_port(Some(port)).ok()?;
    }
    Some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t116_an_upload_never_goes_on_by_plain_http() {
        let origin = |url: &str| Origin::of_url(&url.parse().unwrap()).unwrap();
        let table = [
            ("https://r.example", "http://r.example/up?x=1", Some("https://r.example/up?x=1")),
            ("https://r.example:5000", "http://r.example:5000/up", Some("https://r.example:5000/up")),
            ("https://r.example:5000", "http://r.example/up", Some("https://r.example:5000/up")),
            ("https://r.example", "http://other.example/up", None),
            ("https://r.example", "https://other.example/up", Some("https://other.example/up")),
            ("http://localhost:5000", "http://localhost:5000/up", Some("http://localhost:5000/up")),
        ];
        for (host, url, expected) in table {
            let found = on_https(url.parse().unwrap(), &origin(host)).map(String::from);
            assert_eq!(found.as_deref(), expected, "{host} {url}");
        }
    }

    #[test]
    fn an_uploads_range_says_how_much_is_there() {
        let range = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("range", HeaderValue::from_static(text));
            received(&headers)
        };
        assert_eq!(range("0-9"), Some(10));
        assert_eq!(range("bytes=0-9"), Some(10));
        assert_eq!(range("0-0"), Some(0));
        assert_eq!(range("5-9"), None);
        assert_eq!(range("0-"), None);
        assert_eq!(received(&HeaderMap::new()), None);
    }
}
