//! Mounts beneath a directory: seen, counted and taken away.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub at: PathBuf,
    /// File system type with subtype, e.g. `fuse.soci`.
    pub kind: String,
}

/// Returns the mounts at or beneath `directory`, in the order they were made.
///
/// # Errors
/// Where the mount table cannot be read.
pub fn beneath(directory: &Path) -> io::Result<Vec<Mount>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let mounts = table.split(|byte| *byte == b'\n').filter_map(parse);
    Ok(mounts.filter(|mount| mount.at.starts_with(directory)).collect())
}

/// Returns the FUSE mounts at or beneath `directory`.
///
/// # Errors
/// Where the mount table cannot be read.
pub fn fuse(directory: &Path) -> io::Result<Vec<Mount>> {
    let mounts = beneath(directory)?;
    Ok(mounts.into_iter().filter(|mount| mount.kind == "fuse" || mount.kind.starts_with("fuse.")).collect())
}

/// Detaches every mount at or beneath `directory`, latest first. A mount that cannot be detached stays.
pub fn detach(directory: &Path) {
    // Several may be stacked, and a propagated copy may show up only after another went.
    for _ in 0..8 {
        let Ok(mounts) = beneath(directory) else { return };
        if mounts.is_empty() {
            return;
        }
        for mount in mounts.iter().rev() {
            let _ = rustix::mount::unmount(&mount.at, UnmountFlags::DETACH);
        }
    }
}

fn parse(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let at = PathBuf::from(OsString::from_vec(unescape(fields.get(4)?)));
    let dash = fields.iter().position(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(fields.get(dash + 1)?).into_owned();
    Some(Mount { at, kind })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match octal {
            Some(digits) => {
                let value = digits.iter().fold(0_u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                text.push(u8::try_from(value & 0xff).unwrap_or_default());
                rest = &tail[3..];
            }
            None => {
                text.push(byte);
                rest = tail;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_mount_table_is_read_with_its_escapes() {
        let line = b"36 35 98:0 / /tmp/a\\040b rw,noatime master:1 - fuse.soci soci rw";
        let mount = parse(line).unwrap();
        assert_eq!((mount.at, mount.kind.as_str()), (PathBuf::from("/tmp/a b"), "fuse.soci"));
        assert_eq!(parse(b""), None);
    }
}
