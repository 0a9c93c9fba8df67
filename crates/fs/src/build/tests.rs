//! The tree that comes of given entries.

use std::cell::RefCell;

use proptest::prelude::*;
use soci_ztoc::{EntryKind, UncompressedOffset};

use super::*;
use crate::attr::{self, Attr};

fn member(kind: EntryKind, name: &str) -> Member<'_> {
    Member {
        name: name.as_bytes(),
        kind,
        link: b"",
        header: UncompressedOffset(0),
        data: UncompressedOffset(512),
        size: 0,
        mode: 0o644,
        raw_mode: 0o644,
        uid: 1,
        gid: 2,
        mtime: (7, 8),
        device: (0, 0),
        pax: Vec::new(),
    }
}

fn file(name: &str, size: u64) -> Member<'_> {
    Member { size, ..member(EntryKind::Regular, name) }
}

fn dir(name: &str, mode: u32) -> Member<'_> {
    Member { mode, ..member(EntryKind::Directory, name) }
}

fn link<'a>(kind: EntryKind, name: &'a str, target: &'a str) -> Member<'a> {
    Member { link: target.as_bytes(), ..member(kind, name) }
}

const OPTIONS: TreeOptions<'_> =
    TreeOptions { xattrs: true, opaque: OpaqueXattr::Trusted, implied: &|_| None };

fn build(members: Vec<Member<'_>>) -> Result<LayerTree, TreeError> {
    LayerTree::from_members(members.into_iter(), &OPTIONS, 200_000)
}

fn tree(members: Vec<Member<'_>>) -> LayerTree {
    build(members).unwrap()
}

#[track_caller]
fn attr(tree: &LayerTree, path: &str) -> Attr {
    attr::of_node(tree, tree.find(path.as_bytes()).unwrap_or_else(|| panic!("{path} is missing"))).unwrap()
}

fn names(tree: &LayerTree, path: &str) -> Vec<String> {
    let children = tree.children(tree.find(path.as_bytes()).unwrap());
    children.iter().map(|entry| lossy(tree.name(entry))).collect()
}

#[test]
fn parents_without_an_entry_are_made_with_the_attributes_of_below() {
    let asked = RefCell::new(Vec::new());
    let below = |path: &[u8]| {
        asked.borrow_mut().push(lossy(path));
        let xattrs =
            vec![(b"user.x".to_vec(), b"1".to_vec()), (b"trusted.overlay.opaque".to_vec(), b"y".to_vec())];
        path.ends_with(b"a").then(DirAttr::default).or_else(|| {
            path.ends_with(b"a/b").then_some(DirAttr { mode: 0o1777, uid: 3, gid: 4, mtime: (5, 6), xattrs })
        })
    };
    let options = TreeOptions { implied: &below, ..OPTIONS };
    let tree = LayerTree::from_members([file("./a/b//c/d/f", 3)].into_iter(), &options, 1000).unwrap();
    // Nothing below has "a/b/c", so nobody has to be asked for "a/b/c/d".
    assert_eq!(asked.into_inner(), ["", "a", "a/b", "a/b/c"]);
    let given = attr(&tree, "a/b");
    assert_eq!((given.mode, given.uid, given.gid, given.mtime), (0o041_777, 3, 4, (5, 6)));
    let node = tree.node(tree.find(b"a/b").unwrap()).unwrap();
    assert_eq!(tree.xattrs(node).collect::<Vec<_>>(), [(&b"user.x"[..], &b"1"[..])]);
    let made = attr(&tree, "a/b/c");
    assert_eq!((made.mode, made.uid, made.gid, made.mtime), (0o040_755, 0, 0, (0, 0)));
    assert_eq!(attr(&tree, "a/b/c/d/f").size, 3);
}

#[test]
fn a_directory_named_again_gets_the_later_attributes_and_keeps_its_files() {
    let tree = tree(vec![dir("a/", 0o700), file("a/x", 1), dir("a", 0o711), dir("./", 0o750)]);
    assert_eq!(attr(&tree, "a").mode, 0o040_711);
    assert_eq!(attr(&tree, "").mode, 0o040_750);
    assert_eq!(names(&tree, "a"), ["x"]);
}

#[test]
fn anything_else_named_again_is_replaced() {
    let built = tree(vec![
        file("f", 1),
        file("f", 2),
        dir("d/", 0o755),
        file("d/x", 1),
        file("d", 9),
        file("e", 1),
        dir("e", 0o755),
    ]);
    assert_eq!((attr(&built, "f").size, attr(&built, "d").size), (2, 9));
    assert!(built.find(b"d/x").is_none());
    assert!(attr(&built, "e").is_dir());
    // What comes back as a directory is empty.
    let built = tree(vec![file("d/x", 1), file("d", 1), dir("d", 0o755), file("d/y", 1)]);
    assert_eq!(names(&built, "d"), ["y"]);
}

