use std::time::Duration;

use soci_registry::settings::Insecure;

use super::checked::{Discovery, Limit, Listen};
use super::read::parse;
use super::schema::{Key, Kind, Table};
use super::*;

/// A file of the reference's shape: every table and key that its sample has.
const SAMPLE: &str = include_str!("../../tests/sample.toml");

fn check(text: &str) -> Config {
    Config::check(&parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).raw)
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn a_file_of_the_references_shape_loads_without_a_finding() {
    let read::Parsed { raw, findings, .. } = parse(SAMPLE).unwrap();
    assert_eq!(findings, []);
    let mut expected = Raw::default();
    expected.blob.max_retries = Some(8);
    expected.blob.min_wait_msec = Some(30);
    expected.blob.max_wait_msec = Some(300_000);
    assert_eq!(raw, expected);
    assert_eq!(Config::check(&raw), Config::check(&Raw::default()));
}

#[test]
fn the_defaults_are_the_references() {
    let config = check("");
    assert_eq!(config.http.dial, Duration::from_secs(3));
    assert_eq!(config.http.request, Duration::from_secs(300));
    assert_eq!((config.http.retries, config.blob.retries), (8, 8));
    assert_eq!(config.read_timeout, Duration::from_secs(300));
    assert_eq!(config.mount_timeout, Duration::from_secs(30));
    assert_eq!(config.discovery, Discovery { v1: false, v2: true });
    assert_eq!(config.containerd, Path::new("/run/containerd/containerd.sock"));
    assert!(config.verify_headers && config.check_overlay && config.background_fetch && !config.strict);
    assert_eq!((config.metrics, config.cri, config.kubernetes), (None, None, None));
    assert_eq!(config.hosts_dir.as_deref(), Some(Path::new("/etc/containerd/certs.d")));
}

#[test]
fn keys_are_found_whatever_their_case() {
    let config = check("[HTTP]\nmaxretries = 3\n[pull_modes.SOCI_V1]\nEnable = true\n");
    assert_eq!(config.http.retries, 3);
    assert!(config.discovery.v1);
}

#[test]
fn blob_retries_are_those_of_http_unless_said() {
    let text = "[http]\nMaxRetries = 2\nMinWaitMsec = 5\n[blob]\nmin_wait_msec = 7\n";
    let config = check(text);
    assert_eq!(config.blob.retries, 2);
    assert_eq!(config.blob.pause, (Duration::from_millis(7), Duration::from_secs(300)));
}

#[test]
fn values_become_what_they_mean() {
    let text = r#"
metrics_address = "/run/m.sock"
metrics_network = "unix"
max_concurrency = -1
disable_verification = true
[content_store]
type = "containerd"
containerd_address = "unix:///c.sock"
[pull_modes]
strict = true
[cri_keychain]
enable_keychain = true
[kubeconfig_keychain]
enable_keychain = true
kubeconfig_path = "/k"
namespaces = ["a", "b"]
legacy_dockercfg = true
[[resolver.host."docker.io".mirrors]]
host = "https://mirror:5000"
request_timeout_sec = -1
[[resolver.host."docker.io".mirrors]]
host = "other"
insecure = true
forward_credentials = true
[snapshotter]
min_layer_size = 10
"#;
    let config = check(text);
    assert_eq!(config.metrics, Some(Listen::Unix("/run/m.sock".into())));
    assert!(!config.verify_headers && config.strict);
    assert_eq!(config.containerd, Path::new("/c.sock"));
    assert_eq!(config.cri.as_deref(), Some(Path::new("/run/containerd/containerd.sock")));
    let kubernetes = config.kubernetes.unwrap();
    assert_eq!(kubernetes.kubeconfig.as_deref(), Some(Path::new("/k")));
    assert_eq!(kubernetes.namespaces, ["a", "b"]);
    assert!(kubernetes.legacy_dockercfg);
    assert_eq!(config.min_layer_size, 10);
    let mirrors = &config.mirrors["docker.io"];
    assert_eq!((mirrors[0].request, mirrors[0].forward_credentials), (Some(Limit::None), false));
    assert!(mirrors[1].forward_credentials);
    assert_eq!(
        (mirrors[1].host.as_str(), mirrors[1].insecure, mirrors[1].request),
        ("other", Insecure::Yes, None)
    );
}

