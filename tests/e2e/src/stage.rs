//! One stage: registry, daemon, containerd, and the directory they share.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use serde_json::json;
use soci_testkit::containerd::{self, Containerd, Programs, trust};
use soci_testkit::gate::Gate;
use soci_testkit::snapshotter::{self, Snapshotter};
use soci_testkit::{AuthMode, TestRegistry, mounts};
use tempfile::TempDir;

use crate::binaries::Binaries;

/// The user that the registry knows.
pub const USER: &str = "puller";

/// Its password: unlike any word of a log.
pub const PASSWORD: &str = "hXq3-vrYk-0Wd7";

/// How a stage is set.
#[derive(Debug, Clone)]
pub struct StageOptions {
    /// The binaries under test.
    pub binaries: Binaries,
    /// The containerd to run.
    pub containerd: Programs,
    /// The registry.
    pub registry: soci_testkit::Options,
    /// Whether the daemon finds the registry's credentials in its Docker config.
    pub credentials: bool,
    /// Whether the daemon looks for v1 indexes by referrers.
    pub v1: bool,
    /// Where the daemon keeps artifacts: `soci` or `containerd`.
    pub content_store: String,
    /// Mirrors of the registry, asked first.
    pub mirrors: Vec<String>,
    /// Certificates that the daemon trusts beside the registry's, as PEM.
    pub more_trust: Vec<String>,
    /// Hosts beside the registry that the Docker config has the same login for.
    pub more_logins: Vec<String>,
    /// Tables of the daemon's configuration, appended; `{containerd}` stands for containerd's socket, here and in the
    /// head `{stage}` for the stage's directory.
    pub config: String,
    /// Keys of the daemon's configuration, before any table.
    pub config_head: String,
    /// Options of a tmpfs for the daemon's root directory; none for the stage's own file system.
    pub tmpfs: Option<String>,
    /// The daemon's log level.
    pub log_level: String,
    /// The image, below the registry, that containerd holds a pod's namespaces with.
    pub sandbox_image: Option<String>,
    /// Whether containerd's calls to the daemon pass through a gate.
    pub gated: bool,
    /// Variables of the daemon's environment beside those of every stage; they come last.
    pub env: Vec<(String, OsString)>,
    /// Where the logs go when the stage is taken down, or does not come up.
    pub logs: Option<PathBuf>,
}

impl StageOptions {
    /// Our binaries, the installed containerd and a registry that asks as `auth` says.
    ///
    /// # Errors
    /// Where something needed is missing.
    pub fn new(auth: AuthMode) -> Result<Self> {
        let address = own_address();
        let registry = soci_testkit::Options {
            address: SocketAddr::new(address, 0),
            names: vec![address.to_string()],
            ..soci_testkit::Options::default()
        };
        Ok(Self {
            binaries: Binaries::ours()?,
            containerd: Programs::installed()
                .context("containerd (Debian package of that name) does not run")?,
            registry: registry.auth(auth, USER, PASSWORD),
            credentials: true,
            v1: true,
            content_store: "soci".to_owned(),
            mirrors: Vec::new(),
            more_trust: Vec::new(),
            more_logins: Vec::new(),
            config: "[background_fetch]\ndisable = true\n".to_owned(),
            config_head: String::new(),
            tmpfs: None,
            log_level: "debug".to_owned(),
            sandbox_image: None,
            gated: false,
            env: Vec::new(),
            logs: None,
        })
    }
}

/// The registry and the threads it runs on: may serve several stages, one after the other.
#[derive(Debug, Clone)]
pub struct Backstage {
    /// The registry.
    pub registry: Arc<TestRegistry>,
    _runtime: Arc<tokio::runtime::Runtime>,
}

impl Backstage {
    /// Starts a registry.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn start(options: soci_testkit::Options) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let registry = runtime.block_on(TestRegistry::start(options)).context("start the registry")?;
        Ok(Self { registry: Arc::new(registry), _runtime: Arc::new(runtime) })
    }
}

