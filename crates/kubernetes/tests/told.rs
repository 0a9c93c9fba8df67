//! What goes wrong between the sync and its cluster: one line of the log says what, and what to do about it; no secret is
//! in any line, of ours or of a library; and nothing stays open, alive or at work behind it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Value, json};
use soci_testkit::kube_api::{Hang, KubeApi, WatchBreak};
use soci_testkit::tls::TestCa;
use support::{LONG, Rig, TYPE, count, eventually, healed, put, until};

/// Every token, password and plugin's output holds this.
const PLANTED: &str = "pl4nted-Kx-71";
/// What is in the environment of every plugin, and of all that it starts.
const MARK: &str = "SOCI_TEST_TOLD=kubernetes";
const EXEC: &str = "client.authentication.k8s.io/v1";

/// How it comes about.
enum Cause {
    /// By what is written in place of a good kubeconfig, before the start.
    Files(fn(&Rig, &KubeApi)),
    /// By what the server does, once all is synced.
    Server(fn(&KubeApi)),
    /// The server goes, once all is synced.
    Away,
}

use Cause::{Away, Files, Server};

/// A trouble, what names it, and what says what to do.
struct Trouble(&'static str, Cause, &'static [&'static str], &'static str);

const MEND: &str = "mend it, or write it anew";
const BY_HAND: &str = "run it by hand to see why";
const NO_SERVER: &str = "check that `server` of the kubeconfig is the address of an API server";

fn troubles() -> Vec<Trouble> {
    let file = [".kube/config"].as_slice();
    vec![
        Trouble(
            "no kubeconfig",
            Files(|rig, _| std::fs::remove_file(rig.dir.path().join(".kube/config")).unwrap()),
            &["no kubeconfig at", ".kube/config"],
            "write one there, or set kubeconfig_path",
        ),
        Trouble("garbage", Files(|rig, _| rig.write(".kube/config", &garbage())), &["at line "], MEND),
        Trouble(
            "no context",
            Files(|rig, api| with(rig, api, json!({}), |config| config["current-context"] = Value::Null)),
            &["no current-context is set"],
            MEND,
        ),
        Trouble(
            "a user that is not there",
            Files(|rig, api| with(rig, api, json!({}), |config| config["users"] = json!([]))),
            &["context \"test\" names user \"test\", who is not in the file"],
            MEND,
        ),
        Trouble(
            "too large",
            Files(|rig, _| rig.write(".kube/config", &"#".repeat(5 << 20))),
            &["is larger than the limit of 4194304"],
            "name a kubeconfig",
        ),
        Trouble("a plugin that anybody may set", Files(world_writable), file, "run `chmod o-w` on it"),
        Trouble(
            "an auth-provider",
            Files(|rig, api| rig.login(api, &json!({ "auth-provider": { "name": "gcp", "config": {} } }))),
            &["auth-provider \"gcp\" is not supported"],
            "use an exec plugin",
        ),
        Trouble(
            "no token file",
            Files(|rig, api| rig.login(api, &json!({ "tokenFile": "/nonexistent/token" }))),
            &["token file /nonexistent/token: No such file"],
            "look what writes it, or correct tokenFile",
        ),
        Trouble(
            "an empty token file",
            Files(|rig, api| {
                rig.write("token", "\n");
                rig.login(api, &json!({ "tokenFile": rig.dir.path().join("token") }));
            }),
            &["token is empty"],
            "look what writes it, or correct tokenFile",
        ),
        Trouble(
            "an authority that is none",
            Files(|rig, api| cluster(rig, api, "certificate-authority-data", "?".into())),
            &["without a usable certificate-authority: its data is not base64"],
            MEND,
        ),
        Trouble(
            "a certificate without its key",
            Files(|rig, api| {
                let data = base64::engine::general_purpose::STANDARD.encode("no certificate");
                rig.login(api, &json!({ "client-certificate-data": data, "client-key": "/nonexistent/key" }));
            }),
            &["client for https://127.0.0.1:"],
            "check proxy-url, certificates and keys of the kubeconfig",
        ),
        Trouble(
            "a proxy of another protocol",
            Files(|rig, api| cluster(rig, api, "proxy-url", format!("ftp://u:{PLANTED}@127.0.0.1:1").into())),
            &["client for https://127.0.0.1:"],
            "check proxy-url, certificates and keys of the kubeconfig",
        ),
        Trouble(
            "nobody at the address",
            Files(|rig, api| cluster(rig, api, "server", "https://127.0.0.1:1".into())),
            &["https://127.0.0.1:1/", "Connection refused"],
            "check that the API server runs, and that this node reaches it",
        ),
        Trouble(
            "a server of another authority",
            Files(|rig, api| {
                let other = TestCa::new("another CA").unwrap();
                let data = base64::engine::general_purpose::STANDARD.encode(other.pem());
                cluster(rig, api, "certificate-authority-data", data.into());
            }),
            &["https://127.0.0.1:", "certificate"],
            "check certificate-authority of the kubeconfig",
        ),
        Trouble(
            "a token that is refused",
            Files(|rig, api| rig.login(api, &json!({ "token": format!("not {PLANTED}") }))),
            &["the API server answers 401 Unauthorized"],
            "renew the token or the certificate of the kubeconfig's user",
        ),
        Trouble(
            "a plugin without a command",
            Files(|rig, api| exec(rig, api, json!({ "command": "" }))),
            &["exec plugin without a command"],
            "name its command in the kubeconfig",
        ),
        Trouble(
            "a plugin that asks",
            Files(|rig, api| exec(rig, api, json!({ "interactiveMode": "Always" }))),
            &["plugin has interactiveMode Always"],
            "set it to IfAvailable",
        ),
        Trouble(
            "a plugin of another version",
            Files(|rig, api| {
                exec(rig, api, json!({ "apiVersion": "client.authentication.k8s.io/v1alpha1" }))
            }),
            &["v1alpha1"],
            "set apiVersion of the plugin in the kubeconfig",
        ),
        Trouble(
            "a plugin that is not there",
            Files(|rig, api| {
                exec(rig, api, json!({ "command": "/nonexistent/plugin", "installHint": "get it there" }));
            }),
            &["/nonexistent/plugin cannot be started (get it there): No such file"],
            "install it, or correct its command",
        ),
        Trouble(
            "a plugin that hangs",
            Files(|rig, api| plugin(rig, api, "sleep 600 & sleep 600")),
            &["plugin did not finish within 1s"],
            BY_HAND,
        ),
        Trouble(
            "a plugin that forks, and leaves its children behind",
            Files(|rig, api| plugin(rig, api, "for at in 1 2 3; do sleep 600 & done; exit 0")),
            &["plugin did not finish within 1s"],
            BY_HAND,
        ),
        Trouble(
            "a plugin that floods",
            Files(|rig, api| plugin(rig, api, &format!("yes {PLANTED} | head -c 3000000"))),
            &["plugin printed no usable ExecCredential: more than 1 MiB of output"],
            BY_HAND,
        ),
        Trouble(
            "a plugin that fails",
            Files(|rig, api| plugin(rig, api, &format!("echo {PLANTED}; echo {PLANTED} >&2; exit 3"))),
            &["plugin ended with exit status: 3"],
            BY_HAND,
        ),
        Trouble(
            "a plugin that prints something else",
            Files(|rig, api| plugin(rig, api, &format!("echo '{{\"token\":\"{PLANTED}\"'"))),
            &["plugin printed no usable ExecCredential: not the JSON"],
            BY_HAND,
        ),
        Trouble(
            "a server that is away",
            Away,
            &["https://127.0.0.1:", "Connection refused"],
            "check that the API server runs, and that this node reaches it",
        ),
        Trouble(
            "permission that is revoked",
            Server(|api| {
                api.set_denied(true);
                api.cut_watches();
            }),
            &["not permitted to list and watch secrets"],
            "grant a ClusterRole with resources",
        ),
        Trouble(
            "a token that is revoked",
            Server(|api| {
                api.set_token("another");
                api.cut_watches();
            }),
            &["the API server answers 401 Unauthorized"],
            "renew the token or the certificate of the kubeconfig's user",
        ),
        Trouble(
            "a server that fails",
            Server(|api| {
                api.fail_next(500, None);
                api.cut_watches();
            }),
            &["the API server answers 500 InternalError"],
            "look at the log of the API server, or of the proxy before it",
        ),
        Trouble(
            "a proxy that finds no server",
            Server(|api| {
                api.fail_next_as_proxy(502, None, &format!("<h1>{PLANTED}</h1>"));
                api.cut_watches();
            }),
            &["the API server answers 502 Bad Gateway"],
            "look at the log of the API server, or of the proxy before it",
        ),
        Trouble(
            "another server",
            Server(|api| {
                api.fail_next_as_proxy(404, None, &format!("<h1>{PLANTED}</h1>"));
                api.cut_watches();
            }),
            &["the API server answers 404 Not Found"],
            NO_SERVER,
        ),
        Trouble(
            "an answer that is not one of an API server",
            Server(|api| {
                api.fail_next_as_proxy(200, None, &format!("<h1>{PLANTED}</h1>\n"));
                api.cut_watches();
            }),
            &["the answer is not understood: syntax error"],
            NO_SERVER,
        ),
        Trouble(
            "a server that hangs",
            Server(|api| {
                api.set_hanging("watch", Some(Hang::Head));
                api.cut_watches();
            }),
            &["no answer within 1s to watch secrets"],
            "look whether the API server, or a proxy before it, hangs",
        ),
        Trouble(
            "a watch that falls silent",
            Server(|api| api.break_watches(WatchBreak::Stall)),
            &["not a word within 2.1s of the watch of secrets"],
            "look whether a proxy or a firewall drops connections",
        ),
        Trouble(
            "a secret that is no secret's size",
            Server(|api| {
                let junk = PLANTED.repeat((5 << 20) / PLANTED.len());
                api.put("b", "broken", TYPE, &[("junk", &junk)]);
            }),
            &["larger than the limit of 4194304 bytes"],
            "look for it by `kubectl get secrets`",
        ),
        Trouble(
            "a secret that turns malformed",
            Server(|api| {
                put(api, "b", "broken", "other.example", "good");
                let malformed = format!("{{\"auths\":{{\"other.example\":{{\"password\":\"{PLANTED}\"}}");
                api.put("b", "broken", TYPE, &[(".dockerconfigjson", &malformed)]);
            }),
            &["pull secret cannot be used", "namespace=b", "name=broken"],
            "correct it, or delete it",
        ),
    ]
}

fn garbage() -> String {
    format!("users:\n- name: u\n  user: {{token: {PLANTED}\n  other: [\n")
}

/// Writes a kubeconfig for `user` with a change.
fn with(rig: &Rig, api: &KubeApi, user: Value, change: impl FnOnce(&mut Value)) {
    let mut config: Value = serde_json::from_str(&api.kubeconfig(&user)).unwrap();
    change(&mut config);
    rig.write(".kube/config", &config.to_string());
}

/// Writes a kubeconfig whose cluster has another value for `key`.
fn cluster(rig: &Rig, api: &KubeApi, key: &str, value: Value) {
    with(rig, api, json!({ "token": PLANTED }), |config| config["clusters"][0]["cluster"][key] = value);
}

/// Writes a kubeconfig with an exec plugin, which has these fields beside the usual ones.
fn exec(rig: &Rig, api: &KubeApi, fields: Value) {
    let (name, value) = MARK.split_once('=').unwrap();
    let mut exec = json!({
        "apiVersion": EXEC, "command": rig.dir.path().join("plugin"),
        "env": [{ "name": name, "value": value }],
    });
    for (key, field) in fields.as_object().unwrap() {
        exec[key] = field.clone();
    }
    rig.login(api, &json!({ "exec": exec }));
}

/// Writes a kubeconfig with an exec plugin, and the plugin.
fn plugin(rig: &Rig, api: &KubeApi, script: &str) {
    let path = rig.dir.path().join("plugin");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    exec(rig, api, json!({}));
}

fn world_writable(rig: &Rig, api: &KubeApi) {
    exec(rig, api, json!({}));
    let path = rig.dir.path().join(".kube/config");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
}

/// What this process holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    tasks: usize,
    /// Processes that a plugin started, wherever they belong by now.
    plugins: usize,
}

