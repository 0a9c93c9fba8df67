//! Manifests: resolve a tag, read one by tag or digest.
//!
//! Bytes are capped before they are kept and hashed before they are returned; a digest in a header is a claim to compare
//! with, never a replacement for hashing.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{Descriptor, Digest, FetchContext, FetchError, FetchErrorKind, media_type};

use crate::error::CallError;
use crate::repository::Repository;
use crate::stack::body::BodyError;
use crate::stack::{Call, Journey, Reply};
use crate::status::Operation;

/// What the content's digest is called in an answer.
const CONTENT_DIGEST: &str = "docker-content-digest";

impl Repository {
    /// Returns the descriptor of `object`, a tag or a digest: media type, digest and size.
    ///
    /// Asks by HEAD; where that is refused or says too little, the manifest is read and hashed.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::NotFound`] when there is no such tag or manifest.
    pub async fn resolve(&self, object: &str, ctx: &FetchContext) -> Result<Descriptor, FetchError> {
        let path = path(object)?;
        let call = accepting(Call::read(Operation::Resolve, Method::HEAD, path));
        match self.session.call(&call, &mut Journey::default(), ctx).await {
            Ok(reply) => match from_head(&reply.headers) {
                Some(found) if object.parse::<Digest>().is_ok_and(|asked| asked != found.digest) => {
                    Err(self.other_digest(object, &found.digest))
                }
                Some(found) => Ok(found),
                None => Ok(self.read(object, ctx).await?.0),
            },
            Err(error) if error.unsupported => Ok(self.read(object, ctx).await?.0),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the bytes of the manifest or index `digest`, verified, at most 4 MiB.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::Integrity`] when the registry sends something else.
    pub async fn manifest(&self, digest: &Digest, ctx: &FetchContext) -> Result<Bytes, FetchError> {
        Ok(self.read(&digest.to_string(), ctx).await?.1)
    }

    /// Returns what `tag` points to, and its bytes, at most 4 MiB.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::NotFound`] when there is no such tag.
    pub async fn manifest_by_tag(
        &self,
        tag: &str,
        ctx: &FetchContext,
    ) -> Result<(Descriptor, Bytes), FetchError> {
        self.read(tag, ctx).await
    }

    pub(crate) async fn read(
        &self,
        object: &str,
        ctx: &FetchContext,
    ) -> Result<(Descriptor, Bytes), FetchError> {
        Ok(self.try_read(object, ctx).await?)
    }

    pub(crate) async fn try_read(
        &self,
        object: &str,
        ctx: &FetchContext,
    ) -> Result<(Descriptor, Bytes), CallError> {
        let call = accepting(Call::read(Operation::Manifest, Method::GET, path(object)?));
        let reply = self.session.call(&call, &mut Journey::default(), ctx).await?;
        let media_type = content_type(&reply.headers).unwrap_or_default();
        let claimed = claimed_digest(&reply.headers);
        let bytes = self.collect(reply, MAX_MANIFEST_SIZE, object).await?;
        let asked = object.parse::<Digest>().ok();
        let digest = match asked.or(claimed) {
            Some(expected) if !expected.verifies(&bytes) => {
                return Err(self.other_digest(object, &Digest::of(&bytes)).into());
            }
            Some(expected) => expected,
            None => Digest::of(&bytes),
        };
        Ok((Descriptor::new(media_type, digest, bytes.len() as u64), bytes))
    }

    /// Reads a whole body of at most `max` bytes.
    pub(crate) async fn collect(&self, reply: Reply, max: u64, what: &str) -> Result<Bytes, FetchError> {
        let host = reply.host.name();
        reply.body.collect(max).await.map_err(|error| match error {
            BodyError::TooLarge(max) => FetchError::new(
                FetchErrorKind::Protocol,
                format!("{host}: {what} of {} is larger than the limit of {max} bytes", self.image().name()),
            ),
            BodyError::Failed(failure) => FetchError::new(
                FetchErrorKind::Unavailable,
                format!("{host}: reading {what} of {}: {failure}", self.image().name()),
            ),
        })
    }

    fn other_digest(&self, asked: &str, found: &Digest) -> FetchError {
        FetchError::new(
            FetchErrorKind::Integrity,
            format!(
                "{asked} of {} was asked for and {found} was sent; a proxy or mirror in between serves other content",
                self.image().name()
            ),
        )
    }
}

impl From<FetchError> for CallError {
    fn from(error: FetchError) -> Self {
        Self { error, unsupported: false, status: None, code: None }
    }
}

/// Returns the path of a manifest. A tag or digest has no character that would change the address.
pub(crate) fn path(object: &str) -> Result<String, FetchError> {
    let tag = !object.is_empty()
        && object.len() <= 128
        && !object.starts_with(['.', '-'])
        && object.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    if !tag && object.parse::<Digest>().is_err() {
        let shown: String = object.chars().take(140).collect();
        return Err(FetchError::new(
            FetchErrorKind::Local,
            format!("{shown:?} is neither a tag nor a digest"),
        ));
    }
    Ok(format!("manifests/{object}"))
}

/// Adds the media types of manifests and indexes.
pub(crate) fn accepting(mut call: Call) -> Call {
    let types = [
        media_type::OCI_INDEX,
        media_type::DOCKER_INDEX,
        media_type::OCI_MANIFEST,
        media_type::DOCKER_MANIFEST,
        "*/*;q=0.1",
    ];
    if let Ok(value) = HeaderValue::try_from(types.join(", ")) {
        call.headers.insert(ACCEPT, value);
    }
    call
}

/// Returns the media type without parameters.
pub(crate) fn content_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or(value).trim().to_owned())
}

fn claimed_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

fn from_head(headers: &HeaderMap) -> Option<Descriptor> {
    let size: u64 = headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()?;
    let media_type = content_type(headers)?;
    let known = media_type::is_manifest(&media_type) || media_type::is_index(&media_type);
    // A size of 0 is what some registries answer to HEAD instead of leaving the header out.
    (known && size > 0).then_some(())?;
    Some(Descriptor::new(media_type, claimed_digest(headers)?, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_and_digests_become_paths() {
        assert_eq!(path("latest").unwrap(), "manifests/latest");
        let digest = Digest::of(b"").to_string();
        assert_eq!(path(&digest).unwrap(), format!("manifests/{digest}"));
        for object in ["", "..", "../x", "a/b", "a?b", "a b", "sha256:00", &"x".repeat(129)] {
            assert!(path(object).is_err(), "{object}");
        }
    }

    #[test]
    fn a_head_is_enough_when_it_says_everything() {
        let mut headers = HeaderMap::new();
        assert_eq!(from_head(&headers), None);
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("7"));
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/vnd.oci.image.index.v1+json; charset=x"),
        );
        assert_eq!(from_head(&headers), None);
        let digest = Digest::of(b"");
        headers.insert(CONTENT_DIGEST, HeaderValue::try_from(digest.to_string()).unwrap());
        assert_eq!(from_head(&headers), Some(Descriptor::new(media_type::OCI_INDEX, digest, 7)));
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        assert_eq!(from_head(&headers), None);
    }
}
