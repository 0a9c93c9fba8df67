//! One snapshot's record on disk.
//!
//! `snapshots/<id>/record` is a line `soci-snapshot <version> <digest>` followed by JSON that the digest covers, so that
//! a file cut or changed at any byte is recognised and costs this one snapshot. The file passes through these states:
//!
//! | file | means |
//! | --- | --- |
//! | empty or torn | the operation that made the directory was never answered, or the disk lost the record; the directory may go unless somebody wrote there |
//! | whole | the snapshot exists |
//! | renamed to `removed` | the snapshot was removed; the directory may go |
//!
//! The first record of a directory is written in place: until it is whole the snapshot does not exist, and one sync makes
//! file and directory durable together ([`durable`]). Every later one is written beside it, synced and renamed, so that
//! the snapshot is either as before or as after. A call is answered after the directory was synced.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use soci_oci::Digest;

use crate::durable;
use crate::provider::MountRecord;

/// Name of the record within the snapshot's directory.
pub const RECORD: &str = "record";
/// Name the record gets when the snapshot is removed.
pub const REMOVED: &str = "removed";
/// Name of the next record until it takes the place of the present one.
const NEXT: &str = "record.next";
const MAGIC: &str = "soci-snapshot";
const VERSION: u32 = 1;
/// The largest record that is read, in bytes: implied directories of a huge layer fit many times.
const MAX_SIZE: u64 = 64 << 20;

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, for looking.
    View,
    /// Being written.
    Active,
    /// Finished; others may build on it.
    Committed,
}

/// What a snapshot takes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes, in whole blocks.
    pub size: u64,
    /// Inodes.
    pub inodes: u64,
}

/// What containerd is told about a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its name, or key while it is not committed.
    pub name: String,
    /// Name of the snapshot it builds on.
    pub parent: Option<String>,
    /// What it is for.
    pub kind: Kind,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// When it was made or committed.
    pub created: SystemTime,
    /// When its labels were last changed.
    pub updated: SystemTime,
}

/// Everything kept about a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, which is the name of its directory.
    pub id: u64,
    /// Its name, or key while it is not committed.
    pub name: String,
    /// Name of the snapshot it builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What it is for.
    pub kind: Kind,
    /// Free labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// When it was made or committed.
    pub created: Time,
    /// When its labels were last changed.
    pub updated: Time,
    /// What it took on disk when it was committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// How it is mounted, where it is a lazy layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy: Option<MountRecord>,
}

/// A point in time, in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time(u64);

impl Time {
    /// Returns the present time.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Returns it as the system's time.
    pub fn system(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.0)
    }
}

impl Record {
    /// Returns what containerd is told.
    pub fn info(&self) -> Info {
        Info {
            name: self.name.clone(),
            parent: self.parent.clone(),
            kind: self.kind,
            labels: self.labels.clone(),
            created: self.created.system(),
            updated: self.updated.system(),
        }
    }
}

/// Deletes the record that was being written when the process was killed. What cannot be deleted is overwritten by the next.
pub fn drop_half_written(dir: &Path) {
    let _mostly_absent = std::fs::remove_file(dir.join(NEXT));
}

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// There is no record file.
    #[error("no record")]
    Missing,
    /// The file is empty: the snapshot was never completed, or the disk lost it.
    #[error("record is empty")]
    Begun,
    /// The file is cut, or its digest does not match: it was never completed, or the disk lost it.
    #[error("record is torn: {0}")]
    Torn(&'static str),
    /// Written by a newer version, which must not be undone.
    #[error(
        "record has format {found}, this version reads up to {VERSION}: start the newer version again, or remove the directory"
    )]
    Newer {
        /// The version found.
        found: u32,
    },
    /// The record is whole, but that of the snapshot it builds on is not.
    #[error("the snapshot it builds on was lost")]
    Orphan,
    /// Reading failed.
    #[error("read record")]
    Io(#[from] io::Error),
}

/// Encodes `record` as a file's content.
pub fn encode(record: &Record) -> Vec<u8> {
    let json = serde_json::to_vec(record).expect("a record has string keys only");
    let mut bytes = format!("{MAGIC} {VERSION} {}\n", Digest::of(&json)).into_bytes();
    bytes.extend_from_slice(&json);
    bytes.push(b'\n');
    bytes
}

/// Decodes a file's content.
///
/// # Errors
/// [`RecordError::Begun`] or [`RecordError::Torn`] for anything but a whole record, [`RecordError::Newer`] for a later
/// format.
pub fn decode(bytes: &[u8]) -> Result<Record, RecordError> {
    if bytes.is_empty() {
        return Err(RecordError::Begun);
    }
    let line = bytes.iter().position(|&byte| byte == b'\n').ok_or(RecordError::Torn("no header line"))?;
    let (header, body) = bytes.split_at(line);
    let body = body[1..].strip_suffix(b"\n").ok_or(RecordError::Torn("no end"))?;
    let header = std::str::from_utf8(header).map_err(|_| RecordError::Torn("header is not text"))?;
    let mut words = header.split(' ');
    let (Some(MAGIC), Some(version), Some(digest), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(RecordError::Torn("malformed header line"));
    };
    let found: u32 = version.parse().map_err(|_| RecordError::Torn("malformed version"))?;
    if found > VERSION {
        return Err(RecordError::Newer { found });
    }
    let digest: Digest = digest.parse().map_err(|_| RecordError::Torn("malformed digest"))?;
    if !digest.verifies(body) {
        return Err(RecordError::Torn("digest mismatch"));
    }
    serde_json::from_slice(body).map_err(|_| RecordError::Torn("malformed content"))
}

