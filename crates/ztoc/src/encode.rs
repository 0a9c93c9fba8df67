//! Writing a zTOC, byte for byte as the reference does.
//!
//! The order of every call below is part of the format: the digest of a zTOC is that of its bytes, and equal layers must
//! give equal digests whoever builds them. Source: `docs/ztoc-format.md`, "Bytes".

use soci_oci::Digest;

use crate::entry::EntryKind;
use crate::mtime::Mtime;
use crate::span_table::Compression;
use crate::wire::schema;
use crate::wire::write::{Overflow, Writer, Written};

/// The version that is written.
pub(crate) const VERSION: &str = "0.9";

/// One file, as it is written.
#[derive(Debug, Clone)]
pub(crate) struct FileRow<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) kind: EntryKind,
    pub(crate) data: i64,
    pub(crate) size: i64,
    pub(crate) link: &'a [u8],
    pub(crate) mode: i64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) uname: &'a [u8],
    pub(crate) gname: &'a [u8],
    pub(crate) mtime: Mtime,
    pub(crate) dev_major: i64,
    pub(crate) dev_minor: i64,
    /// In ascending order of keys.
    pub(crate) pax: Vec<(&'a [u8], &'a [u8])>,
}

/// Everything but the files.
#[derive(Debug)]
pub(crate) struct Document<'a> {
    pub(crate) build_tool: &'a str,
    pub(crate) compression: Compression,
    pub(crate) compressed_size: i64,
    pub(crate) uncompressed_size: i64,
    pub(crate) checkpoints: &'a [u8],
    pub(crate) span_digests: &'a [Digest],
}

/// Writes a zTOC. `files` hands over every file, from **last to first**; `expected` is a guess at the size of their part.
pub(crate) fn encode(
    document: &Document<'_>,
    files: impl FnOnce(&mut dyn FnMut(&FileRow<'_>)),
    expected: usize,
) -> Result<Vec<u8>, Overflow> {
    let capacity = expected + document.checkpoints.len() + 96 * document.span_digests.len() + 256;
    let mut writer = Writer::with_capacity(capacity);
    let version = writer.string(VERSION.as_bytes());
    let build_tool = writer.string(document.build_tool.as_bytes());
    let mut list: Vec<Written> = Vec::new();
    files(&mut |file| list.push(encode_file(&mut writer, file)));
    list.reverse();
    let list = writer.offset_vector(&list);
    writer.start_table(schema::toc::FIELDS);
    writer.add_offset(schema::toc::METADATA, list);
    let toc = writer.end_table();

    let checkpoints = writer.byte_vector(document.checkpoints);
    let digests: Vec<Written> =
        document.span_digests.iter().map(|digest| writer.string(digest.to_string().as_bytes())).collect();
    let max_span_id = i32::try_from(digests.len()).map_err(|_| Overflow)? - 1;
    let digests = writer.offset_vector(&digests);
    let algorithm = match document.compression {
        Compression::Gzip => schema::compression::GZIP,
        Compression::Uncompressed => schema::compression::UNCOMPRESSED,
    };
    writer.start_table(schema::compression::FIELDS);
    writer.add_i32(schema::compression::MAX_SPAN_ID, max_span_id);
    writer.add_offset(schema::compression::SPAN_DIGESTS, digests);
    writer.add_offset(schema::compression::CHECKPOINTS, checkpoints);
    writer.add_i8(schema::compression::ALGORITHM, algorithm, schema::compression::GZIP);
    let compression = writer.end_table();

    writer.start_table(schema::ztoc::FIELDS);
    writer.add_offset(schema::ztoc::VERSION, version);
    writer.add_offset(schema::ztoc::BUILD_TOOL, build_tool);
    writer.add_offset(schema::ztoc::TOC, toc);
    writer.add_i64(schema::ztoc::COMPRESSED_SIZE, document.compressed_size);
    writer.add_i64(schema::ztoc::UNCOMPRESSED_SIZE, document.uncompressed_size);
    writer.add_offset(schema::ztoc::COMPRESSION, compression);
    let root = writer.end_table();
    writer.finish(root)
}

fn encode_file(writer: &mut Writer, file: &FileRow<'_>) -> Written {
    let name = writer.string(file.name);
    let kind = writer.string(file.kind.as_str().as_bytes());
    let link = writer.string(file.link);
    let uname = writer.string(file.uname);
    let gname = writer.string(file.gname);
    let mtime = writer.string(file.mtime.to_rfc3339().as_bytes());
    let mut records = Vec::with_capacity(file.pax.len());
    for (key, value) in &file.pax {
        let key = writer.string(key);
        let value = writer.string(value);
        writer.start_table(schema::pax::FIELDS);
        writer.add_offset(schema::pax::KEY, key);
        writer.add_offset(schema::pax::VALUE, value);
        records.push(writer.end_table());
    }
    let pax = writer.offset_vector(&records);
    writer.start_table(schema::file::FIELDS);
    writer.add_offset(schema::file::NAME, name);
    writer.add_offset(schema::file::KIND, kind);
    writer.add_i64(schema::file::OFFSET, file.data);
    writer.add_i64(schema::file::SIZE, file.size);
    writer.add_offset(schema::file::LINK, link);
    writer.add_i64(schema::file::MODE, file.mode);
    writer.add_u32(schema::file::UID, file.uid);
    writer.add_u32(schema::file::GID, file.gid);
    writer.add_offset(schema::file::UNAME, uname);
    writer.add_offset(schema::file::GNAME, gname);
    writer.add_offset(schema::file::MTIME, mtime);
    writer.add_i64(schema::file::DEV_MAJOR, file.dev_major);
    writer.add_i64(schema::file::DEV_MINOR, file.dev_minor);
    writer.add_offset(schema::file::PAX, pax);
    writer.end_table()
}

/// Writes the zinfo of a plain tar.
pub(crate) fn encode_tar_zinfo(span_size: i64, size: i64) -> Result<Vec<u8>, Overflow> {
    let mut writer = Writer::with_capacity(64);
    writer.start_table(schema::tar_zinfo::FIELDS);
    writer.add_i32(schema::tar_zinfo::VERSION, 2);
    writer.add_i64(schema::tar_zinfo::SPAN_SIZE, span_size);
    writer.add_i64(schema::tar_zinfo::SIZE, size);
    let root = writer.end_table();
    writer.finish(root)
}
