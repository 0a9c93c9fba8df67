//! The Docker config option: `config.json` and the helpers that it names.
//!
//! The file is looked at whenever a credential is wanted and read again when it changed, so that `docker login`, a rotated
//! password or a logout take effect without a restart. It is never written. Nothing is read from the environment here: the
//! caller passes an [`Environment`].
//!
//! For a registry: an exact entry of `DOCKER_AUTH_CONFIG`; else the helper that `credHelpers` names for it (an empty name
//! means "the file"); else the helper of `credsStore`; else the entry of `auths`. A helper's answer is final: an entry in
//! the file is no fallback, it would be a stale one.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::keychain::docker_file::DockerFile;
use crate::keychain::helper::{HelperAnswer, HelperCredential, HelperEnvironment, Helpers};
use crate::keychain::key_match::Wanted;
use crate::{
    AuthBoard, Candidate, CandidateId, CredentialScope, Fingerprint, Keychain, KeychainError, Lookup, Meters,
    NoMeters, Outcome, Rejected, Secret,
};

mod file;

/// The option's name.
pub const NAME: &str = "docker-config";

/// How many registries' last answers are remembered, to notice a change.
const MAX_LAST: usize = 1024;

/// What the option takes from the process environment; read by the caller, never here.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `HOME`. When missing or empty, the home of the effective user in the password database.
    pub home: Option<PathBuf>,
    /// `DOCKER_CONFIG`: a directory.
    pub docker_config: Option<PathBuf>,
    /// `PATH`, in which helpers are searched.
    pub path: Option<OsString>,
    /// `DOCKER_AUTH_CONFIG`: JSON.
    pub docker_auth_config: Option<Secret>,
}

/// How helpers are run and what counts them.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a helper may take before it is killed.
    pub helper_deadline: Duration,
    /// What counts.
    pub meters: Arc<dyn Meters>,
}

/// The Docker config option.
#[derive(Debug)]
pub struct DockerConfigKeychain {
    file: Arc<file::ConfigFile>,
    /// From `DOCKER_AUTH_CONFIG`.
    environment: Option<DockerFile>,
    helpers: Helpers,
    board: Arc<AuthBoard>,
    /// What helpers answered last, by registry: a change is news for those who wait.
    last: Mutex<HashMap<String, Option<Fingerprint>>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { helper_deadline: Duration::from_secs(15), meters: Arc::new(NoMeters) }
    }
}

impl Environment {
    /// Returns the home directory: `HOME`, or that of the effective user in `/etc/passwd`, or root's. Blocks on the disk.
    pub fn home_dir(&self) -> Option<PathBuf> {
        self.home_in(Path::new("/etc/passwd"))
    }

    fn home_in(&self, passwd: &Path) -> Option<PathBuf> {
        file::home(self.home.as_deref(), rustix::process::geteuid().as_raw(), passwd)
    }
}

impl DockerConfigKeychain {
    /// Returns the option over the file that `environment` leads to; the file need not exist yet.
    ///
    /// Reads `/etc/passwd` when there is no `HOME`. A `DOCKER_AUTH_CONFIG` that is not valid is warned about once and
    /// ignored.
    pub fn new(environment: Environment, board: Arc<AuthBoard>, settings: Settings) -> Self {
        Self::with_passwd(environment, board, settings, Path::new("/etc/passwd"))
    }

    fn with_passwd(
        environment: Environment,
        board: Arc<AuthBoard>,
        settings: Settings,
        passwd: &Path,
    ) -> Self {
        let home = environment.home_in(passwd);
        let directory = environment
            .docker_config
            .filter(|directory| !directory.as_os_str().is_empty())
            .or_else(|| home.as_ref().map(|home| home.join(".docker")));
        let text = environment.docker_auth_config.filter(|text| !text.is_empty());
        let from_environment = text.and_then(|text| match DockerFile::parse_environment(text.expose()) {
            Ok(file) => Some(file),
            Err(error) => {
                tracing::warn!(%error, "DOCKER_AUTH_CONFIG is not valid and is ignored; correct it, or unset it");
                None
            }
        });
        let helper_environment =
            HelperEnvironment { path: environment.path, home, deadline: settings.helper_deadline };
        Self {
            file: Arc::new(file::ConfigFile::new(directory.map(|directory| directory.join("config.json")))),
            environment: from_environment,
            helpers: Helpers::new(helper_environment, settings.meters),
            board,
            last: Mutex::default(),
        }
    }

    /// Returns the path of the file, where there is one to look at.
    pub fn path(&self) -> Option<&Path> {
        self.file.path()
    }

    async fn load(&self) -> Result<file::Loaded, KeychainError> {
        let file = Arc::clone(&self.file);
        let loaded = tokio::task::spawn_blocking(move || file.load())
            .await
            .map_err(|_| KeychainError("reading config.json was abandoned".to_owned()))?;
        for notice in &loaded.notices {
            tracing::warn!(option = NAME, "{notice}");
        }
        if loaded.changed {
            self.board.bump_all();
        }
        match &loaded.content {
            Ok(_) => Ok(loaded),
            Err(error) => Err(KeychainError(error.clone())),
        }
    }

