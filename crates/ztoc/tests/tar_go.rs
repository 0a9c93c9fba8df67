//! The tar parser agrees with Go's `archive/tar`, which all other tools of the field use. See `fixtures/README.md`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fmt::Write as _;
use std::io::Read;
use std::path::PathBuf;

use soci_ztoc::EntryKind;
use soci_ztoc::tar::{Member, Parser, Step, TarFault};

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tar").join(name);
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
    bytes
}

fn cases() -> Vec<Vec<u8>> {
    let blob = fixture("cases.gz");
    let mut rest = blob.as_slice();
    let mut cases = Vec::new();
    while let Some((len, tail)) = rest.split_first_chunk::<4>() {
        let (case, tail) = tail.split_at(usize::try_from(u32::from_le_bytes(*len)).unwrap());
        cases.push(case.to_vec());
        rest = tail;
    }
    cases
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn line(case: usize, member: &Member) -> String {
    let flag = match member.kind {
        EntryKind::Regular => '0',
        EntryKind::HardLink => '1',
        EntryKind::Symlink => '2',
        EntryKind::CharDevice => '3',
        EntryKind::BlockDevice => '4',
        EntryKind::Directory => '5',
        EntryKind::Fifo => '6',
    };
    let (name, link) = (hex(&member.name), hex(&member.link));
    let (uname, gname) = (hex(&member.uname), hex(&member.gname));
    let (data, size, mode) = (member.data, member.size, member.raw_mode);
    let (uid, gid, time) = (member.uid(), member.gid(), member.mtime.to_rfc3339());
    let (major, minor) = (member.raw_dev_major, member.raw_dev_minor);
    let mut line = format!(
        "{case} {name} {flag} {link} {data} {size} {mode} {uid} {gid} {uname} {gname} {time} {major} {minor}"
    );
    for (key, value) in &member.pax {
        write!(line, " {}={}", hex(key), hex(value)).unwrap();
    }
    line
}

/// What our parser reads, in the fixture's form; the archive comes in pieces of `chunk` bytes.
fn read(case: usize, archive: &[u8], chunk: usize) -> Vec<String> {
    let mut parser = Parser::new();
    let mut lines = Vec::new();
    for piece in archive.chunks(chunk) {
        let mut input = piece;
        loop {
            match parser.step(&mut input) {
                Ok(Step::More) => break,
                Ok(Step::Data(_)) => {}
                Ok(Step::Member(member)) => lines.push(line(case, &member)),
                Ok(Step::Global(_)) => lines.push(format!("{case} global")),
                Ok(Step::End) => {
                    lines.push(format!("{case} end {}", parser.position()));
                    return lines;
                }
                Err(error) => {
                    lines.push(format!(
                        "{case} {}",
                        if error.fault == TarFault::Sparse { "sparse" } else { "error" }
                    ));
                    return lines;
                }
            }
        }
    }
    lines.push(match parser.finish() {
        Ok(()) => format!("{case} end {}", parser.position()),
        Err(_) => format!("{case} error"),
    });
    lines
}

#[test]
fn every_archive_reads_as_by_go() {
    let expected = String::from_utf8(fixture("go-archive-tar.gz")).unwrap();
    let mut expected = expected.lines();
    let cases = cases();
    assert_eq!(cases.len(), 400);
    for (number, archive) in cases.iter().enumerate() {
        for ours in read(number, archive, usize::MAX) {
            let go = expected.next().unwrap();
            // Go tells an old GNU sparse file apart only by reading its map, which here is none.
            let same = ours == go || (ours == format!("{number} sparse") && go == format!("{number} error"));
            assert!(same, "ours {ours}\n  go {go}");
        }
    }
    assert_eq!(expected.next(), None);
}

#[test]
fn the_size_of_the_pieces_does_not_matter() {
    for (number, archive) in cases().iter().enumerate() {
        let whole = read(number, archive, usize::MAX);
        for chunk in [1, 100, 512, 513] {
            assert_eq!(read(number, archive, chunk), whole, "pieces of {chunk}");
        }
    }
}
