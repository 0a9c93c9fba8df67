//! A private containerd: own root, state, sockets and configuration, beside whatever the machine runs.
//!
//! Its daemons write beneath one directory only. What they leave there is unmounted and the shims of its containers are
//! killed when the guard is dropped; no other containerd is ever spoken to, for every call names our socket.

mod running;

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::Signal;

use crate::cri::ImageService;
use crate::process::{Daemon, kill_users_of, output};
use crate::{mounts, wait};

pub use running::Running;

/// How long containerd may take to answer after its start.
const START: Duration = Duration::from_secs(30);

/// Which containerd to run.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Where `containerd`, `ctr` and the shim are; none for the machine's own.
    pub directory: Option<PathBuf>,
    /// The version it says it has.
    pub version: String,
}

impl Programs {
    /// The containerd in `PATH`.
    ///
    /// # Errors
    /// Where there is none.
    pub fn installed() -> io::Result<Self> {
        Self::at(None)
    }

    /// The containerd in a directory.
    ///
    /// # Errors
    /// Where there is none.
    pub fn at(directory: Option<PathBuf>) -> io::Result<Self> {
        let mut programs = Self { directory, version: String::new() };
        let said = output(programs.command("containerd").arg("--version"))?;
        // "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3"
        let version = said.split_whitespace().find(|word| {
            word.trim_start_matches('v').split('.').next().is_some_and(|major| major.parse::<u32>().is_ok())
        });
        programs.version = version.unwrap_or_default().trim_start_matches('v').to_owned();
        Ok(programs)
    }

    /// Returns the major version; 0 where it said none.
    pub fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|text| text.parse().ok()).unwrap_or_default()
    }

    fn command(&self, program: &str) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        match &self.directory {
            Some(directory) => {
                let mut command = Command::new(directory.join(program));
                command.env("PATH", format!("{}:{path}:{system}", directory.display()));
                command
            }
            None => {
                let mut command = Command::new(program);
                command.env("PATH", format!("{path}:{system}"));
                command
            }
        }
    }
}

/// What a private containerd is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Socket of the snapshotter that is offered as `soci`.
    pub snapshotter: PathBuf,
    /// containerd's own trust and mirrors: a directory of `<host>/hosts.toml`.
    pub hosts: PathBuf,
    /// The image that holds a pod's namespaces; containerd pulls it itself, without credentials, unless it is there.
    pub sandbox_image: Option<String>,
}

/// A running containerd. Dropping it ends it and takes away what it mounted.
#[derive(Debug)]
pub struct Containerd {
    daemon: Daemon,
    programs: Programs,
    directory: PathBuf,
    hosts: PathBuf,
}