/// Reads the record in the snapshot directory `dir`.
///
/// # Errors
/// As [`decode`], and when the file is absent or unreadable.
pub fn read(dir: &Path) -> Result<Record, RecordError> {
    let file = match File::open(dir.join(RECORD)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(RecordError::Missing),
        Err(error) => return Err(error.into()),
    };
    let mut bytes = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(RecordError::Torn("too large"));
    }
    decode(&bytes)
}

/// Marks the new directory `dir` as one whose snapshot is being made: an empty record.
///
/// # Errors
/// When the file cannot be made.
pub fn begin(dir: &Path) -> io::Result<()> {
    open(&dir.join(RECORD)).map(drop)
}

/// Writes the first record of `dir`, a directory of `snapshots` marked by [`begin`], and makes both durable.
///
/// # Errors
/// When writing or syncing fails; the snapshot does not exist then.
pub fn write_first(snapshots: &Path, dir: &Path, record: &Record) -> io::Result<()> {
    let mut file = open(&dir.join(RECORD))?;
    file.write_all(&encode(record))?;
    durable::sync(&file, &[dir, snapshots])
}

/// Replaces the record of `dir`, durably and in one step.
///
/// # Errors
/// When writing or syncing fails. Before the rename the record is the old one.
pub fn replace(dir: &Path, record: &Record) -> io::Result<()> {
    let next = dir.join(NEXT);
    let written = open(&next).and_then(|mut file| {
        file.write_all(&encode(record))?;
        file.sync_all()
    });
    if let Err(error) = written {
        let _ = fs::remove_file(&next);
        return Err(error);
    }
    fs::rename(&next, dir.join(RECORD))?;
    sync_dir(dir)
}

/// Makes the snapshot of `dir` not exist, durably; the directory stays until it is reclaimed.
///
/// # Errors
/// When the rename or syncing fails.
pub fn retire(dir: &Path) -> io::Result<()> {
    fs::rename(dir.join(RECORD), dir.join(REMOVED))?;
    sync_dir(dir)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::provider::{ArtifactRef, DirOwner, ImpliedDir, Reference};

    pub(crate) fn mount_record() -> MountRecord {
        MountRecord {
            references: vec![Reference {
                namespace: "k8s.io".into(),
                image: "reg.example/a:1".into(),
                manifest: Digest::of(b"manifest"),
            }],
            layer: Digest::of(b"layer"),
            layer_size: 5,
            index: Digest::of(b"index"),
            ztoc: Digest::of(b"ztoc"),
            ztoc_size: 4,
            disable_xattrs: false,
            root: DirOwner { mode: 0o755, uid: 1, gid: 2 },
            implied: vec![ImpliedDir {
                path: b"usr/\xff".to_vec(),
                owner: DirOwner { mode: 0o700, uid: 3, gid: 4 },
                mtime: Some((-1, 5)),
                xattrs: Vec::new(),
            }],
            prefetch: Some(ArtifactRef { digest: Digest::of(b"prefetch"), size: 8 }),
        }
    }

    fn record() -> Record {
        Record {
            id: 7,
            name: "k8s.io/1/sha256:aa".into(),
            parent: Some("p".into()),
            kind: Kind::Committed,
            labels: [("a".into(), "b".into())].into(),
            created: Time(1),
            updated: Time(2),
            usage: Some(Usage { size: 3, inodes: 4 }),
            lazy: Some(mount_record()),
        }
    }

    #[test]
    fn a_record_round_trips() {
        assert_eq!(decode(&encode(&record())).unwrap(), record());
    }

    #[test]
    fn a_record_without_what_came_later_is_read_and_what_comes_later_is_passed_over() {
        let mut json = serde_json::to_value(mount_record()).unwrap();
        let fields = json.as_object_mut().unwrap();
        fields.remove("prefetch").unwrap();
        fields.insert("later".into(), 1.into());
        let read: MountRecord = serde_json::from_value(json).unwrap();
        assert_eq!(read, MountRecord { prefetch: None, ..mount_record() });
    }

    #[test]
    fn a_record_cut_or_changed_at_any_byte_is_torn() {
        let whole = encode(&record());
        assert!(matches!(decode(b""), Err(RecordError::Begun)));
        for cut in 1..whole.len() {
            assert!(matches!(decode(&whole[..cut]), Err(RecordError::Torn(_))), "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            match decode(&changed) {
                Err(RecordError::Torn(_)) => {}
                // A digit of the version.
                Err(RecordError::Newer { .. }) if at < 16 => {}
                Ok(_) if at < 16 && whole[at] == b'1' => {}
                other => panic!("changed at {at}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_newer_format_is_not_taken_for_damage() {
        let text = String::from_utf8(encode(&record())).unwrap().replacen(" 1 ", " 2 ", 1);
        assert!(matches!(decode(text.as_bytes()), Err(RecordError::Newer { found: 2 })));
    }

    #[test]
    fn replacing_is_all_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path()).unwrap();
        assert!(matches!(read(dir.path()), Err(RecordError::Begun)));
        write_first(dir.path(), dir.path(), &record()).unwrap();
        assert_eq!(read(dir.path()).unwrap(), record());
        // A crash between write and rename leaves the next record beside the old one.
        fs::write(dir.path().join(NEXT), b"half").unwrap();
        assert_eq!(read(dir.path()).unwrap(), record());
        let changed = Record { kind: Kind::Active, ..record() };
        replace(dir.path(), &changed).unwrap();
        assert_eq!(read(dir.path()).unwrap(), changed);
        retire(dir.path()).unwrap();
        assert!(matches!(read(dir.path()), Err(RecordError::Missing)));
    }
}
