//! Slot numbers of the tables in a zTOC. Source: `docs/ztoc-format.md`, "Container".

/// The root table.
pub(crate) mod ztoc {
    pub(crate) const FIELDS: usize = 6;
    pub(crate) const VERSION: usize = 0;
    pub(crate) const BUILD_TOOL: usize = 1;
    pub(crate) const COMPRESSED_SIZE: usize = 2;
    pub(crate) const UNCOMPRESSED_SIZE: usize = 3;
    pub(crate) const TOC: usize = 4;
    pub(crate) const COMPRESSION: usize = 5;
}

/// The list of files.
pub(crate) mod toc {
    pub(crate) const FIELDS: usize = 1;
    pub(crate) const METADATA: usize = 0;
}

/// One file.
pub(crate) mod file {
    pub(crate) const FIELDS: usize = 14;
    pub(crate) const NAME: usize = 0;
    pub(crate) const KIND: usize = 1;
    pub(crate) const OFFSET: usize = 2;
    pub(crate) const SIZE: usize = 3;
    pub(crate) const LINK: usize = 4;
    pub(crate) const MODE: usize = 5;
    pub(crate) const UID: usize = 6;
    pub(crate) const GID: usize = 7;
    pub(crate) const UNAME: usize = 8;
    pub(crate) const GNAME: usize = 9;
    pub(crate) const MTIME: usize = 10;
    pub(crate) const DEV_MAJOR: usize = 11;
    pub(crate) const DEV_MINOR: usize = 12;
    pub(crate) const PAX: usize = 13;
}

/// One PAX record (the format calls it an xattr).
pub(crate) mod pax {
    pub(crate) const FIELDS: usize = 2;
    pub(crate) const KEY: usize = 0;
    pub(crate) const VALUE: usize = 1;
}

/// What is needed to start at a span.
pub(crate) mod compression {
    pub(crate) const FIELDS: usize = 4;
    pub(crate) const ALGORITHM: usize = 0;
    pub(crate) const MAX_SPAN_ID: usize = 1;
    pub(crate) const SPAN_DIGESTS: usize = 2;
    pub(crate) const CHECKPOINTS: usize = 3;
    pub(crate) const GZIP: i8 = 1;
    pub(crate) const UNCOMPRESSED: i8 = 2;
}

/// The zinfo of a plain tar.
pub(crate) mod tar_zinfo {
    pub(crate) const FIELDS: usize = 3;
    pub(crate) const VERSION: usize = 0;
    pub(crate) const SPAN_SIZE: usize = 1;
    pub(crate) const SIZE: usize = 2;
}
