//! What a status means for an operation: done, another host, another time, or over.
//!
//! One table for everything, so that a question about behaviour has one place to look. Rows are operations, columns are
//! status codes; [`Place`] tells whether the registry spoke or the storage it redirected to.

// A new kind of failure is looked at here before it compiles.
#![deny(clippy::wildcard_enum_match_arm)]

use soci_oci::FetchErrorKind;

/// What is done at a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// HEAD of a manifest.
    Resolve,
    /// GET of a manifest.
    Manifest,
    /// GET of a page of referrers.
    Referrers,
    /// GET of a range of a blob.
    Blob,
    /// HEAD of a blob or manifest, to know whether it is there.
    Exists,
    /// POST that starts an upload or mounts.
    UploadStart,
    /// PATCH of an upload.
    UploadChunk,
    /// GET of an upload's state.
    UploadStatus,
    /// PUT that ends an upload.
    UploadFinish,
    /// PUT of a manifest.
    ManifestPut,
    /// DELETE of a manifest.
    Delete,
}

/// Who answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// A host of the list, which may be asked for anything.
    Host,
    /// Where a host redirected to: another origin, which gets no credential.
    Target,
}

/// What to do with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is what was asked for.
    Done,
    /// This host will not give it; another may. When none is left the kind says why.
    NextHost(FetchErrorKind),
    /// This host cannot now. Another may; when none is left, try again later.
    Later,
    /// The location was good for a time that is over: ask the registry for another, once.
    Relocate,
    /// The operation is unknown there; the caller knows another way.
    Unsupported,
    /// No host will do better.
    Final(FetchErrorKind),
}

/// Returns what `status` means for `operation`.
pub(crate) fn verdict(operation: Operation, status: u16, place: Place) -> Verdict {
    use FetchErrorKind::{Denied, NotFound, Protocol};
    use Operation::{
        Blob, Delete, Exists, Manifest, ManifestPut, Referrers, Resolve, UploadChunk, UploadFinish,
        UploadStart, UploadStatus,
    };
    use Verdict::{Done, Final, Later, NextHost, Relocate, Unsupported};
    match (status, operation) {
        (200 | 206, Blob) => Done,
        (200, Resolve | Manifest | Referrers | Exists) => Done,
        (200..=299, UploadStart | UploadChunk | UploadStatus | UploadFinish | ManifestPut | Delete) => Done,
        (200..=299, Blob | Resolve | Manifest | Referrers | Exists) => NextHost(Protocol),
        // Informational and redirects never arrive here but as a breach of the protocol.
        (0..=199 | 300..=399, _) => NextHost(Protocol),

        // A pre-signed location that ran out: S3 says 400 or 403, Azure 403, others 401 or 410.
        (400 | 401 | 403 | 410, Blob | Manifest | Resolve) if place == Place::Target => Relocate,

        (401 | 403 | 407, _) => NextHost(Denied),
        // Registries without the referrers API answer all of these.
        (400 | 404 | 405 | 406 | 501, Referrers) => Unsupported,
        // Some refuse HEAD; a GET tells the same.
        (400 | 405 | 406 | 501, Resolve) => Unsupported,
        (404, UploadChunk | UploadStatus | UploadFinish) => Final(NotFound),
        (404 | 410, _) => NextHost(NotFound),
        // Offsets of an upload that do not fit: its state is asked for and the upload goes on from there.
        (416, UploadChunk) => Unsupported,
        (416, Blob) => NextHost(FetchErrorKind::Integrity),
        (408 | 425 | 429, _) => Later,
        (501 | 505, _) => NextHost(Protocol),
        (500..=599, _) => Later,
        (_, UploadStart | UploadChunk | UploadStatus | UploadFinish | ManifestPut | Delete) => {
            Final(Protocol)
        }
        (_, Blob | Resolve | Manifest | Referrers | Exists) => NextHost(Protocol),
    }
}

impl Operation {
    /// Returns the doing, for messages: "reading a blob".
    pub(crate) fn doing(self) -> &'static str {
        match self {
            Self::Resolve => "resolving",
            Self::Manifest => "reading the manifest",
            Self::Referrers => "listing referrers",
            Self::Blob => "reading a blob",
            Self::Exists => "looking for content",
            Self::UploadStart => "starting an upload",
            Self::UploadChunk => "uploading",
            Self::UploadStatus => "asking for an upload's state",
            Self::UploadFinish => "ending an upload",
            Self::ManifestPut => "pushing a manifest",
            Self::Delete => "deleting a manifest",
        }
    }

    /// Returns every operation.
    #[cfg(test)]
    fn all() -> [Self; 11] {
        [
            Self::Resolve,
            Self::Manifest,
            Self::Referrers,
            Self::Blob,
            Self::Exists,
            Self::UploadStart,
            Self::UploadChunk,
            Self::UploadStatus,
            Self::UploadFinish,
            Self::ManifestPut,
            Self::Delete,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::Operation::*;
    use super::Verdict::{Done, Final, Later, NextHost, Relocate, Unsupported};
    use super::*;
    use FetchErrorKind::{Denied, NotFound, Protocol};

    #[test]
    fn the_table_is_as_written() {
        let table = [
            (Blob, 206, Place::Host, Done),
            (Blob, 200, Place::Target, Done),
            (Manifest, 206, Place::Host, NextHost(Protocol)),
            (Blob, 403, Place::Host, NextHost(Denied)),
            (Blob, 403, Place::Target, Relocate),
            (Blob, 400, Place::Target, Relocate),
            (Blob, 410, Place::Target, Relocate),
            (Blob, 404, Place::Target, NextHost(NotFound)),
            (Blob, 416, Place::Target, NextHost(FetchErrorKind::Integrity)),
            (Blob, 503, Place::Target, Later),
            (Blob, 400, Place::Host, NextHost(Protocol)),
            (Manifest, 429, Place::Host, Later),
            (Manifest, 500, Place::Host, Later),
            (Manifest, 501, Place::Host, NextHost(Protocol)),
            (Referrers, 404, Place::Host, Unsupported),
            (Referrers, 401, Place::Host, NextHost(Denied)),
            (Resolve, 405, Place::Host, Unsupported),
            (Resolve, 404, Place::Host, NextHost(NotFound)),
            (UploadStart, 202, Place::Host, Done),
            (UploadChunk, 416, Place::Host, Unsupported),
            (UploadFinish, 404, Place::Host, Final(NotFound)),
            (ManifestPut, 400, Place::Host, Final(Protocol)),
            (Delete, 405, Place::Host, Final(Protocol)),
        ];
        for (operation, status, place, expected) in table {
            assert_eq!(verdict(operation, status, place), expected, "{operation:?} {status} {place:?}");
        }
    }

    #[test]
    fn no_server_error_is_final_and_no_success_is_an_error() {
        for operation in Operation::all() {
            for status in [500, 502, 503, 504, 429] {
                assert_eq!(verdict(operation, status, Place::Host), Later, "{operation:?} {status}");
            }
            assert_eq!(verdict(operation, 200, Place::Host), Done, "{operation:?}");
            assert_eq!(verdict(operation, 401, Place::Host), NextHost(Denied), "{operation:?}");
        }
    }
}
