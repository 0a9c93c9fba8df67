//! The file itself: where it is, when it changed, what the last good reading was.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::keychain::docker_file::{DockerFile, MAX_FILE};

/// How long the last good reading serves while the file cannot be read: a writer that does not replace it by rename
/// leaves it half written for a moment.
const GRACE: Duration = Duration::from_secs(5);

/// The file and what was read from it.
#[derive(Debug)]
pub(super) struct ConfigFile {
    path: Option<PathBuf>,
    /// Held while the file is read, so that a change is read once.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    seen: Seen,
    good: Option<Arc<DockerFile>>,
    /// When the file of that reading was written.
    written: Option<SystemTime>,
    failing_since: Option<Instant>,
    generation: u64,
    warned_of_mode: bool,
}

/// What the file looked like when it was read last.
#[derive(Debug, Default, PartialEq, Eq)]
enum Seen {
    #[default]
    Never,
    Missing,
    /// Device, inode, size, modification and change time.
    File([i128; 5]),
}

/// What a look at the file gave.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) content: Result<Arc<DockerFile>, String>,
    /// Counts readings with another content.
    pub(super) generation: u64,
    /// How old the file is that was read; nothing when it is missing.
    pub(super) age: Option<Duration>,
    /// Whether the file changed since the last look.
    pub(super) changed: bool,
    /// What an operator should know, once.
    pub(super) notices: Vec<String>,
}

impl ConfigFile {
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        Self { path, state: Mutex::default() }
    }

    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Looks at the file and reads it if it changed or could not be read before. Blocks.
    pub(super) fn load(&self) -> Loaded {
        let mut state = self.state.lock();
        let mut notices = Vec::new();
        let Some(path) = &self.path else {
            let content = Ok(Arc::clone(state.good.get_or_insert_default()));
            return Loaded { content, generation: 0, age: None, changed: false, notices };
        };
        let mut written = None;
        let seen = match std::fs::metadata(path) {
            Ok(metadata) => {
                written = metadata.modified().ok();
                Ok(look_of(&metadata))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Seen::Missing),
            Err(error) => Err(error.kind().to_string()),
        };
        if let (Ok(seen), None, Some(good)) = (&seen, state.failing_since, &state.good)
            && *seen == state.seen
        {
            return Loaded {
                content: Ok(Arc::clone(good)),
                generation: state.generation,
                age: age(state.written),
                changed: false,
                notices,
            };
        }
        let read = match seen {
            Ok(Seen::File(_)) => read(path, &mut state.warned_of_mode, &mut notices),
            Ok(_) => Ok((Seen::Missing, DockerFile::default())),
            Err(error) => Err(error),
        };
        match read {
            Ok((seen, file)) => {
                let changed = state.seen != Seen::Never;
                let file = Arc::new(file);
                state.seen = seen;
                state.good = Some(Arc::clone(&file));
                state.written = written;
                state.failing_since = None;
                state.generation += 1;
                let (generation, age) = (state.generation, age(written));
                Loaded { content: Ok(file), generation, age, changed, notices }
            }
            Err(error) => {
                let now = Instant::now();
                let since = *state.failing_since.get_or_insert(now);
                let content = match &state.good {
                    Some(good) if now < since + GRACE => Ok(Arc::clone(good)),
                    _ => Err(format!("{}: {error}; correct it, or log in again", path.display())),
                };
                let (generation, age) = (state.generation, age(state.written));
                Loaded { content, generation, age, changed: false, notices }
            }
        }
    }
}

/// Nothing where the clock was set back since.
fn age(written: Option<SystemTime>) -> Option<Duration> {
    SystemTime::now().duration_since(written?).ok()
}

fn look_of(metadata: &std::fs::Metadata) -> Seen {
    let time = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    Seen::File([
        metadata.dev().into(),
        metadata.ino().into(),
        metadata.size().into(),
        time(metadata.mtime(), metadata.mtime_nsec()),
        time(metadata.ctime(), metadata.ctime_nsec()),
    ])
}

fn read(path: &Path, warned: &mut bool, notices: &mut Vec<String>) -> Result<(Seen, DockerFile), String> {
    if !std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return Err("not a regular file".to_owned());
    }
    let file = std::fs::File::open(path).map_err(|error| error.kind().to_string())?;
    let metadata = file.metadata().map_err(|error| error.kind().to_string())?;
    let room = usize::try_from(metadata.len()).unwrap_or(MAX_FILE).min(MAX_FILE);
    let mut bytes = Zeroizing::new(Vec::with_capacity(room + 1));
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes).map_err(|error| error.kind().to_string())?;
    let parsed = DockerFile::parse(&bytes).map_err(|error| error.to_string())?;
    for (key, value) in &parsed.auths {
        if let Err(error) = value {
            notices.push(format!(
                "{}: auths key {key:?} is not used: {error}; correct it, or log in again",
                path.display()
            ));
        }
    }
    let (mode, owner) = (metadata.mode() & 0o777, metadata.uid());
    let stranger = owner != 0 && owner != rustix::process::geteuid().as_raw();
    if (mode & 0o077 != 0 || stranger) && !*warned {
        *warned = true;
        let shown = path.display();
        notices.push(format!("{shown} has mode {mode:04o} and owner {owner}: others may read credentials; run `chmod 600 {shown}` and `chown root`"));
    }
    Ok((look_of(&metadata), parsed))
}

/// Returns the home directory: `HOME`, or that of `uid` in the password database, or root's.
pub(super) fn home(variable: Option<&Path>, uid: u32, passwd: &Path) -> Option<PathBuf> {
    if let Some(home) = variable.filter(|home| !home.as_os_str().is_empty()) {
        return Some(home.to_owned());
    }
    let listed = std::fs::read(passwd).ok().and_then(|bytes| {
        let text = String::from_utf8_lossy(&bytes);
        text.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let mine = fields.get(2)?.parse() == Ok(uid);
            let home = fields.get(5).filter(|home| mine && home.starts_with('/'))?;
            Some(PathBuf::from(home))
        })
    });
    listed.or_else(|| (uid == 0).then(|| PathBuf::from("/root")))
}