    /// Asks a helper, with a second name for the server where the file knows it by another one.
    async fn ask_helper(
        &self,
        suffix: &str,
        wanted: &Wanted,
        file: &DockerFile,
        generation: u64,
        rejected: &Rejected,
    ) -> Result<Lookup, KeychainError> {
        let program = format!("docker-credential-{suffix}");
        let server = wanted.server();
        let with_scheme = format!("https://{server}");
        let mut names = vec![server];
        if file.auths.iter().any(|(key, _)| *key == with_scheme) {
            names.push(&with_scheme);
        }
        for name in names {
            let answer = self.helpers.get(suffix, name, generation, rejected).await;
            if let HelperAnswer::Found(HelperCredential(credential)) =
                answer.map_err(|error| KeychainError(error.to_string()))?
            {
                let finding = format!("{program} has an entry for {name}");
                let age = self.helpers.age(suffix, name, generation);
                return Ok(Lookup::one(Candidate::new(program, credential).aged(age), finding));
            }
        }
        Ok(Lookup::empty(format!("{program} has no entry for {server}")))
    }

    /// Looks where no process has to be started; nothing when a helper has to be asked.
    fn look(
        &self,
        wanted: &Wanted,
        file: Option<&DockerFile>,
        age: Option<Duration>,
    ) -> Result<Look, KeychainError> {
        let from_environment = self.environment.iter().flat_map(|file| wanted.sort(&file.auths));
        for (rank, value) in from_environment.filter(|(rank, _)| rank.is_plain()) {
            if let Ok(Some(credential)) = value {
                let entry = format!("DOCKER_AUTH_CONFIG key {rank}");
                return Ok(Look::Told(Lookup::one(Candidate::new(entry.clone(), credential.clone()), entry)));
            }
        }
        let Some(file) = file else { return Ok(Look::FileWanted) };
        let named = wanted.sort(&file.helpers).into_iter().find(|(rank, _)| rank.names_registry());
        let helper = match named {
            Some((_, suffix)) => Some(suffix).filter(|suffix| !suffix.is_empty()),
            None => file.store.as_ref(),
        };
        if let Some(suffix) = helper {
            return Ok(Look::Helper(suffix.clone()));
        }
        let shown = self.path().map_or_else(|| "config.json".to_owned(), |path| path.display().to_string());
        for (rank, value) in wanted.sort(&file.auths) {
            match value {
                Ok(Some(credential)) => {
                    let candidate = Candidate::new(format!("auths key {rank}"), credential.clone()).aged(age);
                    return Ok(Look::Told(Lookup::one(candidate, format!("{shown}: auths key {rank}"))));
                }
                Ok(None) => {}
                Err(error) => {
                    let told = format!("{shown}: auths key {rank}: {error}; correct it, or log in again");
                    return Err(KeychainError(told));
                }
            }
        }
        Ok(Look::Told(Lookup::empty(match file.auths.is_empty() {
            true => format!("{shown} is empty or missing"),
            false => format!("{shown} has no entry for {}", wanted.name),
        })))
    }

    /// Tells those who wait when a registry's helper answers something else than last time.
    fn notice_change(&self, scope: &CredentialScope, lookup: &Lookup) {
        let print = lookup.candidates.first().map(|candidate| candidate.id.fingerprint);
        let registry = scope.identity();
        let mut last = self.last.lock();
        if last.len() >= MAX_LAST && !last.contains_key(&registry) {
            last.clear();
        }
        let before = last.insert(registry.clone(), print);
        drop(last);
        if before.is_some_and(|before| before != print) {
            self.board.bump(&registry);
        }
    }
}

enum Look {
    Told(Lookup),
    Helper(String),
    FileWanted,
}

#[async_trait]
impl Keychain for DockerConfigKeychain {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn lookup(&self, scope: &CredentialScope, rejected: &Rejected) -> Result<Lookup, KeychainError> {
        let wanted = Wanted::new(scope);
        if let Look::Told(lookup) = self.look(&wanted, None, None)? {
            return Ok(lookup);
        }
        let loaded = self.load().await?;
        let file = loaded.content.as_deref().ok();
        match self.look(&wanted, file, loaded.age)? {
            Look::Told(lookup) => Ok(lookup),
            Look::Helper(suffix) => {
                let file = file.unwrap_or(&EMPTY);
                let lookup = self.ask_helper(&suffix, &wanted, file, loaded.generation, rejected).await?;
                self.notice_change(scope, &lookup);
                Ok(lookup)
            }
            Look::FileWanted => Ok(Lookup::empty("config.json was not read")),
        }
    }

    async fn peek(&self, scope: &CredentialScope) -> Option<Lookup> {
        let wanted = Wanted::new(scope);
        if let Ok(Look::Told(lookup)) = self.look(&wanted, None, None) {
            return Some(lookup);
        }
        let loaded = self.load().await.ok()?;
        match self.look(&wanted, loaded.content.as_deref().ok(), loaded.age) {
            Ok(Look::Told(lookup)) => Some(lookup),
            _ => None,
        }
    }

    fn verdict(&self, _scope: &CredentialScope, _candidate: &CandidateId, _outcome: Outcome) {}

    fn max_candidates(&self) -> usize {
        // One entry is the best match; when it was refused, only a changed one is another.
        4
    }
}

static EMPTY: DockerFile = DockerFile { auths: Vec::new(), helpers: Vec::new(), store: None };

#[cfg(test)]
mod tests;
