//! Layers behind real FUSE mounts. Needs root and `/dev/fuse`.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Behaviour, Machine, Source, TREE_OPTIONS, fs_options, tree, until, ztoc};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use soci_fs::{
    FsOptions, FuseDevice, HeaderCheck, InitReply, LayerFs, LayerState, LayerTree, ServeOptions, Session,
    TreeOptions, Unmount,
};
use soci_oci::Digest;
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_testkit::walk::{differences, walk};

const EIO: i32 = 5;
const EROFS: i32 = 30;

fn errno(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap()
}

/// A layer with one of everything.
fn rich() -> Vec<u8> {
    let mut numbers = Numbers::new(7);
    let long = "l".repeat(120);
    LayerBuilder::new()
        .dir("./", &Attr::mode(0o755))
        .dir("bin/", &Attr::mode(0o2755).owned(3, 4))
        .file("bin/setuid", &Attr::mode(0o4755), b"#!/bin/sh\n")
        .file("bin/empty", &Attr::mode(0o600).owned(70_000, 80_000), b"")
        .file("big", &Attr::default(), &numbers.bytes(3_000_001))
        .file("page", &Attr::default(), &numbers.bytes(4096))
        .file(format!("{long}/{long}"), &Attr::default(), b"long name")
        .file(
            "caps",
            &Attr::mode(0o755)
                .xattr("security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            b"x",
        )
        .file("attributes", &Attr::default().xattr("user.empty", b"").xattr("user.some", b"\0\xff="), b"y")
        .dir("tmp/", &Attr::mode(0o1777).xattr("user.on-dir", b"1"))
        .symlink("link", "bin/setuid")
        .symlink("dangling", "/no/such/thing")
        .hard_link("big-again", "big", &Attr::default())
        .hard_link("bin/big-too", "big", &Attr::default())
        .fifo("pipe", &Attr::mode(0o640))
        .device("null", &Attr::mode(0o666), soci_testkit::layer_gen::EntryType::Char, 1, 3)
        .device("disk", &Attr::mode(0o660).owned(0, 6), soci_testkit::layer_gen::EntryType::Block, 259, 300)
        .file("implied/deep/file", &Attr::default(), b"z")
        .file("name with \u{e4}".as_bytes(), &Attr::default(), b"utf8")
        .file(b"raw\xff\xfename", &Attr::default(), b"not utf8")
        .tar()
}

/// Unpacks with the system's tar, which stands for what a layer should look like.
fn unpack(tar: &[u8], at: &Path) {
    let mut child = Command::new("tar")
        .args([
            "-x",
            "-p",
            "--delay-directory-restore",
            "--same-owner",
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            "-C",
        ])
        .arg(at)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), tar).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_mounted_layer_is_what_tar_unpacks() {
    let machine = Machine::new();
    for behaviour in [Behaviour::Cached, Behaviour::Remote] {
        let tar = rich();
        let mounted =
            machine.mount(LayerFs::new(tree(&tar), Source::new(tar.clone(), behaviour), fs_options()));
        let plain = mounted.beside("plain");
        unpack(&tar, &plain);
        let long = "l".repeat(120);
        let timeless: BTreeSet<Vec<u8>> =
            [long.into_bytes(), b"implied".to_vec(), b"implied/deep".to_vec()].into();
        let left = walk(&mounted.at).unwrap();
        assert_eq!(left.len(), 23);
        assert_eq!(differences(&left, &walk(&plain).unwrap(), &timeless), [""; 0]);
        assert_eq!(mounted.session().waiting(), 0);
    }
}