impl Containerd {
    /// Starts containerd beneath `directory`, which must be short (sockets have at most 108 bytes) and on a file system
    /// that overlayfs can write to. Blocks until it answers.
    ///
    /// # Errors
    /// Where it does not start; the message carries the end of its log.
    pub fn start(programs: Programs, directory: &Path, options: &Options) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let config = directory.join("config.toml");
        std::fs::write(&config, config_text(programs.major(), directory, options))?;
        let mut command = programs.command("containerd");
        command.arg("--config").arg(&config).env_remove("NOTIFY_SOCKET");
        let log = directory.join("containerd.log");
        let daemon = Daemon::start("containerd", &command, &log, Signal::TERM)?;
        let hosts = options.hosts.clone();
        let mut containerd = Self { daemon, programs, directory: directory.to_owned(), hosts };
        containerd.wait_ready()?;
        Ok(containerd)
    }

    fn wait_ready(&mut self) -> io::Result<()> {
        let socket = self.socket();
        let programs = self.programs.clone();
        self.daemon.wait_ready(START, || {
            socket.exists()
                && output(programs.command("ctr").arg("--address").arg(&socket).arg("version")).is_ok()
        })
    }

    /// Ends containerd by a signal and starts it again on the same directories. Blocks.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn restart(&mut self, signal: Signal) -> io::Result<()> {
        self.daemon.signal(signal);
        if self.daemon.wait_end(START).is_none() {
            return Err(io::Error::other(format!("containerd does not end by {signal:?}")));
        }
        let mut command = self.programs.command("containerd");
        command.arg("--config").arg(self.directory.join("config.toml")).env_remove("NOTIFY_SOCKET");
        let log = self.daemon.log().to_owned();
        self.daemon = Daemon::start("containerd", &command, &log, Signal::TERM)?;
        self.wait_ready()
    }

    /// Returns the socket it answers on.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("c.sock")
    }

    /// Returns the log.
    pub fn log(&self) -> &Path {
        self.daemon.log()
    }

    /// Returns the version.
    pub fn version(&self) -> &str {
        &self.programs.version
    }

    /// Returns the process, for its processor time and memory.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// Returns a client of its image service, as the kubelet has one.
    ///
    /// # Errors
    /// Where no runtime can be made.
    pub fn image_service(&self) -> io::Result<ImageService> {
        ImageService::connect(&self.socket())
    }

    /// Returns a `ctr` command in a namespace.
    pub fn ctr(&self, namespace: &str) -> Command {
        let mut command = self.programs.command("ctr");
        command.arg("--address").arg(self.socket()).args(["--namespace", namespace]);
        command
    }

    /// Runs `ctr` in a namespace and returns what it prints. Blocks.
    ///
    /// # Errors
    /// Where it fails; the message has what it wrote to stderr.
    pub fn run(&self, namespace: &str, arguments: &[&str]) -> io::Result<String> {
        output(self.ctr(namespace).args(arguments))
    }

    /// Pulls an image by `ctr images pull` with a snapshotter. From 2.x on this is the transfer service.
    ///
    /// # Errors
    /// Where it fails.
    pub fn pull(&self, namespace: &str, snapshotter: &str, user: &str, image: &str) -> io::Result<()> {
        let mut command = self.ctr(namespace);
        command.args(["images", "pull", "--snapshotter", snapshotter, "--hosts-dir"]).arg(&self.hosts);
        if !user.is_empty() {
            command.args(["--user", user]);
        }
        output(command.arg(image)).map(drop)
    }

    /// Runs a command in a new container of an image and returns what it prints.
    ///
    /// The container's name begins with `id`.
    ///
    /// # Errors
    /// Where the container fails.
    pub fn run_container(
        &self,
        namespace: &str,
        snapshotter: &str,
        image: &str,
        id: &str,
        words: &[&str],
    ) -> io::Result<String> {
        output(&mut self.run_command(namespace, snapshotter, image, &unique(id), words))
    }

    /// Returns what runs a command in a new container, which is removed at its end.
    fn run_command(
        &self,
        namespace: &str,
        snapshotter: &str,
        image: &str,
        id: &str,
        words: &[&str],
    ) -> Command {
        let mut command = self.ctr(namespace);
        command.args(["run", "--rm", "--snapshotter", snapshotter, image, id]).args(words);
        command
    }

    /// Mounts what a chain of layers makes, read-only, and returns a guard; the image must have been pulled with it.
    ///
    /// # Errors
    /// Where the snapshotter has no such chain, or the mount fails.
    pub fn mount(
        &self,
        namespace: &str,
        snapshotter: &str,
        chain: &str,
        name: &str,
    ) -> io::Result<MountedImage<'_>> {
        let at = self.directory.join("mounts").join(name);
        std::fs::create_dir_all(&at)?;
        let mut view = self.ctr(namespace);
        view.args(["snapshots", "--snapshotter", snapshotter, "view", "--target"])
            .arg(&at)
            .args([name, chain]);
        let printed = output(&mut view)?;
        let mounted = MountedImage {
            containerd: self,
            namespace: namespace.to_owned(),
            snapshotter: snapshotter.to_owned(),
            key: name.to_owned(),
            at,
        };
        // "mount -t overlay overlay /target -o index=off,lowerdir=…"
        let mut words = printed.split_whitespace();
        if words.next() != Some("mount") {
            return Err(io::Error::other(format!("ctr printed no mount command: {printed}")));
        }
        output(Command::new("mount").args(words))?;
        Ok(mounted)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        kill_users_of(&self.directory);
        mounts::detach(&self.directory.join("mounts"));
        self.daemon.stop();
        kill_users_of(&self.directory);
        mounts::detach(&self.directory);
        // The shims' run directories go only after the shims.
        let _ = wait::until(Duration::from_secs(2), || {
            mounts::beneath(&self.directory).is_ok_and(|left| left.is_empty()).then_some(())
        });
    }
}

/// Returns a container's name that no other on the machine has: control groups are named after containers, and containerds
/// that share one kill each other's.
fn unique(id: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{id}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// An image's file system, mounted. Dropping it unmounts and removes its snapshot.
#[derive(Debug)]
pub struct MountedImage<'a> {
    containerd: &'a Containerd,
    namespace: String,
    snapshotter: String,
    key: String,
    at: PathBuf,
}

impl MountedImage<'_> {
    /// Returns where it is.
    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for MountedImage<'_> {
    fn drop(&mut self) {
        mounts::detach(&self.at);
        let mut command = self.containerd.ctr(&self.namespace);
        let _ = output(command.args(["snapshots", "--snapshotter", &self.snapshotter, "rm", &self.key]));
    }
}

