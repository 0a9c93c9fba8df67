//! Names as a tar has them, made clean.
//!
//! A tar may call the same file `a/b`, `./a/b`, `/a//b` or `a/b/`. A cleaned path is the list of its components, none of
//! them empty, `.` or `..`. What cannot be a path on Linux is refused here, so that no later code has to think of it.

use thiserror::Error;

/// Longest name of one component that Linux has, in bytes.
pub(crate) const NAME_MAX: usize = 255;
/// Longest path that a system call takes, in bytes; longer ones cannot be unpacked either.
pub(crate) const PATH_MAX: usize = 4096;

/// Why a name cannot be a path inside a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PathError {
    /// A component is `..`.
    #[error("it has the component \"..\"")]
    Parent,
    /// A component is longer than 255 bytes.
    #[error("it has a component of {0} bytes, more than 255")]
    LongComponent(usize),
    /// The whole name is longer than 4096 bytes.
    #[error("it is {0} bytes long, more than 4096")]
    Long(usize),
    /// It holds a zero byte.
    #[error("it has a zero byte")]
    Zero,
}

/// Returns the components of `name` in order, after checking all of them.
///
/// No component means the root of the layer.
///
/// # Errors
/// [`PathError`] when the name escapes the layer or is none that Linux allows.
pub(crate) fn components(name: &[u8]) -> Result<impl DoubleEndedIterator<Item = &[u8]> + Clone, PathError> {
    if name.len() > PATH_MAX {
        return Err(PathError::Long(name.len()));
    }
    if name.contains(&0) {
        return Err(PathError::Zero);
    }
    let parts = name.split(|byte| *byte == b'/').filter(|part| !matches!(part, [] | [b'.']));
    for part in parts.clone() {
        if part == b".." {
            return Err(PathError::Parent);
        }
        if part.len() > NAME_MAX {
            return Err(PathError::LongComponent(part.len()));
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(name: &[u8]) -> Result<Vec<u8>, PathError> {
        Ok(components(name)?.collect::<Vec<_>>().join(&b'/'))
    }

    #[test]
    fn spellings_of_one_path_are_one() {
        for name in ["a/b", "./a/b", "/a//b", "a/./b/", "././/a/b//."] {
            assert_eq!(clean(name.as_bytes()).unwrap(), b"a/b", "{name}");
        }
        for name in ["", ".", "/", "./", "//."] {
            assert_eq!(clean(name.as_bytes()).unwrap(), b"", "{name}");
        }
        assert_eq!(clean(b"...").unwrap(), b"...");
    }

    #[test]
    fn names_that_escape_or_cannot_be_are_refused() {
        for name in [&b".."[..], b"a/../b", b"/..", b"a/.."] {
            assert_eq!(clean(name).unwrap_err(), PathError::Parent);
        }
        assert_eq!(clean(b"a\0b").unwrap_err(), PathError::Zero);
        assert_eq!(clean(&[b'a'; 256]).unwrap_err(), PathError::LongComponent(256));
        assert!(clean(&[b'a'; 255]).is_ok());
        assert_eq!(clean(&b"ab/".repeat(1400)).unwrap_err(), PathError::Long(4200));
    }
}