#[test]
fn large_directories_list_every_name_once() {
    let machine = Machine::new();
    let mut layer = LayerBuilder::new();
    for number in 0..12_000 {
        layer =
            layer.file(format!("many/file-{number:05}"), &Attr::default(), format!("{number}").as_bytes());
    }
    let mounted = machine.mount_tar(&layer.tar());
    for _ in 0..2 {
        let mut names = Vec::new();
        for entry in fs::read_dir(mounted.at.join("many")).unwrap() {
            let entry = entry.unwrap();
            let number: usize = entry.file_name().to_str().unwrap()[5..].parse().unwrap();
            assert_eq!(entry.metadata().unwrap().len(), number.to_string().len() as u64);
            names.push(number);
        }
        assert_eq!(names, (0..12_000).collect::<Vec<_>>());
    }
    assert_eq!(fs::read(mounted.at.join("many/file-11999")).unwrap(), b"11999");
    assert_eq!(fs::metadata(mounted.at.join("many/none")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn programs_run_from_a_mount_and_setuid_works() {
    let machine = Machine::new();
    let program = fs::read("/usr/bin/id").unwrap();
    let tar = LayerBuilder::new()
        .file("id", &Attr::mode(0o4755), &program)
        .file("plain", &Attr::mode(0o755), &program)
        .tar();
    let mounted = machine.mount_tar(&tar);
    fs::set_permissions(mounted.top(), fs::Permissions::from_mode(0o755)).unwrap();
    // Loading a program maps its file into memory.
    for (name, effective) in [("id", "0"), ("plain", "65534")] {
        let output = Command::new(mounted.at.join(name)).arg("-u").uid(65_534).gid(65_534).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), effective, "{name}");
    }
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = table.lines().find(|line| line.contains(mounted.at.to_str().unwrap())).unwrap();
    let fields: Vec<_> = line.split(' ').collect();
    assert_eq!((fields[0], fields[2]), ("soci", "fuse.soci"));
    assert!(fields[3].starts_with("ro,") && !fields[3].contains("nosuid"), "{line}");
}

#[test]
fn a_layer_cannot_be_written_to() {
    let machine = Machine::new();
    let mounted = machine.mount_tar(&rich());
    let write = OpenOptions::new().write(true).open(mounted.at.join("big")).unwrap_err();
    assert_eq!(errno(&write), EROFS);
    assert_eq!(errno(&fs::remove_file(mounted.at.join("big")).unwrap_err()), EROFS);
    assert_eq!(errno(&fs::create_dir(mounted.at.join("new")).unwrap_err()), EROFS);
    let device = File::open(mounted.at.join("big-again")).unwrap();
    assert_eq!(device.metadata().unwrap().nlink(), 3);
}

fn spawn(program: &str, arguments: &[&str]) -> Child {
    Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn an_interrupted_reader_returns_while_the_source_stalls() {
    let machine = Machine::new();
    let tar = rich();
    let source = Source::new(tar.clone(), Behaviour::Stalled);
    let mounted = machine.mount(LayerFs::new(tree(&tar), source.clone(), fs_options()));
    let big = mounted.at.join("big");
    // Directly: the reader itself waits for our reply, so the kernel tells us of its signal.
    let input = format!("if={}", big.display());
    let mut dd = spawn("dd", &[&input, "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]);
    until("dd waits for bytes", || mounted.session().waiting() > 0);
    signal(&dd, Signal::INT);
    assert!(!dd.wait().unwrap().success());
    until("its read is given up", || mounted.session().waiting() == 0);
    // Through the page cache: the reader waits for a page that the kernel reads ahead.
    let mut cat = spawn("cat", &[big.to_str().unwrap()]);
    until("cat waits for bytes", || mounted.session().waiting() > 0);
    signal(&cat, Signal::INT);
    assert!(!cat.wait().unwrap().success());
    // Metadata is answered all the while, and once the bytes come all is well.
    assert_eq!(fs::metadata(&big).unwrap().len(), 3_000_001);
    source.set(Behaviour::Remote);
    assert_eq!(fs::read(&big).unwrap().len(), 3_000_001);
    until("nothing waits", || mounted.session().waiting() == 0);
}

#[derive(Debug)]
struct State(Digest);

impl LayerState for State {
    fn digest(&self) -> &Digest {
        &self.0
    }
    fn size(&self) -> u64 {
        10
    }
    fn fetched(&self) -> u64 {
        5
    }
}

#[test]
fn a_failed_read_is_an_error_told_in_the_state_file_and_the_next_read_works() {
    let machine = Machine::new();
    let tar = rich();
    let source = Source::new(tar.clone(), Behaviour::Failing);
    let state = Arc::new(State(Digest::of(b"layer")));
    let options = FsOptions { state: Some(state.clone()), ..fs_options() };
    let mounted = machine.mount(LayerFs::new(tree(&tar), source.clone(), options));
    let directory = mounted.at.join(".soci-snapshotter");
    let state_file = directory.join(format!("{}.json", state.0));
    let before = fs::read_to_string(&state_file).unwrap();
    assert_eq!(
        before,
        format!("{{\"digest\":\"{}\",\"size\":10,\"fetchedSize\":5,\"fetchedPercent\":50}}\n", state.0)
    );
    assert_eq!(errno(&fs::read(mounted.at.join("page")).unwrap_err()), EIO);
    source.set(Behaviour::Remote);
    assert_eq!(fs::read(mounted.at.join("page")).unwrap().len(), 4096);
    let after = fs::read_to_string(&state_file).unwrap();
    assert!(after.starts_with("{\"error\":\"cannot read the layer: the test's source fails\","), "{after}");
    // It can be looked up, with the reference's modes, but is not listed.
    assert_eq!(fs::metadata(&directory).unwrap().mode(), 0o040_500);
    assert_eq!(fs::metadata(&state_file).unwrap().mode(), 0o100_400);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    assert!(
        fs::read_dir(&mounted.at).unwrap().all(|entry| entry.unwrap().file_name() != ".soci-snapshotter")
    );
}

#[test]
fn a_file_of_the_layer_wins_over_the_state_directory() {
    let machine = Machine::new();
    let tar = LayerBuilder::new().file(".soci-snapshotter", &Attr::default(), b"mine").tar();
    let options = FsOptions { state: Some(Arc::new(State(Digest::of(b"")))), ..fs_options() };
    let mounted = machine.mount(LayerFs::new(tree(&tar), Source::new(tar, Behaviour::Cached), options));
    assert_eq!(fs::read(mounted.at.join(".soci-snapshotter")).unwrap(), b"mine");
    assert_eq!(fs::read_dir(&mounted.at).unwrap().count(), 1);
}

#[test]
fn a_read_that_gets_no_bytes_fails_when_its_time_is_over() {
    let machine = Machine::new();
    let tar = rich();
    let source = Source::new(tar.clone(), Behaviour::Stalled);
    let options = FsOptions { read_timeout: Duration::from_millis(50), ..fs_options() };
    let mounted = machine.mount(LayerFs::new(tree(&tar), source, options));
    assert_eq!(errno(&fs::read(mounted.at.join("page")).unwrap_err()), EIO);
    assert!(mounted.session().fs().last_error().unwrap().contains("fetching_timeout_sec"));
}

#[test]
fn readers_of_a_page_that_does_not_come_do_not_wait_one_after_another() {
    const TIMEOUT: Duration = Duration::from_secs(4);
    let machine = Machine::new();
    let tar = LayerBuilder::new().file("large", &Attr::default(), &Numbers::new(5).bytes(1 << 20)).tar();
    let source = Source::new(tar.clone(), Behaviour::Stalled);
    let options = FsOptions { read_timeout: TIMEOUT, header_check: HeaderCheck::Off, ..fs_options() };
    let mounted = machine.mount(LayerFs::new(tree(&tar), Arc::clone(&source) as _, options));
    let file = File::open(mounted.at.join("large")).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(errno(&file.read_at(&mut [0; 10], 4096).unwrap_err()), EIO));
        }
    });
    // The kernel asks ahead of the readers, and then for the page on behalf of each.
    assert!(source.reads() > 4, "{}", source.reads());
    assert!(begun.elapsed() < TIMEOUT * 2, "{:?}", begun.elapsed());
    source.set(Behaviour::Remote);
    file.read_exact_at(&mut [0; 10], 4096).unwrap();
}

