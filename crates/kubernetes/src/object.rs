//! A secret as the API server sends it, with only what is looked at.
//!
//! k8s-openapi's `Secret` would do, but its values are plain byte strings that nobody wipes.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ListMeta, ObjectMeta};
use serde::Deserialize;
use zeroize::Zeroizing;

/// A secret; its values are base64 and wiped on drop.
#[derive(Clone, Deserialize)]
pub(crate) struct PullSecret {
    #[serde(default)]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    pub(crate) data: Option<BTreeMap<String, Option<Zeroizing<String>>>>,
}

impl fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullSecret")
            .field("namespace", &self.metadata.namespace)
            .field("name", &self.metadata.name)
            .finish_non_exhaustive()
    }
}

/// A page of a list of them.
#[derive(Deserialize)]
pub(crate) struct Page {
    #[serde(default)]
    pub(crate) metadata: ListMeta,
    pub(crate) items: Vec<PullSecret>,
}
