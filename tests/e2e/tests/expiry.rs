//! Everything that expires, expires while a reader reads: tokens, locations, passwords. The reader sees no error as long
//! as the first option can give a good credential, and an I/O error soon after it cannot.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use serde_json::json;
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::USER;
use soci_e2e::{Stage, StageOptions};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::kube_api::KubeApi;
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_testkit::{AuthMode, Listener, wait};

/// Name and password of the login that the pull secret has.
const OTHER: &str = "second-option";
/// How long a token lives.
const TOKEN: Duration = Duration::from_secs(10);
/// How long a location in storage is good; after that it answers 403.
const LOCATION: Duration = Duration::from_secs(5);
/// How often the reader reads a block that was never read.
const PACE: Duration = Duration::from_secs(1);
/// Bytes per span: small, so that reading ahead does not fetch everything at once.
const SPAN: usize = 64 << 10;
/// Bytes between two blocks that are read, more than reading ahead covers.
const STRIDE: usize = 1 << 20;
/// How many blocks there are.
const BLOCKS: usize = 48;
/// After this a refused read must have failed: five seconds, and a little for a busy machine.
const DENIED: Duration = Duration::from_secs(8);
/// After this what has to happen does not.
const HUNG: Duration = Duration::from_secs(60);

/// A file that is read block by block from its end, each block for the first time.
struct Reader {
    file: File,
    expected: Vec<u8>,
    next: usize,
}

impl Reader {
    fn read(&mut self) -> Result<()> {
        if self.next == 0 {
            bail!("all blocks are read");
        }
        self.next -= 1;
        let at = self.next * STRIDE;
        let mut block = vec![0; 4096];
        self.file
            .read_exact_at(&mut block, at as u64)
            .with_context(|| format!("read block {}", self.next))?;
        assert!(block == self.expected[at..at + block.len()], "block {} has other bytes", self.next);
        Ok(())
    }

    fn read_at_pace(&mut self, blocks: usize) -> Result<()> {
        for _ in 0..blocks {
            self.read()?;
            // A reader's pace, not a wait for anything.
            let _ = wait::until(PACE, || None::<()>);
        }
        Ok(())
    }
}

fn image(content: &[u8]) -> Image {
    let layer = LayerBuilder::new().file("content", &Attr::default(), content).gzip();
    Image::new(vec![layer], Dialect::Oci, &["/content"])
}

/// A stage whose login is in Docker config, and a cluster with another one that the registry would take.
struct Rotating {
    stage: Stage,
    _api: KubeApi,
    _runtime: tokio::runtime::Runtime,
    _kubeconfig: tempfile::TempDir,
}

impl Rotating {
    /// The option after the one that has a credential is never presented, however often that one is refused.
    fn never_fell_through(&self) -> Result<()> {
        let said = self.stage.explain(&format!("{}/team/content:1", self.stage.registry.host()))?;
        let options = &said["hosts"][0]["options"];
        assert_eq!(options[2]["standing"], "outranked", "the other option has a login: {said:#}");
        let other = base64::engine::general_purpose::STANDARD.encode(format!("{OTHER}:{OTHER}"));
        for seen in self.stage.registry.log() {
            let sent = seen.header("authorization").unwrap_or_default();
            assert!(
                !sent.contains(&other),
                "the login of another option was presented: {}",
                seen.request.path
            );
        }
        Ok(())
    }
}