#[test]
fn a_file_whose_header_is_another_one_is_not_served() {
    let machine = Machine::new();
    let layer = |owner| {
        LayerBuilder::new()
            .file("same", &Attr::default(), b"same")
            .file("other", &Attr::default().owned(owner, 0), b"text")
            .tar()
    };
    let (promised, delivered) = (layer(0), layer(1));
    for behaviour in [Behaviour::Cached, Behaviour::Remote] {
        let source = Source::new(delivered.clone(), behaviour);
        let mounted = machine.mount(LayerFs::new(tree(&promised), source.clone(), fs_options()));
        assert_eq!(fs::read(mounted.at.join("same")).unwrap(), b"same");
        assert_eq!(errno(&fs::read(mounted.at.join("other")).unwrap_err()), EIO);
        let told = mounted.session().fs().last_error().unwrap();
        assert!(told.contains("do not describe the same file"), "{told}");
        let options = FsOptions { header_check: HeaderCheck::Off, ..fs_options() };
        let mounted = machine.mount(LayerFs::new(tree(&promised), source, options));
        assert_eq!(fs::read(mounted.at.join("other")).unwrap(), b"text");
    }
}

#[test]
fn a_hard_link_to_nothing_is_an_error_of_its_own() {
    let machine = Machine::new();
    let tar = LayerBuilder::new()
        .file("good", &Attr::default(), b"good")
        .hard_link("bad", "nowhere", &Attr::default())
        .tar();
    let mounted = machine.mount_tar(&tar);
    let names: BTreeSet<_> =
        fs::read_dir(&mounted.at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["bad".into(), "good".into()].into());
    assert_eq!(errno(&fs::read(mounted.at.join("bad")).unwrap_err()), EIO);
    assert_eq!(fs::read(mounted.at.join("good")).unwrap(), b"good");
}