impl Held {
    fn now() -> Self {
        let marked = |process: &std::fs::DirEntry| {
            let environment = std::fs::read(process.path().join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == MARK.as_bytes())
        };
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            plugins: std::fs::read_dir("/proc").unwrap().flatten().filter(marked).count(),
        }
    }
}

async fn provoked(Trouble(name, cause, what, next): Trouble) {
    let (log, _guard) = soci_testkit::log::capture();
    let mut api = KubeApi::start(PLANTED).await.unwrap();
    put(&api, "a", "x", "reg.example", "before");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.timing.exec = Duration::from_secs(1);
    settings.timing.answer = Duration::from_secs(1);
    settings.timing.watch = (Duration::from_secs(2), Duration::from_secs(2));
    settings.timing.silence = Duration::from_millis(100);
    rig.login(&api, &json!({ "token": PLANTED }));
    if let Files(write) = &cause {
        write(&rig, &api);
    }
    let keychain = rig.start(settings);
    if !matches!(cause, Files(_)) {
        eventually(&keychain, "reg.example/a", &["before"]).await;
        until("the watch is open", || count(&api, "watch") > 0).await;
    }
    match &cause {
        Files(_) => {}
        Server(provoke) => provoke(&api),
        Away => api.close().await,
    }
    let line = || {
        let said = log.text();
        let told = |line: &&str| line.contains("WARN") && what.iter().all(|what| line.contains(what));
        said.lines().find(told).map(str::to_owned)
    };
    let deadline = std::time::Instant::now() + LONG;
    while line().is_none() {
        assert!(std::time::Instant::now() < deadline, "{name} is not told: {}", log.text());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let line = line().unwrap();
    assert!(line.contains(next), "{name}: {line}");

    // It is mended, without a restart.
    api.set_token(PLANTED);
    api.set_denied(false);
    api.set_hanging("watch", None);
    api.delete("b", "broken");
    if let Away = cause {
        api.reopen().await.unwrap();
    }
    rig.login(&api, &json!({ "token": PLANTED }));
    put(&api, "a", "x", "reg.example", "mended");
    api.forget_history();
    eventually(&keychain, "reg.example/a", &["mended"]).await;
    healed(&keychain).await;
    let said = log.text();
    let shown: Vec<&str> = said.lines().filter(|line| line.contains(PLANTED)).collect();
    assert!(shown.is_empty(), "{name}: {shown:?}");
}

/// One test, so that nothing else is open or at work in its process.
#[tokio::test]
async fn every_trouble_says_what_to_do_and_leaves_nothing_behind() {
    // What a process has from its first connection and its first child on.
    provoked(Trouble("first", Files(|rig, api| plugin(rig, api, "exit 3")), &["exit status: 3"], BY_HAND))
        .await;
    until("nothing is at work", || Held::now().tasks == 0).await;
    let before = Held::now();
    assert_eq!(before.plugins, 0);
    for trouble in troubles() {
        let name = trouble.0;
        provoked(trouble).await;
        until(&format!("{name}: {before:?} is all that is held"), || Held::now() == before).await;
    }
}
