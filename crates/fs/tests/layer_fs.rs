//! The file system by itself, without a mount.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use common::{Behaviour, Source, fs_options, tree};
use proptest::prelude::*;
use soci_fs::{FsError, FsOptions, HeaderCheck, Inode, LayerFs, Opened, ReadReply};
use soci_layer::{RangeRead, ReadChunks, ReadError};
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_ztoc::UncompressedOffset;

async fn read(fs: &Arc<LayerFs>, inode: Inode, offset: u64, len: usize) -> Result<Bytes, FsError> {
    match fs.read(inode, offset, len) {
        ReadReply::Ready(result) => result,
        ReadReply::Wait(read) => read.await,
    }
    .map(ReadChunks::into_bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_part_of_any_file_is_what_the_tar_has(
        sizes in prop::collection::vec(0_usize..300_000, 1..5),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 0_u64..400_000, 0_usize..400_000), 1..10),
        waits in any::<bool>(),
    ) {
        let mut numbers = Numbers::new(11);
        let contents: Vec<_> = sizes.iter().map(|size| numbers.bytes(*size)).collect();
        let layer = contents.iter().enumerate().fold(LayerBuilder::new(), |layer, (number, content)| {
            layer.file(format!("{number}"), &Attr::default(), content)
        });
        let tar = layer.tar();
        let behaviour = if waits { Behaviour::Remote } else { Behaviour::Cached };
        let fs = LayerFs::new(tree(&tar), Source::new(tar, behaviour), fs_options());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for (number, offset, len) in reads {
                let number = number.index(contents.len());
                let content = &contents[number];
                let inode = fs.lookup(Inode::ROOT, number.to_string().as_bytes()).unwrap().inode;
                let start = usize::try_from(offset).unwrap().min(content.len());
                let expected = &content[start..content.len().min(start + len)];
                prop_assert_eq!(&read(&fs, inode, offset, len).await.unwrap()[..], expected);
            }
            Ok(())
        })?;
    }
}

/// Gives one byte less than it is asked for.
#[derive(Debug)]
struct Short;

#[async_trait::async_trait]
impl RangeRead for Short {
    fn try_read(&self, _: UncompressedOffset, _: usize) -> Option<ReadChunks> {
        None
    }

    async fn read_at(&self, _: UncompressedOffset, len: usize, _: Instant) -> Result<ReadChunks, ReadError> {
        Ok(Bytes::from(vec![0; len - 1]).into())
    }
}

#[tokio::test]
async fn a_short_answer_is_an_error_and_never_filled_up() {
    let tar = LayerBuilder::new().file("f", &Attr::default(), &[1; 100]).tar();
    let options = FsOptions { header_check: HeaderCheck::Off, ..fs_options() };
    let fs = LayerFs::new(tree(&tar), Arc::new(Short), options);
    let inode = fs.lookup(Inode::ROOT, b"f").unwrap().inode;
    let error = read(&fs, inode, 0, 50).await.unwrap_err();
    assert!(matches!(error, FsError::Length { want: 50, got: 49 }), "{error:?}");
    assert_eq!(fs.last_error().unwrap(), "49 bytes came where 50 were asked for");
}

#[tokio::test]
async fn a_header_is_checked_once_per_file() {
    let tar = LayerBuilder::new().file("f", &Attr::default(), &[1; 100]).tar();
    let source = Source::new(tar.clone(), Behaviour::Remote);
    let fs = LayerFs::new(tree(&tar), source.clone(), fs_options());
    let inode = fs.lookup(Inode::ROOT, b"f").unwrap().inode;
    for reads in [2, 3, 4] {
        assert_eq!(read(&fs, inode, 0, 10).await.unwrap().len(), 10);
        assert_eq!(source.reads(), reads);
    }
}

#[tokio::test]
async fn numbers_that_nothing_has_are_stale_and_kinds_are_told_apart() {
    let tar = LayerBuilder::new()
        .file("f", &Attr::default(), b"x")
        .symlink("l", "f")
        .dir("d/", &Attr::mode(0o755))
        .tar();
    let fs = LayerFs::new(tree(&tar), Source::new(tar.clone(), Behaviour::Cached), fs_options());
    let inode = |name: &[u8]| fs.lookup(Inode::ROOT, name).unwrap().inode;
    for number in [0, 2, 3, 7, u64::MAX] {
        assert!(matches!(fs.getattr(Inode(number)), Err(FsError::Stale)), "{number}");
        assert!(fs.open(Inode(number)).is_err() && read(&fs, Inode(number), 0, 1).await.is_err());
        assert!(fs.read_dir(Inode(number), 0, |_| true).is_err());
    }
    assert_eq!(fs.open(inode(b"f")).unwrap(), Opened::Immutable);
    assert!(matches!(fs.open(inode(b"d")), Err(FsError::NotRegular)));
    assert!(matches!(fs.lookup(inode(b"f"), b"x"), Err(FsError::NotDirectory)));
    assert!(matches!(fs.readlink(inode(b"f")), Err(FsError::NotLink)));
    assert_eq!(fs.readlink(inode(b"l")).unwrap(), b"f");
    assert!(matches!(fs.lookup(Inode::ROOT, b".soci-snapshotter"), Err(FsError::NoEntry)));
    assert_eq!(fs.lookup(inode(b"d"), b"..").unwrap().inode, Inode::ROOT);
}

#[tokio::test]
async fn a_listing_can_be_taken_up_at_any_offset() {
    let layer = (0..20)
        .fold(LayerBuilder::new(), |layer, number| layer.file(format!("{number:02}"), &Attr::default(), b""));
    let tar = layer.tar();
    let fs = LayerFs::new(tree(&tar), Source::new(tar, Behaviour::Cached), fs_options());
    let list = |offset, count: usize| {
        let mut names = Vec::new();
        let mut last = offset;
        fs.read_dir(Inode::ROOT, offset, |item| {
            if names.len() == count {
                return false;
            }
            names.push(String::from_utf8(item.name.to_vec()).unwrap());
            last = item.next;
            true
        })
        .unwrap();
        (names, last)
    };
    let (all, _) = list(0, 100);
    assert_eq!((all.len(), &all[..3]), (22, &[".".to_owned(), "..".to_owned(), "00".to_owned()][..]));
    for step in 1..7 {
        let (mut joined, mut offset) = (Vec::new(), 0);
        loop {
            let (names, next) = list(offset, step);
            if names.is_empty() {
                break;
            }
            joined.extend(names);
            offset = next;
        }
        assert_eq!(joined, all);
    }
    assert_eq!(list(u64::MAX, 10).0, [""; 0]);
}
