//! Credential helpers: `docker-credential-<suffix> get`, the server on stdin, one JSON object on stdout.
//!
//! A helper is somebody else's program that runs as root beside a file system that waits for it, so: no shell, found only
//! in directories that nobody else can write to, a deadline, capped output, killed with all its children, at most
//! `AT_ONCE` at a time, one per (program, server) whoever asks. What it prints never gets into a message.
//!
//! An answer is remembered for `MEMO`, since reads come in bursts. A refused answer is asked for anew at once, then with
//! growing pauses while the helper keeps giving the same one.
//!
//! Source: docker/docker-credential-helpers, `client` and `credentials` packages.

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use crate::children::{Group, NOT_INHERITED, unprotect};
use crate::flight::Flights;
use crate::json;
use crate::{Credential, Fingerprint, Meters, Rejected, Secret};

/// How many helpers run at once.
const AT_ONCE: usize = 4;
/// How long an answer is remembered.
const MEMO: Duration = Duration::from_secs(60);
/// How long it is remembered that a helper has nothing: somebody may be logging in at this moment.
const NOT_FOUND_MEMO: Duration = Duration::from_secs(10);
/// How long a failure is remembered, so that a burst of reads does not start a burst of failing helpers.
const FAILURE_MEMO: Duration = Duration::from_secs(2);
/// The longest pause before a refused answer is asked for anew.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
const MAX_MEMOS: usize = 1024;
const MAX_STDOUT: usize = 256 * 1024;
const MAX_STDERR: usize = 8 * 1024;
/// Where helpers are searched when `PATH` is not set.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const NOT_FOUND: &str = "credentials not found in native keychain";

/// What a helper said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HelperAnswer {
    /// This credential.
    Found(HelperCredential),
    /// It has none for the server.
    NotFound,
}

/// A credential that is compared by fingerprint.
#[derive(Debug, Clone)]
pub(crate) struct HelperCredential(pub(crate) Credential);

/// Why a helper is of no use. Never holds what it printed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{program}: {trouble}; {}", self.advice())]
pub(crate) struct HelperError {
    program: String,
    /// Where the program is, once it is found.
    file: Option<PathBuf>,
    trouble: Trouble,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("not a name for a helper; letters, digits, '.', '_' and '-' are allowed")]
    BadName,
    #[error(
        "not found in PATH as an executable file (relative and world-writable directories are not searched)"
    )]
    NotInstalled,
    #[error("cannot be started: {0}")]
    Start(String),
    #[error("no answer within {0:?}, killed")]
    TimedOut(Duration),
    #[error("prints more than {MAX_STDOUT} bytes, killed")]
    TooMuch,
    #[error("cannot be read from: {0}")]
    Io(String),
    #[error("{status}{hint}")]
    Failed { status: String, hint: &'static str },
    #[error("ends well but prints nothing")]
    Silent,
    #[error("ends well but does not print a JSON object with Username and Secret")]
    Garbled,
    #[error("the task that ran it ended early")]
    Abandoned,
}

/// Where and how helpers are run.
#[derive(Debug, Clone)]
pub(crate) struct HelperEnvironment {
    pub(crate) path: Option<OsString>,
    pub(crate) home: Option<PathBuf>,
    pub(crate) deadline: Duration,
}

/// The helpers of a process.
#[derive(Debug)]
pub(crate) struct Helpers {
    environment: Arc<HelperEnvironment>,
    permits: Arc<Semaphore>,
    flights: Flights<Key, Answer>,
    memos: Arc<Mutex<HashMap<Key, Memo>>>,
    meters: Arc<dyn Meters>,
}

type Answer = Result<HelperAnswer, HelperError>;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    suffix: String,
    server: String,
    /// Of the config file: another file may mean another helper configuration.
    generation: u64,
}

#[derive(Debug, Clone)]
struct Memo {
    answer: Answer,
    at: Instant,
    /// How often the helper gave this same answer again after it was refused.
    repeats: u32,
}

impl PartialEq for HelperCredential {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint() == other.fingerprint()
    }
}

