//! What a node keeps, and how it goes: files of the daemon, containerd's leases and its collector.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use soci_testkit::wait;

use crate::pull::KUBELET;
use crate::scrape::state;
use crate::stage::Stage;

/// How long something that happens by itself may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Keys at the head of the daemon's configuration that show its state to [`Stage::wait_idle`].
pub const SHOWN: &str = "debug_address = \"{stage}/d.sock\"\n";

impl Stage {
    /// Returns the files beneath the daemon's root, without its lock and what is mounted.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![self.snapshotter.root()];
        while let Some(dir) = dirs.pop() {
            for entry in dir.read_dir().into_iter().flatten().flatten() {
                let is =
                    |test: fn(&std::fs::FileType) -> bool| entry.file_type().is_ok_and(|kind| test(&kind));
                if is(std::fs::FileType::is_dir) && entry.file_name() != "fs" {
                    dirs.push(entry.path());
                } else if is(std::fs::FileType::is_file) && entry.file_name() != "lock" {
                    found.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }

    /// Waits until the files are those of `before`.
    ///
    /// # Errors
    /// Where they do not become so.
    pub fn wait_for_files(&self, before: &[PathBuf]) -> Result<()> {
        let same = || (self.files() == before).then_some(());
        if wait::until(PATIENCE, same).is_none() {
            bail!("files {:#?}\nare not {before:#?}\n{}", self.files(), self.log_tail());
        }
        Ok(())
    }

    /// Waits until what readers got is in the span cache, a moment after they got it.
    ///
    /// # Errors
    /// Where nothing of it is stored.
    pub fn wait_stored(&self) -> Result<()> {
        let spans = self.snapshotter.root().join("soci/spans");
        let stored = || {
            let files = self.files();
            let spans_here = files.iter().filter(|file| file.starts_with(&spans));
            let (coming, cached): (Vec<_>, Vec<_>) =
                spans_here.partition(|file| file.starts_with(spans.join("tmp")));
            (coming.is_empty() && !cached.is_empty()).then_some(())
        };
        wait::until(PATIENCE, stored).context("nothing is cached")
    }

    /// Waits until no snapshot has a directory any more.
    ///
    /// # Errors
    /// Where one stays.
    pub fn wait_no_snapshots(&self) -> Result<()> {
        let directory = self.snapshotter.root().join("snapshotter/snapshots");
        let left = || directory.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
        if wait::until(PATIENCE, || left().next().is_none().then_some(())).is_none() {
            bail!("left are {:?}\n{}", left().collect::<Vec<_>>(), self.log_tail());
        }
        Ok(())
    }

    /// Waits until the daemon has so many lazy layers.
    ///
    /// # Errors
    /// Where it keeps another number.
    pub fn wait_lazy_layers(&self, count: usize) -> Result<()> {
        let so_many = || (self.lazy_layers().ok()? == count).then_some(());
        if wait::until(PATIENCE, so_many).is_none() {
            bail!("{} layers are lazy, not {count}\n{}", self.lazy_layers()?, self.log_tail());
        }
        Ok(())
    }

    /// Whether the state file of every mount says that all of its layer is here.
    pub fn is_complete(&self) -> bool {
        let whole = |at: &Path| {
            let mut files = at.join(".soci-snapshotter").read_dir().ok()?;
            let text = std::fs::read_to_string(files.next()?.ok()?.path()).ok()?;
            Some(text.contains("\"fetchedPercent\":100"))
        };
        let mounts = self.snapshotter.fuse_mounts().unwrap_or_default();
        !mounts.is_empty() && mounts.iter().all(|mount| whole(&mount.at) == Some(true))
    }

    /// Ends every lease. That of a pull that was given up, or whose containerd died, holds what it had until it runs out,
    /// after a day.
    ///
    /// # Errors
    /// Where containerd fails.
    pub fn end_leases(&self) -> Result<()> {
        let leases = self.containerd.run(KUBELET, &["leases", "list", "--quiet"])?;
        for lease in leases.split_whitespace() {
            self.containerd.run(KUBELET, &["leases", "delete", lease])?;
        }
        Ok(())
    }

    /// Runs containerd's collector and waits for it.
    ///
    /// # Errors
    /// Where containerd fails.
    pub fn collect(&self) -> Result<()> {
        self.containerd.run(KUBELET, &["leases", "create", "--id", "collect"])?;
        self.containerd.run(KUBELET, &["leases", "delete", "--sync", "collect"])?;
        Ok(())
    }

    /// Removes the images from containerd, has it collect, and waits until nothing of them is mounted, open or under way.
    /// The configuration must have [`SHOWN`].
    ///
    /// # Errors
    /// Where something stays.
    pub fn remove_images(&mut self, references: &[&str]) -> Result<()> {
        let service = self.containerd.image_service()?;
        for reference in references {
            service.remove(reference).with_context(|| format!("RemoveImage of {reference}"))?;
        }
        self.end_leases()?;
        self.collect()?;
        self.wait_lazy_layers(0)?;
        self.wait_idle()
    }

    fn wait_idle(&mut self) -> Result<()> {
        let socket = self.path().join("d.sock");
        let gauges = ["spans_in_flight", "bytes_in_flight", "jobs", "waiting", "background_queue"];
        let idle = || {
            let live = state(&socket).ok()?["live"].take();
            let none = live["layers"].as_array()?.is_empty();
            (none && gauges.iter().all(|gauge| live[gauge] == 0)).then_some(())
        };
        if wait::until(PATIENCE, idle).is_none() {
            bail!("the daemon has {:#}", state(&socket)?["live"]);
        }
        let pid = self.snapshotter.daemon().id();
        let spans = self.snapshotter.root().join("soci/spans");
        let open = || -> Vec<PathBuf> {
            let links = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            let links = links.filter_map(|entry| std::fs::read_link(entry.path()).ok());
            links.filter(|to| to.as_os_str() == "/dev/fuse" || to.starts_with(&spans)).collect()
        };
        if wait::until(PATIENCE, || open().is_empty().then_some(())).is_none() {
            bail!("the daemon has open {:?}", open());
        }
        Ok(())
    }
}
