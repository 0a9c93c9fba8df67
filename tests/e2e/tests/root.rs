//! The daemon's root directory in trouble, with a real containerd: full, out of inodes, in memory, read-only, in use, of a newer
//! version. Containers keep what they read, images can always be removed, and a daemon that refuses to start says why.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::Value;
use soci_e2e::binaries::Binaries;
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::StageDir;
use soci_e2e::state::{PATIENCE, SHOWN};
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::Numbers;
use soci_testkit::snapshotter::{Options, Snapshotter};
use soci_testkit::{AuthMode, wait};

fn options() -> Result<StageOptions> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config_head.push_str(SHOWN);
    Ok(options)
}

/// A stage with an image that is pulled, two of its layers lazily.
fn stage(options: StageOptions) -> Result<(Stage, Image, Published)> {
    let stage = Stage::start(options)?;
    let image = images::odd(Dialect::Oci);
    let published = stage.publish_v2(&image, "team/app", "1")?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 2);
    Ok((stage, image, published))
}

/// What takes all that a file system has.
trait Filler {
    fn fill(&mut self) -> Result<()>;
    fn empty(&self) -> Result<()>;
}

/// A file of all bytes.
struct Bytes(PathBuf);

impl Filler for Bytes {
    fn fill(&mut self) -> Result<()> {
        let stat = rustix::fs::statvfs(self.0.parent().context("a file without a directory")?)?;
        let file = fs::OpenOptions::new().append(true).create(true).open(&self.0)?;
        let free = stat.f_bavail * stat.f_frsize;
        if free > 0 {
            let size = file.metadata()?.len();
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), size, free)?;
        }
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(&self.0)?)
    }
}

/// A directory of empty files.
struct Inodes(PathBuf, usize);

impl Filler for Inodes {
    fn fill(&mut self) -> Result<()> {
        if !self.0.exists() {
            fs::create_dir(&self.0)?;
        }
        while fs::write(self.0.join(self.1.to_string()), b"").is_ok() {
            self.1 += 1;
        }
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_dir_all(&self.0)?)
    }
}