impl Eq for HelperCredential {}

impl HelperCredential {
    fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint()
    }
}

impl HelperError {
    fn abandoned(program: String) -> Self {
        Self { program, file: None, trouble: Trouble::Abandoned }
    }

    /// Returns what a person can do about it.
    fn advice(&self) -> String {
        match (&self.trouble, &self.file) {
            (Trouble::BadName, _) => "correct it in config.json".to_owned(),
            (Trouble::NotInstalled, _) => "install it or remove it from config.json".to_owned(),
            (_, Some(file)) => {
                format!("run `{} get` with the registry on its standard input to see why", file.display())
            }
            (_, None) => "it is run again".to_owned(),
        }
    }
}

impl Helpers {
    pub(crate) fn new(environment: HelperEnvironment, meters: Arc<dyn Meters>) -> Self {
        Self {
            environment: Arc::new(environment),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            flights: Flights::default(),
            memos: Arc::default(),
            meters,
        }
    }

    /// Returns what `docker-credential-<suffix>` has for `server`: from memory if it is recent and was not refused.
    pub(crate) async fn get(
        &self,
        suffix: &str,
        server: &str,
        generation: u64,
        rejected: &Rejected,
    ) -> Answer {
        let program = format!("docker-credential-{suffix}");
        if !is_suffix(suffix) {
            let program = format!("docker-credential-{suffix:?}");
            return Err(HelperError { program, file: None, trouble: Trouble::BadName });
        }
        let key = Key { suffix: suffix.to_owned(), server: server.to_owned(), generation };
        let asked = Instant::now();
        let refused = match self.remembered(&key, rejected) {
            Remembered::Answer(answer) => return answer,
            Remembered::Refused => true,
            Remembered::Nothing => false,
        };
        let run = self.flights.join(key.clone(), || {
            let (environment, permits) = (Arc::clone(&self.environment), Arc::clone(&self.permits));
            let (memos, meters, server) =
                (Arc::clone(&self.memos), Arc::clone(&self.meters), server.to_owned());
            let program = program.clone();
            async move {
                // Another run may have ended between the caller's look and this start.
                if let Some(memo) = memos.lock().get(&key).filter(|memo| memo.at >= asked) {
                    return memo.answer.clone();
                }
                let Ok(_permit) = permits.acquire().await else {
                    return Err(HelperError::abandoned(program));
                };
                let started = Instant::now();
                let answer = run(&environment, program, &server).await;
                meters.helper_ran(started.elapsed(), answer.is_ok());
                remember(&mut memos.lock(), key, &answer, refused);
                answer
            }
        });
        run.wait().await.unwrap_or_else(|_| Err(HelperError::abandoned(program)))
    }

    /// Returns how long ago the helper gave the answer that is remembered.
    pub(crate) fn age(&self, suffix: &str, server: &str, generation: u64) -> Option<Duration> {
        let key = Key { suffix: suffix.to_owned(), server: server.to_owned(), generation };
        self.memos.lock().get(&key).map(|memo| memo.at.elapsed())
    }

    fn remembered(&self, key: &Key, rejected: &Rejected) -> Remembered {
        let memos = self.memos.lock();
        let Some(memo) = memos.get(key) else { return Remembered::Nothing };
        let refused = match &memo.answer {
            Ok(HelperAnswer::Found(found)) => rejected.holds(found.fingerprint()),
            // Somebody's credential was refused and this helper had none: it may have one by this time.
            Ok(HelperAnswer::NotFound) => !rejected.is_empty(),
            Err(_) => false,
        };
        let kept = match memo.answer {
            Err(_) => FAILURE_MEMO,
            Ok(_) if refused => pause(memo.repeats),
            Ok(HelperAnswer::NotFound) => NOT_FOUND_MEMO,
            Ok(_) => MEMO,
        };
        match memo.at.elapsed() < kept {
            true => Remembered::Answer(memo.answer.clone()),
            false if refused => Remembered::Refused,
            false => Remembered::Nothing,
        }
    }
}

