//! Everything that expires, expires while a container reads in a loop: tokens, locations, passwords. It sees no error as long
//! as the first option that has a credential can give a good one, and an I/O error soon after it cannot.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use serde_json::json;
use soci_e2e::publish::Published;
use soci_e2e::pull::KUBELET;
use soci_e2e::stage::{PASSWORD, USER};
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::containerd::Running;
use soci_testkit::cri::{self, ImageService};
use soci_testkit::image::{Dialect, Image};
use soci_testkit::kube_api::KubeApi;
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_testkit::{AuthMode, Listener, wait};

/// Name and password of a login that the option after the first one has.
const OTHER: &str = "second-option";
/// How long a token lives.
const TOKEN: Duration = Duration::from_secs(10);
/// How long a location in storage is good; after that it answers 403.
const LOCATION: Duration = Duration::from_secs(5);
/// How often the container reads a block that was never read.
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
/// `EIO`.
const IO_ERROR: i32 = 5;

/// A container that reads a file block by block from its end, each block for the first time, and one that cannot be read again.
struct Reader {
    container: Running,
    expected: Vec<u8>,
    next: usize,
}

/// One read of the container.
#[derive(Debug)]
struct Turn {
    took: Duration,
    error: Option<i32>,
}

impl Reader {
    fn start(rotating: &Rotating) -> Result<Self> {
        let numbers = [STRIDE, BLOCKS, usize::try_from(PACE.as_millis())?].map(|number| number.to_string());
        let [stride, blocks, pace] = numbers.each_ref().map(String::as_str);
        let words = ["/probe", "blocks", "/content", stride, blocks, pace];
        let reference = &rotating.published.reference;
        let container =
            rotating.stage.containerd.start_container(KUBELET, "soci", reference, "reader", &words)?;
        Ok(Self { container, expected: rotating.content.clone(), next: BLOCKS })
    }

    /// Waits for the next read, and compares what was read.
    fn turn(&mut self) -> Result<Turn> {
        let line = self.container.next_line(HUNG)?;
        let words: Vec<&str> = line.split(' ').collect();
        let (block, took, rest) = match words.as_slice() {
            [block, took, rest @ ..] => (block.parse::<usize>()?, took.parse()?, rest),
            _ => bail!("the container prints {line:?}"),
        };
        assert_eq!(Some(block), self.next.checked_sub(1), "it reads another block: {line:?}");
        let took = Duration::from_millis(took);
        match rest {
            ["error", number] => Ok(Turn { took, error: Some(number.parse()?) }),
            [sum] => {
                let start = &self.expected[block * STRIDE..][..4096];
                assert_eq!(
                    u64::from_str_radix(sum, 16)?,
                    images::sum(start),
                    "block {block} has other bytes"
                );
                self.next = block;
                Ok(Turn { took, error: None })
            }
            _ => bail!("the container prints {line:?}"),
        }
    }

    /// So many reads succeed.
    fn reads(&mut self, turns: usize) -> Result<()> {
        for _ in 0..turns {
            let turn = self.turn()?;
            assert_eq!(turn.error, None, "before block {}: {turn:?}", self.next);
        }
        Ok(())
    }

    /// A read fails, at the latest the one after that which may be under way; in time, and as reads fail.
    fn fails(&mut self) -> Result<()> {
        let mut turn = self.turn()?;
        if turn.error.is_none() {
            turn = self.turn()?;
        }
        assert_eq!(turn.error, Some(IO_ERROR), "{turn:?}");
        assert!(turn.took < DENIED, "a read that cannot succeed lasts too long: {turn:?}");
        Ok(())
    }

    /// What failed is read at last.
    fn heals(&mut self) -> Result<()> {
        let healed = wait::until(HUNG, || match self.turn() {
            Ok(Turn { error: Some(_), .. }) => None,
            ended => Some(ended),
        });
        healed.context("the container reads nothing more")??;
        Ok(())
    }
}

/// The option that has the login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Docker,
    Pulls,
    Secrets,
}

