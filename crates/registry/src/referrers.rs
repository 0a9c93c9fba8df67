//! Referrers: what refers to a manifest, by the API with its pages, or by the tag schema where there is none.
//!
//! The answer is hostile until checked: pages, entries and bytes are bounded, pages stay on the host that was asked, and
//! the filter is applied here again whatever the registry says it did.

use http::Method;
use soci_oci::manifest::MAX_MANIFEST_SIZE;
use soci_oci::{Descriptor, Digest, FetchContext, FetchError, FetchErrorKind, Index, media_type};
use url::Url;

use crate::error::CallError;
use crate::link;
use crate::manifest::{accepting, content_type};
use crate::repository::Repository;
use crate::stack::{Call, Journey, Reply};
use crate::status::Operation;

/// Pages that are read of one list.
const MAX_PAGES: usize = 64;
/// Entries that are kept of one list.
const MAX_REFERRERS: usize = 10_000;

impl Repository {
    /// Returns the descriptors of manifests that refer to `subject` and are of `artifact_type`, in the registry's order;
    /// empty when there are none.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchErrorKind::NotFound`] when the repository itself is not there.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
        ctx: &FetchContext,
    ) -> Result<Vec<Descriptor>, FetchError> {
        match self.by_api(subject, artifact_type, ctx).await {
            Ok(found) => Ok(found),
            Err(error) if error.unsupported && error.code.as_deref() != Some("NAME_UNKNOWN") => {
                let index = self.by_tag(subject, ctx).await?;
                Ok(of_type(index.map(|(_, index)| index.manifests).unwrap_or_default(), artifact_type))
            }
            Err(error) if error.code.as_deref() == Some("NAME_UNKNOWN") => {
                Err(FetchError::new(FetchErrorKind::NotFound, error.error.to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn by_api(
        &self,
        subject: &Digest,
        artifact_type: &str,
        ctx: &FetchContext,
    ) -> Result<Vec<Descriptor>, CallError> {
        let mut call =
            accepting(Call::read(Operation::Referrers, Method::GET, format!("referrers/{subject}")));
        call.query.push(("artifactType", artifact_type.to_owned()));
        let mut journey = Journey::default();
        let first = self.session.call(&call, &mut journey, ctx).await?;
        let mirror = first.host.is_mirror();
        let found = self.pages(first, artifact_type, &call, &mut journey, ctx).await?;
        if !found.is_empty() || !mirror {
            return Ok(found);
        }
        // Mirrors serve what was read through them; that nothing refers to an image only its registry can say.
        call.past_mirrors = true;
        let first = self.session.call(&call, &mut journey, ctx).await?;
        self.pages(first, artifact_type, &call, &mut journey, ctx).await
    }

    /// Reads a list from its first page on.
    async fn pages(
        &self,
        first: Reply,
        artifact_type: &str,
        call: &Call,
        journey: &mut Journey,
        ctx: &FetchContext,
    ) -> Result<Vec<Descriptor>, CallError> {
        let mut reply = first;
        let mut found = Vec::new();
        for _ in 0..MAX_PAGES {
            let next = next_page(&reply);
            let page = self.page(&reply.host.name(), content_type(&reply.headers));
            let at = (reply.host.clone(), reply.origin.clone());
            let bytes = self.collect(reply, MAX_MANIFEST_SIZE, "a page of referrers").await?;
            page?;
            let page = Index::decode(&bytes).map_err(|error| {
                FetchError::because(
                    FetchErrorKind::Protocol,
                    format!("{}: malformed list of referrers of {}", at.0.name(), self.image().name()),
                    error,
                )
            })?;
            found.extend(of_type(page.manifests, artifact_type));
            if found.len() > MAX_REFERRERS {
                found.truncate(MAX_REFERRERS);
                return Ok(found);
            }
            let Some(url) = next else { return Ok(found) };
            reply = self.session.at(&at.0, &at.1, url, call, journey, ctx).await?;
        }
        Ok(found)
    }

    /// Whether an answer is a list of referrers at all: some registries answer any path with a page for people.
    fn page(&self, host: &str, media_type: Option<String>) -> Result<(), CallError> {
        match media_type.as_deref() {
            Some(media_type::OCI_INDEX) => Ok(()),
            other => Err(CallError {
                unsupported: true,
                ..CallError::new(
                    FetchErrorKind::Protocol,
                    format!(
                        "{host}: the list of referrers of {} has the media type {other:?}",
                        self.image().name()
                    ),
                )
            }),
        }
    }

    /// Returns the index under the subject's tag and its digest, nothing when there is none.
    pub(crate) async fn by_tag(
        &self,
        subject: &Digest,
        ctx: &FetchContext,
    ) -> Result<Option<(Digest, Index)>, FetchError> {
        let (found, bytes) = match self.read(&tag(subject), ctx).await {
            Ok(found) => found,
            Err(error) if error.kind() == FetchErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let index = Index::decode(&bytes).map_err(|error| {
            FetchError::because(
                FetchErrorKind::Protocol,
                format!("the tag {} of {} is not a list of referrers", tag(subject), self.image().name()),
                error,
            )
        })?;
        Ok(Some((found.digest, index)))
    }
}

/// Returns the tag under which referrers are listed where there is no API: `sha256-<hex>`.
pub(crate) fn tag(subject: &Digest) -> String {
    let mut tag = format!("{}-{}", subject.algorithm(), subject.hex());
    // A tag has at most 128 characters; the specification cuts algorithm at 32 and hex at 64.
    tag.truncate(subject.algorithm().len() + 1 + 64);
    tag
}

fn of_type(mut manifests: Vec<Descriptor>, artifact_type: &str) -> Vec<Descriptor> {
    manifests.retain(|manifest| manifest.artifact_type.as_deref() == Some(artifact_type));
    manifests
}

/// Returns the address of the next page, if there is one on the same host.
fn next_page(reply: &Reply) -> Option<Url> {
    let url = reply.url.join(&link::next(&reply.headers)?).ok()?;
    (url.origin() == reply.url.origin()).then_some(url)
}

/// Body of the fuzz target `referrers`: any answer is a list or an error.
#[doc(hidden)]
pub fn fuzz_referrers(bytes: &[u8]) {
    if let Ok(page) = Index::decode(bytes) {
        for found in of_type(page.manifests, media_type::SOCI_INDEX_V1) {
            assert_eq!(found.artifact_type.as_deref(), Some(media_type::SOCI_INDEX_V1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_schema_names_algorithm_and_hex() {
        let digest = Digest::of(b"x");
        assert_eq!(tag(&digest), format!("sha256-{}", digest.hex()));
        let long: Digest = format!("sha512:{}", "a".repeat(128)).parse().unwrap();
        assert_eq!(tag(&long), format!("sha512-{}", "a".repeat(64)));
    }
}
