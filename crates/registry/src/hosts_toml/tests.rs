use super::*;

const PATH: &str = "/etc/containerd/certs.d/docker.io/hosts.toml";

fn good(text: &str) -> HostsFile {
    parse(text, Path::new(PATH)).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn bad(text: &str) -> HostsTomlError {
    parse(text, Path::new(PATH)).unwrap_err()
}

#[test]
fn every_key_is_read() {
    let file = good(
        r#"
server = "https://registry-1.docker.io"
capabilities = ["pull", "resolve"]
ca = "root.pem"

[host."https://z-mirror.example"]
  capabilities = ["Pull"]
  ca = ["/etc/a.pem", "b.pem"]
  client = [["c.cert", "c.key"], "both.pem"]
  skip_verify = true
  override_path = true
  dial_timeout = "1m1.5s"
  [host."https://z-mirror.example".header]
    x-one = "1"
    x-two = ["2", "3"]

[host."http://a-mirror.example:5000/cache"]
"#,
    );
    assert!(file.unknown.is_empty(), "{:?}", file.unknown);
    let origins: Vec<String> =
        file.hosts.iter().map(|host| host.address.as_ref().unwrap().origin.to_string()).collect();
    assert_eq!(origins, ["https://z-mirror.example", "http://a-mirror.example:5000"], "order of the file");
    let [z, a] = file.hosts.as_slice() else { panic!() };
    assert_eq!(z.address.as_ref().unwrap().root, "", "override_path appends nothing");
    assert_eq!(a.address.as_ref().unwrap().root, "/cache/v2");
    assert_eq!(z.capabilities, Some(Capabilities { pull: true, ..Capabilities::NONE }));
    assert_eq!(a.capabilities, None);
    let base = Path::new("/etc/containerd/certs.d/docker.io");
    assert_eq!(z.ca, [PathBuf::from("/etc/a.pem"), base.join("b.pem")]);
    assert_eq!(z.client, [(base.join("c.cert"), Some(base.join("c.key"))), (base.join("both.pem"), None)]);
    assert_eq!(z.verify, Some(Verify::Skip));
    assert_eq!(z.dial_timeout, Some(Duration::from_millis(61_500)));
    assert_eq!(z.headers.get_all("x-two").iter().count(), 2);
    assert!(z.headers["x-one"].is_sensitive());
    assert_eq!(file.server.address.as_ref().unwrap().origin.to_string(), "https://registry-1.docker.io");
    assert_eq!(file.server.ca, [base.join("root.pem")]);
    assert!(!file.server.capabilities.unwrap().push);
}

#[test]
fn a_client_may_be_one_file() {
    let file = good("[host.\"https://m\"]\nclient = \"both.pem\"\n");
    assert_eq!(file.hosts[0].client.len(), 1);
    assert_eq!(file.hosts[0].client[0].1, None);
}

#[test]
fn addresses_are_completed_as_containerd_does() {
    let table = [
        ("m.example", "https://m.example", "/v2"),
        ("https://m.example/", "https://m.example", "/v2"),
        ("http://m.example:80/v2/", "http://m.example", "/v2"),
        ("https://m.example/v2/proxy", "https://m.example", "/v2/proxy/v2"),
    ];
    for (text, origin, root) in table {
        let file = good(&format!("server = \"{text}\""));
        let address = file.server.address.unwrap();
        assert_eq!((address.origin.to_string().as_str(), address.root.as_str()), (origin, root), "{text}");
    }
    assert_eq!(good("").server.address, None);
}

#[test]
fn a_duplicate_table_is_an_error_with_its_line() {
    let error = bad("server = \"https://a\"\n\n[host.\"https://m\"]\n[host.\"https://m\"]\n");
    assert_eq!(error.line, 4, "{error}");
    assert!(error.to_string().starts_with(&format!("{PATH}:4: ")), "{error}");
    assert!(error.message.contains("duplicate"), "{error}");
}

#[test]
fn mistakes_name_their_line() {
    let table = [
        ("server = 5\n", 1),
        ("[host.\"https://m\"]\nskip_verify = \"yes\"\n", 2),
        ("\n\n[host.\"https://m\"]\ncapabilities = [\"fly\"]\n", 4),
        ("[host.\"ftp://m\"]\n", 1),
        ("[host.\"https://m\"]\ndial_timeout = \"soon\"\n", 2),
        ("[host.\"https://m\"]\nclient = [[\"only\"]]\n", 2),
        ("[host.\"https://m\"]\n[host.\"https://m\".header]\n\"a b\" = \"c\"\n", 3),
        ("server = \"https://user:hunter2@m\"", 1),
        ("x = [", 1),
    ];
    for (text, line) in table {
        let error = bad(text);
        assert_eq!(error.line, line, "{text}: {error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}

#[test]
fn unknown_keys_are_reported_and_harmless() {
    let file = good("color = 1\n[host.\"https://m\"]\nsize = 2\n");
    assert_eq!(file.unknown, ["color", "host.\"https://m\".size"]);
}

#[test]
fn durations_are_gos() {
    for (text, expected) in [
        ("3s", Some(3_000)),
        ("1m30s", Some(90_000)),
        ("500ms", Some(500)),
        ("0.5h", Some(1_800_000)),
        ("0s", None),
        ("-1s", None),
        ("3", None),
        ("s", None),
        ("3x", None),
        ("999999h", None),
    ] {
        assert_eq!(duration(text), expected.map(Duration::from_millis), "{text}");
    }
}
