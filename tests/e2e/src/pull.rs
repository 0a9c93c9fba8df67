//! Pulling what was published, and comparing what came with containerd's own overlayfs.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use soci_testkit::image::Image;
use soci_testkit::{Listener, cri, walk};

use crate::publish::Published;
use crate::stage::{PASSWORD, Stage, USER};

/// The namespace that containerd's image service pulls into.
pub const KUBELET: &str = "k8s.io";

impl Stage {
    /// Pulls as the kubelet does: `PullImage` on containerd's socket, with containerd's own credentials.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pull_as_kubelet(&self, published: &Published) -> Result<()> {
        let login = Some(cri::basic(USER, PASSWORD));
        self.containerd.image_service()?.pull(&published.reference, login, "default").context("PullImage")?;
        Ok(())
    }

    /// Pulls by `ctr`; with containerd 2.x that is its transfer service.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pull_by_ctr(&self, namespace: &str, snapshotter: &str, published: &Published) -> Result<()> {
        let login = format!("{USER}:{PASSWORD}");
        self.containerd.pull(namespace, snapshotter, &login, &published.reference)?;
        Ok(())
    }

    /// Runs the probe in a new container and returns what it prints.
    ///
    /// # Errors
    /// Where the container fails.
    pub fn probe(&self, namespace: &str, published: &Published, id: &str, words: &[&str]) -> Result<String> {
        let words: Vec<&str> = [&["/probe"], words].concat();
        let run = || self.containerd.run_container(namespace, "soci", &published.reference, id, &words);
        // Every word of the probe prints something, but on a busy machine a shim may drop the output of a container that
        // ends at once.
        match run()? {
            printed if printed.is_empty() => Ok(run()?),
            printed => Ok(printed),
        }
    }

    /// Walks the pulled image and the same image unpacked by containerd's overlayfs; returns what differs.
    ///
    /// # Errors
    /// Where one cannot be mounted or read.
    pub fn differences(
        &self,
        namespace: &str,
        published: &Published,
        image: &Image,
        timeless: &BTreeSet<Vec<u8>>,
    ) -> Result<Vec<String>> {
        let lazy = self.containerd.mount(namespace, "soci", &image.chain_id(), "lazy")?;
        let lazy = walk::walk(lazy.path()).context("walk the lazy image")?;
        self.pull_by_ctr("plain", "overlayfs", published)?;
        let plain = self.containerd.mount("plain", "overlayfs", &image.chain_id(), "plain")?;
        let plain = walk::walk(plain.path()).context("walk the unpacked image")?;
        Ok(walk::differences(&lazy, &plain, timeless))
    }

    /// Returns the number of layers that are FUSE mounts.
    ///
    /// # Errors
    /// Where the mount table cannot be read.
    pub fn lazy_layers(&self) -> Result<usize> {
        Ok(self.snapshotter.fuse_mounts()?.len())
    }

    /// Returns how many bytes of blobs the registry has sent since its log was cleared.
    pub fn blob_bytes(&self) -> u64 {
        let log = self.registry.log_of(Listener::Registry);
        log.iter().filter(|seen| seen.request.path.contains("/blobs/")).map(|seen| seen.bytes).sum()
    }
}
