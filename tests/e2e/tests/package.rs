//! The Debian package: installed, run as its units say, and removed, on a copy of this machine.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use soci_e2e::binaries::Binaries;
use soci_e2e::guest::{Boot, Guest};
use soci_e2e::stage::{Backstage, PASSWORD, USER};
use soci_e2e::{images, layout, not_run};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::{Attr, EntryType, LayerBuilder, Numbers};
use soci_testkit::process::output;
use soci_testkit::snapshots::Snapshots;
use soci_testkit::{AuthMode, mounts, wait};

const PACKAGE: &str = "soci-snapshotter";
const CONFIG: &str = "/etc/soci-snapshotter-grpc/config.toml";
const SOCKET: &str = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock";
const SERVICE: &str = "soci-snapshotter-grpc.service";
const UNITS: [&str; 2] = [SERVICE, "soci-snapshotter-grpc.socket"];
/// Where the daemon of the guest logs to: its systemd has no journal.
const LOG: &str = "/run/daemon.log";
const PATIENCE: Duration = Duration::from_secs(60);

/// A package with debugging information is large: one guest at a time.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Builds the package of the binaries under test, in the guest; returns its path there.
fn package_for(guest: &Guest) -> Result<String> {
    let binaries = Binaries::ours()?.path("");
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["run", "--quiet", "--package", "xtask", "--", "package", "--binaries"])
        .arg(binaries)
        .arg("--output")
        .arg(guest.root().join("opt"));
    let printed = output(&mut command)?;
    let package = printed.lines().last().context("cargo xtask package prints no path")?;
    let inside = Path::new(package).strip_prefix(guest.root())?;
    Ok(format!("/{}", inside.display()))
}

fn exists(guest: &Guest, path: &str) -> bool {
    guest.root().join(path.trim_start_matches('/')).symlink_metadata().is_ok()
}

#[test]
fn it_brings_all_that_a_node_needs_and_takes_it_away_again() -> Result<()> {
    let _turn = turn();
    let guest = Guest::new()?;
    let package = package_for(&guest)?;
    guest.run("dpkg", &["--install", &package])?;
    let listed = guest.run("dpkg", &["--listfiles", PACKAGE])?;
    for program in ["soci", "soci-snapshotter-grpc"] {
        let version = guest.run(program, &["--version"])?;
        assert!(version.starts_with(&format!("{program} version ")), "{version}");
        let page = format!("/usr/share/man/man1/{program}.1.gz");
        assert!(guest.run("zcat", &[&page])?.contains(".SH SYNOPSIS"), "{page}");
        guest.run("bash", &["-n", &format!("/usr/share/bash-completion/completions/{program}")])?;
        for path in [
            format!("/usr/share/zsh/vendor-completions/_{program}"),
            format!("/usr/share/fish/vendor_completions.d/{program}.fish"),
        ] {
            assert!(listed.lines().any(|line| line == path), "{path}\n{listed}");
        }
    }
    // The configuration is the default one, and every key of it is known.
    let default = guest.run("soci-snapshotter-grpc", &["config", "default"])?;
    let config = std::fs::read_to_string(guest.root().join(&CONFIG[1..]))?;
    assert!(config.ends_with(&default), "{config}");
    assert_eq!(guest.run("soci-snapshotter-grpc", &["config", "dump"])?, default);

    // What was configured survives removal and goes with a purge; so does what was cached.
    let cached = "/var/lib/soci-snapshotter-grpc/soci";
    std::fs::create_dir(guest.root().join(&cached[1..]))?;
    guest.run("dpkg", &["--remove", PACKAGE])?;
    assert!(exists(&guest, CONFIG) && exists(&guest, cached));
    assert!(!exists(&guest, "/usr/bin/soci-snapshotter-grpc"));
    guest.run("dpkg", &["--purge", PACKAGE])?;
    assert!(!exists(&guest, cached));
    let ours = |line: &&str| line.contains("soci");
    let left: Vec<&str> = listed.lines().filter(ours).filter(|path| exists(&guest, path)).collect();
    assert_eq!(left, Vec::<&str>::new());
    Ok(())
}

