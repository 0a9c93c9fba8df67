use std::fs;
use std::path::Path;

use super::*;
use crate::settings::{Insecure, Mirror};

fn registry(name: &str) -> RegistryName {
    RegistryName::new(name).unwrap()
}

fn settings(root: &Path) -> Settings {
    Settings { hosts_dirs: vec![root.to_owned()], hosts_recheck: Duration::ZERO, ..Settings::default() }
}

fn write(root: &Path, directory: &str, file: &str, text: &str) {
    fs::create_dir_all(root.join(directory)).unwrap();
    fs::write(root.join(directory).join(file), text).unwrap();
}

async fn names(hosts: &Hosts, name: &str) -> Vec<String> {
    hosts
        .of(&registry(name))
        .await
        .unwrap()
        .iter()
        .map(|host| format!("{}{}", host.name(), host.root))
        .collect()
}

#[tokio::test]
async fn without_configuration_the_registry_is_the_only_host() {
    let root = tempfile::tempdir().unwrap();
    let hosts = Hosts::new(Arc::new(settings(root.path())));
    assert_eq!(names(&hosts, "reg.example:5000").await, ["https://reg.example:5000/v2"]);
    assert_eq!(names(&hosts, "docker.io").await, ["https://registry-1.docker.io/v2"]);
    let list = hosts.of(&registry("docker.io")).await.unwrap();
    assert_eq!(list[0].namespace, None, "Docker Hub's other host is no mirror");
    let local = hosts.of(&registry("localhost:5000")).await.unwrap();
    let origins: Vec<String> = local[0].origins.iter().map(ToString::to_string).collect();
    assert_eq!(origins, ["https://localhost:5000", "http://localhost:5000"]);
}

#[tokio::test]
async fn the_order_is_resolver_mirrors_then_hosts_toml_then_server() {
    let root = tempfile::tempdir().unwrap();
    write(
        root.path(),
        "docker.io",
        "hosts.toml",
        "server = \"https://registry-1.docker.io\"\n[host.\"https://z.example\"]\n[host.\"https://a.example\"]\ncapabilities=[\"pull\"]\n",
    );
    let mut settings = settings(root.path());
    let mirror = Mirror::parse("https://first.example", Insecure::No).unwrap();
    settings.mirrors.insert("docker.io".into(), vec![mirror]);
    let hosts = Hosts::new(Arc::new(settings));
    assert_eq!(
        names(&hosts, "docker.io").await,
        [
            "https://first.example/v2",
            "https://z.example/v2",
            "https://a.example/v2",
            "https://registry-1.docker.io/v2"
        ]
    );
    let list = hosts.of(&registry("docker.io")).await.unwrap();
    let namespaces: Vec<Option<&str>> = list.iter().map(|host| host.namespace.as_deref()).collect();
    assert_eq!(namespaces, [Some("docker.io"), Some("docker.io"), Some("docker.io"), None]);
    assert!(!list[0].serves(Operation::ManifestPut), "resolver mirrors are for reading");
    assert!(list[1].serves(Operation::ManifestPut));
    assert!(!list[2].serves(Operation::Resolve) && list[2].serves(Operation::Blob));
}

#[tokio::test]
async fn directories_are_looked_for_in_containerds_order() {
    let root = tempfile::tempdir().unwrap();
    let hosts = Hosts::new(Arc::new(settings(root.path())));
    for (directory, mirror) in [
        ("_default", "https://default.example"),
        ("reg.example", "https://host.example"),
        ("reg.example:5000", "https://colon.example"),
        ("reg.example_5000_", "https://underscore.example"),
    ] {
        write(root.path(), directory, "hosts.toml", &format!("[host.\"{mirror}\"]\n"));
        let found = names(&hosts, "reg.example:5000").await;
        assert_eq!(found, [format!("{mirror}/v2"), "https://reg.example:5000/v2".into()], "{directory}");
    }
    assert_eq!(names(&hosts, "other.example").await[0], "https://default.example/v2");
}

