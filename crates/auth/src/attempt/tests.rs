//! The state machine against a scripted registry: what is presented, in which order, and what is not.

use std::collections::HashSet;
use std::time::Duration;

use parking_lot::Mutex;

use super::*;
use crate::testing::{Script, ScriptedKeychain, challenges};
use crate::{AuthBoard, Credential, Keychain, KeychainChain, Origin, Scheme, Secret};

mod presented;
mod refused;
mod renewed;

const BASIC: &[&str] = &["Basic realm=\"r\""];
const BEARER: &[&str] = &["Bearer realm=\"https://auth.example/token\",service=\"reg.example\""];
const ECR: &str = r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate and try again."}]}"#;

fn basic(name: &str, password: &str) -> Credential {
    Credential::basic(name, password)
}

/// What a header says, in clear: `user:password`, `Bearer T`, or nothing.
fn clear(header: Option<&HeaderValue>) -> String {
    use base64::Engine as _;
    let text = header.map_or("", |header| header.to_str().unwrap());
    match text.strip_prefix("Basic ") {
        Some(pair) => {
            String::from_utf8(base64::engine::general_purpose::STANDARD.decode(pair).unwrap()).unwrap()
        }
        None => text.to_owned(),
    }
}

/// A registry that accepts a set of headers.
struct Registry {
    accepts: Mutex<HashSet<String>>,
    challenge: &'static [&'static str],
    refuses_with: (u16, &'static str),
    log: Mutex<Vec<String>>,
}

impl Registry {
    fn new(challenge: &'static [&'static str], accepts: &[&str]) -> Arc<Self> {
        let accepts = Mutex::new(accepts.iter().map(|text| (*text).to_owned()).collect());
        Arc::new(Self { accepts, challenge, refuses_with: (401, ""), log: Mutex::default() })
    }

    /// Answers a presented credential that it does not accept with 403 and `body`, as ECR does.
    fn forbidding(accepts: &[&str], body: &'static str) -> Arc<Self> {
        let accepts = Mutex::new(accepts.iter().map(|text| (*text).to_owned()).collect());
        Arc::new(Self { accepts, challenge: BASIC, refuses_with: (403, body), log: Mutex::default() })
    }

    fn accept_only(&self, header: &str) {
        *self.accepts.lock() = HashSet::from([header.to_owned()]);
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().clone()
    }

    fn answer(&self, header: Option<&HeaderValue>) -> (u16, HeaderMap, &'static str) {
        assert!(header.is_none_or(HeaderValue::is_sensitive));
        let shown = clear(header);
        self.log.lock().push(shown.clone());
        match self.accepts.lock().contains(&shown) {
            true => (200, HeaderMap::new(), ""),
            false if header.is_none() => (401, challenges(self.challenge), ""),
            false => match self.refuses_with {
                (401, body) => (401, challenges(self.challenge), body),
                (status, body) => (status, HeaderMap::new(), body),
            },
        }
    }
}

struct Stack {
    auth: Arc<Authenticator>,
    registry: Arc<Registry>,
    tokens: Arc<Script>,
    image: String,
    time: Duration,
}