/// With no room left: what is mounted is read, another image fails or falls back, the daemon restarts, images are removed, and
/// with room again all is as before.
fn a_full_root(tmpfs: &str, filler: impl FnOnce(&Stage) -> Box<dyn Filler>) -> Result<()> {
    let mut options = options()?;
    options.tmpfs = Some(tmpfs.to_owned());
    let (mut stage, image, published) = stage(options)?;
    let other = images::small(80);
    let other_published = stage.publish_v2(&other, "team/other", "1")?;
    let mut filler = filler(&stage);
    filler.fill()?;
    {
        let mounts = stage.snapshotter.fuse_mounts()?;
        let large = mounts.iter().map(|mount| mount.at.join("large")).find(|path| path.exists());
        let read = fs::read(large.context("no layer has the file")?)?;
        assert_eq!(read.len(), images::LARGE, "spans that cannot be stored are served all the same");
    }
    if let Err(error) = stage.pull_as_kubelet(&other_published) {
        let said = format!("{error:#}");
        assert!(said.to_lowercase().contains("no space left"), "{said}");
    }
    stage.snapshotter.daemon().kill();
    filler.fill()?;
    stage.snapshotter.start_again()?;
    stage.wait_lazy_layers(2)?;
    // Asks the daemon for each snapshot. What containerd collects while it has not found the daemon again stays for good.
    let reached = || stage.containerd.run(KUBELET, &["snapshots", "--snapshotter", "soci", "list"]).ok();
    wait::until(PATIENCE, reached).context("containerd does not reach the daemon after its restart")?;
    stage.remove_images(&[&published.reference, &other_published.reference])?;
    filler.empty()?;
    stage.pull_as_kubelet(&published)?;
    stage.pull_as_kubelet(&other_published)?;
    let mounted = stage.containerd.mount(KUBELET, "soci", &other.chain_id(), "other")?;
    assert!(fs::read(mounted.path().join("content"))? == Numbers::new(80).bytes(1_200_000));
    drop(mounted);
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

#[test]
fn on_a_full_disk_containers_read_the_daemon_restarts_and_images_can_be_removed() -> Result<()> {
    a_full_root("size=64m", |stage| Box::new(Bytes(stage.snapshotter.root().join("filler"))))
}

#[test]
fn without_inodes_containers_read_the_daemon_restarts_and_images_can_be_removed() -> Result<()> {
    a_full_root("size=128m,nr_inodes=400", |stage| {
        Box::new(Inodes(stage.snapshotter.root().join("filler"), 0))
    })
}

#[test]
fn a_root_in_memory_is_a_root_like_any_other() -> Result<()> {
    let mut options = options()?;
    options.tmpfs = Some("size=128m".to_owned());
    let (mut stage, image, published) = stage(options)?;
    let before = stage.probe(KUBELET, &published, "before", &["sum", "/large"])?;
    stage.snapshotter.daemon().kill();
    stage.start_snapshotter_again()?;
    stage.wait_lazy_layers(2)?;
    assert_eq!(stage.probe(KUBELET, &published, "after", &["sum", "/large"])?, before);
    let differences = stage.differences(KUBELET, &published, &image, &images::odd_timeless())?;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    stage.remove_images(&[&published.reference])
}

/// A first start on a root directory where nothing can be made says why and what to do, and succeeds when that is done.
fn a_first_start(tmpfs: &str, named: &str, mend: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let directory = StageDir::new()?;
    let root = directory.path().join("s/root");
    fs::create_dir_all(&root)?;
    let size = std::ffi::CString::new(tmpfs)?;
    rustix::mount::mount("tmpfs", &root, "tmpfs", MountFlags::empty(), size.as_c_str())?;
    // Whatever there is.
    Bytes(root.join("filler")).fill()?;
    let mut number = 0;
    while number < 64 && fs::write(root.join(number.to_string()), b"").is_ok() {
        number += 1;
    }
    if named.contains("written to") {
        rustix::mount::mount_remount(&root, MountFlags::RDONLY, c"")?;
    }
    let program = Binaries::ours()?.path("soci-snapshotter-grpc");
    let mut refused = Command::new(&program);
    refused.arg("--address").arg(directory.path().join("refused.sock")).arg("--root").arg(&root);
    let config = directory.path().join("config.toml");
    fs::write(&config, "")?;
    let output = refused.arg("--config").arg(config).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let fatal: Value = serde_json::from_str(said.lines().next_back().unwrap_or_default())?;
    let (level, message) = (&fatal["level"], fatal["msg"].as_str().unwrap_or_default());
    assert_eq!(level, "fatal", "{said}");
    assert!(message.starts_with(&format!("root directory {root:?} {named}")), "{said}");
    assert!(message.contains("use another --root"), "{said}");
    mend(&root)?;
    let options = Options { program, config: String::new(), env: Vec::new(), log_level: "info".to_owned() };
    Snapshotter::start(&directory.path().join("s"), options)?;
    Ok(())
}

#[test]
fn a_first_start_on_a_full_disk_says_where_room_is_wanted() -> Result<()> {
    a_first_start("size=1m", "has no room", |root| Ok(fs::remove_file(root.join("filler"))?))
}

#[test]
fn a_first_start_without_inodes_says_where_room_is_wanted() -> Result<()> {
    a_first_start("size=1m,nr_inodes=40", "has no room", |root| {
        fs::read_dir(root)?.try_for_each(|entry| Ok(fs::remove_file(entry?.path())?))
    })
}

#[test]
fn a_first_start_on_a_read_only_disk_says_that_it_must_write() -> Result<()> {
    a_first_start("size=1m", "must be on a file system that can be written to", |root| {
        rustix::mount::mount_remount(root, MountFlags::empty(), c"")?;
        Ok(fs::remove_file(root.join("filler"))?)
    })
}

/// Starts the daemon, which is expected to refuse, and returns what it says.
fn refusal(stage: &mut Stage) -> Result<String> {
    let error = stage.snapshotter.start_again().err().context("the daemon starts")?;
    Ok(error.to_string())
}

#[test]
fn a_read_only_root_is_refused_with_the_reason_and_serves_again_when_it_can_be_written() -> Result<()> {
    let (mut stage, _, published) = stage(options()?)?;
    stage.snapshotter.daemon().stop();
    let root = stage.snapshotter.root();
    rustix::mount::mount_bind(&root, &root)?;
    rustix::mount::mount_remount(&root, MountFlags::BIND | MountFlags::RDONLY, c"")?;
    let said = refusal(&mut stage)?;
    assert!(said.contains("can be written to") && said.contains(&*root.to_string_lossy()), "{said}");
    rustix::mount::unmount(&root, UnmountFlags::DETACH)?;
    stage.start_snapshotter_again()?;
    stage.wait_lazy_layers(2)?;
    assert_eq!(stage.probe(KUBELET, &published, "c", &["echo", "again"])?, "again\n");
    Ok(())
}

#[test]
fn a_second_daemon_on_the_root_is_refused_and_the_first_serves_on() -> Result<()> {
    let (mut stage, _, published) = stage(options()?)?;
    let mut second = Command::new(stage.binaries.path("soci-snapshotter-grpc"));
    second.arg("--address").arg(stage.path().join("second.sock"));
    second.arg("--root").arg(stage.snapshotter.root());
    second.arg("--config").arg(stage.path().join("s/config.toml"));
    let output = second.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let first = stage.snapshotter.daemon().id();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("process {first}")) && said.contains("--root"), "{said}");
    assert_eq!(stage.probe(KUBELET, &published, "c", &["echo", "served"])?, "served\n");
    Ok(())
}

#[test]
fn a_root_of_a_newer_version_is_refused_and_left_as_it_is() -> Result<()> {
    let (mut stage, _, published) = stage(options()?)?;
    stage.snapshotter.daemon().stop();
    let version = stage.snapshotter.root().join("version");
    let ours = fs::read_to_string(&version)?;
    fs::write(&version, "soci-snapshotter-grpc state 7\n")?;
    let before = stage.files();
    let said = refusal(&mut stage)?;
    assert!(said.contains("format 7") && said.contains("newer"), "{said}");
    assert_eq!(stage.files(), before);
    fs::write(&version, ours)?;
    stage.start_snapshotter_again()?;
    stage.wait_lazy_layers(2)?;
    assert_eq!(stage.probe(KUBELET, &published, "c", &["echo", "again"])?, "again\n");
    Ok(())
}
