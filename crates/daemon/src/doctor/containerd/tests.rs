use super::*;
use crate::config::Raw;
use crate::serve::DEFAULT_ADDRESS;

fn packaged(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/containerd").join(name);
    std::fs::read_to_string(path).unwrap()
}

fn findings(text: &str) -> Vec<Finding> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, text).unwrap();
    let own = Config::check(&Raw::default()).unwrap();
    let mut findings = look(&path, Path::new(DEFAULT_ADDRESS), &own);
    // Whether a containerd runs here is not what these tests are about.
    findings.retain(|finding| !finding.what.contains("answer"));
    findings
}

fn faults(text: &str) -> Vec<Finding> {
    findings(text).into_iter().filter(|finding| finding.level > Level::Ok).collect()
}

/// Asserts that there is one fault, how bad it is, on which line, and what to write.
fn one(text: &str, level: Level, line: usize, change: &str) {
    let faults = faults(text);
    assert_eq!(faults.len(), 1, "{faults:#?}");
    let place = faults[0].place.as_deref().unwrap();
    assert_eq!(
        (faults[0].level, place.rsplit(':').next().unwrap()),
        (level, line.to_string().as_str()),
        "{faults:?}"
    );
    assert!(faults[0].change.as_deref().unwrap().contains(change), "{faults:#?}");
}

fn line_of(text: &str, part: &str) -> usize {
    text.lines().position(|line| line.contains(part)).unwrap() + 1
}

#[test]
fn the_configurations_that_we_ship_are_without_fault() {
    for name in ["config-v2.toml", "config-v3.toml"] {
        assert_eq!(faults(&packaged(name)), [], "{name}");
    }
}

#[test]
fn what_the_readme_says_is_what_we_ship() {
    let readme =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap();
    for name in ["config-v2.toml", "config-v3.toml"] {
        let shipped = packaged(name);
        let body = shipped.split_once("\n\n").unwrap().1;
        let lines = |text: &str| -> Vec<String> {
            text.lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned)
                .collect()
        };
        let (readme, body) = (lines(&readme).join("\n"), lines(body).join("\n"));
        assert!(readme.contains(&body), "{name} is not in README.md");
    }
}

#[test]
fn annotations_must_be_on_in_both_schemas() {
    for name in ["config-v2.toml", "config-v3.toml"] {
        let text = packaged(name)
            .replace("disable_snapshot_annotations = false", "disable_snapshot_annotations = true");
        let text = text.replace("enable_remote_snapshot_annotations = \"true\"", "");
        let line = line_of(&text, "disable_snapshot_annotations = true");
        let faults = faults(&text);
        let fault = faults.iter().find(|fault| fault.level == Level::Error).unwrap();
        assert!(fault.place.as_ref().unwrap().ends_with(&format!(":{line}")), "{fault:?}");
        assert!(fault.change.as_ref().unwrap().contains("disable_snapshot_annotations = false"));
        // Absent is as bad as on; the place is then the table's.
        let absent = text.replace("disable_snapshot_annotations = true", "");
        assert!(self::faults(&absent).iter().any(|fault| fault.level == Level::Error));
    }
    // From 2.1 on the transfer service passes labels on, if told.
    let text = packaged("config-v3.toml").replace("  disable_snapshot_annotations = false", "");
    let line = line_of(&text, "cri.v1.images");
    one(&text, Level::Note, line, "disable_snapshot_annotations = false");
}

#[test]
fn a_plugin_that_is_missing_elsewhere_or_of_another_type_is_named() {
    let text = packaged("config-v2.toml");
    let missing = text
        .replace("[proxy_plugins.soci]", "[proxy_plugins.other]")
        .replace(DEFAULT_ADDRESS, "/run/other.sock");
    let line = line_of(&missing, "[proxy_plugins.other]");
    one(&missing, Level::Error, line, "[proxy_plugins.soci]");
    let elsewhere = text.replace(DEFAULT_ADDRESS, "/run/other.sock");
    one(&elsewhere, Level::Error, line_of(&text, "address ="), DEFAULT_ADDRESS);
    let content = text.replace("\"snapshot\"", "\"content\"");
    one(&content, Level::Error, line_of(&text, "type ="), "type = \"snapshot\"");
    let unix = text.replace(DEFAULT_ADDRESS, &format!("unix://{DEFAULT_ADDRESS}"));
    assert_eq!(faults(&unix), []);
}

#[test]
fn who_uses_another_snapshotter_is_told() {
    let text = packaged("config-v2.toml").replace("snapshotter = \"soci\"", "snapshotter = \"overlayfs\"");
    one(&text, Level::Warning, line_of(&text, "snapshotter ="), "snapshotter = \"soci\"");
    let runtime = format!(
        "{text}\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.lazy]\nsnapshotter = \"soci\"\n"
    );
    assert_eq!(faults(&runtime), []);
}

#[test]
fn each_half_of_the_transfer_service_needs_the_other() {
    let text = packaged("config-v3.toml");
    let no_export = text.replace("enable_remote_snapshot_annotations = \"true\"", "");
    one(
        &no_export,
        Level::Warning,
        line_of(&text, "[proxy_plugins.soci]"),
        "enable_remote_snapshot_annotations",
    );
    let no_unpack = text.replace("snapshotter = \"soci\"\n[[", "snapshotter = \"native\"\n[[");
    one(&no_unpack, Level::Warning, line_of(&text, "[[plugins"), "snapshotter = \"soci\"");
}

#[test]
fn registries_are_asked_from_the_same_files() {
    let table = "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n";
    let text = packaged("config-v2.toml");
    let same = format!("{text}\n{table}config_path = \"/etc/containerd/certs.d:/etc/docker/certs.d\"\n");
    assert_eq!(faults(&same), []);
    let other = format!("{text}\n{table}config_path = \"/etc/other\"\n");
    one(&other, Level::Warning, line_of(&other, "config_path"), "config_path = \"/etc/other\"");
    let mirrors = format!(
        "{text}\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://m\"]\n"
    );
    one(&mirrors, Level::Warning, line_of(&mirrors, "registry.mirrors"), "hosts.toml");
}

#[test]
fn what_is_only_worth_knowing_is_a_note() {
    let text = packaged("config-v2.toml") + "  discard_unpacked_layers = true\n";
    one(&text, Level::Note, line_of(&text, "discard_unpacked"), "discard_unpacked_layers = false");
}

#[test]
fn an_old_or_missing_or_broken_file_is_an_error() {
    let old = faults("[proxy_plugins]\n");
    assert_eq!((old.len(), old[0].level), (1, Level::Error));
    assert!(old[0].change.as_ref().unwrap().starts_with("version = 2"));
    let own = Config::check(&Raw::default()).unwrap();
    let missing = look(Path::new("/nonexistent/config.toml"), Path::new(DEFAULT_ADDRESS), &own);
    assert_eq!((missing.len(), missing[0].level), (1, Level::Error));
    assert!(missing[0].change.as_ref().unwrap().contains(DEFAULT_ADDRESS));
    let broken = faults("version = 2\n[proxy_plugins\n");
    assert!(broken[0].place.as_ref().unwrap().ends_with("config.toml:2"), "{broken:?}");
}

#[test]
fn a_socket_elsewhere_is_ours_to_know() {
    let text = packaged("config-v2.toml") + "[grpc]\n  address = \"/run/k3s/containerd/containerd.sock\"\n";
    one(
        &text,
        Level::Warning,
        line_of(&text, "/run/k3s"),
        "containerd_address = \"/run/k3s/containerd/containerd.sock\"",
    );
}
