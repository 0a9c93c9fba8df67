//! Which kubeconfig is used, and what it refers to.
//!
//! The contract names `$HOME/kube/config` as the default and calls it Kubernetes' own, which is `$KUBECONFIG`, else
//! `$HOME/.kube/config`. Both hold: the candidates are, in order, the files of `$KUBECONFIG` that exist, merged with the
//! first definition winning; `$HOME/.kube/config`; `$HOME/kube/config`; the service account of the pod. A path that is
//! configured is the only candidate.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kube::config::{AuthInfo, Cluster, Kubeconfig, KubeconfigError, LoadDataError};

use crate::settings::Settings;

/// The largest kubeconfig that is read, in bytes.
const MAX_SIZE: u64 = 4 << 20;

/// Where the connection's configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Location {
    /// These files, merged in this order.
    Files(Vec<PathBuf>),
    /// The service account of the pod this process runs in.
    InCluster,
}

/// A kubeconfig that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// A file cannot be read.
    #[error("kubeconfig {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file is far larger than any kubeconfig.
    #[error("kubeconfig {path} of {size} bytes is larger than the limit of {MAX_SIZE}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Others than its owner may write a file that names a program to run.
    #[error("kubeconfig {path} names an exec plugin and is writable by everyone")]
    WorldWritable {
        /// The file.
        path: PathBuf,
    },
    /// The content is no kubeconfig.
    #[error("kubeconfig {path} is {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// It has no current context, or the context names what is not there.
    #[error("kubeconfig {path}: {what}")]
    Incomplete {
        /// The file, the first of several.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
}

impl LoadError {
    /// Returns what a person can do about it.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::Read { .. } => "make it a file that this daemon can read",
            Self::TooLarge { .. } => "name a kubeconfig",
            Self::WorldWritable { .. } => "run `chmod o-w` on it",
            Self::Malformed { .. } | Self::Incomplete { .. } => "mend it, or write it anew",
        }
    }
}

/// Returns where the configuration is, or `None` while there is none.
pub(crate) fn locate(settings: &Settings) -> Option<Location> {
    if let Some(path) = &settings.kubeconfig {
        return path.exists().then(|| Location::Files(vec![path.clone()]));
    }
    let environment = &settings.environment;
    let listed: Vec<PathBuf> = environment.kubeconfig.iter().filter(|path| path.exists()).cloned().collect();
    if !listed.is_empty() {
        return Some(Location::Files(listed));
    }
    let [usual, documented] = usual_places(settings);
    match (usual.exists(), documented.exists()) {
        (true, _) => Some(Location::Files(vec![usual])),
        (false, true) => Some(Location::Files(vec![documented])),
        (false, false) => environment.in_cluster.then_some(Location::InCluster),
    }
}

/// Says that of two kubeconfigs `used` is one, where whoever wrote the other may expect that.
pub(crate) fn passed_over(settings: &Settings, used: &Location) -> Option<String> {
    let [usual, documented] = usual_places(settings);
    let chosen = settings.kubeconfig.is_none() && *used == Location::Files(vec![usual.clone()]);
    (chosen && documented.exists()).then(|| {
        format!(
            "{} is used and {} is not; set kubeconfig_path to choose, or delete one",
            usual.display(),
            documented.display()
        )
    })
}

fn usual_places(settings: &Settings) -> [PathBuf; 2] {
    [".kube/config", "kube/config"].map(|name| settings.environment.home.join(name))
}

/// Names the places that [`locate`] looks at, for messages.
pub(crate) fn places(settings: &Settings) -> String {
    let Settings { kubeconfig, environment, .. } = settings;
    let usual = usual_places(settings);
    let places: Vec<String> = match kubeconfig {
        Some(path) => vec![path.display().to_string()],
        None => environment.kubeconfig.iter().chain(&usual).map(|path| path.display().to_string()).collect(),
    };
    places.join(" or ")
}

/// The current context of a kubeconfig: one cluster and one user, paths made absolute.
#[derive(Debug, Clone)]
pub(crate) struct Current {
    /// The user, with `tokenFile` and `exec` still to be resolved.
    pub user: AuthInfo,
    /// The cluster.
    pub cluster: Cluster,
    /// Every file that the connection depends on.
    pub files: Vec<PathBuf>,
    /// What an operator should mend though it works.
    pub notices: Vec<String>,
}

