//! The snapshotter daemon under test: started with a private root, its log kept, ended with the guard.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::mounts;
use crate::process::Daemon;

/// How long the daemon may take to answer.
const START: Duration = Duration::from_secs(60);

/// What the daemon is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// The binary.
    pub program: PathBuf,
    /// The configuration's text.
    pub config: String,
    /// Variables of its environment beside ours.
    pub env: Vec<(String, OsString)>,
    /// The `--log-level`.
    pub log_level: String,
}

/// A running daemon. Dropping it ends it and detaches what it left mounted.
#[derive(Debug)]
pub struct Snapshotter {
    daemon: Daemon,
    directory: PathBuf,
    options: Options,
}

impl Snapshotter {
    /// Starts the daemon beneath `directory`. Blocks until its socket answers.
    ///
    /// # Errors
    /// Where it does not start; the message carries the end of its log.
    pub fn start(directory: &Path, options: Options) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        std::fs::write(directory.join("config.toml"), &options.config)?;
        let daemon = launch(directory, &options)?;
        let mut snapshotter = Self { daemon, directory: directory.to_owned(), options };
        snapshotter.wait_ready()?;
        Ok(snapshotter)
    }

    fn wait_ready(&mut self) -> io::Result<()> {
        let socket = self.socket();
        self.daemon.wait_ready(START, || std::os::unix::net::UnixStream::connect(&socket).is_ok())
    }

    /// Starts it again on the same root, after it ended or was ended.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn start_again(&mut self) -> io::Result<()> {
        self.daemon.stop();
        self.daemon = launch(&self.directory, &self.options)?;
        self.wait_ready()
    }

    /// Returns the process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Returns processor time used so far.
    pub fn cpu_time(&self) -> Duration {
        self.daemon.cpu_time()
    }

    /// Returns the socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("s.sock")
    }

    /// Returns the state directory.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Returns the text of the log so far.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.daemon.log()).unwrap_or_default()).into_owned()
    }

    /// Returns where the log is.
    pub fn log(&self) -> &Path {
        self.daemon.log()
    }

    /// Returns the layers it has mounted.
    ///
    /// # Errors
    /// Where the mount table cannot be read.
    pub fn fuse_mounts(&self) -> io::Result<Vec<mounts::Mount>> {
        mounts::fuse(&self.root())
    }
}

impl Drop for Snapshotter {
    fn drop(&mut self) {
        // SIGINT unmounts; what a killed or hanging daemon left is detached after.
        self.daemon.stop();
        mounts::detach(&self.directory);
    }
}

fn launch(directory: &Path, options: &Options) -> io::Result<Daemon> {
    let mut command = Command::new(&options.program);
    command
        .arg("--address")
        .arg(directory.join("s.sock"))
        .arg("--root")
        .arg(directory.join("root"))
        .arg("--config")
        .arg(directory.join("config.toml"))
        .args(["--log-level", &options.log_level])
        .env_remove("NOTIFY_SOCKET");
    for (key, value) in &options.env {
        command.env(key, value);
    }
    Daemon::start("soci-snapshotter-grpc", &command, &directory.join("snapshotter.log"), Signal::INT)
}
