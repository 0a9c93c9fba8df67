//! The programs that a daemon runs, as anybody with rights on the machine sees them: their command lines and environments.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use soci_testkit::wait;

/// Longer than any work that is watched.
const FOREVER: Duration = Duration::from_secs(3600);

/// The programs of one daemon, wherever in the tree of processes they went.
#[derive(Debug)]
pub struct Children {
    daemon: u32,
    program: PathBuf,
    /// A variable that only the daemon has, and who has it from the daemon.
    mark: Vec<u8>,
    seen: BTreeSet<Vec<u8>>,
}

impl Children {
    /// Watches a daemon. `mark`, `NAME=VALUE`, is in its environment and in that of nothing that it did not start.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn of(daemon: u32, mark: &str) -> Result<Self> {
        let program = std::fs::read_link(format!("/proc/{daemon}/exe")).context("the daemon does not run")?;
        Ok(Self { daemon, program, mark: mark.into(), seen: BTreeSet::new() })
    }

    /// Returns how many there are, the dead that nobody waited for included, and remembers what they were told.
    pub fn look(&mut self) -> usize {
        let processes = Path::new("/proc").read_dir().into_iter().flatten().flatten();
        processes.filter(|process| self.is_one(&process.path())).count()
    }

    /// Does `work`, and looks again and again as long as that takes.
    ///
    /// # Panics
    /// Where `work` does.
    pub fn during<T: Send>(&mut self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let working = scope.spawn(work);
            let done = || {
                self.look();
                working.is_finished().then_some(())
            };
            wait::until(FOREVER, done);
            working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Returns the command line and the environment of each that was seen.
    pub fn told(&self) -> impl Iterator<Item = &[u8]> {
        self.seen.iter().map(Vec::as_slice)
    }

    fn is_one(&mut self, process: &Path) -> bool {
        let id = process.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
        if id.is_none_or(|id| id == self.daemon) {
            return false;
        }
        let child = parent(process) == Some(self.daemon);
        // Looked at first: between fork and exec it is the daemon's image, whose environment is not the child's.
        if std::fs::read_link(process.join("exe")).is_ok_and(|program| program == self.program) {
            return child;
        }
        let environment = std::fs::read(process.join("environ")).unwrap_or_default();
        if !child && !environment.split(|byte| *byte == 0).any(|variable| variable == self.mark) {
            return false;
        }
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        self.seen.insert([line, environment].concat());
        true
    }
}

fn parent(process: &Path) -> Option<u32> {
    let stat = std::fs::read(process.join("stat")).ok()?;
    // The name may hold anything but ends with the last parenthesis.
    let stat = String::from_utf8_lossy(&stat).into_owned();
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