/// Reads and merges `paths` and picks the current context. Blocks on the disk.
///
/// # Errors
/// [`LoadError`] names the file and what is wrong with it.
pub(crate) fn load(paths: &[PathBuf]) -> Result<Current, LoadError> {
    let mut merged = Kubeconfig::default();
    let first = paths.first().cloned().unwrap_or_default();
    for path in paths {
        let metadata = path.metadata().map_err(|source| LoadError::Read { path: path.clone(), source })?;
        if metadata.len() > MAX_SIZE {
            return Err(LoadError::TooLarge { path: path.clone(), size: metadata.len() });
        }
        if is_cut_utf16(path, &metadata).map_err(|source| LoadError::Read { path: path.clone(), source })? {
            let what = "it is UTF-16 and ends within a character; is it still being written?".to_owned();
            return Err(LoadError::Incomplete { path: path.clone(), what });
        }
        let malformed = |error| LoadError::Malformed { path: path.clone(), what: unquoted(&error) };
        let mut file = Kubeconfig::read_from(path).map_err(malformed)?;
        // An empty value says nothing: the one of the next file counts.
        for value in [&mut file.current_context, &mut file.kind, &mut file.api_version] {
            *value = value.take().filter(|value| !value.is_empty());
        }
        let runs_programs = file
            .auth_infos
            .iter()
            .any(|named| named.auth_info.as_ref().is_some_and(|user| user.exec.is_some()));
        if runs_programs && metadata.mode() & 0o002 != 0 {
            return Err(LoadError::WorldWritable { path: path.clone() });
        }
        merged = merged.merge(file).map_err(malformed)?;
    }
    let incomplete = |what: String| LoadError::Incomplete { path: first.clone(), what };
    let name = merged.current_context.clone();
    let name = name.ok_or_else(|| incomplete("no current-context is set".into()))?;
    let context = merged
        .contexts
        .iter()
        .find(|named| named.name == name)
        .and_then(|named| named.context.clone())
        .ok_or_else(|| incomplete(format!("current-context {name:?} is not among its contexts")))?;
    let mut cluster = merged
        .clusters
        .iter()
        .find(|named| named.name == context.cluster)
        .and_then(|named| named.cluster.clone())
        .ok_or_else(|| incomplete(format!("context {name:?} names no cluster of the file")))?;
    // No data is no authority, rather than one without certificates.
    cluster.certificate_authority_data = cluster.certificate_authority_data.filter(|data| !data.is_empty());
    let user = match context.user.as_deref().filter(|user| !user.is_empty()) {
        None => AuthInfo::default(),
        Some(user) => merged
            .auth_infos
            .iter()
            .find(|named| named.name == user)
            .and_then(|named| named.auth_info.clone())
            .ok_or_else(|| {
                incomplete(format!("context {name:?} names user {user:?}, who is not in the file"))
            })?,
    };
    let referred =
        [&cluster.certificate_authority, &user.client_certificate, &user.client_key, &user.token_file];
    let referred = referred.into_iter().flatten().map(PathBuf::from);
    let files = paths.iter().cloned().chain(referred).collect();
    // Certificates are no secrets.
    let secret = [&user.client_key, &user.token_file].into_iter().flatten().map(Path::new);
    let notices = paths.iter().map(PathBuf::as_path).chain(secret).filter_map(exposed).collect();
    Ok(Current { user, cluster, files, notices })
}

/// Says what is wrong with a kubeconfig without quoting it: the parser's own message shows the lines around a fault, and
/// whoever is a neighbour there may be a token.
pub(crate) fn unquoted(error: &KubeconfigError) -> String {
    use KubeconfigError as Error;
    match error {
        Error::Parse(error) => match error.location() {
            Some(at) => format!("not the YAML of a kubeconfig at line {}, column {}", at.line(), at.column()),
            None => "not the YAML of a kubeconfig".to_owned(),
        },
        Error::KindMismatch | Error::ApiVersionMismatch => {
            "of another kind or apiVersion than the files before it".to_owned()
        }
        Error::ReadConfig(error, _) => format!("not readable: {error}"),
        Error::LoadCertificateAuthority(error) => {
            format!("without a usable certificate-authority: {}", lost(error))
        }
        _ => "incomplete".to_owned(),
    }
}

fn lost(error: &LoadDataError) -> String {
    match error {
        LoadDataError::DecodeBase64(_) => "its data is not base64".to_owned(),
        LoadDataError::ReadFile(error, path) => format!("{}: {error}", path.display()),
        LoadDataError::NoBase64DataOrFile => "neither data nor a file".to_owned(),
    }
}

/// Whether a file is UTF-16 of an odd length: kube, which knows UTF-16 by its mark, panics at the half character.
fn is_cut_utf16(path: &Path, metadata: &Metadata) -> io::Result<bool> {
    if metadata.len().is_multiple_of(2) {
        return Ok(false);
    }
    let mut mark = Vec::new();
    File::open(path)?.take(2).read_to_end(&mut mark)?;
    Ok(matches!(mark.as_slice(), [0xfe, 0xff] | [0xff, 0xfe]))
}

