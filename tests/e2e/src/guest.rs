//! A copy of this machine that a test may install packages on: its root file system beneath an overlay of our own.
//!
//! Nothing that is done in the guest reaches the machine. Where the machine allows it the guest runs its own systemd, in
//! namespaces of its own; the network is the machine's. Dropping the guest ends and removes all of it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use soci_testkit::process::{Daemon, output};
use soci_testkit::wait;

use crate::stage::StageDir;

/// Where the daemon keeps its state in the guest: on a real directory, for an overlay carries no overlays.
const STATE: &str = "var/lib/soci-snapshotter-grpc";
/// How long systemd may take to start.
const BOOT: Duration = Duration::from_secs(60);

/// Begins each script: `KIND` mounts the machine's kind of hierarchy of groups, `AT` is where systemd expects it.
const HIERARCHY: &str = r#"
set -e
if [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]; then
    export KIND="-t cgroup2 cgroup2" AT=sys/fs/cgroup
else
    export KIND="-t cgroup -o none,name=systemd cgroup" AT=sys/fs/cgroup/systemd
fi
"#;

/// What machines refuse in a container: a hierarchy of groups, a group in it, and namespaces with their own /proc and groups.
/// What works is undone, but for the hierarchy and the group.
const ALLOWED_SCRIPT: &str = r#"
mount $KIND "$GROUPS_AT"
mkdir "$GROUPS_AT/$GROUP"
sh -c 'echo 0 >"$GROUPS_AT/$GROUP/cgroup.procs"'
unshare --fork --kill-child --pid --mount --uts --ipc --cgroup sh -ec '
    mount --make-rprivate /
    mount -t proc proc "$ROOT/proc"
    mount $KIND "$ROOT/tmp"
'
"#;

/// Moves into a group of its own, then into namespaces of its own, and becomes systemd. Of the machine's units none starts:
/// what services depend on by default is replaced by an empty target.
const BOOT_SCRIPT: &str = r#"
echo 0 >"$GROUPS_AT/$GROUP/cgroup.procs"
exec unshare --fork --kill-child --pid --mount --uts --ipc --cgroup sh -ec '
    mount --make-rprivate /
    mount -t proc proc "$ROOT/proc"
    mount -t sysfs sysfs "$ROOT/sys"
    [ "$AT" = sys/fs/cgroup ] || mount -t tmpfs tmpfs "$ROOT/sys/fs/cgroup"
    mkdir -p "$ROOT/$AT"
    mount $KIND "$ROOT/$AT"
    exec env -i container=soci-guest PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        chroot "$ROOT" /lib/systemd/systemd --system --unit=guest.target --show-status=0 --log-target=console
'
"#;

/// What came of starting systemd in the copy.
#[derive(Debug)]
pub enum Boot {
    /// It runs.
    Up,
    /// The machine does not let it run in a container, for this reason.
    Refused(String),
}

/// The copy.
#[derive(Debug)]
pub struct Guest {
    root: PathBuf,
    group: String,
    systemd: Option<Daemon>,
    // Last: what is mounted in it is detached when it is dropped.
    directory: StageDir,
}

