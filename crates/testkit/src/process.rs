//! Daemons that tests start: in a process group of their own, logged to a file, and gone when the guard is dropped.
//!
//! A child is told by the kernel when the thread that started it ends (`setpriv --pdeathsig`), so that a test program
//! that is killed leaves no daemon behind. Start them from a thread that outlives the guard.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::wait;

/// How long a daemon may take to end after the polite signal.
const GRACE: Duration = Duration::from_secs(10);

/// A running daemon. Dropping it ends it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    name: String,
    log: PathBuf,
    goodbye: Signal,
}

impl Daemon {
    /// Starts a program; stdout and stderr are appended to `log`, and `goodbye` is the signal that ends it politely.
    ///
    /// # Errors
    /// Where the program or the log cannot be opened.
    pub fn start(name: &str, command: &Command, log: &Path, goodbye: Signal) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log)?;
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            wrapped.current_dir(directory);
        }
        use std::os::unix::process::CommandExt as _;
        wrapped.process_group(0).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = wrapped.spawn().map_err(|error| {
            let program = command.get_program().to_string_lossy().into_owned();
            io::Error::new(error.kind(), format!("start {program}: {error}"))
        })?;
        Ok(Self { child, name: name.to_owned(), log: log.to_owned(), goodbye })
    }

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Returns the last lines of its output, for a message.
    pub fn tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Waits until `ready` holds. Blocks.
    ///
    /// # Errors
    /// Where the daemon ends before that, or `limit` passes; the message carries the end of its log.
    pub fn wait_ready(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> io::Result<()> {
        let seen = wait::until(limit, || match self.child.try_wait() {
            Ok(Some(status)) => Some(Err(status)),
            _ => ready().then_some(Ok(())),
        });
        let trouble = match seen {
            Some(Ok(())) => return Ok(()),
            Some(Err(status)) => format!("{} ended with {status}", self.name),
            None => format!("{} was not ready after {} s", self.name, limit.as_secs()),
        };
        // By its name alone: its directory may go before anybody reads this.
        let log = self.log.file_name().unwrap_or_default().display();
        Err(io::Error::other(format!("{trouble}; end of {log}:\n{}", self.tail())))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to the daemon alone.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = pid(self.child.id()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Waits for its end. Blocks.
    pub fn wait_end(&mut self, limit: Duration) -> Option<ExitStatus> {
        wait::until(limit, || self.child.try_wait().ok().flatten())
    }

    /// Kills it without a chance to clean up, and reaps it.
    pub fn kill(&mut self) {
        self.signal_group(Signal::KILL);
        let _ = self.child.wait();
    }

    /// Ends it politely, or by force when it does not react in time. Returns how long it took.
    pub fn stop(&mut self) -> Duration {
        let start = Instant::now();
        if self.is_running() {
            self.signal(self.goodbye);
            if self.wait_end(GRACE).is_none() {
                self.kill();
            }
        }
        start.elapsed()
    }

    /// Returns processor time used so far, user and system.
    pub fn cpu_time(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.child.id());
        let Ok(text) = std::fs::read_to_string(path) else { return Duration::ZERO };
        // The name may hold anything but ends with the last parenthesis.
        let Some((_, rest)) = text.rsplit_once(')') else { return Duration::ZERO };
        let ticks: u64 =
            rest.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second().max(1))
    }

    /// Returns resident memory in bytes: the value of `VmRSS`, or of `VmHWM` for the most it ever was.
    pub fn memory(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib: u64 = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or_default();
        kib * 1024
    }

    fn signal_group(&self, signal: Signal) {
        if let Some(pid) = pid(self.child.id()) {
            let _ = rustix::process::kill_process_group(pid, signal);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
        self.signal_group(Signal::KILL);
    }
}

fn pid(id: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(id).ok()?)
}

/// Kills every process that names `directory` on its command line: containers' shims outlive their containerd.
pub fn kill_users_of(directory: &Path) {
    let Ok(entries) = Path::new("/proc").read_dir() else { return };
    let needle = directory.as_os_str().as_encoded_bytes();
    for entry in entries.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let shim = line.starts_with(b"/") && line.windows(15).any(|window| window == b"containerd-shim");
        let names_it = line.windows(needle.len().max(1)).any(|window| window == needle);
        if shim
            && names_it
            && let Some(pid) = pid(id)
        {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// Where it cannot be started, or fails: the message has its words and what it wrote to stderr.
pub fn output(command: &mut Command) -> io::Result<String> {
    let result = command.stdin(Stdio::null()).output();
    let words = |command: &Command| {
        let mut text = command.get_program().to_string_lossy().into_owned();
        let mut secret = false;
        for word in command.get_args() {
            text.push(' ');
            text.push_str(if secret { "***" } else { word.to_str().unwrap_or("?") });
            secret = word == "--user";
        }
        text
    };
    let result =
        result.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", words(command))))?;
    if !result.status.success() {
        let told = String::from_utf8_lossy(&result.stderr);
        return Err(io::Error::other(format!("{}: {}: {}", words(command), result.status, told.trim())));
    }
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}

/// Opens a file for a child's output.
///
/// # Errors
/// Where it cannot be made.
pub fn log_file(path: &Path) -> io::Result<File> {
    File::create(path)
}