#[test]
fn the_cache_has_a_limit_unless_it_is_lifted() {
    let cache = |text: &str| {
        let cache = check(&format!("[span_cache]\n{text}")).cache;
        (cache.max_bytes, cache.max_percent)
    };
    assert_eq!(cache(""), (None, Some(75)));
    assert_eq!(cache("max_bytes = 1000"), (Some(1000), Some(75)));
    assert_eq!(cache("max_percent = 10"), (None, Some(10)));
    assert_eq!(cache("max_bytes = -1"), (None, None));
    assert_eq!(check("[background_fetch]\nmax_bytes_per_second = 5").background_rate, Some(5));
    assert_eq!(check("[background_fetch]\nmax_bytes_per_second = 0").background_rate, None);
}

#[test]
fn the_state_is_served_on_a_unix_socket_only() {
    use super::checked::Debug;
    let debug = |address: &str| check(&format!("debug_address = '{address}'")).debug;
    assert_eq!(debug(""), Debug::Off);
    assert_eq!(debug("/run/d.sock"), Debug::Unix("/run/d.sock".into()));
    assert_eq!(debug("unix:///run/d.sock"), Debug::Unix("/run/d.sock".into()));
    for address in ["127.0.0.1:6060", ":6060", "d.sock"] {
        assert_eq!(debug(address), Debug::Refused(address.to_owned()));
    }
}

#[test]
fn a_malformed_file_names_line_and_key() {
    for (text, line, key) in [
        ("[http]\nMaxRetries = \"many\"\n", 2, "[http] MaxRetries"),
        ("debug = 1\n", 1, "debug"),
        ("\n\n[fuse]\nattr_timeout = 1.5\n", 4, "[fuse] attr_timeout"),
        ("http = 3\n", 1, "http"),
        ("a = \n", 1, ""),
        ("[http\n", 1, ""),
        ("[[resolver.host.x.mirrors]]\nhost = 1\n", 2, "[resolver.host.x.mirrors] host"),
        ("debug = true\nDebug = true\n", 2, "debug"),
    ] {
        let error = parse(text).expect_err(text);
        assert_eq!((error.line, error.key.as_str()), (line, key), "{text}: {error}");
        assert!(!error.what.is_empty());
    }
}

#[test]
fn unknown_keys_and_changed_ones_without_effect_are_findings() {
    let findings =
        parse("nonsense = 1\nmetadata_store = \"db-multi\"\n[http]\nx = 1\n[new]\ny = 1\n").unwrap().findings;
    let found: Vec<_> = findings.iter().map(|finding| (finding.line, finding.key.as_str())).collect();
    assert_eq!(found, [(1, "nonsense"), (2, "metadata_store"), (4, "[http] x"), (5, "new")]);
    assert!(findings[1].what.contains("has no effect: layer metadata"), "{findings:?}");
}