#[test]
fn hard_links_share_the_file_and_its_count() {
    let built = tree(vec![
        file("b/f", 5),
        link(EntryKind::HardLink, "a", "./b/f"),
        link(EntryKind::HardLink, "c", "a"),
        link(EntryKind::Symlink, "s", "b/f"),
        link(EntryKind::HardLink, "t", "s"),
        // A file replaced later lives on under its other name.
        file("b/f", 6),
    ]);
    assert_eq!(attr(&built, "a").inode, attr(&built, "c").inode);
    assert_eq!((attr(&built, "a").nlink, attr(&built, "a").size), (2, 5));
    assert_eq!((attr(&built, "b/f").nlink, attr(&built, "b/f").size), (1, 6));
    assert_eq!((attr(&built, "s").nlink, attr(&built, "t").mode), (2, 0o120_777));
    assert_eq!(built.broken_links().len(), 0);
}

#[test]
fn hard_links_may_come_before_their_target() {
    let built = tree(vec![
        link(EntryKind::HardLink, "one", "two"),
        link(EntryKind::HardLink, "two", "three"),
        link(EntryKind::HardLink, "three", "d/f"),
        file("d/f", 4),
    ]);
    for name in ["one", "two", "three"] {
        assert_eq!(attr(&built, name).inode, attr(&built, "d/f").inode);
    }
    assert_eq!(attr(&built, "one").nlink, 4);
}

#[test]
fn a_hard_link_to_nothing_costs_that_file_only() {
    let built = tree(vec![
        link(EntryKind::HardLink, "d/gone", "nowhere"),
        link(EntryKind::HardLink, "d/out", "../../etc/passwd"),
        link(EntryKind::HardLink, "dir", "d"),
        link(EntryKind::HardLink, "self", "self"),
        link(EntryKind::HardLink, "ring1", "ring2"),
        link(EntryKind::HardLink, "ring2", "ring1"),
        link(EntryKind::HardLink, "to-ring", "ring1"),
        file("good", 1),
    ]);
    let broken: Vec<_> = built.broken_links().map(lossy).collect();
    assert_eq!(broken, ["dir", "ring1", "ring2", "self", "to-ring", "d/gone", "d/out"]);
    assert_eq!(attr(&built, "good").nlink, 1);
    assert_eq!(names(&built, "d"), ["gone", "out"]);
    assert!(attr::of_node(&built, built.find(b"d/gone").unwrap()).is_none());
}

#[test]
fn a_long_chain_of_links_is_followed_in_linear_time() {
    let texts: Vec<String> = (0..50_000).map(|number| format!("l{number}")).collect();
    let mut members: Vec<_> =
        texts.windows(2).map(|pair| link(EntryKind::HardLink, &pair[0], &pair[1])).collect();
    members.push(file(texts.last().unwrap(), 1));
    let built = tree(members);
    assert_eq!(attr(&built, "l0").nlink, 50_000);
}

#[test]
fn whiteouts_become_devices_unless_the_layer_has_the_file() {
    let built = tree(vec![
        file("d/.wh.gone", 0),
        file("d/.wh.kept", 0),
        file("d/kept", 4),
        file("d/.wh.twice", 0),
        dir("d/.wh.twice", 0),
        link(EntryKind::HardLink, "d/.wh.linked", "d/kept"),
        file("e/.wh..wh..opq", 0),
        file("e/.wh..wh.aufs", 0),
        file(".wh..wh.plnk/1.2", 0),
        file(".wh.x/y", 0),
    ]);
    assert_eq!(names(&built, "d"), ["gone", "kept", "linked", "twice"]);
    assert_eq!(names(&built, "e"), [""; 0]);
    assert_eq!(names(&built, ""), ["d", "e"]);
    let gone = attr(&built, "d/gone");
    assert_eq!((gone.mode, gone.rdev, gone.nlink, gone.uid, gone.size), (0o020_000, 0, 1, 0, 0));
    assert_eq!((attr(&built, "d/kept").size, attr(&built, "d/kept").nlink), (4, 1));
    let marks = |tree: &LayerTree, path: &str| {
        let node = *tree.node(tree.find(path.as_bytes()).unwrap()).unwrap();
        tree.xattrs(&node).map(|(name, value)| (lossy(name), lossy(value))).collect::<Vec<_>>()
    };
    assert_eq!(marks(&built, "e"), [("trusted.overlay.opaque".to_owned(), "y".to_owned())]);
    assert_eq!(marks(&built, "d"), []);
    let options = TreeOptions { opaque: OpaqueXattr::User, ..OPTIONS };
    let built = LayerTree::from_members([file("e/.wh..wh..opq", 0)].into_iter(), &options, 1000).unwrap();
    assert_eq!(marks(&built, "e"), [("user.overlay.opaque".to_owned(), "y".to_owned())]);
}

