//! `docs/auth.md` says what the code does: its order, its snippets, its commands, its metrics.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;
use soci_auth::keychain::Keychain;
use soci_auth::keychain::docker_config::{DockerConfigKeychain, Environment, Settings};
use soci_auth::{AuthBoard, CredentialScope, Origin, Rejected, Scheme};
use soci_snapshotter_grpc::config;
use soci_snapshotter_grpc::keychains::OPTIONS;
use soci_snapshotter_grpc::metrics::names;
use soci_snapshotter_grpc::serve::DEFAULT_ADDRESS;
use soci_testkit::kube_api::KubeApi;

const DOCUMENT: &str = include_str!("../../../docs/auth.md");
const COMMANDS: &str = include_str!("../../../docs/cli.md");

/// Returns the code blocks of a language.
fn blocks(language: &str) -> Vec<&'static str> {
    let opening = format!("```{language}\n");
    let blocks = DOCUMENT.split(&*opening).skip(1);
    let blocks: Vec<_> = blocks.map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(!blocks.is_empty(), "no block of {language}");
    blocks
}

/// Returns what stands between backticks.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn the_order_in_the_document_is_the_one_in_the_code() {
    let mut names = Vec::new();
    for place in 1..=OPTIONS.len() {
        let row = DOCUMENT.lines().find(|line| line.starts_with(&format!("| {place} |"))).unwrap();
        names.push(code(row).next().unwrap());
        assert!(DOCUMENT.contains(&format!("\n## {place}. {}\n", row.split('|').nth(2).unwrap().trim())));
    }
    assert_eq!(names, OPTIONS.map(|(name, _)| name));
}

#[test]
fn every_configuration_snippet_loads_without_a_finding_and_does_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let mut seen = (false, false);
    for block in blocks("toml") {
        std::fs::write(&path, block).unwrap();
        let config::Loaded { config, findings, .. } = config::load(&path).unwrap();
        assert!(findings.is_empty(), "{block}");
        seen = (seen.0 || config.cri.is_some(), seen.1 || config.kubernetes.is_some());
    }
    assert_eq!(seen, (true, true), "both options are shown");
    assert!(
        blocks("console")
            .iter()
            .any(|block| { block.trim() == format!("--image-service-endpoint=unix://{DEFAULT_ADDRESS}") })
    );
}

#[test]
fn the_manifests_grant_list_and_watch_on_secrets_to_one_account_and_nothing_else() {
    let objects: Vec<Value> = blocks("yaml")
        .iter()
        .flat_map(|block| block.split("---\n"))
        .map(|document| serde_saphyr::from_str(document).unwrap())
        .collect();
    let of_kind = |kind: &str| objects.iter().find(|object| object["kind"] == kind).unwrap();
    let (account, role, binding) =
        (of_kind("ServiceAccount"), of_kind("ClusterRole"), of_kind("ClusterRoleBinding"));
    assert_eq!(
        role["rules"],
        serde_json::json!([{ "apiGroups": [""], "resources": ["secrets"], "verbs": ["list", "watch"] }])
    );
    assert_eq!(binding["roleRef"]["kind"], "ClusterRole");
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    let subject = &binding["subjects"][0];
    assert_eq!(subject["kind"], "ServiceAccount");
    for field in ["name", "namespace"] {
        assert_eq!(subject[field], account["metadata"][field]);
    }
    let name = account["metadata"]["name"].as_str().unwrap();
    assert!(blocks("console").iter().any(|block| block.contains(&format!("create token {name} "))));
}