/// Returns what to do about a file that others than its owner can read, or that belongs to a stranger.
fn exposed(path: &Path) -> Option<String> {
    let metadata = path.metadata().ok()?;
    let (mode, owner) = (metadata.mode() & 0o777, metadata.uid());
    let stranger = owner != 0 && owner != rustix::process::geteuid().as_raw();
    let shown = path.display();
    (mode & 0o077 != 0 || stranger).then(|| {
        format!(
            "{shown} has mode {mode:04o} and owner {owner}: others may read credentials; run `chmod 600 {shown}` and \
             `chown root`"
        )
    })
}

/// What tells one state of a set of files from another; follows symbolic links, so that a swapped link shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Fingerprint(Vec<Option<FileState>>);

/// Device, inode, size, and the two times in nanoseconds.
type FileState = (u64, u64, u64, i128, i128);

impl Fingerprint {
    /// Takes the fingerprint of `files`; a missing one is a state as well. Blocks on the disk.
    pub(crate) fn of(files: &[PathBuf]) -> Self {
        let stat = |path: &PathBuf| {
            let m = path.metadata().ok()?;
            let nanoseconds = |seconds, rest| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
            let (modified, changed) =
                (nanoseconds(m.mtime(), m.mtime_nsec()), nanoseconds(m.ctime(), m.ctime_nsec()));
            Some((m.dev(), m.ino(), m.size(), modified, changed))
        };
        Self(files.iter().map(stat).collect())
    }

    /// Takes that of more files, which come after these. Blocks on the disk.
    pub(crate) fn and(mut self, more: &[PathBuf]) -> Self {
        self.0.extend(Self::of(more).0);
        self
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::settings::Environment;

    const MINIMAL: &str = r#"
apiVersion: v1
kind: Config
current-context: main
contexts: [{name: main, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://api.example:6443", certificate-authority: ca.crt}}]
users: [{name: u, user: {tokenFile: token}}]
"#;

    fn settings(home: &Path) -> Settings {
        Settings::new(Environment { home: home.to_owned(), ..Environment::default() })
    }

    fn write(path: PathBuf, text: &str) -> PathBuf {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn t101_candidates_are_tried_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = settings(dir.path());
        assert_eq!(locate(&settings), None);
        settings.environment.in_cluster = true;
        assert_eq!(locate(&settings), Some(Location::InCluster));
        let documented = write(dir.path().join("kube/config"), MINIMAL);
        assert_eq!(locate(&settings), Some(Location::Files(vec![documented])));
        let usual = write(dir.path().join(".kube/config"), MINIMAL);
        assert_eq!(locate(&settings), Some(Location::Files(vec![usual])));
        let listed = write(dir.path().join("listed"), MINIMAL);
        settings.environment.kubeconfig = vec![dir.path().join("missing"), listed.clone()];
        assert_eq!(locate(&settings), Some(Location::Files(vec![listed])));
        settings.kubeconfig = Some(dir.path().join("late"));
        assert_eq!(locate(&settings), None, "a configured path is the only candidate");
        let late = write(dir.path().join("late"), MINIMAL);
        assert_eq!(locate(&settings), Some(Location::Files(vec![late])));
    }

    #[test]
    fn relative_paths_are_relative_to_the_file_and_watched() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path().join("config"), MINIMAL);
        let current = load(std::slice::from_ref(&path)).unwrap();
        assert_eq!(current.files, [path, dir.path().join("ca.crt"), dir.path().join("token")]);
    }

    #[test]
    fn utf16_is_read_and_where_it_is_cut_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        for to_bytes in [u16::to_le_bytes as fn(u16) -> [u8; 2], u16::to_be_bytes] {
            let text = format!("\u{feff}{MINIMAL}");
            let bytes: Vec<u8> = text.encode_utf16().flat_map(to_bytes).collect();
            fs::write(&path, &bytes).unwrap();
            assert!(load(std::slice::from_ref(&path)).is_ok());
            fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
            let error = load(std::slice::from_ref(&path)).unwrap_err().to_string();
            assert!(error.contains("ends within a character"), "{error}");
        }
    }

    #[test]
    fn the_first_definition_wins_when_files_are_merged() {
        let dir = tempfile::tempdir().unwrap();
        let first = write(dir.path().join("a"), MINIMAL);
        let second = write(dir.path().join("b"), &MINIMAL.replace("api.example", "other.example"));
        let current = load(&[first, second]).unwrap();
        assert_eq!(current.cluster.server.as_deref(), Some("https://api.example:6443"));
    }

