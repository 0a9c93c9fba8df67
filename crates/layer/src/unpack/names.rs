//! Names in a tar as places below a root.

use super::UnpackError;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Where a member goes: a directory, by its clean path, and a name in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place<'a> {
    /// Components joined by `/`, without `.` and `..`; empty for the root.
    pub(super) dir: Vec<u8>,
    /// One component.
    pub(super) name: &'a [u8],
}

/// What a name asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// The directory hides what is below it.
    Opaque,
    /// The name hides what is below it.
    Whiteout(&'a [u8]),
    /// An ordinary file.
    File,
}

/// Returns the place that `path` names, or `None` for the root itself. `..` never climbs above the root.
pub(super) fn place(path: &[u8]) -> Option<Place<'_>> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let name = parts.pop()?;
    Some(Place { dir: parts.join(&b'/'), name })
}

/// Splits a clean path at its last component. The root has none.
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => Some((&path[..at], &path[at + 1..])),
        None => Some((b"", path)),
    }
}

/// Returns what `name` asks for.
pub(super) fn meaning(name: &[u8]) -> Result<Meaning<'_>, UnpackError> {
    if name == OPAQUE {
        return Ok(Meaning::Opaque);
    }
    match name.strip_prefix(WHITEOUT) {
        Some(b"" | b"." | b"..") => {
            Err(UnpackError::Name { path: show(name), reason: "a whiteout of no name" })
        }
        Some(hidden) => Ok(Meaning::Whiteout(hidden)),
        None => Ok(Meaning::File),
    }
}

/// Returns a name as an error shows it.
pub(super) fn show(name: &[u8]) -> String {
    let mut text: String = String::from_utf8_lossy(name).chars().take(200).collect();
    if text.len() < name.len() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below_the_root() {
        let at = |path: &'static str| place(path.as_bytes()).map(|place| (place.dir, place.name.to_vec()));
        let some = |dir: &str, name: &str| Some((dir.as_bytes().to_vec(), name.as_bytes().to_vec()));
        assert_eq!(at("./a//b/./c/"), some("a/b", "c"));
        assert_eq!(at("/etc/passwd"), some("etc", "passwd"));
        assert_eq!(at("../../x"), some("", "x"));
        assert_eq!(at("a/../../b"), some("", "b"));
        for root in ["", ".", "./", "/", "..", "a/.."] {
            assert_eq!(at(root), None, "{root}");
        }
    }

    #[test]
    fn whiteouts_of_no_name_are_refused() {
        assert_eq!(meaning(b".wh.a").unwrap(), Meaning::Whiteout(b"a"));
        assert_eq!(meaning(b".wh..wh..opq").unwrap(), Meaning::Opaque);
        assert_eq!(meaning(b".wha").unwrap(), Meaning::File);
        for name in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(meaning(name).is_err());
        }
    }
}
