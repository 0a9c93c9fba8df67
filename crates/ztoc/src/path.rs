//! The few questions about names that decoding asks. Names stay as the tar has them; the file system cleans them.

/// The components that count: without empty ones and `.`.
fn components(name: &[u8]) -> impl Iterator<Item = &[u8]> {
    name.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."))
}

/// Whether `..` climbs above the root at any point.
pub(crate) fn escapes(name: &[u8]) -> bool {
    if !name.windows(2).any(|pair| pair == b"..") {
        return false;
    }
    let mut depth: usize = 0;
    for part in components(name) {
        match (part, depth) {
            (b"..", 0) => return true,
            (b"..", _) => depth -= 1,
            _ => depth += 1,
        }
    }
    false
}

/// Whether two names without `..` mean the same file.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    components(a).eq(components(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_climb_above_the_root_escape() {
        for name in ["..", "../x", "a/../../x", "./../x", "/../x"] {
            assert!(escapes(name.as_bytes()), "{name}");
        }
        for name in ["", "a..b", "..a", "a/../b", "/a/./../b", "..."] {
            assert!(!escapes(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn names_are_compared_by_components() {
        assert!(same(b"./a//b/", b"/a/b"));
        assert!(!same(b"a/b", b"a/c"));
        assert!(!same(b"a", b"a/b"));
    }
}