    #[test]
    fn an_empty_value_does_not_hide_that_of_the_next_file() {
        let dir = tempfile::tempdir().unwrap();
        let empty = "apiVersion: ''\nkind: ''\ncurrent-context: ''\n";
        let first = write(dir.path().join("a"), empty);
        let second = write(dir.path().join("b"), MINIMAL);
        let current = load(&[first, second]).unwrap();
        assert_eq!(current.cluster.server.as_deref(), Some("https://api.example:6443"));
    }

    #[test]
    fn an_authority_without_data_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let text = MINIMAL.replace("certificate-authority: ca.crt", "certificate-authority-data: ''");
        let cluster = load(&[write(dir.path().join("config"), &text)]).unwrap().cluster;
        assert_eq!((cluster.certificate_authority_data, cluster.certificate_authority), (None, None));
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for (from, to, expected) in [
            ("current-context: main", "", "no current-context"),
            ("current-context: main", "current-context: other", "\"other\" is not among its contexts"),
            ("cluster: c,", "cluster: d,", "names no cluster"),
            ("user: u}", "user: v}", "names user \"v\""),
        ] {
            let path = write(dir.path().join("config"), &MINIMAL.replace(from, to));
            let error = load(&[path]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let path = write(dir.path().join("config"), "{ not yaml");
        assert!(matches!(load(&[path]), Err(LoadError::Malformed { .. })));
    }

    #[test]
    fn a_file_that_everyone_may_write_runs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let exec = MINIMAL
            .replace("tokenFile: token", "exec: {apiVersion: client.authentication.k8s.io/v1, command: x}");
        let path = write(dir.path().join("config"), &exec);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(load(&[path]), Err(LoadError::WorldWritable { .. })));
    }

    #[test]
    fn what_others_can_read_is_noticed_but_for_certificates() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path().join("config"), MINIMAL);
        let (authority, token) = (dir.path().join("ca.crt"), dir.path().join("token"));
        for (file, mode) in [(&path, 0o600), (&authority, 0o644), (&token, 0o600)] {
            fs::write(file, fs::read(file).unwrap_or_default()).unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
        }
        let notices = || load(std::slice::from_ref(&path)).unwrap().notices;
        assert_eq!(notices(), Vec::<String>::new());
        for file in [&path, &token] {
            fs::set_permissions(file, fs::Permissions::from_mode(0o640)).unwrap();
            let said = notices();
            let told = |word: &str| said.iter().any(|notice| notice.contains(word));
            assert!(
                said.len() == 1 && told("mode 0640") && told(&format!("chmod 600 {}", file.display())),
                "{said:?}"
            );
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
        }
    }

    #[test]
    fn a_malformed_file_is_an_error_that_does_not_quote_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let before = "apiVersion: v1\nkind: Config\nusers:\n";
        for (users, place) in [
            ("- name: u\n  user: {token: hunter2-token\n  other: [\n", None),
            ("- name: u\n  user:\n    token: hunter2-token\n   password: hunter2-password\n", None),
            ("- name: u\n  user:\n    token: [hunter2-token]\n", Some("at line 6, column 12")),
            ("- name: u\n  user: hunter2-token\n", Some("at line 5, column 9")),
            ("- {name: u, user: {token: \"hunter2-token\\x\"}}\n", None),
            ("- {name: u, user: {tokenFile: a, tokenFile: hunter2-token}}\n", None),
        ] {
            fs::write(&path, format!("{before}{users}")).unwrap();
            let error = load(std::slice::from_ref(&path)).unwrap_err();
            let said = format!("{} {error:?}", crate::synced::told("here", &error, error.advice()));
            assert!(!said.contains("hunter2"), "{users}: {said}");
            let place = place.unwrap_or("not the YAML of a kubeconfig at line ");
            assert!(said.contains(place) && said.contains("mend it"), "{users}: {said}");
        }
    }

    #[test]
    fn a_swapped_link_changes_the_fingerprint() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, link) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("link"));
        fs::write(&a, "same").unwrap();
        fs::write(&b, "same").unwrap();
        std::os::unix::fs::symlink(&a, &link).unwrap();
        let files = [link.clone()];
        let before = Fingerprint::of(&files);
        assert_eq!(before, Fingerprint::of(&files));
        fs::remove_file(&link).unwrap();
        assert_ne!(before, Fingerprint::of(&files));
        std::os::unix::fs::symlink(&b, &link).unwrap();
        assert_ne!(before, Fingerprint::of(&files));
    }
}
