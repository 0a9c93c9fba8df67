//! A layer of a million files in one directory, the largest that is promised: indexed, decoded and mounted within the limits and
//! within memory that is a bounded number of bytes for each file, and each name is found.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::ErrorKind;
use std::time::Instant;
use std::{fs, sync::Arc};

use common::{Machine, TREE_OPTIONS, fs_options};
use soci_fs::{LayerFs, LayerTree};
use soci_layer::{RangeRead, ReadChunks, ReadError};
use soci_ztoc::{BuildOptions, Compression, DecodeLimits, UncompressedOffset, Ztoc, ZtocBuilder};

const FILES: u64 = 1_000_000;
const BLOCK: usize = 512;
/// What the last file holds; the others are empty.
const LAST: &[u8] = b"the last of a million";
/// Memory for each file that a mounted layer may have, in bytes.
const KEPT: u64 = 400;
/// The same while its zTOC is decoded and its tree made.
const PEAK: u64 = 1600;

fn name(number: u64) -> String {
    format!("file-{number:07}")
}

/// Returns block `number` of the tar: a header for each file, then what the last one holds, then the end.
fn block(number: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    if number == FILES {
        block[..LAST.len()].copy_from_slice(LAST);
    }
    if number >= FILES {
        return block;
    }
    let size = if number + 1 == FILES { LAST.len() } else { 0 };
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, &format!("many/{}", name(number)));
    for (at, text) in [(100, "0000644\0"), (108, "0000000\0"), (116, "0000000\0"), (136, "14700000000\0")] {
        put(at, text);
    }
    put(124, &format!("{size:011o}\0"));
    put(148, "        0");
    put(257, "ustar\x0000");
    // There is nothing after the magic.
    let sum: u32 = block[..265].iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// The tar, made as it is read.
#[derive(Debug)]
struct Tar;

#[async_trait::async_trait]
impl RangeRead for Tar {
    fn try_read(&self, at: UncompressedOffset, len: usize) -> Option<ReadChunks> {
        let first = at.0 / BLOCK as u64;
        let skip = usize::try_from(at.0 % BLOCK as u64).unwrap();
        let blocks: Vec<_> = (first..).take((skip + len).div_ceil(BLOCK)).map(block).collect();
        let mut chunks = ReadChunks::new();
        chunks.push(blocks.as_flattened()[skip..skip + len].to_vec().into());
        Some(chunks)
    }

    async fn read_at(&self, at: UncompressedOffset, len: usize, _: Instant) -> Result<ReadChunks, ReadError> {
        Ok(self.try_read(at, len).unwrap())
    }
}

/// Returns a line of `/proc/self/status`, in bytes.
fn memory(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().split(' ').next().unwrap().parse::<u64>().unwrap() * 1024
}

fn per_file(bytes: u64) -> u64 {
    bytes / FILES
}

/// Returns the zTOC.
fn build() -> Vec<u8> {
    let options = BuildOptions { span_size: 4 << 20, build_tool: "test".into() };
    let mut builder = ZtocBuilder::new(Compression::Uncompressed, options).unwrap();
    let mut numbers = 0..FILES + 3;
    loop {
        let piece: Vec<_> = numbers.by_ref().take(2048).map(block).collect();
        if piece.is_empty() {
            return builder.finish().unwrap().bytes;
        }
        builder.push(piece.as_flattened()).unwrap();
    }
}

#[test]
fn a_layer_of_a_million_files_is_served_within_bounded_memory() {
    let begun = Instant::now();
    let limits = DecodeLimits::default();
    // On a thread of its own: what building takes of the heap is left out of what is measured.
    let built = std::thread::spawn(build).join().unwrap();
    assert!(built.len() < limits.bytes / 2, "a zTOC of {} bytes", built.len());
    println!("{:?}: built, a zTOC of {} bytes a file", begun.elapsed(), per_file(built.len() as u64));
    // The most that was resident counts from here.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    // The zTOC's own bytes are the daemon's as well.
    let before = memory("RssAnon").saturating_sub(built.len() as u64);
    let ztoc = Ztoc::decode(built.into(), &limits).unwrap();
    println!("{:?}: decoded", begun.elapsed());
    let tree = LayerTree::build(&ztoc, &TREE_OPTIONS).unwrap();
    drop(ztoc);
    let machine = Machine::new();
    let mounted = machine.mount(LayerFs::new(tree, Arc::new(Tar), fs_options()));
    let (kept, peak) = (memory("RssAnon").saturating_sub(before), memory("VmHWM").saturating_sub(before));
    println!(
        "{:?}: mounted with {} bytes a file, {} at most",
        begun.elapsed(),
        per_file(kept),
        per_file(peak)
    );
    assert!(per_file(kept) < KEPT, "{kept} bytes are kept");
    assert!(per_file(peak) < PEAK, "{peak} bytes at most");

    let many = mounted.at.join("many");
    let mut next = 0;
    for entry in fs::read_dir(&many).unwrap() {
        assert_eq!(entry.unwrap().file_name().to_str(), Some(name(next).as_str()));
        next += 1;
    }
    assert_eq!(next, FILES);
    println!("{:?}: listed", begun.elapsed());
    for number in (0..FILES).step_by(9_973) {
        assert_eq!(fs::metadata(many.join(name(number))).unwrap().len(), 0);
    }
    for absent in [name(FILES), "file-0500000x".to_owned(), "file".to_owned(), "a".to_owned()] {
        assert_eq!(fs::metadata(many.join(absent)).unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert_eq!(fs::read(many.join(name(FILES - 1))).unwrap(), LAST);
    let kept = memory("RssAnon").saturating_sub(before);
    println!("{:?}: looked up, {} bytes a file", begun.elapsed(), per_file(kept));
    assert!(per_file(kept) < KEPT, "{kept} bytes are kept");
}