#[test]
fn a_state_directory_behind_a_link_is_emptied_and_the_link_goes() -> Result<()> {
    let _turn = turn();
    let guest = Guest::new()?;
    let package = package_for(&guest)?;
    guest.run("dpkg", &["--install", &package])?;
    let (link, disk) = ("/var/lib/soci-snapshotter-grpc", "/srv/disk/soci");
    guest.run("umount", &[link])?;
    guest.run("rmdir", &[link])?;
    let layer = format!("{disk}/snapshotter/snapshots/1/fs");
    guest.run("mkdir", &["-p", &layer, &format!("{disk}/soci/spans")])?;
    guest.run("touch", &[&format!("{disk}/version"), &format!("{disk}/of-somebody-else")])?;
    guest.run("ln", &["-s", disk, link])?;
    // Stands in for the mount of a daemon that was killed.
    guest.run("mount", &["-t", "tmpfs", "dead", &layer])?;
    guest.run("dpkg", &["--remove", PACKAGE])?;
    assert_eq!(mounts::beneath(&guest.root().join(&disk[1..]))?.len(), 0);
    assert!(exists(&guest, link) && exists(&guest, &layer));
    guest.run("dpkg", &["--purge", PACKAGE])?;
    assert!(!exists(&guest, link));
    assert_eq!(guest.run("ls", &["-A", disk])?.trim(), "of-somebody-else");
    Ok(())
}

/// A unit file: sections with their assignments, in order.
struct Unit(Vec<(String, String, String)>);

impl Unit {
    fn read(path: &Path) -> Result<Self> {
        let mut entries = Vec::new();
        let mut section = String::new();
        for line in std::fs::read_to_string(path)?.lines() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                name.clone_into(&mut section);
                continue;
            }
            let (key, value) = line.split_once('=').with_context(|| format!("{line:?}"))?;
            entries.push((section.clone(), key.to_owned(), value.to_owned()));
        }
        Ok(Self(entries))
    }

    /// Returns the words of all assignments to a key.
    fn words(&self, section: &str, key: &str) -> Vec<&str> {
        let found = self.0.iter().filter(|(in_section, name, _)| in_section == section && name == key);
        found.flat_map(|(_, _, value)| value.split_whitespace()).collect()
    }
}

