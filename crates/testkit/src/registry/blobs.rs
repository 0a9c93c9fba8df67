//! Blobs: GET and HEAD with ranges, or a redirect to storage; DELETE.

use std::sync::Arc;

use ::http::Method;

use super::{Shared, storage};
use crate::faults::RequestInfo;
use crate::http::{Answer, Content, Piece};

pub(crate) fn answer(shared: &Arc<Shared>, info: &RequestInfo, repository: &str, digest: &str) -> Answer {
    if info.method == Method::DELETE {
        return match shared.store.delete_blob(repository, digest) {
            true => Answer::new(202),
            false => unknown(),
        };
    }
    if info.method != Method::GET && info.method != Method::HEAD {
        return Answer::error(405, "UNSUPPORTED", "no such method");
    }
    let Some(content) = shared.store.blob(repository, digest) else {
        return unknown();
    };
    let ttl = shared.behaviour.lock().storage;
    match ttl {
        Some(ttl) if info.method == Method::GET => {
            Answer::new(307).header("location", storage::sign(shared, digest, ttl))
        }
        _ => ranged(info, content).header("docker-content-digest", digest),
    }
}

fn unknown() -> Answer {
    Answer::error(404, "BLOB_UNKNOWN", "blob unknown to registry")
}

/// Answers the range asked for: 206, 416, or 200 with everything when none was asked for.
pub(crate) fn ranged(info: &RequestInfo, content: Content) -> Answer {
    let len = content.len();
    let mut answer = match info.range {
        None => {
            let mut answer = Answer::new(200);
            answer.piece = Piece::all(content);
            answer
        }
        Some((start, _)) if start >= len => {
            return Answer::error(416, "RANGE_INVALID", "range not satisfiable")
                .header("content-range", format!("bytes */{len}"));
        }
        Some((start, end)) => {
            let end = end.map_or(len, |end| end.saturating_add(1).min(len)).max(start + 1);
            let mut answer =
                Answer::new(206).header("content-range", format!("bytes {start}-{}/{len}", end - 1));
            answer.piece = Piece { content, range: start..end };
            answer
        }
    };
    answer.set("accept-ranges", "bytes");
    answer.header("content-type", "application/octet-stream")
}