/// Writes the trust of one registry into a hosts directory: https with one more certificate authority.
///
/// # Errors
/// Where the files cannot be written.
pub fn trust(hosts: &Path, registry: &str, ca_pem: &str) -> io::Result<()> {
    let directory = hosts.join(registry);
    std::fs::create_dir_all(&directory)?;
    let ca = directory.join("ca.crt");
    std::fs::write(&ca, ca_pem)?;
    let text = format!(
        "server = \"https://{registry}\"\n\n[host.\"https://{registry}\"]\n  \
         capabilities = [\"pull\", \"resolve\", \"push\"]\n  ca = {ca:?}\n"
    );
    std::fs::write(directory.join("hosts.toml"), text)
}

fn config_text(major: u32, directory: &Path, options: &Options) -> String {
    let at = |name: &str| format!("{:?}", directory.join(name));
    let (snapshotter, hosts) = (format!("{:?}", options.snapshotter), format!("{:?}", options.hosts));
    // A machine that is a container itself may not lower its processes' scores for the out-of-memory killer.
    let sandbox = options.sandbox_image.as_ref();
    let mut text = String::new();
    let disabled = [
        "io.containerd.snapshotter.v1.aufs",
        "io.containerd.snapshotter.v1.btrfs",
        "io.containerd.snapshotter.v1.devmapper",
        "io.containerd.snapshotter.v1.zfs",
        "io.containerd.nri.v1.nri",
        "io.containerd.tracing.processor.v1.otlp",
        "io.containerd.internal.v1.tracing",
    ];
    let _ = write!(
        text,
        "version = {version}\nroot = {root}\nstate = {state}\ndisabled_plugins = {disabled:?}\n\n\
         [grpc]\n  address = {socket}\n\n[ttrpc]\n  address = {ttrpc}\n\n\
         [proxy_plugins.soci]\n  type = \"snapshot\"\n  address = {snapshotter}\n  \
         [proxy_plugins.soci.exports]\n    enable_remote_snapshot_annotations = \"true\"\n\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = {opt}\n\n",
        version = if major >= 2 { 3 } else { 2 },
        root = at("root"),
        state = at("state"),
        socket = at("c.sock"),
        ttrpc = at("c.sock.ttrpc"),
        opt = at("opt"),
    );
    let cni = format!("bin_dir = {}\n  conf_dir = {}", at("cni-bin"), at("cni-conf"));
    if major >= 2 {
        let architecture = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
        let unpack = |snapshotter: &str| {
            format!(
                "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  \
                 platform = \"linux/{architecture}\"\n  snapshotter = \"{snapshotter}\"\n  differ = \"walking\"\n"
            )
        };
        let _ = write!(
            text,
            "[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"soci\"\n  \
             disable_snapshot_annotations = false\n  \
             [plugins.\"io.containerd.cri.v1.images\".registry]\n    config_path = {hosts}\n{sandbox}\n\
             [plugins.\"io.containerd.cri.v1.runtime\"]\n  restrict_oom_score_adj = true\n  \
             [plugins.\"io.containerd.cri.v1.runtime\".cni]\n  {cni}\n\n{}\n{}",
            unpack("soci"),
            unpack("overlayfs"),
            sandbox = sandbox.map_or_else(String::new, |image| {
                let table = "plugins.\"io.containerd.cri.v1.images\".pinned_images";
                format!("  [{table}]\n    sandbox = {image:?}\n")
            }),
        );
    } else {
        let _ = write!(
            text,
            "[plugins.\"io.containerd.grpc.v1.cri\"]\n  stream_server_port = \"0\"\n  \
             restrict_oom_score_adj = true\n{sandbox}  \
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n    snapshotter = \"soci\"\n    \
             disable_snapshot_annotations = false\n  \
             [plugins.\"io.containerd.grpc.v1.cri\".registry]\n    config_path = {hosts}\n\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\n  {cni}\n",
            sandbox = sandbox.map_or_else(String::new, |image| format!("  sandbox_image = {image:?}\n")),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_configurations_name_only_their_own_directory() {
        let options =
            Options { snapshotter: "/d/s.sock".into(), hosts: "/d/certs.d".into(), sandbox_image: None };
        for major in [1, 2] {
            let text = config_text(major, Path::new("/d"), &options);
            assert!(text.contains("disable_snapshot_annotations = false"), "{text}");
            for path in text.split('"').filter(|word| word.starts_with('/')) {
                assert!(path.starts_with("/d/"), "{path}");
            }
        }
    }
}