/// The process that a test stands in for systemd for.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn its_command_line_serves_the_socket_it_is_handed_and_gives_signs_of_life() -> Result<()> {
    let _turn = turn();
    let guest = Guest::new()?;
    let package = package_for(&guest)?;
    guest.run("dpkg", &["--install", &package])?;
    let unit = |name: &str| Unit::read(&guest.root().join("lib/systemd/system").join(name));
    let (service, socket) = (unit(UNITS[0])?, unit(UNITS[1])?);
    let paths = UNITS.map(|name| format!("/lib/systemd/system/{name}"));
    assert_eq!(guest.run("systemd-analyze", &["verify", &paths[0], &paths[1]])?, "");
    assert_eq!(socket.words("Socket", "ListenStream"), [SOCKET]);
    assert_eq!(
        (socket.words("Socket", "SocketMode"), service.words("Service", "Type")),
        (vec!["0600"], vec!["notify"])
    );
    // Neither way a failure of one takes the other along.
    assert!(service.words("Unit", "Before").contains(&"containerd.service"));
    for key in ["Requires", "BindsTo", "PartOf", "Requisite", "RequiredBy"] {
        let words = [service.words("Unit", key), service.words("Install", key)].concat();
        assert!(!words.contains(&"containerd.service"), "{key}");
    }
    // Each of these would hide the daemon's mounts from containerd, or keep it from unpacking layers.
    for (_, key, _) in service.0.iter().filter(|(section, ..)| section == "Service") {
        let cuts = key.starts_with("Private") || key.starts_with("Protect") || key.ends_with("Paths");
        let others =
            ["MountFlags", "RestrictSUIDSGID", "DevicePolicy", "RootDirectory", "DynamicUser", "User"];
        assert!(!cuts && !others.contains(&key.as_str()), "{key}");
    }

    std::fs::create_dir(guest.root().join("run/soci-snapshotter-grpc"))?;
    let listener = UnixListener::bind(guest.root().join(&SOCKET[1..]))?;
    let manager = UnixDatagram::bind(guest.root().join("run/manager"))?;
    manager.set_read_timeout(Some(PATIENCE))?;
    let line = service.words("Service", "ExecStart");
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec chroot \"$@\"", "sh"])
        .arg(guest.root())
        .args(&line)
        .env("NOTIFY_SOCKET", "/run/manager")
        .env("WATCHDOG_USEC", "900000")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stderr(std::fs::File::create(guest.outside().join("log"))?);
    let _served = Served(command.spawn()?);
    let log = || std::fs::read_to_string(guest.outside().join("log")).unwrap_or_default();
    let said = || -> Result<String> {
        let mut text = [0; 256];
        let length = manager.recv(&mut text).with_context(log)?;
        Ok(String::from_utf8_lossy(&text[..length]).trim_end().to_owned())
    };
    assert_eq!(said()?, "READY=1");
    assert_eq!((said()?, said()?), ("WATCHDOG=1".to_owned(), "WATCHDOG=1".to_owned()));
    let snapshots = Snapshots::connect(&guest.root().join(&SOCKET[1..]))?;
    assert_eq!(snapshots.prepare("default", "default/1/a", "", &[])?.len(), 1);

    // Whom nobody can reach does not live: signs of life end with the socket.
    std::fs::rename(guest.root().join(&SOCKET[1..]), guest.root().join("run/away"))?;
    let noticed = wait::until(PATIENCE, || log().contains("does not answer itself").then_some(()));
    assert!(noticed.is_some(), "{}", log());
    Ok(())
}

/// An image of a layer worth indexing and one too small for it; to make what they hold takes capabilities.
fn image() -> Image {
    let privileged = |directory: &str| {
        let program = Attr::mode(0o755).xattr("security.capability", images::CAPABILITY);
        LayerBuilder::new()
            .dir(directory, &Attr::mode(0o2755).owned(3, 4))
            .device(&format!("{directory}/null"), &Attr::mode(0o666), EntryType::Char, 1, 3)
            .file(format!("{directory}/program"), &program, b"x")
            .file(format!("{directory}/setuid"), &Attr::mode(0o4755).owned(5, 6), b"x")
    };
    let lazy = privileged("lazy")
        .file("probe", &Attr::mode(0o755), images::PROBE)
        .file("random", &Attr::default(), &Numbers::new(8).bytes(1_500_000))
        .gzip();
    Image::new(vec![lazy, privileged("unpacked").gzip()], Dialect::Oci, &["/probe"])
}

/// Asserts that a directory of the image is as its layer has it.
fn is_whole(directory: &Path) -> Result<()> {
    let of = |name: &str| {
        directory.join(name).symlink_metadata().with_context(|| format!("{directory:?}: {name}"))
    };
    let (null, setuid) = (of("null")?, of("setuid")?);
    assert!(null.file_type().is_char_device());
    assert_eq!((rustix::fs::major(null.rdev()), rustix::fs::minor(null.rdev())), (1, 3));
    assert_eq!((setuid.mode() & 0o7777, setuid.uid(), setuid.gid()), (0o4755, 5, 6));
    let mut value = [0; 64];
    let length = rustix::fs::lgetxattr(directory.join("program"), "security.capability", &mut value)?;
    assert_eq!(&value[..length], images::CAPABILITY);
    Ok(())
}

/// A registry whose credential helper never answers.
const HANGING: &str = "hanging.example";
/// What that helper and its child become.
const HANGS: &str = "sleep 86321";