/// A stage in play. Dropping it takes everything down in order.
#[derive(Debug)]
pub struct Stage {
    /// The containerd.
    pub containerd: Containerd,
    /// The daemon.
    pub snapshotter: Snapshotter,
    /// Between the two, where the options say so.
    pub gate: Option<Gate>,
    /// The registry.
    pub registry: Arc<TestRegistry>,
    /// The binaries under test.
    pub binaries: Binaries,
    _backstage: Backstage,
    directory: StageDir,
}

impl Stage {
    /// Starts registry, daemon and containerd. Blocks.
    ///
    /// # Errors
    /// Where root or /dev/fuse is missing, or one of the three does not start.
    pub fn start(options: StageOptions) -> Result<Self> {
        let backstage = Backstage::start(options.registry.clone())?;
        Self::with(options, backstage)
    }

    /// Starts daemon and containerd before a registry that runs already. Blocks.
    ///
    /// # Errors
    /// As [`Stage::start`].
    pub fn with(options: StageOptions, backstage: Backstage) -> Result<Self> {
        require()?;
        let mut directory = StageDir::new()?;
        directory.logs.clone_from(&options.logs);
        let registry = Arc::clone(&backstage.registry);
        let at = directory.path();
        let trusted: Vec<&str> =
            std::iter::once(registry.ca_pem()).chain(options.more_trust.iter().map(String::as_str)).collect();
        std::fs::write(at.join("ca.pem"), trusted.join("\n"))?;
        let hosts = at.join("certs.d");
        trust(&hosts, &registry.host(), registry.ca_pem())?;
        let host = registry.host();
        let logins: Vec<&str> =
            std::iter::once(host.as_str()).chain(options.more_logins.iter().map(String::as_str)).collect();
        if options.credentials {
            write_docker_config(&at.join("docker"), &logins, Some((USER, PASSWORD)))?;
        }
        write_docker_config(&at.join("docker-cli"), &logins, Some((USER, PASSWORD)))?;
        let containerd_directory = at.join("c");
        let config = daemon_config(&options, &host, &containerd_directory.join("c.sock"));
        let config = config.replace("{stage}", &at.display().to_string());
        if let Some(tmpfs) = &options.tmpfs {
            mount_tmpfs(&at.join("s/root"), tmpfs).context("mount a tmpfs for the daemon's root")?;
        }
        let snapshotter = Snapshotter::start(
            &at.join("s"),
            snapshotter::Options {
                program: options.binaries.path("soci-snapshotter-grpc"),
                config,
                env: [
                    vec![
                        ("DOCKER_CONFIG".to_owned(), at.join("docker").into()),
                        ("HOME".to_owned(), at.join("home").into()),
                        ("SSL_CERT_FILE".to_owned(), at.join("ca.pem").into()),
                    ],
                    options.env.clone(),
                ]
                .concat(),
                log_level: options.log_level.clone(),
            },
        )
        .context("start the snapshotter")?;
        let gate_socket = at.join("g.sock");
        let gate = match options.gated {
            true => Some(Gate::start(&gate_socket, &snapshotter.socket()).context("open the gate")?),
            false => None,
        };
        let containerd = Containerd::start(
            options.containerd,
            &containerd_directory,
            &containerd::Options {
                snapshotter: if gate.is_some() { gate_socket } else { snapshotter.socket() },
                hosts,
                sandbox_image: options.sandbox_image.as_ref().map(|name| registry.image(name)),
            },
        )
        .context("start containerd")?;
        Ok(Self {
            containerd,
            snapshotter,
            gate,
            registry,
            binaries: options.binaries,
            _backstage: backstage,
            directory,
        })
    }