impl Guest {
    /// Makes one. Needs root.
    ///
    /// # Errors
    /// Where it cannot be mounted.
    pub fn new() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("needs root: it mounts an overlay of the machine's root file system");
        }
        let directory = StageDir::new()?;
        let at = directory.path().to_owned();
        let root = at.join("m");
        for name in ["u", "w", "m", "state"] {
            std::fs::create_dir(at.join(name))?;
        }
        let layers = format!("lowerdir=/,upperdir={0}/u,workdir={0}/w", at.display());
        mount(&["-t", "overlay", "overlay", "-o", &layers], &root)
            .context("an overlay of / beneath the stage's directory (SOCI_STAGE_DIR names another)")?;
        std::fs::create_dir_all(root.join(STATE))?;
        let state = at.join("state");
        mount(&["--bind", state.to_str().context("a path is not UTF-8")?], &root.join(STATE))?;
        mount(&["--bind", "/proc"], &root.join("proc"))?;
        mount(&["--rbind", "--make-rslave", "/dev"], &root.join("dev"))?;
        for name in ["run", "tmp"] {
            mount(&["-t", "tmpfs", "tmpfs"], &root.join(name))?;
        }
        // What container images have so that services stay off.
        let _ = std::fs::remove_file(root.join("usr/sbin/policy-rc.d"));
        let group = format!("soci-guest-{}", at.file_name().unwrap_or_default().to_string_lossy());
        Ok(Self { root, group, systemd: None, directory })
    }

    /// Returns its root directory, as seen by this process before [`Guest::boot`].
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns a directory beside it that it does not see.
    pub fn outside(&self) -> &Path {
        self.directory.path()
    }

    /// Starts its systemd, or says why the machine does not let one run in a container: that may be so, and whatever else
    /// goes wrong is an error.
    ///
    /// # Errors
    /// Where the machine has none, or it does not come up; the message carries the end of its log.
    pub fn boot(&mut self) -> Result<Boot> {
        let program = self.root.join("lib/systemd/systemd");
        if !program.exists() {
            bail!("this machine has no systemd (Debian package of that name)");
        }
        let units = self.root.join("etc/systemd/system");
        std::fs::create_dir_all(&units)?;
        for unit in ["guest.target", "sysinit.target"] {
            std::fs::write(units.join(unit), "[Unit]\nDescription=guest\nDefaultDependencies=no\n")?;
        }
        std::fs::create_dir(self.groups())?;
        let asked = self.script(ALLOWED_SCRIPT).stdin(Stdio::null()).output()?;
        if !asked.status.success() {
            return Ok(Boot::Refused(String::from_utf8_lossy(&asked.stderr).into_owned()));
        }
        let command = self.script(BOOT_SCRIPT);
        let log = self.directory.path().join("systemd.log");
        let mut systemd = Daemon::start("systemd", &command, &log, Signal::KILL)?;
        let id = systemd.id();
        let running =
            || init_of(id).is_some_and(|init| run_in(init, "systemctl", &["is-system-running"]).is_ok());
        let booted = systemd.wait_ready(BOOT, running);
        self.systemd = Some(systemd);
        booted?;
        Ok(Boot::Up)
    }

    fn script(&self, text: &str) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{HIERARCHY}{text}")])
            .env("ROOT", &self.root)
            .env("GROUPS_AT", self.groups())
            .env("GROUP", &self.group)
            .env_remove("NOTIFY_SOCKET");
        command
    }

    /// Returns the process id of its systemd, as the machine counts.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn init(&self) -> Result<u32> {
        self.systemd.as_ref().and_then(|systemd| init_of(systemd.id())).context("the guest's systemd ended")
    }

    /// Runs a program in it and returns what it prints.
    ///
    /// # Errors
    /// Where it fails; the message carries what it said.
    pub fn run(&self, program: &str, words: &[&str]) -> Result<String> {
        if self.systemd.is_some() {
            return run_in(self.init()?, program, words);
        }
        let mut command = Command::new("chroot");
        Ok(output(clean(&mut command).arg(&self.root).arg(program).args(words))?)
    }

    fn groups(&self) -> PathBuf {
        self.directory.path().join("groups")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let Some(mut systemd) = self.systemd.take() else { return };
        // With its first process all others of the guest end.
        systemd.kill();
        let group = self.groups().join(&self.group);
        wait::until(Duration::from_secs(10), || remove_groups(&group).then_some(()));
    }
}

fn mount(words: &[&str], at: &Path) -> Result<()> {
    output(Command::new("mount").args(words).arg(at))?;
    Ok(())
}

/// Takes what the caller's environment says out of a command, but where programs are.
fn clean(command: &mut Command) -> &mut Command {
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("DEBIAN_FRONTEND", "noninteractive")
}

/// Returns the only child of the process that waits for the namespaces' first process.
fn init_of(outer: u32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

fn run_in(init: u32, program: &str, words: &[&str]) -> Result<String> {
    let mut command = Command::new("nsenter");
    clean(&mut command).args([
        "--mount",
        "--pid",
        "--root",
        "--wd",
        "--target",
        &init.to_string(),
        "--",
        program,
    ]);
    Ok(output(command.args(words))?)
}

/// Removes a group and those within it; returns whether it is gone.
fn remove_groups(group: &Path) -> bool {
    if let Ok(entries) = group.read_dir() {
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(group);
    !group.exists()
}
