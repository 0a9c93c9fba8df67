//! Images and their indexes, brought into the registry by the command line under test.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use soci_testkit::image::Image;
use soci_testkit::process::output;

use crate::stage::{PASSWORD, Stage, USER};
use crate::{images, layout};

/// An image in the stage's registry.
#[derive(Debug, Clone)]
pub struct Published {
    /// `host:port/repository:tag`.
    pub reference: String,
    /// The repository.
    pub repository: String,
    /// Bytes of its layers as stored.
    pub size: u64,
}

impl Stage {
    /// Puts an image into the registry as it is.
    pub fn publish(&self, image: &Image, repository: &str, tag: &str) -> Published {
        for layer in &image.layers {
            self.registry.put_blob(repository, layer.blob.clone());
        }
        self.registry.put_blob(repository, image.config.clone());
        self.registry.put_manifest(repository, tag, &image.media_type, image.manifest.clone());
        Published {
            reference: self.registry.image(&format!("{repository}:{tag}")),
            repository: repository.to_owned(),
            size: image.compressed_size(),
        }
    }

    /// Puts an image into the registry with a v2 index, by `soci convert --standalone`.
    ///
    /// # Errors
    /// Where the command line fails.
    pub fn publish_v2(&self, image: &Image, repository: &str, tag: &str) -> Result<Published> {
        self.publish_v2_from(images::MIN_LAYER, image, repository, tag)
    }

    /// The same with layers of at least `min_layer` bytes indexed.
    ///
    /// # Errors
    /// Where the command line fails.
    pub fn publish_v2_from(
        &self,
        min_layer: &str,
        image: &Image,
        repository: &str,
        tag: &str,
    ) -> Result<Published> {
        let work = tempfile::tempdir_in(self.path())?;
        let (from, to) = (work.path().join("from"), work.path().join("to"));
        layout::write(image, &from)?;
        let mut command = Command::new(self.binaries.path("soci"));
        command
            .args(["convert", "--standalone", "--format", "oci-dir", "--min-layer-size", min_layer])
            .args([&from, &to])
            .envs(self.cli_env());
        output(&mut command)?;
        layout::publish(&to, &self.registry, repository, tag).context("publish what soci convert wrote")?;
        Ok(Published {
            reference: self.registry.image(&format!("{repository}:{tag}")),
            repository: repository.to_owned(),
            size: image.compressed_size(),
        })
    }

    /// Puts an image into the registry and pushes a v1 index for it: `soci create`, `soci push`.
    ///
    /// The content goes into a namespace of its own, so that what is pulled later comes from the registry; `after`
    /// removes it, for containerd shares blobs between namespaces.
    ///
    /// # Errors
    /// Where a tool fails.
    pub fn publish_v1(&self, image: &Image, repository: &str, tag: &str) -> Result<Published> {
        self.publish_v1_with(image, repository, tag, &[])
    }

    /// The same with more flags of `soci create`.
    ///
    /// # Errors
    /// Where a tool fails.
    pub fn publish_v1_with(
        &self,
        image: &Image,
        repository: &str,
        tag: &str,
        flags: &[&str],
    ) -> Result<Published> {
        let published = self.publish(image, repository, tag);
        self.fetch(&published.reference)?;
        let words = [&["create", "--min-layer-size", images::MIN_LAYER], flags, &[&published.reference]];
        let created = self.soci(BUILD, &words.concat())?;
        if !created.contains("-> ztoc") {
            bail!("soci create indexed no layer: {created}");
        }
        self.soci(BUILD, &["push", "--user", &format!("{USER}:{PASSWORD}"), &published.reference])?;
        self.forget(&published.reference)?;
        Ok(published)
    }

    /// Brings an image's content into containerd's store, without unpacking, in the namespace where indexes are built.
    ///
    /// # Errors
    /// Where containerd cannot fetch it.
    pub fn fetch(&self, reference: &str) -> Result<()> {
        let hosts = self.path().join("certs.d");
        let hosts = hosts.to_str().context("a path is not UTF-8")?;
        let user = format!("{USER}:{PASSWORD}");
        self.containerd
            .run(BUILD, &["content", "fetch", "--hosts-dir", hosts, "--user", &user, reference])?;
        Ok(())
    }

    /// Removes an image from the namespace where indexes are built, and its content with it.
    ///
    /// # Errors
    /// Where containerd fails.
    pub fn forget(&self, reference: &str) -> Result<()> {
        self.containerd.run(BUILD, &["images", "rm", "--sync", reference])?;
        Ok(())
    }

    /// Runs `soci` in a namespace and returns what it prints.
    ///
    /// # Errors
    /// Where it fails.
    pub fn soci(&self, namespace: &str, words: &[&str]) -> Result<String> {
        Ok(output(&mut self.soci_command(namespace, words))?)
    }

    /// Returns a `soci` command in a namespace, with an operator's trust and credentials.
    pub fn soci_command(&self, namespace: &str, words: &[&str]) -> Command {
        let mut command = Command::new(self.binaries.path("soci"));
        command
            .arg("--address")
            .arg(self.containerd.socket())
            .args(["--namespace", namespace])
            .arg("--root")
            .arg(self.cli_root())
            .args(words)
            .envs(self.cli_env());
        command
    }

    fn cli_root(&self) -> PathBuf {
        self.path().join("cli-root")
    }
}

/// The containerd namespace where indexes are built.
pub const BUILD: &str = "build";