    /// Returns the stage's directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the environment of the command line: trust and credentials of an operator.
    pub fn cli_env(&self) -> Vec<(String, OsString)> {
        let at = self.path();
        vec![
            ("DOCKER_CONFIG".to_owned(), at.join("docker-cli").into()),
            ("HOME".to_owned(), at.join("home").into()),
            ("SSL_CERT_FILE".to_owned(), at.join("ca.pem").into()),
        ]
    }

    /// Starts the daemon again on the same state, and waits until containerd has found it again.
    ///
    /// # Errors
    /// Where it does not start, or containerd does not reconnect.
    pub fn start_snapshotter_again(&mut self) -> Result<()> {
        self.snapshotter.start_again()?;
        // A call that containerd cannot answer by itself.
        let call = |words: &[&str]| {
            self.containerd.run("reach", &[&["snapshots", "--snapshotter", "soci"], words].concat()).ok()
        };
        let reached = || call(&["view", "reach"]).and_then(|_| call(&["rm", "reach"]));
        if soci_testkit::wait::until(Duration::from_secs(60), reached).is_none() {
            bail!("containerd does not reach the daemon after its restart");
        }
        Ok(())
    }

    /// Changes the credentials that the daemon finds in its Docker config, by rename as tools do it.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn set_login(&self, login: Option<(&str, &str)>) -> Result<()> {
        write_docker_config(&self.path().join("docker"), &[&self.registry.host()], login)
    }

    /// Gives containerd a login of its own for the registry, which needs none from the pull then.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn containerd_login(&self, user: &str, password: &str) -> Result<()> {
        use std::io::Write as _;
        let file = self.path().join("certs.d").join(self.registry.host()).join("hosts.toml");
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        let mut file = std::fs::OpenOptions::new().append(true).open(file)?;
        writeln!(
            file,
            "[host.\"https://{}\".header]\nauthorization = \"Basic {login}\"",
            self.registry.host()
        )?;
        Ok(())
    }

    /// Returns what the daemon says of an image's credentials: `soci auth explain --daemon --json`.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn explain(&self, image: &str) -> Result<serde_json::Value> {
        let control = self.snapshotter.socket().with_file_name("control.sock");
        let control = control.to_str().context("a path is not UTF-8")?.to_owned();
        let words = ["auth", "explain", "--daemon", "--json", "--control", &control, image];
        Ok(serde_json::from_str(&self.soci("default", &words)?)?)
    }

    /// Returns the end of the daemon's log, for a message.
    pub fn log_tail(&self) -> String {
        let log = self.snapshotter.log_text();
        let lines: Vec<String> =
            log.lines().rev().take(20).map(|line| line.chars().take(600).collect()).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Waits until the daemon's log has a line with `text`, and returns that line.
    ///
    /// # Errors
    /// Where it does not come in time.
    pub fn wait_log(&self, text: &str, limit: Duration) -> Result<String> {
        let find = || self.snapshotter.log_text().lines().find(|line| line.contains(text)).map(str::to_owned);
        match soci_testkit::wait::until(limit, find) {
            Some(line) => Ok(line),
            None => bail!("no log line with {text:?} after {} s", limit.as_secs()),
        }
    }
}

/// An address of this machine that is not loopback, where it has one: clients treat loopback registries specially.
fn own_address() -> IpAddr {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    // Connecting a datagram socket chooses a route and sends nothing. The address is one kept for documentation.
    let route = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect(("198.51.100.1", 9))?;
        socket.local_addr()
    });
    route.map_or(loopback, |address| if address.ip().is_unspecified() { loopback } else { address.ip() })
}

fn daemon_config(options: &StageOptions, host: &str, containerd: &Path) -> String {
    let mirrors: Vec<String> =
        options.mirrors.iter().map(|mirror| format!("{{ host = {mirror:?} }}")).collect();
    let resolver = if mirrors.is_empty() {
        String::new()
    } else {
        format!("[resolver.host.{host:?}]\nmirrors = [{}]\n\n", mirrors.join(", "))
    };
    format!(
        "{head}\n[pull_modes.soci_v1]\nenable = {v1}\n\n[content_store]\ntype = {store:?}\n\
         containerd_address = {containerd:?}\n\n{resolver}{rest}",
        head = options.config_head,
        v1 = options.v1,
        store = options.content_store,
        rest = options.config.replace("{containerd}", &containerd.display().to_string()),
    )
}

