//! Which files of a layer a program's start reads, whatever the program: its loader, that one's cache, the C library, and
//! who is who.
//!
//! They are read one after another, each when the one before it was understood, so a cold start waits for several spans
//! in a row. Whoever knows that a container is about to start can have them fetched at once.

use std::ops::Range;

use soci_ztoc::UncompressedOffset;

use crate::tree::{Body, LayerTree, NodeIndex};

/// Files of `etc`: containerd looks for the user there, the loader for libraries.
const ETC: [&[u8]; 3] = [b"passwd", b"group", b"ld.so.cache"];
/// Where loaders and C libraries are, and in directories named after the machine beneath these.
const LIBRARIES: [&[u8]; 4] = [b"lib", b"lib64", b"usr/lib", b"usr/lib64"];
/// Libraries that are taken of one directory, and directories named after a machine of another: a layer made in bad faith may
/// have any number.
const MOST: usize = 8;
/// Names of a directory that are looked at.
const NAMES: usize = 1 << 15;
/// What such a directory's name contains.
const MACHINE: &[u8] = b"-linux-";

impl LayerTree {
    /// Returns where in the tar those files lie that the layer has, with their headers; half open, in no order. A few at
    /// most in any sane layer. Looks at the names of a few directories, so it takes microseconds.
    pub fn startup_files(&self) -> Vec<Range<UncompressedOffset>> {
        let mut found = Vec::new();
        if let Some(etc) = self.find(b"etc") {
            found.extend(ETC.iter().filter_map(|name| self.extent(self.child(etc, name)?)));
        }
        for path in LIBRARIES {
            let Some(directory) = self.find(path) else { continue };
            self.add_libraries(directory, &mut found);
            let names = self.children(directory).iter().take(NAMES);
            let machines =
                names.filter(|entry| self.name(entry).windows(MACHINE.len()).any(|part| part == MACHINE));
            machines.take(MOST).for_each(|entry| self.add_libraries(entry.node, &mut found));
        }
        found
    }

    fn add_libraries(&self, directory: NodeIndex, found: &mut Vec<Range<UncompressedOffset>>) {
        let names = self.children(directory).iter().take(NAMES);
        let wanted = names.filter(|entry| is_startup_library(self.name(entry)));
        found.extend(wanted.take(MOST).filter_map(|entry| self.extent(entry.node)));
    }

    /// Returns where a regular file's header and data lie.
    fn extent(&self, index: NodeIndex) -> Option<Range<UncompressedOffset>> {
        let Body::Regular { header_len, data, size, .. } = self.node(index)?.body else { return None };
        let start = data.0.saturating_sub(u64::from(header_len));
        Some(UncompressedOffset(start)..UncompressedOffset(data.0.saturating_add(size)))
    }
}

/// Whether this is a loader or a C library, of glibc (`ld-linux-x86-64.so.2`, `ld-2.31.so`, `libc.so.6`, `libc-2.31.so`) or
/// musl (`ld-musl-x86_64.so.1`).
fn is_startup_library(name: &[u8]) -> bool {
    let names: [&[u8]; 4] = [b"ld-linux", b"ld-musl-", b"libc.so.", b"libc.musl-"];
    let numbered = |prefix: &[u8]| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit) && rest.ends_with(b".so"))
    };
    names.iter().any(|prefix| name.starts_with(prefix)) || numbered(b"ld-") || numbered(b"libc-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaders_and_c_libraries_are_known_by_their_names() {
        let yes = ["ld-linux-x86-64.so.2", "ld-2.31.so", "libc.so.6", "libc-2.31.so", "ld-musl-aarch64.so.1"];
        assert!(yes.iter().all(|name| is_startup_library(name.as_bytes())));
        let no = ["libcrypt.so.1", "libc", "ld-", "libc-client.so", "libcap.so.2", "ld.so", "ld-2.31"];
        assert!(no.iter().all(|name| !is_startup_library(name.as_bytes())));
    }
}