#[tokio::test]
async fn changed_files_are_read_again() {
    let root = tempfile::tempdir().unwrap();
    let hosts = Hosts::new(Arc::new(settings(root.path())));
    write(root.path(), "r.example", "hosts.toml", "[host.\"https://one.example\"]\n");
    assert_eq!(names(&hosts, "r.example").await[0], "https://one.example/v2");
    write(root.path(), "r.example", "hosts.toml", "[host.\"https://another.example\"]\n");
    assert_eq!(names(&hosts, "r.example").await[0], "https://another.example/v2");
    fs::remove_dir_all(root.path().join("r.example")).unwrap();
    assert_eq!(names(&hosts, "r.example").await, ["https://r.example/v2"]);
}

#[tokio::test]
async fn a_changed_authority_makes_another_identity() {
    let root = tempfile::tempdir().unwrap();
    let hosts = Hosts::new(Arc::new(settings(root.path())));
    write(root.path(), "r.example", "hosts.toml", "ca = \"ca.pem\"\n");
    write(root.path(), "r.example", "ca.pem", "one");
    let first = hosts.of(&registry("r.example")).await.unwrap();
    let same = hosts.of(&registry("r.example")).await.unwrap();
    assert!(Arc::ptr_eq(&first, &same), "nothing changed, nothing is made anew");
    write(root.path(), "r.example", "ca.pem", "other");
    let second = hosts.of(&registry("r.example")).await.unwrap();
    assert_ne!(first[0].identity, second[0].identity);
}

#[tokio::test]
async fn an_unusable_file_leaves_the_registry_and_the_certificates_beside_it() {
    let root = tempfile::tempdir().unwrap();
    let hosts = Hosts::new(Arc::new(settings(root.path())));
    write(root.path(), "r.example", "hosts.toml", "[host.\"https://m\"]\n[host.\"https://m\"]\n");
    write(root.path(), "r.example", "ca.crt", "authority");
    write(root.path(), "r.example", "us.cert", "certificate");
    write(root.path(), "r.example", "us.key", "key");
    let list = hosts.of(&registry("r.example")).await.unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].identity.authorities, [b"authority".to_vec()]);
    assert_eq!(list[0].identity.clients, [(b"certificate".to_vec(), b"key".to_vec())]);
}

#[tokio::test]
async fn plain_http_is_only_what_was_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let plain = Settings { plain_http: PlainHttp::Always, ..settings(root.path()) };
    assert_eq!(names(&Hosts::new(Arc::new(plain)), "r.example").await, ["http://r.example/v2"]);
    write(root.path(), "r.example", "hosts.toml", "server = \"http://r.example:8080\"\n");
    let hosts = Hosts::new(Arc::new(settings(root.path())));
    assert_eq!(names(&hosts, "r.example").await, ["http://r.example:8080/v2"]);
    write(root.path(), "r.example", "hosts.toml", "server = \"http://r.example:8080\"\nskip_verify = true\n");
    let list = hosts.of(&registry("r.example")).await.unwrap();
    let origins: Vec<String> = list[0].origins.iter().map(ToString::to_string).collect();
    assert_eq!(origins, ["https://r.example:8080", "http://r.example:8080"]);
}

#[test]
fn only_another_host_is_told_the_namespace() {
    let table = [
        ("reg.example", "https://reg.example", None),
        ("reg.example", "http://reg.example", None),
        ("reg.example:443", "https://reg.example", None),
        ("reg.example:5000", "https://reg.example:5000", None),
        ("reg.example", "https://reg.example:5000", Some("reg.example")),
        ("docker.io", "https://registry-1.docker.io", None),
        ("docker.io", "https://mirror.gcr.example", Some("docker.io")),
    ];
    for (name, url, expected) in table {
        let origin = Origin::of_url(&url.parse().unwrap()).unwrap();
        assert_eq!(namespace(&registry(name), &origin).as_deref(), expected, "{name} {url}");
    }
}
