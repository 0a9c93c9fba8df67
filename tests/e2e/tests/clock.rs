//! A node's clock is wrong and is set, a year ahead or back, while the daemon runs: nothing that a reader reads depends on the
//! time of day. Tokens and locations are asked for as often as their life says, which is counted from when they came.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use soci_e2e::clock::Clock;
use soci_e2e::pull::KUBELET;
use soci_e2e::scrape::scrape;
use soci_e2e::state::PATIENCE;
use soci_e2e::{Stage, StageOptions};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_testkit::{AuthMode, Listener, wait};

/// Bytes between two blocks that are read, more than reading ahead covers.
const STRIDE: usize = 1 << 20;
/// How many blocks there are.
const BLOCKS: usize = 24;
/// Bytes per span.
const SPAN: &str = "65536";
/// A year and a day.
const YEAR: i32 = 366;
/// Bytes of the span cache where it is small.
const SMALL: usize = 4 << 20;
const METRICS: &str = "metrics_address = \"{stage}/m.sock\"\nmetrics_network = \"unix\"\n";

/// The content and what is known of the daemon beside it.
struct Node {
    stage: Stage,
    clock: Clock,
    image: Image,
    content: Vec<u8>,
}

impl Node {
    /// A node whose clock is right, with one image, pulled lazily.
    fn new() -> Result<Self> {
        let clock = Clock::new()?;
        let mut options = StageOptions::new(AuthMode::Bearer)?;
        options.config_head.push_str(METRICS);
        options.env = clock.env();
        options.registry = options.registry.storage(Duration::from_secs(300));
        let stage = Stage::start(options)?;
        let content = Numbers::new(17).bytes(BLOCKS * STRIDE);
        let layer = LayerBuilder::new().file("content", &Attr::default(), &content).gzip();
        let image = Image::new(vec![layer], Dialect::Oci, &["/content"]);
        let published = stage.publish_v1_with(&image, "team/content", "1", &["--span-size", SPAN])?;
        stage.pull_as_kubelet(&published)?;
        assert_eq!(stage.lazy_layers()?, 1, "{}", stage.log_tail());
        Ok(Self { stage, clock, image, content })
    }

    /// Reads a page of each of these blocks.
    fn read(&self, blocks: impl IntoIterator<Item = usize>) -> Result<()> {
        let mounted = self.stage.containerd.mount(KUBELET, "soci", &self.image.chain_id(), "m")?;
        let file = File::open(mounted.path().join("content"))?;
        for block in blocks {
            let at = block * STRIDE;
            let mut page = vec![0; 4096];
            file.read_exact_at(&mut page, at as u64).with_context(|| format!("read block {block}"))?;
            assert!(page == self.content[at..at + page.len()], "block {block} has other bytes");
        }
        Ok(())
    }

    /// Returns the year that the daemon wrote into its latest line.
    fn year(&self) -> Result<i32> {
        let log = self.stage.snapshotter.log_text();
        let (whole, _) = log.rsplit_once('\n').context("the log is empty")?;
        let line: Value = serde_json::from_str(whole.lines().next_back().unwrap_or_default())?;
        let time = line["time"].as_str().with_context(|| format!("{line} has no time"))?;
        Ok(time.get(..4).context("a time without a year")?.parse()?)
    }

    /// Sets the clock, and has the registry take no token that it gave before.
    fn jump(&self, days: i32) -> Result<()> {
        self.clock.set(days)?;
        self.stage.registry.revoke_tokens();
        self.stage.registry.expire_locations();
        self.stage.registry.clear_log();
        Ok(())
    }

    /// What was read since the jump took a token or a few and a location or a few, not one of each for each read.
    fn asked_little(&self, when: &str) {
        let tokens = self.stage.registry.log_of(Listener::Token).len();
        assert!((1..=3).contains(&tokens), "{when}: {tokens} tokens");
        let registry = self.stage.registry.log_of(Listener::Registry);
        let locations = registry.iter().filter(|seen| seen.request.path.contains("/blobs/")).count();
        assert!((1..=4).contains(&locations), "{when}: {locations} requests for the blob's location");
        let served = self.stage.registry.log_of(Listener::Storage);
        let served = served.iter().filter(|seen| (200..300).contains(&seen.status)).count();
        assert!(served >= 6, "{when}: the reads took {served} requests, so they prove nothing");
    }

    /// Kills the daemon and starts it with another configuration.
    fn restart(&mut self, config: &str) -> Result<()> {
        self.stage.snapshotter.daemon().kill();
        let file = self.stage.path().join("s/config.toml");
        let text = std::fs::read_to_string(&file)?;
        let head = text.split("[background_fetch]").next().unwrap_or_default();
        std::fs::write(&file, format!("{head}{config}"))?;
        self.stage.start_snapshotter_again()?;
        self.stage.wait_lazy_layers(1)
    }

    fn cache_bytes(&self) -> Result<usize> {
        let shown = scrape(&self.stage.path().join("m.sock"))?;
        let line = shown.lines().find_map(|line| line.strip_prefix("soci_span_cache_bytes "));
        Ok(line.with_context(|| format!("no size of the cache in\n{shown}"))?.parse()?)
    }

    fn no_panic(&self) -> Result<()> {
        let log = self.stage.snapshotter.log_text();
        match log.lines().find(|line| line.contains("panicked")) {
            Some(line) => bail!("{line}"),
            None => Ok(()),
        }
    }
}

#[test]
fn clock_jumps_of_a_year_ahead_and_back_are_not_noticed_by_readers() -> Result<()> {
    let mut node = Node::new()?;
    node.read(0..4)?;
    let year = node.year()?;

    node.jump(YEAR)?;
    node.read([23, 21, 19, 17, 15, 13])?;
    assert!(node.year()? > year, "the daemon does not see the clock");
    node.asked_little("a year ahead");

    node.jump(-YEAR)?;
    node.read([22, 20, 18, 16, 14, 12])?;
    assert!(node.year()? < year, "the daemon does not see the clock");
    node.asked_little("two years back");

    // What is started before a jump goes on after it.
    node.stage.registry.shape(Duration::ZERO, Some(2_000_000));
    node.restart("")?;
    node.stage.registry.clear_log();
    let begun = || {
        let log = node.stage.registry.log_of(Listener::Storage);
        (!log.is_empty()).then_some(())
    };
    assert!(wait::until(PATIENCE, begun).is_some(), "nothing is fetched: {}", node.stage.log_tail());
    assert!(!node.stage.is_complete());
    node.jump(YEAR)?;
    node.stage.registry.shape(Duration::ZERO, None);
    let complete = || node.stage.is_complete().then_some(());
    assert!(wait::until(PATIENCE, complete).is_some(), "not completed: {}", node.stage.log_tail());
    let tokens = node.stage.registry.log_of(Listener::Token).len();
    assert!((1..=6).contains(&tokens), "completing took {tokens} tokens");
    node.read(0..BLOCKS)?;

    // A smaller cache, found with files of another year.
    assert!(node.cache_bytes()? > SMALL);
    node.jump(-YEAR)?;
    node.restart(&format!("[background_fetch]\ndisable = true\n[span_cache]\nmax_bytes = {SMALL}\n"))?;
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    for round in [0, YEAR, -YEAR] {
        node.clock.set(round)?;
        node.read(0..BLOCKS)?;
        let bytes = node.cache_bytes()?;
        assert!((1..=SMALL).contains(&bytes), "the cache has {bytes} bytes");
    }
    node.no_panic()
}
