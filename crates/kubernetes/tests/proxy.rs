//! Proxies between the sync and its API server.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use soci_kubernetes::Proxies;
use soci_testkit::kube_api::KubeApi;
use support::{Rig, eventually, put};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

/// Starts a proxy that connects to `server` whatever it is asked for, and returns where it is and how often it was asked.
async fn tunnel(server: SocketAddr) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(client.read_u8().await?);
                }
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                copy_bidirectional(&mut client, &mut TcpStream::connect(server).await?).await
            });
        }
    });
    (address, asked)
}

/// Writes the kubeconfig of a server with these fields for its cluster.
fn cluster(rig: &Rig, api: &KubeApi, fields: &[(&str, Value)]) {
    let mut config: Value = serde_json::from_str(&api.kubeconfig(&json!({ "token": "t" }))).unwrap();
    for (key, value) in fields {
        config["clusters"][0]["cluster"][*key] = value.clone();
    }
    rig.write(".kube/config", &config.to_string());
}

#[tokio::test]
async fn a_server_on_this_machine_is_reached_past_the_proxy_of_the_environment() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.environment.proxies =
        Proxies::of(|name| (name == "HTTPS_PROXY").then(|| "http://127.0.0.1:1".into()));
    let keychain = rig.synced_with(&api, settings).await;
    eventually(&keychain, "reg.example/a", &["x"]).await;
}

#[tokio::test]
async fn a_server_elsewhere_is_reached_through_the_proxy_of_the_environment() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let (proxy, asked) = tunnel(api.address()).await;
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.environment.proxies = Proxies::of(|name| match name {
        "HTTPS_PROXY" => Some(format!("http://{proxy}").into()),
        // Of the proxy it says nothing, though that is in the range.
        "NO_PROXY" => Some("127.0.0.0/8,".into()),
        _ => None,
    });
    let elsewhere = ("server", json!("https://api.invalid:6443"));
    cluster(&rig, &api, &[elsewhere, ("tls-server-name", json!("127.0.0.1"))]);
    let keychain = rig.start(settings);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    assert!(asked.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn the_proxy_that_a_kubeconfig_names_is_used_whatever_the_environment_says() {
    let api = KubeApi::start("t").await.unwrap();
    put(&api, "a", "x", "reg.example", "x");
    let (proxy, asked) = tunnel(api.address()).await;
    let rig = Rig::new();
    let mut settings = rig.settings();
    settings.environment.proxies = Proxies::of(|name| (name == "NO_PROXY").then(|| "*".into()));
    cluster(&rig, &api, &[("proxy-url", json!(format!("http://{proxy}")))]);
    let keychain = rig.start(settings);
    eventually(&keychain, "reg.example/a", &["x"]).await;
    assert!(asked.load(Ordering::Relaxed) > 0);
}

/// The library for the API server reads the environment by itself where one lets it, and by other rules.
#[test]
fn what_the_process_has_in_its_environment_counts_only_as_the_daemon_says() {
    let test = "a_server_on_this_machine_is_reached_past_the_proxy_of_the_environment";
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args([test, "--exact"]).env("HTTPS_PROXY", "http://127.0.0.1:1").env("NO_PROXY", "10.0.0.0/8,");
    let output = again.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