/// Runs the commands of the document for a kubeconfig, with a `kubectl` that knows one cluster and an administrator.
#[tokio::test]
async fn the_kubeconfig_of_the_document_holds_the_service_account_alone_and_works() {
    let block = *blocks("console").iter().find(|block| block.contains("create token")).unwrap();
    let commands: Vec<&str> = block.lines().map(|line| line.strip_prefix("$ ").unwrap_or(line)).collect();
    assert!(!block.contains("--token"), "a token on a command line is for everyone to read");
    let api = KubeApi::start("service-account").await.unwrap();
    api.put(
        "team",
        "pull",
        "kubernetes.io/dockerconfigjson",
        &[(".dockerconfigjson", r#"{"auths":{"reg.example":{"auth":"dXNlcjpwYXNz"}}}"#)],
    );
    let dir = tempfile::tempdir().unwrap();
    let admin: Value =
        serde_json::from_str(&api.kubeconfig(&serde_json::json!({ "token": "admin-hunter2" }))).unwrap();
    let cluster = &admin["clusters"][0]["cluster"];
    let (server, authority) =
        (cluster["server"].as_str().unwrap(), cluster["certificate-authority-data"].as_str().unwrap());
    let kubectl = format!(
        "#!/bin/sh\ncase \"$*\" in\n*'create token'*) echo service-account;;\n*cluster.server*) printf %s '{server}';;\n\
         *certificate-authority-data*) printf %s '{authority}';;\n*) cat admin;;\nesac\n"
    );
    std::fs::write(dir.path().join("admin"), admin.to_string()).unwrap();
    for (name, text) in [("kubectl", &*kubectl), ("scp", "#!/bin/sh\necho \"$@\" > copied\n")] {
        std::fs::write(dir.path().join(name), text).unwrap();
        std::fs::set_permissions(dir.path().join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let mut shell = std::process::Command::new("sh");
    shell.args(["-euc", &commands.join("\n")]).current_dir(dir.path()).env("PATH", path);
    assert!(shell.status().unwrap().success());

    let file = dir.path().join("kubeconfig");
    let text = std::fs::read_to_string(&file).unwrap();
    let written: Value = serde_saphyr::from_str(&text).unwrap();
    for list in ["users", "clusters", "contexts"] {
        assert_eq!(written[list].as_array().unwrap().len(), 1, "{list} of {text}");
    }
    assert_eq!(written["users"][0]["user"], serde_json::json!({ "tokenFile": "token" }));
    for name in ["kubeconfig", "token"] {
        assert_eq!(dir.path().join(name).metadata().unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    let configured = blocks("toml").concat();
    let copied = std::fs::read_to_string(dir.path().join("copied")).unwrap();
    let (files, destination) = copied.trim().rsplit_once(" root@NODE:").unwrap();
    assert_eq!(files, "-p token kubeconfig");
    assert!(configured.contains(&format!("kubeconfig_path = \"{destination}kubeconfig\"")), "{copied}");

    let mut settings = soci_kubernetes::Settings::new(soci_kubernetes::Environment::default());
    settings.kubeconfig = Some(file);
    let keychain = soci_kubernetes::SecretsKeychain::start(settings, std::sync::Arc::new(AuthBoard::new()));
    keychain.ready().await;
    assert_eq!((keychain.len(), keychain.progress().trouble), (1, None));
}

#[tokio::test]
async fn the_docker_config_of_the_document_asks_the_helper_it_names() {
    for block in blocks("json") {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), block).unwrap();
        let parsed: Value = serde_json::from_str(block).unwrap();
        let (host, helper) = parsed["credHelpers"].as_object().unwrap().iter().next().unwrap();
        let environment = Environment {
            docker_config: Some(dir.path().to_owned()),
            path: Some(dir.path().into()),
            ..Environment::default()
        };
        let board = std::sync::Arc::new(AuthBoard::new());
        let option = DockerConfigKeychain::new(environment, board, Settings::default());
        let image: soci_oci::ImageRef = format!("{host}/team/app:1").parse().unwrap();
        let scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
        let missing = option.lookup(&scope, &Rejected::default()).await.unwrap_err().to_string();
        assert!(
            missing.starts_with(&format!("docker-credential-{}: not found", helper.as_str().unwrap())),
            "{missing}"
        );
    }
}

#[test]
fn the_commands_and_metrics_of_the_document_exist() {
    let mut commands = 0;
    for line in blocks("console").iter().flat_map(|block| block.lines()) {
        let Some(at) = line.find("soci ").filter(|_| line.starts_with("# ")) else { continue };
        commands += 1;
        let words: Vec<&str> = line[at..].split_whitespace().collect();
        for flag in words.iter().filter(|word| word.starts_with("--")) {
            assert!(COMMANDS.contains(&format!("`{flag}")), "{flag} of {line}");
        }
        let names: Vec<&str> =
            words.iter().copied().take_while(|word| word.chars().all(char::is_lowercase)).collect();
        assert!(COMMANDS.contains(&format!("## `{}`", names.join(" "))), "{line}");
    }
    assert!(commands >= 4, "{commands}");
    let known: HashSet<&str> = names::ALL.iter().map(|family| family.name).collect();
    let named: Vec<&str> =
        code(DOCUMENT).filter(|word| word.starts_with("soci_") && !word.contains(' ')).collect();
    assert!(named.len() >= 9);
    for name in named {
        assert!(known.contains(name), "{name}");
    }
}