/// What is remembered of a helper.
enum Remembered {
    /// An answer that still holds.
    Answer(Answer),
    /// An answer that was refused and is to be asked for anew.
    Refused,
    Nothing,
}

/// Returns how long an answer that was given `repeats` times again is kept although it was refused.
fn pause(repeats: u32) -> Duration {
    match repeats {
        0 => Duration::ZERO,
        n => (Duration::from_secs(2) * 2u32.saturating_pow((n - 1).min(8))).min(LONGEST_PAUSE),
    }
}

fn remember(memos: &mut HashMap<Key, Memo>, key: Key, answer: &Answer, refused: bool) {
    if memos.len() >= MAX_MEMOS && !memos.contains_key(&key) {
        let oldest = memos.iter().min_by_key(|(_, memo)| memo.at).map(|(key, _)| key.clone());
        oldest.map(|key| memos.remove(&key));
    }
    let same = memos.get(&key).filter(|memo| refused && memo.answer == *answer);
    let repeats = same.map_or(0, |memo| memo.repeats.saturating_add(1));
    memos.insert(key, Memo { answer: answer.clone(), at: Instant::now(), repeats });
}

fn is_suffix(suffix: &str) -> bool {
    suffix.len() <= 128
        && suffix.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && suffix.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Returns the program's path: in an absolute directory that not everybody may write to, a regular executable file.
fn find(path: &OsStr, program: &str) -> Option<PathBuf> {
    path.as_bytes().split(|byte| *byte == b':').map(|part| Path::new(OsStr::from_bytes(part))).find_map(
        |directory| {
            if !directory.is_absolute() || std::fs::metadata(directory).ok()?.mode() & 0o002 != 0 {
                return None;
            }
            let file = directory.join(program);
            let metadata = std::fs::metadata(&file).ok()?;
            (metadata.is_file() && metadata.permissions().mode() & 0o111 != 0).then_some(file)
        },
    )
}

async fn run(environment: &HelperEnvironment, program: String, server: &str) -> Answer {
    let path =
        environment.path.clone().filter(|path| !path.is_empty()).unwrap_or_else(|| DEFAULT_PATH.into());
    let (searched, name) = (path.clone(), program.clone());
    let Ok(file) = tokio::task::spawn_blocking(move || find(&searched, &name)).await else {
        return Err(HelperError::abandoned(program));
    };
    let Some(file) = file else {
        return Err(HelperError { program, file, trouble: Trouble::NotInstalled });
    };
    let answer = ask(environment, &path, &file, server).await;
    answer.map_err(|trouble| HelperError { program, file: Some(file), trouble })
}

async fn ask(
    environment: &HelperEnvironment,
    path: &OsStr,
    file: &Path,
    server: &str,
) -> Result<HelperAnswer, Trouble> {
    let mut command = Command::new(file);
    command.arg("get").env("PATH", path).process_group(0).kill_on_drop(true);
    for ours in NOT_INHERITED {
        command.env_remove(ours);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(home) = &environment.home {
        command.env("HOME", home);
    }
    let child = command.spawn().map_err(|error| Trouble::Start(error.kind().to_string()))?;
    // Before it is asked for anything.
    if let Some(process) = child.id() {
        unprotect(process);
    }
    let mut helper = Helper { group: Group::of(&child), child };
    let talked = timeout(environment.deadline, helper.talk(server)).await;
    let (status, stdout) = match talked {
        Ok(Ok(said)) => said,
        Ok(Err(trouble)) => {
            helper.end().await;
            return Err(trouble);
        }
        Err(_elapsed) => {
            helper.end().await;
            return Err(Trouble::TimedOut(environment.deadline));
        }
    };
    understand(status, &stdout)
}

/// A helper and all its children. Dropped before its end, it is killed.
struct Helper {
    /// Goes first, before the child is reaped.
    group: Group,
    child: Child,
}

impl Helper {
    /// Writes the server, reads all output, waits for the end. What the helper left running in its group is killed then.
    async fn talk(
        &mut self,
        server: &str,
    ) -> Result<(std::process::ExitStatus, Zeroizing<Vec<u8>>), Trouble> {
        let (stdin, stdout, stderr) =
            (self.child.stdin.take(), self.child.stdout.take(), self.child.stderr.take());
        let write = async {
            if let Some(mut stdin) = stdin {
                // A helper need not read; that it closed its end is no failure.
                let _ = stdin.write_all(server.as_bytes()).await;
                let _ = stdin.shutdown().await;
            }
        };
        let read = async {
            match stdout {
                Some(stdout) => read_capped(stdout).await,
                None => Ok(Zeroizing::new(Vec::new())),
            }
        };
        let drain = async {
            if let Some(stderr) = stderr {
                // Read so that the helper does not block; what it says may quote anything and is not shown.
                let mut kept = Zeroizing::new(vec![0; MAX_STDERR]);
                let mut stderr = stderr;
                while matches!(stderr.read(&mut kept).await, Ok(1..)) {}
            }
            std::future::pending::<Infallible>().await
        };
        let talk = async {
            let ((), stdout) = tokio::join!(write, read);
            if stdout.is_ok() {
                self.group.kill_at_the_end().await;
            }
            stdout
        };
        // Whoever keeps stderr open after that is not waited for.
        let stdout = tokio::select! {
            stdout = talk => stdout?,
            never = drain => match never {},
        };
        let status = self.child.wait().await.map_err(|error| Trouble::Io(error.kind().to_string()))?;
        Ok((status, stdout))
    }

    /// Kills the whole group and reaps its leader.
    async fn end(&mut self) {
        self.group.kill();
        // SIGKILL cannot be refused; the limit is for a process stuck in the kernel.
        let _ = timeout(Duration::from_secs(1), self.child.wait()).await;
    }
}

async fn read_capped(stdout: impl AsyncRead + Unpin) -> Result<Zeroizing<Vec<u8>>, Trouble> {
    // Room for all of it at once: a buffer that grows leaves copies of the secret behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_STDOUT + 1));
    let mut stdout = stdout.take(MAX_STDOUT as u64 + 1);
    loop {
        match stdout.read_buf(&mut *bytes).await {
            Ok(0) => return Ok(bytes),
            Ok(_) if bytes.len() > MAX_STDOUT => return Err(Trouble::TooMuch),
            Ok(_) => {}
            Err(error) => return Err(Trouble::Io(error.kind().to_string())),
        }
    }
}

/// Returns what a helper meant that ended with `status` and printed `stdout`.
pub(crate) fn understand(status: std::process::ExitStatus, stdout: &[u8]) -> Result<HelperAnswer, Trouble> {
    let said = stdout.trim_ascii();
    if !status.success() {
        if said == NOT_FOUND.as_bytes() {
            return Ok(HelperAnswer::NotFound);
        }
        let hint = match said {
            b"no credentials server URL" => " (it got no server name)",
            b"no credentials username" => " (its entry has no user name)",
            _ => "",
        };
        return Err(Trouble::Failed { status: status.to_string(), hint });
    }
    if said.is_empty() {
        return Err(Trouble::Silent);
    }
    let node = json::parse(said, 8).map_err(|_| Trouble::Garbled)?;
    let (username, secret) = match (node.get("Username"), node.get("Secret"), &node) {
        (name, secret, json::Node::Map(_)) if is_text(name) && is_text(secret) => {
            (node.text("Username").unwrap_or_default(), node.text("Secret").unwrap_or_default())
        }
        _ => return Err(Trouble::Garbled),
    };
    let secret = Secret::new(secret);
    let credential = match username {
        "<token>" => Credential::IdentityToken(secret),
        username => Credential::Basic { username: username.to_owned(), password: secret },
    };
    Ok(match credential.is_empty() {
        true => HelperAnswer::NotFound,
        false => HelperAnswer::Found(HelperCredential(credential)),
    })
}

fn is_text(node: Option<&json::Node>) -> bool {
    matches!(node, None | Some(json::Node::Text(_)))
}

#[cfg(test)]
mod tests;
