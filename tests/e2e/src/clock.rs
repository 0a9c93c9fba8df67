//! A clock that the test sets, for one process: the time of day jumps while the process runs, as when a node's clock is set.
//! Times that only go forward are left alone, as the kernel does.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// The clock. Processes with its environment read it each time.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    directory: TempDir,
}

impl Clock {
    /// Makes a clock that shows the true time.
    ///
    /// # Errors
    /// Where libfaketime is not installed.
    pub fn new() -> Result<Self> {
        let library = library().context("libfaketime is missing: install Debian's package faketime")?;
        let clock = Self { library, directory: tempfile::tempdir()? };
        clock.set(0)?;
        Ok(clock)
    }

    /// Returns the environment of a process that shall see it.
    pub fn env(&self) -> Vec<(String, OsString)> {
        [
            ("LD_PRELOAD", self.library.clone().into()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().into()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            // Times of files do not change with the clock.
            ("NO_FAKE_STAT", "1".into()),
        ]
        .map(|(name, value): (&str, OsString)| (name.to_owned(), value))
        .to_vec()
    }

    /// Sets it so many days ahead of the true time, or behind it.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn set(&self, days: i32) -> Result<()> {
        // By rename: it is read at any moment.
        let unfinished = self.directory.path().join("clock.new");
        std::fs::write(&unfinished, format!("{days:+}d\n"))?;
        std::fs::rename(&unfinished, self.file())?;
        Ok(())
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("clock")
    }
}

/// Finds the library, which is in a directory of the machine's architecture.
fn library() -> Option<PathBuf> {
    let name = Path::new("faketime/libfaketimeMT.so.1");
    let directories = Path::new("/usr/lib").read_dir().ok()?.flatten().map(|entry| entry.path());
    directories.map(|directory| directory.join(name)).find(|path| path.is_file())
}
