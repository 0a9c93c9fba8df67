//! A secret as the API server sends it, with only what is looked at.
//!
//! k8s-openapi's `Secret` would do, but its values are plain byte strings that nobody wipes, and its annotations hold the
//! whole secret once more where `kubectl apply` made it.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroizing;

/// A secret; its values are base64 and wiped on drop.
#[derive(Deserialize)]
pub(crate) struct PullSecret {
    #[serde(default)]
    pub(crate) metadata: Metadata,
    #[serde(default)]
    pub(crate) data: Option<BTreeMap<String, Option<Zeroizing<String>>>>,
}

/// Which secret it is, and which version of it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Metadata {
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) resource_version: Option<String>,
    creation_timestamp: Option<String>,
}

impl Metadata {
    /// Returns when it was created, in seconds since 1970; 0 where the server does not say.
    pub(crate) fn created(&self) -> i64 {
        let text = self.creation_timestamp.as_deref().unwrap_or_default();
        OffsetDateTime::parse(text, &Rfc3339).map_or(0, OffsetDateTime::unix_timestamp)
    }
}

impl fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullSecret").field("metadata", &self.metadata).finish_non_exhaustive()
    }
}

/// A page of a list of them.
#[derive(Deserialize)]
pub(crate) struct Page {
    #[serde(default)]
    pub(crate) metadata: PageMetadata,
    pub(crate) items: Vec<PullSecret>,
}

/// Where the list stands.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PageMetadata {
    pub(crate) resource_version: Option<String>,
    #[serde(rename = "continue")]
    pub(crate) further: Option<String>,
}