/// Installs a credential helper that has a login for nobody but the user of that name, and one that becomes that user and
/// hangs, as does a child of it.
fn install_helpers(guest: &Guest, host: &str) -> Result<()> {
    let login = guest.root().join("etc/soci-login");
    std::fs::create_dir(&login)?;
    let config = json!({ "credHelpers": { host: "nobody", HANGING: "hanging" } });
    std::fs::write(login.join("config.json"), config.to_string())?;
    let become_nobody = "#!/bin/sh\ncat >/dev/null\ncat /proc/self/oom_score_adj >/run/helper-score\n\
                         exec setpriv --reuid=nobody --regid=nogroup --clear-groups /usr/local/bin/login-of-nobody\n";
    let answer = json!({ "Username": USER, "Secret": PASSWORD });
    let answer = format!("#!/bin/sh\n[ \"$(id -u):$(id -G)\" = 65534:65534 ] && echo '{answer}'\n");
    let as_nobody = format!("setpriv --reuid=nobody --regid=nogroup --clear-groups {HANGS}");
    let hang = format!("#!/bin/sh\n{as_nobody} &\n{as_nobody} &\ntouch /run/helper-hangs\nwait\n");
    for (name, text) in [
        ("docker-credential-nobody", become_nobody),
        ("login-of-nobody", answer.as_str()),
        ("docker-credential-hanging", hang.as_str()),
    ] {
        let file = guest.root().join("usr/local/bin").join(name);
        std::fs::write(&file, text)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Calls the doctor in the guest; returns what it says of some checks.
fn doctor(guest: &Guest, reference: &str, checks: &[&str]) -> Result<Vec<String>> {
    let line = format!("env -i PATH=$PATH soci-snapshotter-grpc doctor --json {reference} || true");
    let report: Value = serde_json::from_str(&guest.run("sh", &["-c", &line])?)?;
    let findings = report["findings"].as_array().context("no findings")?;
    let wanted = findings.iter().filter(|found| checks.iter().any(|check| found["check"] == *check));
    Ok(wanted.map(|found| format!("{} {}", found["level"], found["what"])).collect())
}

/// An image in a registry that the daemon of the guest can pull lazily.
struct Pushed {
    backstage: Backstage,
    image: Image,
    manifest: String,
    reference: String,
}

fn publish(guest: &Guest) -> Result<Pushed> {
    let backstage = Backstage::start(soci_testkit::Options::default().auth(AuthMode::Basic, USER, PASSWORD))?;
    let image = image();
    let (from, to) = (guest.outside().join("from"), guest.outside().join("to"));
    layout::write(&image, &from)?;
    let mut convert = Command::new(Binaries::ours()?.path("soci"));
    convert.args(["convert", "--standalone", "--format", "oci-dir", "--min-layer-size", images::MIN_LAYER]);
    output(convert.args([&from, &to]))?;
    layout::publish(&to, &backstage.registry, "team/app", "1")?;
    let top = backstage.registry.manifest("team/app", "1").context("the image is not in the registry")?;
    let top: Value = serde_json::from_slice(&top)?;
    let manifest = top["manifests"][0]["digest"].as_str().context("no digest")?.to_owned();
    let reference = backstage.registry.image("team/app:1");
    Ok(Pushed { backstage, image, manifest, reference })
}

#[test]
fn systemd_starts_restarts_and_watches_the_daemon_and_its_mounts_are_seen() -> Result<()> {
    let _turn = turn();
    let mut guest = Guest::new()?;
    let package = package_for(&guest)?;
    let published = publish(&guest)?;
    install_helpers(&guest, &published.backstage.registry.host())?;
    std::fs::write(guest.root().join("etc/soci-login/ca.pem"), published.backstage.registry.ca_pem())?;
    let environment = "DOCKER_CONFIG=/etc/soci-login\nSSL_CERT_FILE=/etc/soci-login/ca.pem\n";
    std::fs::write(guest.root().join("etc/default/soci-snapshotter-grpc"), environment)?;
    let drop_in = guest.root().join(format!("etc/systemd/system/{SERVICE}.d"));
    std::fs::create_dir_all(&drop_in)?;
    std::fs::write(drop_in.join("log.conf"), format!("[Service]\nStandardError=append:{LOG}\n"))?;
    if let Boot::Refused(reason) = guest.boot()? {
        // What the units say is tested without systemd as well.
        return not_run::report("the package under a systemd of its own", &reason);
    }
    guest.run("dpkg", &["--install", &package])?;
    for unit in UNITS {
        assert_eq!(guest.run("systemctl", &["is-active", unit])?.trim(), "active", "{unit}");
        assert_eq!(guest.run("systemctl", &["is-enabled", unit])?.trim(), "enabled", "{unit}");
    }
    let show = |property: &str| -> Result<String> {
        let text = guest.run("systemctl", &["show", "--value", "--property", property, SERVICE])?;
        Ok(text.trim().to_owned())
    };
    let root = PathBuf::from(format!("/proc/{}/root", guest.init()?));
    let socket = root.join(&SOCKET[1..]);
    assert_eq!(socket.symlink_metadata()?.permissions().mode() & 0o777, 0o600);

    // A lazy mount, with the capabilities that the unit leaves, is seen by everybody else in the guest.
    let layer = &published.image.layers[0];
    let snapshots = Snapshots::connect(&socket)?;
    let chain = published.image.chain_id();
    let chains = ["", &layer.diff_id, &chain];
    for (number, layer) in published.image.layers.iter().enumerate() {
        let labels = [
            ("containerd.io/snapshot.ref", chains[number + 1]),
            ("containerd.io/snapshot/cri.image-ref", published.reference.as_str()),
            ("containerd.io/snapshot/cri.manifest-digest", published.manifest.as_str()),
            ("containerd.io/snapshot/cri.layer-digest", layer.digest.as_str()),
            ("containerd.io/snapshot/cri.image-layers", layer.digest.as_str()),
        ];
        let key = format!("default/{number}/extract");
        let prepared = snapshots.prepare("default", &key, chains[number], &labels);
        let Err(status) = prepared else { bail!("layer {number}: {}", guest.run("cat", &[LOG])?) };
        assert!(status.to_string().contains("already exists"), "{status}: {}", guest.run("cat", &[LOG])?);
    }
    // The login came from a helper that became another user, and that the kernel does not spare when memory is short; whether
    // it spares the daemon depends on what this machine allows.
    assert_eq!(guest.run("cat", &["/run/helper-score"])?.trim(), "0");
    // One that hangs is killed at its deadline with all that it started, whatever user they became.
    let line = format!("soci auth explain --daemon {HANGING}/app:1 || true");
    let said = guest.run("sh", &["-c", &line])?;
    assert!(said.contains("no answer within"), "{said}");
    assert!(root.join("run/helper-hangs").exists(), "it did not run");
    let killed = wait::until(PATIENCE, || {
        let processes = guest.run("ps", &["-eo", "args"]).ok()?;
        (!processes.lines().any(|line| line.contains(HANGS))).then_some(())
    });
    assert!(killed.is_some(), "a helper that hangs is left behind");
    let fuse = || -> Result<Vec<String>> {
        let text = guest.run("cat", &["/proc/1/mountinfo"])?;
        let points = text.lines().filter(|line| line.contains(" fuse.soci "));
        Ok(points.filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect())
    };
    let mounted = fuse()?;
    assert_eq!(mounted.len(), 1, "{mounted:?}");
    let probe = std::fs::read(root.join(mounted[0].trim_start_matches('/')).join("probe"))?;
    assert!(probe == images::PROBE, "the file is read through the mount");
    is_whole(&root.join(mounted[0].trim_start_matches('/')).join("lazy"))?;
    let unpacked = root.join("var/lib/soci-snapshotter-grpc/snapshotter/snapshots").read_dir()?;
    let unpacked = unpacked.flatten().map(|snapshot| snapshot.path().join("fs/unpacked"));
    is_whole(&unpacked.into_iter().find(|path| path.exists()).context("no layer is unpacked")?)?;

    // The doctor sees what the daemon sees, whatever the shell knows, and without a daemon what its unit says.
    let checks = ["environment", "image", "login"];
    let seen = doctor(&guest, &published.reference, &checks)?;
    assert!(seen[0].contains(&format!("the running daemon's (process {})", show("MainPID")?)), "{seen:?}");
    assert!(seen.iter().all(|found| found.starts_with("\"ok\"")), "{seen:?}");

    // An upgrade does not restart it: containers that read through its mounts would lose them.
    let first = show("MainPID")?;
    let said = guest.run("dpkg", &["--install", &package])?;
    assert!(said.contains("systemctl restart soci-snapshotter-grpc"), "{said}");
    assert_eq!((show("MainPID")?, fuse()?.len()), (first.clone(), 1));

    // Killed, it comes back; containerd's calls wait for it on the socket meanwhile, and the mount is served again.
    guest.run("kill", &["-KILL", &first])?;
    let view = Snapshots::connect(&socket)?.view("default", "default/2/view", &layer.diff_id)?;
    assert_eq!(view.len(), 1);
    assert_ne!(show("MainPID")?, first);
    let again = wait::until(PATIENCE, || fuse().ok().filter(|mounts| mounts.len() == 1));
    let again = again.context("the layer is not mounted again")?;
    let probe = std::fs::read(root.join(again[0].trim_start_matches('/')).join("probe"))?;
    assert!(probe == images::PROBE, "the file is read through the new mount");

    // It gives signs of life, and is replaced when they stop.
    let drop_in = root.join(format!("etc/systemd/system/{SERVICE}.d"));
    let watch = "[Service]\nWatchdogSec=1500ms\nTimeoutAbortSec=1s\n";
    std::fs::write(drop_in.join("watch.conf"), watch)?;
    guest.run("systemctl", &["daemon-reload"])?;
    guest.run("systemctl", &["restart", SERVICE])?;
    let sign = show("WatchdogTimestampMonotonic")?;
    let later =
        wait::until(PATIENCE, || show("WatchdogTimestampMonotonic").ok().filter(|later| *later != sign));
    assert!(later.is_some(), "no sign of life");
    let (second, restarts) = (show("MainPID")?, show("NRestarts")?);
    guest.run("kill", &["-STOP", &second])?;
    let replaced = wait::until(PATIENCE, || show("NRestarts").ok().filter(|count| *count != restarts));
    assert!(replaced.is_some(), "a daemon that hangs is not replaced");

    guest.run("systemctl", &["stop", UNITS[0], UNITS[1]])?;
    let seen = doctor(&guest, &published.reference, &checks)?;
    assert!(seen[0].contains("that of /etc/default/soci-snapshotter-grpc"), "{seen:?}");
    assert!(seen.iter().all(|found| found.starts_with("\"ok\"")), "{seen:?}");
    guest.run("systemctl", &["start", UNITS[0], UNITS[1]])?;

    // Removed, it leaves no process, no mount and no socket; installed again, it runs; purged, there is no state either.
    guest.run("dpkg", &["--remove", PACKAGE])?;
    assert_eq!(fuse()?, Vec::<String>::new());
    assert!(!socket.exists());
    let said = guest.run("dpkg", &["--install", &package])?;
    assert!(!said.contains("systemctl restart"), "nothing ran before: {said}");
    for unit in UNITS {
        assert_eq!(guest.run("systemctl", &["is-active", unit])?.trim(), "active", "{unit}");
    }
    guest.run("dpkg", &["--purge", PACKAGE])?;
    assert!(!socket.exists());
    let left = mounts::beneath(guest.root())?.into_iter().filter(|mount| mount.kind.starts_with("fuse"));
    assert_eq!(left.count(), 0);
    assert_eq!(guest.run("ls", &["-A", "/var/lib/soci-snapshotter-grpc"])?, "");
    Ok(())
}
