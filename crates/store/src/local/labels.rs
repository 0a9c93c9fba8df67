//! Labels of content in the soci store.
//!
//! They are hints that save work, so that a lost or damaged one costs a repetition, never correctness. Labels for
//! containerd's garbage collector mean nothing here and are not kept.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use soci_oci::Digest;

use super::ingest::suffix;
use crate::StoreError;

/// Labels with this prefix are for containerd's garbage collector.
const COLLECTOR: &str = "containerd.io/gc.";
/// The largest label file that is read, in bytes.
const MAX_SIZE: u64 = 64 << 10;

fn path(layout: &Path, digest: &Digest) -> PathBuf {
    layout.join("labels").join(format!("{}-{}", digest.algorithm(), digest.hex()))
}

/// Returns the labels of `digest`; none when there are none or they cannot be read.
pub(super) fn read(layout: &Path, digest: &Digest) -> BTreeMap<String, String> {
    let path = path(layout, digest);
    match fs::metadata(&path) {
        Ok(metadata) if metadata.len() <= MAX_SIZE => {}
        Ok(_) | Err(_) => return BTreeMap::new(),
    }
    fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Merges `labels` into those of `digest`.
pub(super) fn merge(layout: &Path, digest: &Digest, labels: &[(String, String)]) -> Result<(), StoreError> {
    let kept = labels.iter().filter(|(key, _)| !key.starts_with(COLLECTOR)).cloned().collect::<Vec<_>>();
    if kept.is_empty() {
        return Ok(());
    }
    let mut all = read(layout, digest);
    all.extend(kept);
    let path = path(layout, digest);
    let temporary = layout.join("ingest").join(format!("labels_{}", suffix()));
    let text = serde_json::to_vec(&all).unwrap_or_default();
    let written = fs::create_dir_all(layout.join("labels"))
        .and_then(|()| fs::write(&temporary, text))
        .and_then(|()| fs::rename(&temporary, &path));
    written.map_err(StoreError::io("writing", &path))
}

/// Forgets the labels of `digest`.
pub(super) fn remove(layout: &Path, digest: &Digest) {
    // What stays is a hint about content that is not there.
    let _ = fs::remove_file(path(layout, digest));
}

/// Returns all content that has labels, whether or not it is still there.
pub(super) fn labelled(layout: &Path) -> Vec<Digest> {
    let Ok(entries) = fs::read_dir(layout.join("labels")) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.replacen('-', ":", 1).parse().ok()).collect()
}