#[test]
fn many_readers_at_once_read_the_same_bytes() {
    let machine = Machine::new();
    let mut numbers = Numbers::new(3);
    let contents: Vec<Vec<u8>> = (0..40).map(|number| numbers.bytes(1 + number * 20_011)).collect();
    let mut layer = LayerBuilder::new();
    for (number, content) in contents.iter().enumerate() {
        layer = layer.file(format!("{number}"), &Attr::default(), content);
    }
    let tar = layer.tar();
    let source = Source::new(tar.clone(), Behaviour::Remote);
    let mounted = machine.mount(LayerFs::new(tree(&tar), source.clone(), fs_options()));
    std::thread::scope(|scope| {
        for reader in 0..8_usize {
            let (mounted, contents, source) = (&mounted, &contents, &source);
            scope.spawn(move || {
                for step in 0..contents.len() {
                    let number = (step * 7 + reader * 5) % contents.len();
                    let file = File::open(mounted.at.join(number.to_string())).unwrap();
                    let content = &contents[number];
                    let at = content.len() / 3;
                    let mut part = vec![0; content.len() - at];
                    file.read_exact_at(&mut part, at as u64).unwrap();
                    assert_eq!(part, content[at..]);
                    source.set(if step % 2 == 0 { Behaviour::Cached } else { Behaviour::Remote });
                }
            });
        }
    });
    assert!(source.reads() > 0);
}

/// Mounts overlayfs at `at`; lower directories topmost first.
fn overlay(at: &Path, lowers: &[&Path], upper: Option<(&Path, &Path)>) {
    let lowers: Vec<_> = lowers.iter().map(|lower| lower.to_str().unwrap()).collect();
    let mut options = format!("lowerdir={}", lowers.join(":"));
    if let Some((upper, work)) = upper {
        options.push_str(&format!(",upperdir={},workdir={}", upper.display(), work.display()));
    }
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount("overlay", at, "overlay", rustix::mount::MountFlags::empty(), options.as_c_str())
        .unwrap();
}