impl From {
    /// Its name, and its place in the order.
    fn name(self) -> (&'static str, usize) {
        match self {
            Self::Docker => ("docker-config", 0),
            Self::Pulls => ("cri", 1),
            Self::Secrets => ("kubernetes-secrets", 2),
        }
    }
}

/// A stage whose login is in one option, and another one that the registry would take in an option after it.
struct Rotating {
    stage: Stage,
    from: From,
    published: Published,
    content: Vec<u8>,
    api: KubeApi,
    _runtime: tokio::runtime::Runtime,
    _kubeconfig: tempfile::TempDir,
}

impl Rotating {
    fn new(from: From, auth: AuthMode) -> Result<Self> {
        let mut options = StageOptions::new(auth)?;
        options.credentials = from == From::Docker;
        options.registry.tokens.ttl = TOKEN;
        options.registry = options.registry.storage(LOCATION);
        options.registry.users.push((OTHER.to_owned(), OTHER.to_owned()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let api = runtime.block_on(KubeApi::start("sync"))?;
        let kubeconfig = tempfile::tempdir()?;
        let path = kubeconfig.path().join("kubeconfig");
        std::fs::write(&path, api.kubeconfig(&json!({ "token": "sync" })))?;
        options.config.push_str(&format!(
            "[cri_keychain]\nenable_keychain = true\nimage_service_path = \"{{containerd}}\"\n\
             [kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = {path:?}\n"
        ));
        let stage = Stage::start(options)?;
        let content = Numbers::new(11).bytes(BLOCKS * STRIDE);
        let span = SPAN.to_string();
        let published =
            stage.publish_v1_with(&image(&content), "team/content", "1", &["--span-size", &span])?;
        let rotating =
            Self { stage, from, published, content, api, _runtime: runtime, _kubeconfig: kubeconfig };
        let in_cluster = if from == From::Secrets { (USER, PASSWORD) } else { (OTHER, OTHER) };
        rotating.put_secret(in_cluster);
        rotating.stage.wait_log("pull secrets are synced", HUNG)?;
        match from {
            From::Pulls => rotating.pull(PASSWORD)?,
            From::Docker | From::Secrets => rotating.stage.pull_as_kubelet(&rotating.published)?,
        }
        assert_eq!(rotating.stage.lazy_layers()?, 1, "{}", rotating.stage.log_tail());
        rotating.stage.registry.clear_log();
        Ok(rotating)
    }

    fn put_secret(&self, (user, password): (&str, &str)) {
        let host = self.stage.registry.host();
        let auths = json!({ "auths": { host: { "username": user, "password": password } } }).to_string();
        self.api.put("team", "pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &auths)]);
    }

    /// Pulls through the daemon.
    fn pull(&self, password: &str) -> Result<()> {
        let service = ImageService::connect(&self.stage.snapshotter.socket())?;
        let login = Some(cri::basic(USER, password));
        service.pull(&self.published.reference, login, "default").context("PullImage")?;
        Ok(())
    }

    /// Gives the option another password. A pull brings one that the registry takes by then.
    fn set_password(&self, password: &str) -> Result<()> {
        match self.from {
            From::Docker => self.stage.set_login(Some((USER, password))),
            From::Pulls => self.pull(password),
            From::Secrets => {
                self.put_secret((USER, password));
                Ok(())
            }
        }
    }

    /// The option after the one that has a credential is never presented, however often that one is refused.
    fn never_fell_through(&self) -> Result<()> {
        let said = self.stage.explain(&self.published.reference)?;
        let options = &said["hosts"][0]["options"];
        if self.from != From::Secrets {
            assert_eq!(options[2]["standing"], "outranked", "the other option has a login: {said:#}");
        }
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

fn image(content: &[u8]) -> Image {
    let layer = LayerBuilder::new()
        .file("probe", &Attr::mode(0o755), images::PROBE)
        .file("content", &Attr::default(), content)
        .gzip();
    Image::new(vec![layer], Dialect::Oci, &["/probe"])
}

/// The password is replaced before the registry changes where that can be, and after it, then by one that the option does not
/// have, and at last the option has that one too. With the third password the container reads `long` blocks.
fn passwords_rotate(rotating: &Rotating, reader: &mut Reader, long: usize) -> Result<()> {
    let stage = &rotating.stage;
    if rotating.from != From::Pulls {
        rotating.set_password("second")?;
    }
    stage.registry.rotate_password(USER, "second");
    stage.registry.revoke_tokens();
    rotating.set_password("second")?;
    reader.reads(2)?;
    stage.registry.rotate_password(USER, "third");
    stage.registry.revoke_tokens();
    rotating.set_password("third")?;
    reader.reads(2)?;
    stage.registry.expire_locations();
    reader.reads(long)?;

    stage.registry.rotate_password(USER, "nobody-knows");
    stage.registry.revoke_tokens();
    stage.registry.expire_locations();
    reader.fails()?;
    let event = stage.wait_log("a registry gives no access", HUNG)?;
    let (option, place) = rotating.from.name();
    for part in [
        format!("\"option\":\"{option}\"").as_str(),
        "\"status\":\"401\"",
        "\"repository\":\"team/content\"",
        "advice",
    ] {
        assert!(event.contains(part), "{part} is not in {event}");
    }
    rotating.set_password("nobody-knows")?;
    reader.heals()?;
    reader.reads(1)?;
    let log = stage.snapshotter.log_text();
    assert!(!log.contains("nobody-knows") && !log.contains("X-Test-Signature"));
    let said = stage.explain(&rotating.published.reference)?;
    assert_eq!(said["hosts"][0]["options"][place]["standing"], "used", "{said:#}");
    rotating.never_fell_through()
}

#[test]
fn a_container_outlives_tokens_locations_and_the_passwords_of_docker_config() -> Result<()> {
    let rotating = Rotating::new(From::Docker, AuthMode::Bearer)?;
    let mut reader = Reader::start(&rotating)?;
    reader.reads(22)?;
    let registry = &rotating.stage.registry;
    let tokens = registry.log_of(Listener::Token).len();
    assert!(tokens >= 2, "22 s of reading with tokens of 10 s asked for {tokens}");
    let locations = registry.log_of(Listener::Registry);
    let locations = locations.iter().filter(|seen| seen.request.path.contains("/blobs/")).count();
    assert!(locations >= 4, "22 s of reading with locations good for 5 s asked for {locations}");
    passwords_rotate(&rotating, &mut reader, 12)
}

#[test]
fn a_container_outlives_the_passwords_of_pulls() -> Result<()> {
    let rotating = Rotating::new(From::Pulls, AuthMode::Bearer)?;
    let mut reader = Reader::start(&rotating)?;
    reader.reads(2)?;
    passwords_rotate(&rotating, &mut reader, 2)
}

#[test]
fn a_container_outlives_the_passwords_of_pull_secrets() -> Result<()> {
    let rotating = Rotating::new(From::Secrets, AuthMode::Bearer)?;
    let mut reader = Reader::start(&rotating)?;
    reader.reads(2)?;
    passwords_rotate(&rotating, &mut reader, 2)
}

#[test]
fn a_403_for_an_expired_password_heals_as_soon_as_there_is_another() -> Result<()> {
    let rotating = Rotating::new(From::Docker, AuthMode::Ecr)?;
    let stage = &rotating.stage;
    let mut reader = Reader::start(&rotating)?;
    reader.reads(2)?;
    for password in ["second", "third"] {
        stage.registry.expire_password(USER);
        stage.registry.expire_locations();
        // The new login comes while the read waits for it.
        let refused = || {
            let log = stage.registry.log_of(Listener::Registry);
            log.iter().any(|seen| seen.status == 403).then_some(())
        };
        let seen = wait::until(HUNG, refused);
        stage.registry.rotate_password(USER, password);
        rotating.set_password(password)?;
        assert!(seen.is_some(), "nothing was refused");
        reader.reads(3)?;
        rotating.never_fell_through()?;
        stage.registry.clear_log();
    }
    stage.registry.expire_password(USER);
    stage.registry.expire_locations();
    reader.fails()?;
    rotating.never_fell_through()
}
