//! What this crate asks of a registry's repository, to read from it and to write to it.

use std::collections::BTreeMap;
use std::fmt::Debug;

use async_trait::async_trait;
use bytes::Bytes;
use soci_oci::{BlobSource, Descriptor, Digest, FetchContext, FetchError, ImageRef};
use soci_registry::{Pushed, Repository};

/// Before a registry's host, the label by which containerd keeps of which repositories there some content came, separated
/// by commas.
const DISTRIBUTION_SOURCE: &str = "containerd.io/distribution.source";

/// A repository to read from. What it returns was verified against the digest asked for.
#[async_trait]
pub trait Remote: Send + Sync + Debug {
    /// Returns the manifest or index `digest`.
    ///
    /// # Errors
    /// When it cannot be had.
    async fn manifest(&self, digest: &Digest, context: &FetchContext) -> Result<Bytes, FetchError>;

    /// Returns the manifests of `artifact_type` that refer to `subject`; none where the registry knows no referrers.
    ///
    /// # Errors
    /// When the registry cannot be asked.
    async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
        context: &FetchContext,
    ) -> Result<Vec<Descriptor>, FetchError>;

    /// Returns the whole blob of `descriptor`, of at most `max` bytes.
    ///
    /// # Errors
    /// When it cannot be had, or is larger.
    async fn blob(
        &self,
        descriptor: &Descriptor,
        max: u64,
        context: &FetchContext,
    ) -> Result<Bytes, FetchError>;
}

/// A repository to write to.
#[async_trait]
pub trait PushRemote: Remote {
    /// Whether the manifest `digest` is there.
    ///
    /// # Errors
    /// When the registry cannot be asked.
    async fn has_manifest(&self, digest: &Digest, context: &FetchContext) -> Result<bool, FetchError>;

    /// Makes the repository have a blob; returns whether it did not have it before. `labels` are those of the content
    /// here: where they name another repository of the same registry, the blob is taken from that instead of sent.
    ///
    /// # Errors
    /// When it cannot be.
    async fn push_blob(
        &self,
        descriptor: &Descriptor,
        source: &dyn BlobSource,
        labels: &BTreeMap<String, String>,
        context: &FetchContext,
    ) -> Result<bool, FetchError>;

    /// Uploads a manifest under `object`, a tag or its digest. If it has a subject it is listed as its referrer
    /// afterwards, by the registry itself or under the subject's tag.
    ///
    /// # Errors
    /// When it cannot be.
    async fn push_manifest(
        &self,
        object: &str,
        media_type: &str,
        bytes: Bytes,
        context: &FetchContext,
    ) -> Result<(), FetchError>;
}

#[async_trait]
impl Remote for Repository {
    async fn manifest(&self, digest: &Digest, context: &FetchContext) -> Result<Bytes, FetchError> {
        self.manifest(digest, context).await
    }

    async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
        context: &FetchContext,
    ) -> Result<Vec<Descriptor>, FetchError> {
        self.referrers(subject, artifact_type, context).await
    }

    async fn blob(
        &self,
        descriptor: &Descriptor,
        max: u64,
        context: &FetchContext,
    ) -> Result<Bytes, FetchError> {
        self.blob_bytes(descriptor, max, context).await
    }
}

#[async_trait]
impl PushRemote for Repository {
    async fn has_manifest(&self, digest: &Digest, context: &FetchContext) -> Result<bool, FetchError> {
        self.has_manifest(digest, context).await
    }

    async fn push_blob(
        &self,
        descriptor: &Descriptor,
        source: &dyn BlobSource,
        labels: &BTreeMap<String, String>,
        context: &FetchContext,
    ) -> Result<bool, FetchError> {
        let from = mount_source(self.image(), labels);
        Ok(self.push_blob(descriptor, source, from, context).await? != Pushed::Existed)
    }

    async fn push_manifest(
        &self,
        object: &str,
        media_type: &str,
        bytes: Bytes,
        context: &FetchContext,
    ) -> Result<(), FetchError> {
        self.push_manifest(object, media_type, bytes, context).await.map(|_| ())
    }
}

/// Returns the repository of the image's registry from which content with `labels` can be taken: of several the one that
/// has most leading parts in common with the image's, the last of equals, as containerd chooses.
fn mount_source<'a>(image: &ImageRef, labels: &'a BTreeMap<String, String>) -> Option<&'a str> {
    // containerd writes the host without port and without the brackets of an IPv6 address.
    let host = image.registry().host().trim_matches(['[', ']']);
    let names = labels.get(&format!("{DISTRIBUTION_SOURCE}.{host}"))?;
    let shared = |name: &&str| {
        let pairs = name.split('/').zip(image.repository().split('/'));
        pairs.take_while(|(one, other)| one == other).count()
    };
    let is_repository = |name: &&str| {
        let full = format!("{}/{name}", image.registry());
        full.parse::<ImageRef>().is_ok_and(|parsed| parsed.name() == full)
    };
    let others = names.split(',').filter(|name| *name != image.repository());
    others.filter(is_repository).max_by_key(shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_taken_from_the_nearest_repository_of_the_same_registry() {
        let source = |image: &str, label: &str, value: &str| {
            let labels = [(format!("{DISTRIBUTION_SOURCE}.{label}"), value.to_owned())].into();
            mount_source(&image.parse().unwrap(), &labels).map(str::to_owned)
        };
        for (image, label, value, expected) in [
            ("reg.example/team/app:1", "reg.example", "base/app", Some("base/app")),
            ("reg.example:5000/team/app:1", "reg.example", "base/app", Some("base/app")),
            ("[::1]:5000/team/app:1", "::1", "base/app", Some("base/app")),
            ("alpine:3", "docker.io", "library/debian", Some("library/debian")),
            ("reg.example/team/app:1", "other.example", "base/app", None),
            ("reg.example/team/app:1", "reg.example", "team/app", None),
            ("reg.example/team/app:1", "reg.example", "x/app,team/base,team/app,y/app", Some("team/base")),
            ("reg.example/team/app:1", "reg.example", "x/app,y/app", Some("y/app")),
            ("reg.example/team/app:1", "reg.example", "", None),
            ("reg.example/team/app:1", "reg.example", "UPPER,a:b,a@c,/,ok", Some("ok")),
        ] {
            assert_eq!(source(image, label, value).as_deref(), expected, "{image} {label}={value}");
        }
    }
}