#[test]
fn overlayfs_on_two_layers_hides_what_the_upper_one_takes_away() {
    let machine = Machine::new();
    let lower = LayerBuilder::new()
        .dir("d/", &Attr::mode(0o755))
        .file("d/gone", &Attr::default(), b"1")
        .file("d/kept", &Attr::default(), b"2")
        .file("d/changed", &Attr::default(), b"3")
        .file("opaque/old", &Attr::default(), b"4")
        .file("opaque/deep/old", &Attr::default(), b"5")
        .tar();
    let upper = LayerBuilder::new()
        .whiteout("d/gone")
        .whiteout("d/changed")
        .file("d/changed", &Attr::default(), b"new")
        .opaque("opaque")
        .file("opaque/new", &Attr::default(), b"6")
        .tar();
    let (lower, upper) = (machine.mount_tar(&lower), machine.mount_tar(&upper));
    let names = |path: &Path| -> BTreeSet<String> {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let [merged, writable, up, work] = ["merged", "writable", "up", "work"].map(|name| upper.beside(name));
    overlay(&merged, &[&upper.at, &lower.at], None);
    overlay(&writable, &[&upper.at, &lower.at], Some((&up, &work)));
    for at in [&merged, &writable] {
        assert_eq!(names(&at.join("d")), ["changed".to_owned(), "kept".to_owned()].into());
        assert_eq!(fs::read(at.join("d/changed")).unwrap(), b"new");
        assert_eq!(fs::read(at.join("d/kept")).unwrap(), b"2");
        assert_eq!(fs::metadata(at.join("d/gone")).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(names(&at.join("opaque")), ["new".to_owned()].into());
    }
    // Writing copies up.
    fs::write(writable.join("d/kept"), b"written").unwrap();
    assert_eq!(fs::read(writable.join("d/kept")).unwrap(), b"written");
    fs::remove_file(writable.join("d/changed")).unwrap();
    fs::remove_dir_all(writable.join("opaque")).unwrap();
    assert_eq!(names(&writable), ["d".to_owned()].into());
    for at in [merged, writable] {
        rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_writable_overlay_on_one_layer_is_the_layer() {
    let machine = Machine::new();
    let tar = rich();
    let mounted = machine.mount_tar(&tar);
    let [merged, up, work, plain] = ["merged", "up", "work", "plain"].map(|name| mounted.beside(name));
    unpack(&tar, &plain);
    overlay(&merged, &[&mounted.at], Some((&up, &work)));
    let long = "l".repeat(120);
    let timeless: BTreeSet<Vec<u8>> =
        [Vec::new(), long.into_bytes(), b"implied".to_vec(), b"implied/deep".to_vec()].into();
    let mut through = walk(&merged).unwrap();
    let mut plainly = walk(&plain).unwrap();
    // The merged root is the upper directory's.
    through.remove(&b""[..]);
    plainly.remove(&b""[..]);
    let different = differences(&through, &plainly, &timeless);
    rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(different, [""; 0]);
}

fn getxattr(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = [0; 64];
    let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
    Ok(value[..len].to_vec())
}

#[test]
fn extended_attributes_follow_the_rules_of_their_system_calls() {
    let machine = Machine::new();
    let mounted = machine.mount_tar(&rich());
    let file = mounted.at.join("attributes");
    assert_eq!(getxattr(&file, "user.empty"), Ok(Vec::new()));
    assert_eq!(getxattr(&file, "user.some"), Ok(b"\0\xff=".to_vec()));
    assert_eq!(getxattr(&file, "user.none"), Err(Errno::NODATA));
    assert_eq!(rustix::fs::lgetxattr_query(&file, "user.some"), Ok(3));
    assert_eq!(rustix::fs::lgetxattr(&file, "user.some", &mut [0_u8; 2][..]), Err(Errno::RANGE));
    let mut names = [0; 64];
    let len = rustix::fs::llistxattr(&file, &mut names[..]).unwrap();
    assert_eq!(&names[..len], b"user.empty\0user.some\0");
    assert_eq!(rustix::fs::llistxattr_query(&file), Ok(21));
    assert_eq!(rustix::fs::llistxattr(&file, &mut [0_u8; 20][..]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::llistxattr(mounted.at.join("page"), &mut names[..]), Ok(0));
}

#[test]
fn extended_attributes_can_be_off() {
    let machine = Machine::new();
    let tar = rich();
    let tree = LayerTree::build(&ztoc(&tar), &TreeOptions { xattrs: false, ..TREE_OPTIONS }).unwrap();
    let mounted = machine.mount(LayerFs::new(tree, Source::new(tar, Behaviour::Cached), fs_options()));
    let file = mounted.at.join("attributes");
    assert_eq!(getxattr(&file, "user.some"), Err(Errno::OPNOTSUPP));
    assert_eq!(rustix::fs::llistxattr(&file, &mut [0_u8; 64][..]), Err(Errno::OPNOTSUPP));
    assert_eq!(fs::read(&file).unwrap(), b"y");
}

#[test]
fn a_busy_mount_can_be_detached_and_is_served_until_nobody_uses_it() {
    let machine = Machine::new();
    let mounted = machine.mount_tar(&rich());
    let mut open = File::open(mounted.at.join("page")).unwrap();
    let busy = soci_fs::unmount(&mounted.at, Unmount::Idle).unwrap_err();
    let source = std::error::Error::source(&busy).unwrap();
    assert_eq!(source.downcast_ref::<Errno>(), Some(&Errno::BUSY));
    assert!(soci_fs::unmount(&mounted.at, Unmount::Detach).unwrap());
    assert!(!soci_fs::unmount(&mounted.at, Unmount::Detach).unwrap());
    assert_eq!(fs::read_dir(&mounted.at).unwrap().count(), 0);
    let mut content = Vec::new();
    open.read_to_end(&mut content).unwrap();
    assert_eq!(content.len(), 4096);
    assert!(!mounted.session().has_ended());
    drop(open);
    machine.runtime.block_on(mounted.session().ended());
    assert!(mounted.session().has_ended());
    until("it is served no more", || machine.hub.mounts() == 0);
}

#[test]
fn another_session_goes_on_with_a_mount_and_answers_what_is_left_open() {
    let machine = Machine::new();
    let tar = rich();
    let stalled = Source::new(tar.clone(), Behaviour::Stalled);
    let mut mounted = machine.mount(LayerFs::new(tree(&tar), stalled, fs_options()));
    let big = mounted.at.join("big");
    let before = fs::metadata(&big).unwrap();
    let reader = std::thread::spawn({
        let big = big.clone();
        move || fs::read(big).unwrap()
    });
    until("the reader waits for bytes", || mounted.session().waiting() > 0);
    let device: OwnedFd = mounted.session().as_fd().try_clone_to_owned().unwrap();
    let kept = mounted.session().init().encode();
    drop(mounted.session.take());
    // All is built anew, as another process would.
    let fs = LayerFs::new(tree(&tar), Source::new(tar.clone(), Behaviour::Remote), fs_options());
    let device = FuseDevice::inherited(device, &mounted.at).unwrap();
    let init = InitReply::decode(&kept).unwrap();
    let session = Session::serve(device, Some(init), fs, &ServeOptions::default(), &machine.hub).unwrap();
    mounted.session = Some(session);
    let content = reader.join().unwrap();
    assert_eq!(content.len(), 3_000_001);
    let after = fs::metadata(&big).unwrap();
    assert_eq!((before.ino(), before.size(), before.nlink()), (after.ino(), after.size(), after.nlink()));
    assert_eq!(walk(&mounted.at).unwrap().len(), 23);
}

/// Serves a mount through a socket in the place of its device, so that what comes from there can be anything.
#[test]
fn a_session_that_cannot_go_on_is_told_of_and_its_readers_fail_once_it_is_dropped() {
    let machine = Machine::new();
    let mut mounted = machine.mount_tar(&rich());
    let device = mounted.session().as_fd().try_clone_to_owned().unwrap();
    let init = *mounted.session().init();
    drop(mounted.session.take());
    let (socket, kernel) = std::os::unix::net::UnixStream::pair().unwrap();
    let fs = LayerFs::new(tree(&rich()), Source::new(rich(), Behaviour::Cached), fs_options());
    let served = FuseDevice::inherited(socket.into(), &mounted.at).unwrap();
    let init = InitReply { features: 0, ..init };
    mounted.session =
        Some(Session::serve(served, Some(init), fs, &ServeOptions::default(), &machine.hub).unwrap());
    assert!(!mounted.session().is_broken());
    std::io::Write::write_all(&mut &kernel, b"no request").unwrap();
    let broken = async { tokio::time::timeout(Duration::from_secs(60), machine.hub.broken()).await };
    machine.runtime.block_on(broken).expect("nobody was told");
    assert!(mounted.session().is_broken() && mounted.session().has_ended());
    assert_eq!(machine.hub.mounts(), 0);
    drop((mounted.session.take(), device));
    let error = fs::read(mounted.at.join("page")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::NOTCONN.raw_os_error()));
}

#[test]
fn a_mount_that_was_aborted_is_broken_and_one_that_was_unmounted_is_not() {
    let machine = Machine::new();
    let (aborted, unmounted) = (machine.mount_tar(&rich()), machine.mount_tar(&rich()));
    assert!(soci_fs::unmount(&unmounted.at, Unmount::Detach).unwrap());
    machine.runtime.block_on(unmounted.session().ended());
    // As umount --force does it: the mount stays because it is in use.
    let _in_use = File::open(aborted.at.join("page")).unwrap();
    let forced = rustix::mount::unmount(&aborted.at, rustix::mount::UnmountFlags::FORCE);
    assert_eq!(forced, Err(Errno::BUSY));
    machine.runtime.block_on(aborted.session().ended());
    assert!(aborted.session().is_broken());
    assert!(!unmounted.session().is_broken());
}

#[test]
fn free_space_is_that_of_the_local_file_system() {
    let machine = Machine::new();
    let mounted = machine.mount_tar(&rich());
    let (ours, local) = (rustix::fs::statvfs(&mounted.at).unwrap(), rustix::fs::statvfs("/tmp").unwrap());
    assert_eq!((ours.f_blocks, ours.f_namemax, ours.f_bsize), (local.f_blocks, 255, local.f_bsize));
}

#[test]
fn direct_reads_at_odd_places_are_right() {
    let machine = Machine::new();
    let tar = rich();
    let mounted = machine.mount_tar(&tar);
    let content = fs::read(mounted.at.join("big")).unwrap();
    // O_DIRECT on x86-64 and most others.
    let direct = OpenOptions::new().read(true).custom_flags(0o40_000).open(mounted.at.join("big")).unwrap();
    for (at, len) in [(0, 4096), (2_999_808, 4096), (1_048_576, 8192), (2_998_272, 512)] {
        let mut part = vec![0; len];
        let got = direct.read_at(&mut part, at as u64).unwrap();
        assert_eq!(part[..got], content[at..content.len().min(at + len)]);
    }
}