#[test]
fn overlayfs_attributes_of_the_image_are_withheld_and_empty_values_kept() {
    let mut with = file("f", 0);
    with.pax = vec![
        (b"SCHILY.xattr.security.capability", b"\x01\0\xff"),
        (b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        (b"SCHILY.xattr.user.empty", b""),
        (b"SCHILY.xattr.user.overlay.opaque", b"y"),
        (b"mtime", b"1.5"),
    ];
    let built = tree(vec![with.clone()]);
    let node = *built.node(built.find(b"f").unwrap()).unwrap();
    let have: Vec<_> = built.xattrs(&node).collect();
    assert_eq!(have, [(&b"security.capability"[..], &b"\x01\0\xff"[..]), (b"user.empty", b"")]);
    assert!(built.any_xattrs());
    let off =
        LayerTree::from_members([with].into_iter(), &TreeOptions { xattrs: false, ..OPTIONS }, 10).unwrap();
    assert!(!off.any_xattrs());
    assert!(!tree(vec![file("f", 0)]).any_xattrs());
}

#[test]
fn equal_sets_of_attributes_are_stored_once() {
    let texts: Vec<String> = (0..1000).map(|number| format!("f{number}")).collect();
    let value = [b'x'; 1000];
    let members = texts
        .iter()
        .map(|name| Member { pax: vec![(b"SCHILY.xattr.security.selinux", &value)], ..file(name, 0) });
    let built = LayerTree::from_members(members, &OPTIONS, 10_000).unwrap();
    assert_eq!(built.xattrs.len(), 2);
}

#[test]
fn a_parent_that_is_a_symbolic_link_is_followed_as_unpacking_would() {
    let built = tree(vec![
        dir("usr/lib", 0o755),
        link(EntryKind::Symlink, "lib", "usr/lib"),
        link(EntryKind::Symlink, "usr/abs", "/usr/lib/../lib"),
        file("lib/a", 1),
        file("usr/abs/b", 1),
        link(EntryKind::Symlink, "ahead", "new/dir"),
        file("ahead/c", 1),
        link(EntryKind::HardLink, "hard", "lib/a"),
    ]);
    assert_eq!(names(&built, "usr/lib"), ["a", "b"]);
    assert_eq!(names(&built, "new/dir"), ["c"]);
    assert_eq!(attr(&built, "hard").nlink, 2);
    assert_eq!(attr(&built, "lib").size, 7);
    let above = tree(vec![link(EntryKind::Symlink, "up", "../../.."), file("up/x", 1)]);
    assert_eq!(names(&above, ""), ["up", "x"]);
}

#[test]
fn what_cannot_be_unpacked_is_refused() {
    let refused = |members| build(members).unwrap_err();
    for name in ["../x", "a/../../x", "/../x", "a/.."] {
        assert!(matches!(refused(vec![file(name, 0)]), TreeError::Name { source: PathError::Parent, .. }));
    }
    assert!(matches!(refused(vec![file("./", 0)]), TreeError::Root));
    assert!(matches!(refused(vec![link(EntryKind::Symlink, ".", "x")]), TreeError::Root));
    assert!(matches!(refused(vec![file("f", 0), file("f/x", 0)]), TreeError::NotInDirectory(_)));
    let ring = vec![link(EntryKind::Symlink, "a", "b"), link(EntryKind::Symlink, "b", "a"), file("a/x", 0)];
    assert!(matches!(refused(ring), TreeError::NotInDirectory(_)));
    let long = "x".repeat(4096);
    assert!(matches!(refused(vec![link(EntryKind::Symlink, "l", &long)]), TreeError::LongTarget(_, 4096)));
    let error = refused(vec![file("a/../x", 0)]);
    assert_eq!(error.to_string(), "entry \"a/../x\" of the layer cannot be a file");
}

#[test]
fn directories_that_only_names_imply_are_bounded() {
    // 2000 parents each, none shared.
    let texts: Vec<String> = (0..3000).map(|number| format!("{number}{}", "/x".repeat(2000))).collect();
    let error = build(texts.iter().map(|name| file(name, 0)).collect()).unwrap_err();
    assert!(matches!(error, TreeError::TooManyNodes(200_000)));
}

#[test]
fn directories_count_their_subdirectories() {
    let built = tree(vec![dir("a", 0o755), dir("a/b", 0o755), dir("a/c", 0o755), file("a/f", 0)]);
    assert_eq!((attr(&built, "a").nlink, attr(&built, "").nlink, attr(&built, "a/b").nlink), (4, 3, 2));
}

#[test]
fn numbers_follow_from_the_order_of_entries() {
    let members = || {
        vec![
            file("z/y", 0),
            file("a", 0),
            file(".wh.w", 0),
            link(EntryKind::HardLink, "l", "later"),
            file("later", 0),
        ]
    };
    let (one, two) = (tree(members()), tree(members()));
    for (path, number) in [("", 1), ("z", 4), ("z/y", 5), ("a", 6), ("w", 7), ("later", 9)] {
        assert_eq!((attr(&one, path).inode.0, attr(&two, path).inode.0), (number, number), "{path}");
    }
}

#[test]
fn a_hundred_thousand_files_cost_about_a_hundred_bytes_each() {
    let texts: Vec<String> =
        (0..100_000).map(|number| format!("usr/lib/{}/file-{number}", number / 100)).collect();
    let built = tree(texts.iter().map(|name| file(name, 1)).collect());
    assert!(built.memory() < 100 * built.len(), "{} bytes for {} nodes", built.memory(), built.len());
}

/// Entries as something between sense and malice would write them.
fn any_member() -> impl Strategy<Value = (EntryKind, String, String)> {
    let kind = prop_oneof![
        Just(EntryKind::Regular),
        Just(EntryKind::Directory),
        Just(EntryKind::Symlink),
        Just(EntryKind::HardLink),
        Just(EntryKind::Fifo),
    ];
    let part =
        prop_oneof!["[abc]", Just(".wh.a".to_owned()), Just(".wh..wh..opq".to_owned()), Just(".".to_owned())];
    let name = prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"));
    let target =
        prop::collection::vec(prop_oneof!["[abc]", Just("..".to_owned()), Just(String::new())], 0..4)
            .prop_map(|parts| parts.join("/"));
    (kind, name, target)
}

proptest! {
    #[test]
    fn every_tree_is_sound(entries in prop::collection::vec(any_member(), 0..40)) {
        let members = entries.iter().map(|(kind, name, target)| link(*kind, name, target)).collect();
        let Ok(built) = build(members) else { return Ok(()) };
        let mut seen = vec![0_u32; built.len()];
        let mut todo = vec![NodeIndex::ROOT];
        while let Some(directory) = todo.pop() {
            let children = built.children(directory);
            prop_assert!(children.windows(2).all(|pair| built.name(&pair[0]) < built.name(&pair[1])));
            for entry in children {
                let name = built.name(entry);
                prop_assert!(!name.is_empty() && !name.contains(&b'/') && !name.starts_with(b".wh."));
                prop_assert_eq!(built.child(directory, name), Some(entry.node));
                seen[entry.node.at()] += 1;
                if let Body::Directory { parent, .. } = built.node(entry.node).unwrap().body {
                    // A directory has one name, in its parent: so there are no cycles.
                    prop_assert_eq!(NodeIndex(parent), directory);
                    prop_assert_eq!(seen[entry.node.at()], 1);
                    todo.push(entry.node);
                }
            }
        }
        for (index, count) in seen.iter().enumerate().skip(1).filter(|(_, count)| **count > 0) {
            let index = NodeIndex(u32::try_from(index).unwrap());
            if let Some(attr) = attr::of_node(&built, index) && !attr.is_dir() {
                prop_assert_eq!(attr.nlink, *count);
            }
        }
    }
}

#[test]
fn the_files_of_a_start_are_found_with_their_headers_and_links_are_not_followed() {
    let at = |name, place: u64| Member {
        header: UncompressedOffset(place),
        data: UncompressedOffset(place + 512),
        ..file(name, 100)
    };
    let tree = tree(vec![
        at("etc/passwd", 1000),
        at("etc/hosts", 2000),
        at("usr/lib/x86_64-linux-gnu/libc.so.6", 3000),
        at("usr/lib/x86_64-linux-gnu/libm.so.6", 4000),
        at("usr/lib/other/libc.so.6", 5000),
        link(EntryKind::Symlink, "lib64/ld-linux-x86-64.so.2", "../lib/ld-linux-x86-64.so.2"),
    ]);
    let mut found: Vec<_> =
        tree.startup_files().into_iter().map(|range| (range.start.0, range.end.0)).collect();
    found.sort_unstable();
    assert_eq!(found, [(1000, 1612), (3000, 3612)]);
}
