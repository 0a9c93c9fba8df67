//! Manifests, tags and the referrers API.

use std::sync::Arc;

use ::http::Method;
use bytes::Bytes;
use serde_json::{Value, json};
use url::form_urlencoded;

use super::store::StoredManifest;
use super::{Referrers, Shared, store};
use crate::faults::{Listener, RequestInfo};
use crate::http::{Answer, Content, Piece};

/// What registries refuse to store beyond.
const MAX_MANIFEST: usize = 4 << 20;

pub(crate) fn answer(
    shared: &Arc<Shared>,
    info: &RequestInfo,
    repository: &str,
    reference: &str,
    body: Bytes,
) -> Answer {
    match info.method {
        Method::GET | Method::HEAD => match shared.store.manifest(repository, reference) {
            Some(manifest) => {
                let mut answer = Answer::new(200)
                    .header("content-type", &manifest.media_type)
                    .header("docker-content-digest", &manifest.digest);
                answer.piece = Piece::all(manifest.content);
                answer
            }
            None if shared.store.knows(repository) => {
                Answer::error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            }
            None => Answer::error(404, "NAME_UNKNOWN", "repository name not known to registry"),
        },
        Method::PUT => put(shared, info, repository, reference, body),
        Method::DELETE => match shared.store.delete_manifest(repository, reference) {
            true => Answer::new(202),
            false => Answer::error(404, "MANIFEST_UNKNOWN", "manifest unknown"),
        },
        _ => Answer::error(405, "UNSUPPORTED", "no such method"),
    }
}

fn put(shared: &Arc<Shared>, info: &RequestInfo, repository: &str, reference: &str, body: Bytes) -> Answer {
    if body.len() > MAX_MANIFEST {
        return Answer::error(413, "SIZE_INVALID", "manifest too large");
    }
    let Ok(json) = serde_json::from_slice::<Value>(&body) else {
        return Answer::error(400, "MANIFEST_INVALID", "manifest invalid");
    };
    if reference.contains(':') && store::digest(&body) != reference {
        return Answer::error(400, "DIGEST_INVALID", "digest does not match");
    }
    let declared = info.headers.get("content-type").and_then(|value| value.to_str().ok());
    let media_type = declared.unwrap_or("application/vnd.oci.image.manifest.v1+json");
    let blobs = [json.get("config")].into_iter().flatten().chain(array(&json, "layers"));
    for descriptor in blobs {
        let digest = descriptor.get("digest").and_then(Value::as_str).unwrap_or("");
        if shared.store.blob(repository, digest).is_none() {
            return Answer::error(
                404,
                "MANIFEST_BLOB_UNKNOWN",
                &format!("blob unknown to registry: {digest}"),
            );
        }
    }
    let digest = shared.store.put_manifest(repository, reference, media_type, body);
    let location = format!("{}/v2/{repository}/manifests/{digest}", shared.url(Listener::Registry));
    let mut answer = Answer::new(201).header("location", location).header("docker-content-digest", &digest);
    let api = shared.behaviour.lock().referrers != Referrers::Unsupported;
    if let (true, Some(subject)) = (api, subject(&json)) {
        answer.set("oci-subject", subject);
    }
    answer
}

fn array<'a>(json: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    json.get(name).and_then(Value::as_array).into_iter().flatten()
}

fn subject(json: &Value) -> Option<&str> {
    json.get("subject")?.get("digest")?.as_str()
}

pub(crate) fn tags(shared: &Arc<Shared>, info: &RequestInfo, repository: &str) -> Answer {
    match shared.store.tags(repository) {
        Some(tags) if info.method == Method::GET => Answer::new(200)
            .bytes("application/json", json!({ "name": repository, "tags": tags }).to_string()),
        Some(_) => Answer::error(405, "UNSUPPORTED", "no such method"),
        None => Answer::error(404, "NAME_UNKNOWN", "repository name not known to registry"),
    }
}

pub(crate) fn referrers(shared: &Arc<Shared>, info: &RequestInfo, repository: &str, digest: &str) -> Answer {
    let Referrers::Api { page, filters } = shared.behaviour.lock().referrers else {
        return Answer::new(404).bytes("text/plain", "404 page not found");
    };
    let query = |name: &str| {
        form_urlencoded::parse(info.query.as_bytes())
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
    };
    let wanted = query("artifactType").filter(|_| filters);
    let start: usize = query("next").and_then(|text| text.parse().ok()).unwrap_or(0);
    let all: Vec<Value> = shared
        .store
        .manifests(repository)
        .into_iter()
        .filter_map(|manifest| describe(manifest, digest))
        .filter(|found| wanted.as_deref().is_none_or(|wanted| found["artifactType"] == *wanted))
        .collect();
    let end = if page == 0 { all.len() } else { all.len().min(start.saturating_add(page)) };
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": all.get(start..end).unwrap_or_default(),
    });
    let mut answer = Answer::new(200).bytes("application/vnd.oci.image.index.v1+json", index.to_string());
    if wanted.is_some() {
        answer.set("oci-filters-applied", "artifactType");
    }
    if end < all.len() {
        let kept: String = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(query("artifactType").map(|wanted| ("artifactType", wanted)))
            .append_pair("next", &end.to_string())
            .finish();
        answer.set("link", &format!("</v2/{repository}/referrers/{digest}?{kept}>; rel=\"next\""));
    }
    answer
}

fn describe(manifest: StoredManifest, digest: &str) -> Option<Value> {
    let Content::Memory(bytes) = &manifest.content else { return None };
    let json: Value = serde_json::from_slice(bytes).ok()?;
    if subject(&json) != Some(digest) {
        return None;
    }
    let artifact_type = json
        .get("artifactType")
        .or_else(|| json.get("config").and_then(|config| config.get("mediaType")))
        .cloned()
        .unwrap_or(Value::Null);
    let mut descriptor = json!({
        "mediaType": manifest.media_type,
        "digest": manifest.digest,
        "size": bytes.len(),
        "artifactType": artifact_type,
    });
    if let Some(annotations) = json.get("annotations") {
        descriptor["annotations"] = annotations.clone();
    }
    Some(descriptor)
}
