//! A daemon that was killed comes back with the registry down and without a login anywhere: what is here is served to containers
//! that are started anew, and whatever brings a login brings the rest.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::cri::{self, ImageService};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::{Action, AuthMode, Fault, Matcher};

/// A stage on which an image was pulled and half of it read, in a container.
struct Node {
    stage: Stage,
    image: Image,
    published: Published,
    /// What the container printed.
    read: String,
}

impl Node {
    /// Pulls as `pull` does.
    fn new(credentials: bool, pull: impl FnOnce(&Stage, &Published) -> Result<()>) -> Result<Self> {
        let mut options = StageOptions::new(AuthMode::Bearer)?;
        options.credentials = credentials;
        // A token that outlived the login would hide that there is none.
        options.registry.tokens.ttl = Duration::from_secs(1);
        options.config.push_str("[blob]\nfetching_timeout_sec = 5\nmax_retries = 1\n");
        options
            .config
            .push_str("[cri_keychain]\nenable_keychain = true\nimage_service_path = \"{containerd}\"\n");
        let stage = Stage::start(options)?;
        let image = images::odd(Dialect::Oci);
        let published = stage.publish_v1(&image, "team/app", "1")?;
        pull(&stage, &published)?;
        assert_eq!(stage.lazy_layers()?, 2, "{}", stage.log_tail());
        let read = stage.probe(KUBELET, &published, "before", &["sum", "/large"])?;
        stage.wait_stored()?;
        Ok(Self { stage, image, published, read })
    }

    /// Kills the daemon, takes registry and logins away, and starts it again.
    fn comes_back_without_anything(&mut self) -> Result<()> {
        self.stage.set_login(None)?;
        self.stage.registry.fault(Fault::new(Matcher::any(), Action::Hangup));
        self.stage.registry.clear_log();
        self.stage.snapshotter.daemon().kill();
        self.stage.start_snapshotter_again()?;
        self.stage.wait_lazy_layers(2)?;
        for chain in self.image.chain_ids() {
            let words = ["snapshots", "--snapshotter", "soci", "info", &chain];
            let shown: Value = serde_json::from_str(&self.stage.containerd.run(KUBELET, &words)?)?;
            assert_eq!(shown["Kind"], "Committed", "{shown}");
        }
        self.serves_what_is_here("without a registry")?;
        assert_eq!(self.uses()?, Value::Null, "a login is left");
        // With the registry back there is still nobody who may read.
        self.stage.registry.clear_faults();
        self.serves_what_is_here("without a login")
    }

    fn serves_what_is_here(&self, when: &str) -> Result<()> {
        let sums = |path: &str| self.stage.probe(KUBELET, &self.published, "c", &["sum", path]);
        assert_eq!(sums("/large").context(when.to_owned())?, self.read, "{when}: from the span cache");
        assert!(sums("/random").is_err(), "{when}: what was never fetched is read");
        Ok(())
    }

    /// Which option the daemon has a login from.
    fn uses(&self) -> Result<Value> {
        Ok(self.stage.explain(&self.published.reference)?["hosts"][0]["uses"].take())
    }

    /// What was never fetched is read by a container.
    fn reads_the_rest(&self, option: &str) -> Result<()> {
        assert_eq!(self.uses()?, option);
        let rest = self.stage.probe(KUBELET, &self.published, "c", &["sum", "/random"])?;
        assert!(rest.starts_with("/random 5242897 "), "{rest}");
        let differences =
            self.stage.differences(KUBELET, &self.published, &self.image, &images::odd_timeless())?;
        assert!(differences.is_empty(), "{}", differences.join("\n"));
        Ok(())
    }
}

/// Pulls through the daemon, with a login.
fn pull_with_login(stage: &Stage, published: &Published) -> Result<()> {
    let service = ImageService::connect(&stage.snapshotter.socket())?;
    let login = Some(cri::basic(USER, PASSWORD));
    service.pull(&published.reference, login, "default").context("PullImage through the daemon")?;
    Ok(())
}

#[test]
fn a_docker_config_that_comes_after_the_restart_brings_the_rest() -> Result<()> {
    let mut node = Node::new(true, Stage::pull_as_kubelet)?;
    node.comes_back_without_anything()?;
    node.stage.set_login(Some((USER, PASSWORD)))?;
    node.reads_the_rest("docker-config")
}

#[test]
fn a_pull_of_the_same_image_after_the_restart_brings_the_rest() -> Result<()> {
    let mut node = Node::new(false, pull_with_login)?;
    node.comes_back_without_anything()?;
    pull_with_login(&node.stage, &node.published)?;
    node.reads_the_rest("cri")
}

#[test]
fn a_pull_of_another_image_after_the_restart_brings_the_rest() -> Result<()> {
    let mut node = Node::new(false, pull_with_login)?;
    let other = node.stage.publish_v1(&images::single(9), "team/other", "1")?;
    node.comes_back_without_anything()?;
    pull_with_login(&node.stage, &other)?;
    node.reads_the_rest("cri")
}