/// A token endpoint that gives `T-<user>` to the pairs it knows, `T-anonymous` to nobody in particular.
fn token_server(known: &'static [&'static str], anonymous: bool) -> Arc<Script> {
    Script::by(move |sent| match &sent.authorization {
        None if anonymous => (200, r#"{"token":"T-anonymous","expires_in":300}"#.into()),
        None => (401, String::new()),
        Some(header) => {
            let pair = clear(Some(&header.parse().unwrap()));
            match known.contains(&pair.as_str()) {
                true => {
                    (200, format!(r#"{{"token":"T-{}","expires_in":300}}"#, pair.split(':').next().unwrap()))
                }
                false => (401, String::new()),
            }
        }
    })
}

impl Stack {
    fn new(options: &[&Arc<ScriptedKeychain>], registry: &Arc<Registry>, tokens: Arc<Script>) -> Self {
        Self::with_patience(options, registry, tokens, Duration::ZERO)
    }

    fn with_patience(
        options: &[&Arc<ScriptedKeychain>],
        registry: &Arc<Registry>,
        tokens: Arc<Script>,
        patience: Duration,
    ) -> Self {
        let options = options.iter().map(|option| Arc::clone(option) as Arc<dyn Keychain>).collect();
        let settings = Settings { patience, ..Settings::default() };
        let auth = Authenticator::new(KeychainChain::new(options), Arc::new(AuthBoard::new()), settings);
        let (image, time) = ("reg.example/team/app:1".to_owned(), Duration::from_secs(30));
        Self { auth, registry: Arc::clone(registry), tokens, image, time }
    }

    fn attempt(&self) -> AuthAttempt {
        let image: soci_oci::ImageRef = self.image.parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        self.auth.attempt(scope, Access::Pull, (Instant::now() + self.time).into_std())
    }

    /// Sends one request as the registry client does, which asks again as long as that is worth while.
    async fn request(&self) -> Result<(), AuthError> {
        let (begun, mut attempt) = (Instant::now(), self.attempt());
        loop {
            let since = self.auth.board().latest();
            let result = self.ask(&mut attempt).await;
            let (patient, deadline) = (Some(begun.into_std()), (begun + self.time).into_std());
            if !attempt.may_heal() || !self.auth.wait_for_news(since, patient, deadline).await {
                return result;
            }
        }
    }

    async fn ask(&self, attempt: &mut AuthAttempt) -> Result<(), AuthError> {
        let http: Arc<dyn TokenHttp> = Arc::clone(&self.tokens) as _;
        loop {
            let header = attempt.authorization(&http).await?;
            let (status, headers, body) = self.registry.answer(header.as_ref());
            tokio::task::yield_now().await;
            if status == 200 {
                attempt.accepted(StatusCode::OK);
                return Ok(());
            }
            let status = StatusCode::from_u16(status).unwrap();
            match attempt.refused(Refusal { status, headers: &headers, body: body.as_bytes() }, &http).await?
            {
                Next::Retry => {}
                Next::Final(denied) => return Err((*denied).into()),
            }
        }
    }

    async fn denied(&self) -> Denied {
        match self.request().await {
            Err(AuthError::Denied(denied)) => denied,
            other => panic!("{other:?}"),
        }
    }
}

fn no_tokens() -> Arc<Script> {
    Arc::new(Script::new([]))
}

fn option(name: &'static str, pairs: &[(&str, &str)]) -> Arc<ScriptedKeychain> {
    ScriptedKeychain::new(name, pairs.iter().map(|(name, password)| basic(name, password)).collect())
}

/// The three options of the daemon, each with the pairs given.
fn daemon(d: &[(&str, &str)], c: &[(&str, &str)], k: &[(&str, &str)]) -> [Arc<ScriptedKeychain>; 3] {
    [option("docker-config", d), option("cri", c), option("kubernetes-secrets", k)]
}

/// A stack over a real `config.json` in a directory of its own, where helpers may be too, and then these options.
fn over_a_file(
    registry: &Arc<Registry>,
    tokens: Arc<Script>,
    more: &[&Arc<ScriptedKeychain>],
) -> (tempfile::TempDir, Stack) {
    use crate::keychain::docker_config::{self, DockerConfigKeychain, Environment};
    let directory = tempfile::TempDir::new().unwrap();
    let (docker_config, path) = (Some(directory.path().to_owned()), Some(directory.path().into()));
    let board = Arc::new(AuthBoard::new());
    let environment = Environment { docker_config, path, ..Environment::default() };
    let keychain =
        DockerConfigKeychain::new(environment, Arc::clone(&board), docker_config::Settings::default());
    let settings = Settings { patience: Duration::ZERO, ..Settings::default() };
    let mut options: Vec<Arc<dyn Keychain>> = vec![Arc::new(keychain)];
    options.extend(more.iter().map(|option| Arc::clone(option) as Arc<dyn Keychain>));
    let auth = Authenticator::new(KeychainChain::new(options), board, settings);
    (directory, Stack { auth, ..Stack::new(&[], registry, tokens) })
}

/// A stack whose only option is what pulls brought.
fn over_pulls(
    registry: &Arc<Registry>,
    tokens: Arc<Script>,
    patience: Duration,
) -> (Arc<crate::keychain::cri::CriStore>, Stack) {
    let board = Arc::new(AuthBoard::new());
    let store = crate::keychain::cri::CriStore::new(Arc::clone(&board));
    let settings = Settings { patience, ..Settings::default() };
    let auth = Authenticator::new(KeychainChain::new(vec![Arc::clone(&store) as _]), board, settings);
    (store, Stack { auth, ..Stack::new(&[], registry, tokens) })
}

/// What a pull brings.
fn login(name: &str, password: &str) -> Option<crate::keychain::cri::AuthConfig> {
    let [a, b, c, d] = [(); 4].map(|()| String::new());
    Some(crate::keychain::cri::AuthConfig::new(name.into(), password.into(), a, b, c, d))
}

fn log_in(directory: &tempfile::TempDir, name: &str, password: &str) {
    let json = serde_json::json!({"auths": {"reg.example:443": {"username": name, "password": password}}});
    let new = directory.path().join("new");
    std::fs::write(&new, json.to_string()).unwrap();
    std::fs::rename(new, directory.path().join("config.json")).unwrap();
}
