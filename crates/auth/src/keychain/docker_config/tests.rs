//! The option over real files and real helpers.

use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;
use crate::testing::install_helper;
use crate::{Credential, Origin, Scheme};

const PAIR: &str = r#"{"auths":{"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#;
const OTHER: &str = r#"{"auths":{"reg.example":{"auth":"dTI6cDI="}}}"#;

/// A home directory.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Replaces the file by rename, as `docker login` does.
    fn write(&self, json: &str) {
        let directory = self.path().join(".docker");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("new"), json).unwrap();
        std::fs::set_permissions(directory.join("new"), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::rename(directory.join("new"), directory.join("config.json")).unwrap();
    }

    /// Installs a helper that notes its runs and its input, and prints what is in the file `answer`.
    fn helper(&self, suffix: &str, answer: &str, status: u8) {
        std::fs::write(self.path().join("answer"), answer).unwrap();
        let body = format!("echo run >> runs\ncat >> stdin\ncat answer\nexit {status}");
        install_helper(self.path(), suffix, &body);
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).unwrap_or_default()
    }

    fn environment(&self) -> Environment {
        Environment {
            home: Some(self.path().to_owned()),
            path: Some(format!("{}:/usr/bin:/bin", self.path().display()).into()),
            ..Environment::default()
        }
    }

    fn keychain(&self) -> DockerConfigKeychain {
        keychain(self.environment())
    }
}

fn keychain(environment: Environment) -> DockerConfigKeychain {
    let settings = Settings { helper_deadline: Duration::from_secs(60), ..Settings::default() };
    DockerConfigKeychain::new(environment, Arc::new(AuthBoard::new()), settings)
}

fn scope(image: &str) -> CredentialScope {
    let image: soci_oci::ImageRef = image.parse().unwrap();
    CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image)
}

async fn ask(keychain: &DockerConfigKeychain, image: &str) -> Result<Option<Credential>, KeychainError> {
    let lookup = keychain.lookup(&scope(image), &Rejected::default()).await?;
    Ok(lookup.candidates.into_iter().next().map(|candidate| candidate.credential))
}

/// Asserts what the option has for an image of `reg.example`.
async fn expect(keychain: &DockerConfigKeychain, expected: Option<(&str, &str)>) {
    let found = ask(keychain, "reg.example/a:1").await.unwrap().map(|credential| credential.fingerprint());
    assert_eq!(found, expected.map(|(name, password)| Credential::basic(name, password).fingerprint()));
}

#[tokio::test]
async fn r16_entries_of_the_file_are_used_without_any_program() {
    let home = Home::new();
    home.write(PAIR);
    let keychain = keychain(Environment { path: Some("".into()), ..home.environment() });
    expect(&keychain, Some(("user", "pass"))).await;
    assert!(keychain.peek(&scope("reg.example/a")).await.is_some_and(|lookup| lookup.candidates.len() == 1));
    assert!(ask(&keychain, "other.example/a").await.unwrap().is_none());
}

#[tokio::test]
async fn r23_one_entry_serves_every_image_of_the_registry() {
    let home = Home::new();
    home.write(PAIR);
    let keychain = home.keychain();
    for image in ["reg.example/a", "reg.example/b/c:2", "reg.example:443/a"] {
        let mut scope = scope(image);
        scope.namespace = Some("pod".into());
        assert_eq!(
            keychain.lookup(&scope, &Rejected::default()).await.unwrap().candidates.len(),
            1,
            "{image}"
        );
    }
}

#[tokio::test]
async fn a_mirror_is_looked_up_by_its_own_name() {
    let home = Home::new();
    home.write(
        r#"{"auths":{"mirror.example:8443":{"auth":"dTI6cDI="},"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#,
    );
    let mut scope = scope("reg.example/a");
    scope.mirror = true;
    scope.origin = Origin::new(Scheme::Https, "mirror.example", Some(8443));
    let lookup = home.keychain().lookup(&scope, &Rejected::default()).await.unwrap();
    assert_eq!(lookup.candidates[0].id.fingerprint, Credential::basic("u2", "p2").fingerprint());
}