#[test]
fn values_that_cannot_be_meant_name_line_and_key() {
    let parallel = "[pull_modes.parallel_pull_unpack] ";
    for (text, line, key, expected) in [
        ("debug = true\nmetadata_store = \"sqlite\"", 2, "metadata_store", "unknown metadata store type"),
        (
            "[background_fetch]\ndrop_policy = \"random\"",
            2,
            "[background_fetch] drop_policy",
            "must be \"oldest\" or \"newest\"",
        ),
        ("[content_store]\n\ntype = \"x\"", 3, "[content_store] type", "must be \"soci\""),
        ("metrics_address = \"a:1\"\nmetrics_network = \"udp\"", 2, "metrics_network", "must be \"tcp\""),
        ("debug = true\nmetrics_address = \"nine\"", 2, "metrics_address", "no port"),
        (
            "metrics_network = \"tcp4\"\nmetrics_address = \"[::1]:9090\"",
            2,
            "metrics_address",
            "metrics_network",
        ),
        (
            "[pull_modes.parallel_pull_unpack]\nconcurrent_download_chunk_size = \"8 lines\"",
            2,
            &format!("{parallel}concurrent_download_chunk_size"),
            "invalid size format",
        ),
        (
            "[pull_modes.parallel_pull_unpack]\nenable = true",
            2,
            &format!("{parallel}enable"),
            "requires containerd content store",
        ),
        (
            "[content_store]\ntype = \"containerd\"\n[pull_modes.parallel_pull_unpack]\nenable = true\nmax_concurrent_downloads = 1",
            5,
            &format!("{parallel}max_concurrent_downloads"),
            "global download limit less than per-image download limit",
        ),
        (
            "debug = true\n[[resolver.host.x.mirrors]]\ninsecure = true",
            2,
            "[resolver.host.x.mirrors]",
            "without host",
        ),
        (
            "[[resolver.host.x.mirrors]]\nhost = \"a\"\n[[resolver.host.x.mirrors]]\nhost = \"https://u:p@b\"",
            4,
            "[resolver.host.x.mirrors] host",
            "credentials do not belong",
        ),
        ("\n[resolver.host.\"a/b\"]\nmirrors = []", 2, "[resolver.host.a/b]", "no registry host"),
        ("\n[[resolver.host.\"a b\".mirrors]]\nhost = \"c\"", 2, "[resolver.host.a b]", "no registry host"),
        ("[span_cache]\nmax_percent = 0", 2, "[span_cache] max_percent", "from 1 to 100"),
        ("[SPAN_CACHE]\nmax_percent = 101", 2, "[span_cache] max_percent", "from 1 to 100"),
    ] {
        let parsed = parse(text).unwrap();
        let error = parsed.places.locate(Config::check(&parsed.raw).expect_err(text));
        assert_eq!((error.line, error.key.as_str()), (line, key), "{text}: {error}");
        assert!(error.what.contains(expected), "{text}: {error}");
    }
}

#[test]
fn a_dump_loads_to_the_same() {
    let text = "max_concurrency = 7\n[[resolver.host.\"a.b\".mirrors]]\nhost = \"it's\"\n[blob]\nmax_retries = 1\n\
                [pull_modes.parallel_pull_unpack.decompress_streams.gzip]\npath = \"/x\"\nargs = [\"-d\"]\n";
    for text in ["", text, SAMPLE] {
        let raw = parse(text).unwrap().raw;
        let dumped = dump::dump(&raw).unwrap();
        assert_eq!(parse(&dumped).unwrap_or_else(|error| panic!("{dumped}\n{error}")).raw, raw);
    }
    let dumped = dump::dump(&Raw::default()).unwrap();
    assert!(dumped.starts_with("http_cache_type = ''\nfilesystem_cache_type = ''\n"), "{dumped}");
    assert!(dumped.contains("\n[http]\n  DialTimeoutMsec = 3000\n"), "{dumped}");
    assert!(dumped.contains("\n  [pull_modes.soci_v1]\n    enable = false\n"), "{dumped}");
}

#[test]
fn every_key_says_what_it_does() {
    fn walk(keys: &[Key]) -> usize {
        keys.iter()
            .map(|key| {
                assert!(key.effect.len() > 3, "{}", key.name);
                match key.kind {
                    Kind::Value(_) => 1,
                    Kind::Table(keys) | Kind::Map(keys) | Kind::List(keys) => walk(keys()),
                }
            })
            .sum()
    }
    assert!(walk(Raw::keys()) > 70);
}

#[test]
fn only_the_default_path_may_be_absent() {
    let error = load(Path::new("/nonexistent/config.toml")).unwrap_err();
    assert!(error.to_string().contains("failed to open config file \"/nonexistent/config.toml\""), "{error}");
}

#[test]
fn an_oversized_file_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![b'\n'; 2 << 20]).unwrap();
    let error = soci_oci::with_causes(&load(file.path()).unwrap_err());
    assert!(error.contains("larger than the limit"), "{error}");
}
