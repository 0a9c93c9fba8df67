//! Uploads: start, mount, chunks, status, finish.

use std::sync::Arc;

use ::http::Method;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use url::form_urlencoded;

use super::Shared;
use crate::faults::{Listener, RequestInfo};
use crate::http::Answer;

fn query(info: &RequestInfo, name: &str) -> Option<String> {
    form_urlencoded::parse(info.query.as_bytes())
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
}

pub(crate) async fn start(
    shared: &Arc<Shared>,
    info: &RequestInfo,
    repository: &str,
    body: Incoming,
) -> Option<Answer> {
    if info.method != Method::POST {
        return Some(Answer::error(405, "UNSUPPORTED", "no such method"));
    }
    if let (Some(digest), Some(from)) = (query(info, "mount"), query(info, "from")) {
        let supported = shared.behaviour.lock().mount;
        if supported && shared.store.mount(repository, &from, &digest) {
            return Some(created(shared, repository, &digest));
        }
    }
    let id = shared.store.start_upload().ok()?;
    if let Some(digest) = query(info, "digest") {
        receive(shared, &id, body).await?;
        return Some(finish(shared, repository, &id, &digest));
    }
    let minimum = shared.behaviour.lock().chunk_min;
    let mut answer = progress(shared, 202, repository, &id, 0);
    if let Some(minimum) = minimum {
        answer.set("oci-chunk-min-length", &minimum.to_string());
    }
    Some(answer)
}

pub(crate) async fn go_on(
    shared: &Arc<Shared>,
    info: &RequestInfo,
    repository: &str,
    id: &str,
    body: Incoming,
) -> Option<Answer> {
    let Some(have) = shared.store.upload_len(id) else {
        return Some(Answer::error(404, "BLOB_UPLOAD_UNKNOWN", "upload unknown"));
    };
    if let Some(range) = info.headers.get("content-range").and_then(|value| value.to_str().ok())
        && range.split('-').next().and_then(|start| start.trim().parse().ok()) != Some(have)
    {
        return Some(progress(shared, 416, repository, id, have));
    }
    Some(match info.method {
        Method::GET => progress(shared, 204, repository, id, have),
        Method::DELETE => {
            shared.store.cancel_upload(id);
            Answer::new(204)
        }
        Method::PATCH => {
            let len = receive(shared, id, body).await?;
            progress(shared, 202, repository, id, len)
        }
        Method::PUT => {
            let Some(digest) = query(info, "digest") else {
                return Some(Answer::error(400, "DIGEST_INVALID", "no digest given"));
            };
            receive(shared, id, body).await?;
            finish(shared, repository, id, &digest)
        }
        _ => Answer::error(405, "UNSUPPORTED", "no such method"),
    })
}

/// Appends a body to an upload as it arrives; nothing when the client went away.
async fn receive(shared: &Arc<Shared>, id: &str, mut body: Incoming) -> Option<u64> {
    let mut len = shared.store.upload_len(id)?;
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.ok()?.into_data() {
            len = shared.store.append(id, &data).ok()?;
        }
    }
    Some(len)
}

fn finish(shared: &Arc<Shared>, repository: &str, id: &str, digest: &str) -> Answer {
    match shared.store.finish_upload(repository, id, digest) {
        Ok(true) => created(shared, repository, digest),
        Ok(false) => Answer::error(400, "DIGEST_INVALID", "provided digest did not match uploaded content"),
        Err(_) => Answer::error(404, "BLOB_UPLOAD_UNKNOWN", "upload unknown"),
    }
}

fn created(shared: &Arc<Shared>, repository: &str, digest: &str) -> Answer {
    let location = format!("{}/v2/{repository}/blobs/{digest}", shared.url(Listener::Registry));
    Answer::new(201).header("location", location).header("docker-content-digest", digest)
}

fn progress(shared: &Arc<Shared>, status: u16, repository: &str, id: &str, have: u64) -> Answer {
    let location = format!("{}/v2/{repository}/blobs/uploads/{id}?_state=x", shared.url(Listener::Registry));
    Answer::new(status)
        .header("location", location)
        .header("docker-upload-uuid", id)
        .header("range", format!("0-{}", have.saturating_sub(1)))
}