#[tokio::test]
async fn t39_t40_a_bad_entry_is_an_error_for_its_registry_only_and_warned_about() {
    let (log, _guard) = soci_testkit::log::capture();
    let home = Home::new();
    home.write(r#"{"auths":{"bad.example":{"auth":"aHVudGVyMg=="},"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#);
    let keychain = home.keychain();
    expect(&keychain, Some(("user", "pass"))).await;
    expect(&keychain, Some(("user", "pass"))).await;
    let error = ask(&keychain, "bad.example/a").await.unwrap_err().to_string();
    assert!(error.contains("auths key bad.example: auth holds no colon"), "{error}");
    assert_eq!(log.warnings("bad.example"), 1);
    assert!(!log.text().contains("aHVudGVyMg") && !log.text().contains("hunter2"));
}

#[tokio::test]
async fn t43_t12_an_empty_file_is_empty_and_a_broken_one_an_error() {
    let home = Home::new();
    home.write("");
    expect(&home.keychain(), None).await;
    home.write("{");
    let error = ask(&home.keychain(), "reg.example/a").await.unwrap_err().to_string();
    assert!(error.contains("config.json: not JSON at line 1"), "{error}");
}

#[tokio::test]
async fn t45_docker_config_outranks_home() {
    let (home, other) = (Home::new(), Home::new());
    home.write(PAIR);
    other.write(OTHER);
    let docker_config = Some(other.path().join(".docker"));
    let environment = Environment { docker_config, ..home.environment() };
    expect(&keychain(environment), Some(("u2", "p2"))).await;
    let environment = Environment { docker_config: Some(PathBuf::new()), ..home.environment() };
    expect(&keychain(environment), Some(("user", "pass"))).await;
}

#[tokio::test]
async fn t46_without_home_the_password_database_is_asked() {
    let home = Home::new();
    home.write(PAIR);
    let uid = rustix::process::geteuid().as_raw();
    let passwd = home.path().join("passwd");
    let shown = home.path().display();
    std::fs::write(
        &passwd,
        format!("broken\nx:x:{}:0::/nonexistent:/bin/sh\nme:x:{uid}:0:Me:{shown}:/bin/sh\n", uid + 1),
    )
    .unwrap();
    for variable in [None, Some(PathBuf::new())] {
        let environment = Environment { home: variable, ..Environment::default() };
        let keychain = DockerConfigKeychain::with_passwd(
            environment,
            Arc::new(AuthBoard::new()),
            Settings::default(),
            &passwd,
        );
        expect(&keychain, Some(("user", "pass"))).await;
    }
    let nowhere = Path::new("/nonexistent/passwd");
    assert_eq!(file::home(None, 0, nowhere), Some("/root".into()));
    assert_eq!(file::home(None, 1, nowhere), None);
    assert_eq!(file::home(Some(Path::new("/h")), 0, nowhere), Some("/h".into()));
}

#[tokio::test]
async fn r11_a_home_that_is_missing_is_no_error() {
    let environment = Environment { home: Some("/nonexistent/home".into()), ..Environment::default() };
    expect(&keychain(environment), None).await;
}

#[tokio::test]
async fn t47_t48_t13_the_file_is_read_again_when_it_appears_changes_and_goes() {
    let home = Home::new();
    let keychain = home.keychain();
    expect(&keychain, None).await;
    let since = keychain.board.generation("reg.example");
    home.write(PAIR);
    expect(&keychain, Some(("user", "pass"))).await;
    let appeared = keychain.board.generation("reg.example");
    assert!(appeared > since, "those who wait are told");
    home.write(OTHER);
    expect(&keychain, Some(("u2", "p2"))).await;
    let changed = keychain.board.generation("reg.example");
    assert!(changed > appeared);
    expect(&keychain, Some(("u2", "p2"))).await;
    assert_eq!(keychain.board.generation("reg.example"), changed, "no news without a change");
    std::fs::remove_file(home.path().join(".docker/config.json")).unwrap();
    expect(&keychain, None).await;
}

#[tokio::test]
async fn a_half_written_file_leaves_the_last_good_reading_in_use_for_a_moment() {
    tokio::time::pause();
    let home = Home::new();
    home.write(PAIR);
    let keychain = home.keychain();
    expect(&keychain, Some(("user", "pass"))).await;
    home.write("{\"auths\":");
    expect(&keychain, Some(("user", "pass"))).await;
    tokio::time::advance(Duration::from_secs(6)).await;
    assert!(ask(&keychain, "reg.example/a").await.is_err());
    home.write(OTHER);
    expect(&keychain, Some(("u2", "p2"))).await;
}

#[tokio::test]
async fn t49_a_file_that_cannot_be_read_is_an_error() {
    let home = Home::new();
    // A directory in its place cannot be read by anybody, root included.
    std::fs::create_dir_all(home.path().join(".docker/config.json")).unwrap();
    let error = ask(&home.keychain(), "reg.example/a").await.unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    let file_as_directory = Home::new();
    std::fs::write(file_as_directory.path().join(".docker"), "").unwrap();
    assert!(ask(&file_as_directory.keychain(), "reg.example/a").await.is_err());
}

#[tokio::test]
async fn t50_a_file_that_others_may_read_is_used_and_warned_about_once() {
    let (log, _guard) = soci_testkit::log::capture();
    let home = Home::new();
    home.write(PAIR);
    let file = home.path().join(".docker/config.json");
    let keychain = home.keychain();
    expect(&keychain, Some(("user", "pass"))).await;
    assert_eq!(log.warnings("has mode"), 0);
    for mode in [0o644, 0o640] {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        expect(&keychain, Some(("user", "pass"))).await;
    }
    assert_eq!(log.warnings("has mode 0644"), 1);
    assert_eq!(log.warnings("has mode"), 1);
}

#[tokio::test]
async fn t51_a_helper_named_for_the_registry_is_asked() {
    let home = Home::new();
    home.write(r#"{"credHelpers":{"reg.example":"x"},"auths":{"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#);
    home.helper("x", r#"{"ServerURL":"reg.example","Username":"u","Secret":"p"}"#, 0);
    let keychain = home.keychain();
    assert!(keychain.peek(&scope("reg.example/a")).await.is_none(), "not before a challenge");
    assert_eq!(home.read("runs"), "");
    expect(&keychain, Some(("u", "p"))).await;
    assert_eq!(home.read("stdin"), "reg.example");
}

#[tokio::test]
async fn t52_an_entry_of_the_file_is_no_fallback_for_a_helper() {
    let home = Home::new();
    home.write(r#"{"credsStore":"x","auths":{"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#);
    let error = ask(&home.keychain(), "reg.example/a").await.unwrap_err().to_string();
    assert!(error.contains("docker-credential-x: not found in PATH"), "{error}");
    home.helper("x", "credentials not found in native keychain\n", 1);
    expect(&home.keychain(), None).await;
}

#[tokio::test]
async fn t53_an_empty_helper_name_means_the_file() {
    let home = Home::new();
    home.write(r#"{"credsStore":"x","credHelpers":{"reg.example":""},"auths":{"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#);
    home.helper("x", "{}", 0);
    expect(&home.keychain(), Some(("user", "pass"))).await;
    assert_eq!(home.read("runs"), "");
}

#[tokio::test]
async fn t62_a_refused_answer_of_a_helper_is_asked_for_anew_and_a_change_is_news() {
    let home = Home::new();
    home.write(r#"{"credsStore":"x"}"#);
    home.helper("x", r#"{"Username":"u","Secret":"old"}"#, 0);
    let keychain = home.keychain();
    expect(&keychain, Some(("u", "old"))).await;
    std::fs::write(home.path().join("answer"), r#"{"Username":"u","Secret":"new"}"#).unwrap();
    expect(&keychain, Some(("u", "old"))).await;
    let since = keychain.board.generation("reg.example");
    let mut rejected = Rejected::default();
    rejected.add(Credential::basic("u", "old").fingerprint());
    let lookup = keychain.lookup(&scope("reg.example/a"), &rejected).await.unwrap();
    assert_eq!(lookup.candidates[0].id.fingerprint, Credential::basic("u", "new").fingerprint());
    assert!(keychain.board.generation("reg.example") > since);
    assert_eq!(home.read("runs"), "run\nrun\n");
}

#[tokio::test]
async fn t63_docker_hubs_helper_is_asked_by_the_canonical_key() {
    for key in ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "docker.io:443"] {
        let home = Home::new();
        home.write(&format!(r#"{{"credHelpers":{{"{key}":"x"}}}}"#));
        home.helper("x", r#"{"Username":"u","Secret":"p"}"#, 0);
        assert!(ask(&home.keychain(), "nginx").await.unwrap().is_some(), "{key}");
        assert_eq!(home.read("stdin"), "https://index.docker.io/v1/", "{key}");
    }
}

#[tokio::test]
async fn a_store_that_knows_the_registry_with_its_scheme_is_asked_a_second_time() {
    let home = Home::new();
    home.write(r#"{"credsStore":"x","auths":{"https://reg.example":{}}}"#);
    home.helper("x", "credentials not found in native keychain", 1);
    expect(&home.keychain(), None).await;
    assert_eq!(home.read("stdin"), "reg.examplehttps://reg.example");
}

#[tokio::test]
async fn docker_auth_config_outranks_the_file_for_its_exact_keys() {
    let home = Home::new();
    home.write(r#"{"auths":{"reg.example":{"auth":"dXNlcjpwYXNz"},"b.example":{"auth":"dXNlcjpwYXNz"}}}"#);
    let with = |json: &str| {
        keychain(Environment { docker_auth_config: Some(Secret::new(json)), ..home.environment() })
    };
    let keychain = with(OTHER);
    expect(&keychain, Some(("u2", "p2"))).await;
    let other = ask(&keychain, "b.example/a").await.unwrap().unwrap();
    assert_eq!(other.fingerprint(), Credential::basic("user", "pass").fingerprint());
    let (log, _guard) = soci_testkit::log::capture();
    expect(&with(r#"{"auths":{},"credsStore":"hunter2"}"#), Some(("user", "pass"))).await;
    assert_eq!(log.warnings("DOCKER_AUTH_CONFIG is not valid"), 1);
    assert!(!log.text().contains("hunter2"));
}

#[tokio::test]
async fn t123_debug_of_the_option_shows_no_secret() {
    let home = Home::new();
    home.write(r#"{"auths":{"reg.example":{"username":"user","password":"hunter2"}}}"#);
    let secret = Some(Secret::new(r#"{"auths":{"x":{"auth":"aHVudGVyMjpodW50ZXIy"}}}"#));
    let keychain = keychain(Environment { docker_auth_config: secret, ..home.environment() });
    let lookup = keychain.lookup(&scope("reg.example/a"), &Rejected::default()).await.unwrap();
    let shown = format!("{keychain:?} {lookup:?}");
    assert!(!shown.contains("hunter2") && !shown.contains("aHVudGVyM"), "{shown}");
}