/// Writes a Docker config with one login for some hosts, or with none.
///
/// # Errors
/// Where the file cannot be written.
pub fn write_docker_config(directory: &Path, hosts: &[&str], login: Option<(&str, &str)>) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut auths = serde_json::Map::new();
    if let Some((user, password)) = login {
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        for host in hosts {
            auths.insert((*host).to_owned(), json!({"auth": auth}));
        }
    }
    let unfinished = directory.join("config.json.new");
    std::fs::write(&unfinished, json!({"auths": auths}).to_string())?;
    std::fs::set_permissions(&unfinished, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&unfinished, directory.join("config.json"))?;
    Ok(())
}

fn mount_tmpfs(at: &Path, options: &str) -> Result<()> {
    std::fs::create_dir_all(at)?;
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount("tmpfs", at, "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str())?;
    Ok(())
}

/// Tells what the machine lacks, as an error.
fn require() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("needs root: it mounts file systems and starts containerd");
    }
    if !Path::new("/dev/fuse").exists() {
        bail!("needs /dev/fuse: load the fuse module, or give the container that device");
    }
    Ok(())
}

/// The directory of a stage. Its name carries our process id, so that a later run finds what a killed one left.
#[derive(Debug)]
pub struct StageDir {
    directory: Option<TempDir>,
    path: PathBuf,
    /// Where the logs go when this is dropped.
    logs: Option<PathBuf>,
}

/// What the names of stage directories begin with.
const PREFIX: &str = "soci-stage-";

impl StageDir {
    /// Makes one, and takes away those of processes that are gone.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn new() -> Result<Self> {
        // Sockets have at most 108 bytes, so this stays short.
        let parent = std::env::var_os("SOCI_STAGE_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        sweep(&parent);
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).rand_bytes(4).tempdir_in(&parent);
        let directory = directory.with_context(|| format!("make a directory in {}", parent.display()))?;
        let path = directory.path().to_owned();
        Ok(Self { directory: Some(directory), path, logs: None })
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies what daemon and containerd logged.
    fn keep_logs(&self, to: &Path) -> Result<()> {
        std::fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
        for log in ["s/snapshotter.log", "c/containerd.log"] {
            let log = self.path.join(log);
            if let Some(name) = log.file_name().filter(|_| log.exists()) {
                std::fs::copy(&log, to.join(name)).with_context(|| format!("keep {}", log.display()))?;
            }
        }
        Ok(())
    }
}

impl Drop for StageDir {
    #[expect(clippy::print_stderr, reason = "a destructor has nobody else to tell")]
    fn drop(&mut self) {
        mounts::detach(&self.path);
        if let Some(to) = &self.logs
            && let Err(error) = self.keep_logs(to)
        {
            eprintln!("{error:#}");
        }
        let Some(directory) = self.directory.take() else { return };
        if std::thread::panicking() || std::env::var_os("SOCI_STAGE_KEEP").is_some() {
            // The logs are what one wants to see then.
            let kept = directory.keep();
            for big in ["s/root", "c/root", "c/state"] {
                let _ = std::fs::remove_dir_all(kept.join(big));
            }
            let _ = std::fs::write(kept.join("kept"), "logs of a test that failed\n");
        }
    }
}

fn sweep(parent: &Path) {
    let Ok(entries) = parent.read_dir() else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let owner = rest.split('-').next().unwrap_or_default();
        let gone = owner.parse::<u32>().is_ok() && !Path::new("/proc").join(owner).exists();
        if gone && !entry.path().join("kept").exists() {
            soci_testkit::process::kill_users_of(&entry.path());
            mounts::detach(&entry.path());
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