fn stage(auth: AuthMode) -> Result<(Rotating, Image, Vec<u8>)> {
    let mut options = StageOptions::new(auth)?;
    options.registry.tokens.ttl = TOKEN;
    options.registry = options.registry.storage(LOCATION);
    options.registry.users.push((OTHER.to_owned(), OTHER.to_owned()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let api = runtime.block_on(KubeApi::start("sync"))?;
    let kubeconfig = tempfile::tempdir()?;
    let path = kubeconfig.path().join("kubeconfig");
    std::fs::write(&path, api.kubeconfig(&json!({ "token": "sync" })))?;
    options
        .config
        .push_str(&format!("[kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = {path:?}\n"));
    let stage = Stage::start(options)?;
    let auths = json!({ "auths": { stage.registry.host(): { "username": OTHER, "password": OTHER } } });
    api.put("team", "pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &auths.to_string())]);
    stage.wait_log("pull secrets are synced", HUNG)?;
    let content = Numbers::new(11).bytes(BLOCKS * STRIDE);
    let image = image(&content);
    let span = SPAN.to_string();
    let published = stage.publish_v1_with(&image, "team/content", "1", &["--span-size", &span])?;
    stage.pull_as_kubelet(&published)?;
    assert_eq!(stage.lazy_layers()?, 1, "{}", stage.log_tail());
    stage.registry.clear_log();
    Ok((Rotating { stage, _api: api, _runtime: runtime, _kubeconfig: kubeconfig }, image, content))
}

/// Reads what cannot be had any more and returns how it fails.
fn fails(file: &File, at: u64) -> Result<Option<i32>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let file = file.try_clone()?;
    std::thread::spawn(move || {
        let result = file.read_exact_at(&mut [0; 4096], at);
        let _ = sender.send(result.err().and_then(|error| error.raw_os_error()));
    });
    receiver.recv_timeout(DENIED).context("a read that cannot succeed lasts too long")
}

#[test]
fn a_reader_outlives_tokens_locations_and_passwords() -> Result<()> {
    let (rotating, image, expected) = stage(AuthMode::Bearer)?;
    let stage = &rotating.stage;
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    let file = File::open(mounted.path().join("content"))?;
    let mut reader = Reader { file, expected, next: BLOCKS };

    reader.read_at_pace(22)?;
    let tokens = stage.registry.log_of(Listener::Token).len();
    assert!(tokens >= 2, "22 s of reading with tokens of 10 s asked for {tokens}");
    let locations = stage.registry.log_of(Listener::Registry);
    let locations = locations.iter().filter(|seen| seen.request.path.contains("/blobs/")).count();
    assert!(locations >= 4, "22 s of reading with locations good for 5 s asked for {locations}");

    // The login is replaced before the registry changes, and after it.
    stage.set_login(Some((USER, "second")))?;
    stage.registry.rotate_password(USER, "second");
    stage.registry.revoke_tokens();
    reader.read_at_pace(2)?;
    stage.registry.rotate_password(USER, "third");
    stage.registry.revoke_tokens();
    stage.set_login(Some((USER, "third")))?;
    reader.read_at_pace(2)?;
    stage.registry.expire_locations();
    reader.read_at_pace(12)?;

    stage.registry.rotate_password(USER, "nobody-knows");
    stage.registry.revoke_tokens();
    stage.registry.expire_locations();
    // The first block has the span that was read to look at the file's header.
    let unread = STRIDE as u64;
    assert_eq!(fails(&reader.file, unread)?, Some(5), "EIO");
    let event = stage.wait_log("a registry gives no access", HUNG)?;
    for part in
        ["\"option\":\"docker-config\"", "\"status\":\"401\"", "\"repository\":\"team/content\"", "advice"]
    {
        assert!(event.contains(part), "{part} is not in {event}");
    }
    stage.set_login(Some((USER, "nobody-knows")))?;
    let healed = wait::until(HUNG, || reader.file.read_exact_at(&mut [0; 4096], unread).ok());
    assert!(healed.is_some(), "{}", stage.log_tail());
    reader.read_at_pace(1)?;
    let log = stage.snapshotter.log_text();
    assert!(!log.contains("nobody-knows") && !log.contains("X-Test-Signature"));
    rotating.never_fell_through()
}

#[test]
fn a_403_for_an_expired_password_heals_as_soon_as_there_is_another() -> Result<()> {
    let (rotating, image, expected) = stage(AuthMode::Ecr)?;
    let stage = &rotating.stage;
    let mounted = stage.containerd.mount(KUBELET, "soci", &image.chain_id(), "m")?;
    let file = File::open(mounted.path().join("content"))?;
    let mut reader = Reader { file, expected, next: BLOCKS };
    reader.read_at_pace(2)?;
    for password in ["second", "third"] {
        stage.registry.expire_password(USER);
        stage.registry.expire_locations();
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| reader.read());
            // The new login comes while the read waits for it.
            let refused = || {
                let log = stage.registry.log_of(Listener::Registry);
                log.iter().any(|seen| seen.status == 403).then_some(())
            };
            let seen = wait::until(HUNG, refused);
            stage.registry.rotate_password(USER, password);
            stage.set_login(Some((USER, password)))?;
            assert!(seen.is_some(), "nothing was refused");
            reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
        })?;
        rotating.never_fell_through()?;
        stage.registry.clear_log();
    }
    stage.registry.expire_password(USER);
    stage.registry.expire_locations();
    // The first block has the span that was read to look at the file's header.
    let unread = STRIDE as u64;
    assert_eq!(fails(&reader.file, unread)?, Some(5), "EIO");
    rotating.never_fell_through()
}
