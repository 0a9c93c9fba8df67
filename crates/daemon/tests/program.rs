//! The program itself: arguments, configuration, log lines, signals, exit status.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use soci_testkit::wait;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soci-snapshotter-grpc"));
    command.env_clear().env("HOME", "/nonexistent").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

fn lines(stderr: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(stderr).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

/// A daemon that was seen to start, ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(dir: &Path, config: &str) -> (Running, Vec<Value>, BufReader<std::process::ChildStderr>) {
    std::fs::write(dir.join("config.toml"), config).unwrap();
    let mut command = program();
    command
        .env("SOCI_SNAPSHOTTER_ADDRESS", dir.join("run/s.sock"))
        .env("SOCI_SNAPSHOTTER_CONFIG", dir.join("config.toml"))
        .env("SOCI_SNAPSHOTTER_ROOT", dir.join("state"))
        .env("NOTIFY_SOCKET", dir.join("notify"))
        .stderr(Stdio::piped());
    let mut child = Running(command.spawn().unwrap());
    let mut stderr = BufReader::new(child.0.stderr.take().unwrap());
    let mut seen = Vec::new();
    loop {
        let mut line = String::new();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "the daemon ended: {seen:?}");
        let value: Value = serde_json::from_str(&line).unwrap();
        let done = value["msg"].as_str().unwrap().contains("successfully");
        seen.push(value);
        if done {
            return (child, seen, stderr);
        }
    }
}

fn signal(child: &Running, signal: Signal) {
    kill_process(Pid::from_child(&child.0), signal).unwrap();
}

#[test]
fn the_version_is_printed_as_the_references() {
    let output = run(&["--version"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let expected = format!("soci-snapshotter-grpc version {} ", env!("CARGO_PKG_VERSION"));
    assert!(text.starts_with(&expected), "{text}");
}

#[test]
fn the_default_configuration_is_printed_and_loads() {
    let output = run(&["config", "default"]);
    assert!(output.status.success());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, &output.stdout).unwrap();
    let dumped = run(&["--config", path.to_str().unwrap(), "config", "dump"]);
    assert_eq!(dumped.stdout, output.stdout, "what is printed is what is read");
}

#[test]
fn a_bad_configuration_stops_the_start_with_file_line_and_key() {
    for (text, key) in [
        ("[http]\nMaxRetries = \"many\"\n", "[http] MaxRetries"),
        ("[background_fetch]\ndrop_policy = \"random\"\n", "[background_fetch] drop_policy"),
        ("debug = true\nmetrics_address = \"9090\"\n", "metrics_address"),
        (
            "[[resolver.host.\"a.example\".mirrors]]\nhost = \"ftp://b\"\n",
            "[resolver.host.a.example.mirrors] host",
        ),
        ("\n[[resolver.host.\"a b\".mirrors]]\nhost = \"c\"\n", "[resolver.host.a b]"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        let (path, root) = (path.to_str().unwrap(), dir.path().join("state"));
        let output = run(&["--config", path, "--root", root.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        let lines = lines(&output.stderr);
        let last = lines.last().unwrap();
        assert_eq!(last["level"], "fatal");
        let message = last["msg"].as_str().unwrap();
        for part in ["failed to load config file", path, "line 2", key] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!root.exists(), "nothing was begun");
    }
}

/// Returns the answer to a request for the metrics, once there is one.
fn scrape(address: &str) -> String {
    let answer = || {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        text.starts_with("HTTP/1.1 200").then_some(text)
    };
    wait::until(Duration::from_secs(60), answer).unwrap_or_else(|| panic!("no metrics at {address}"))
}

#[test]
fn an_address_that_cannot_be_had_is_warned_about_and_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    // Something is in the way of the other endpoint, too.
    let debug = dir.path().join("d.sock");
    std::fs::write(&debug, b"").unwrap();
    let config = format!("\nmetrics_address = '{address}'\ndebug_address = '{}'\n", debug.display());
    let (_child, seen, _stderr) = start(dir.path(), &config);
    let warnings: Vec<_> = seen.iter().filter(|line| line["place"].is_string()).collect();
    let file = dir.path().join("config.toml").display().to_string();
    let about = |number: usize| {
        ["address", "place", "error"].map(|key| warnings[number][key].as_str().unwrap().to_owned())
    };
    assert_eq!(about(0)[..2], [debug.display().to_string(), format!("{file}:3")], "{warnings:?}");
    assert!(about(0)[2].contains("is not a socket"), "{warnings:?}");
    assert_eq!(about(1)[..2], [address.clone(), format!("{file}:2")], "{warnings:?}");
    assert!(about(1)[2].contains("in use"), "{warnings:?}");
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    drop(taken);
    assert!(scrape(&address).contains("soci"));
}

#[test]
fn metrics_are_served_at_all_addresses_where_no_host_is_named() {
    // A machine may have no IPv6.
    let six = TcpListener::bind("[::1]:0").is_ok();
    for (network, four) in [("tcp", true), ("tcp4", true), ("tcp6", false)] {
        if !six && !four {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
        let config = format!("metrics_address = ':{port}'\nmetrics_network = '{network}'\n");
        let _running = start(dir.path(), &config);
        for (host, served) in [("127.0.0.1", four), ("[::1]", six && network != "tcp4")] {
            let address = format!("{host}:{port}");
            match served {
                true => assert!(scrape(&address).contains("soci")),
                false => assert!(TcpStream::connect(&address).is_err(), "{network}: {address}"),
            }
        }
    }
}

#[test]
fn a_missing_configuration_and_a_bad_level_stop_the_start() {
    for (arguments, expected) in [
        (&["--config", "/nonexistent.toml"], "failed to open config file"),
        (&["--log-level", "loud"], "not a valid log level"),
        (&["--address", "tcp://x"], "must be a path"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1));
        let last = lines(&output.stderr).pop().unwrap();
        assert!(last["msg"].as_str().unwrap().contains(expected), "{last}");
    }
}

#[test]
fn it_says_ready_and_ends_on_sigterm_and_sigint() {
    for (which, name) in [(Signal::TERM, "Got terminated"), (Signal::INT, "Got interrupt")] {
        let dir = tempfile::tempdir().unwrap();
        let notify = std::os::unix::net::UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let (mut child, seen, mut stderr) = start(dir.path(), "nonsense = 1\nresolve_result_entry = 3\n");
        assert_eq!(seen[0]["msg"], "starting soci-snapshotter-grpc");
        assert_eq!(seen.last().unwrap()["msg"], "soci-snapshotter-grpc successfully started");
        let warnings: Vec<_> = seen.iter().filter(|line| line["level"] == "warning").collect();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert_eq!(
            (&warnings[1]["line"], &warnings[1]["key"]),
            (&"2".into(), &"resolve_result_entry".into())
        );
        for line in &seen {
            assert!(
                line.as_object().unwrap().values().all(Value::is_string),
                "all fields are strings: {line}"
            );
        }
        let mut text = [0; 64];
        let length = notify.recv(&mut text).unwrap();
        assert_eq!(std::str::from_utf8(&text[..length]).unwrap().trim_end(), "READY=1");
        let mode = std::fs::metadata(dir.path().join("run/s.sock")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        signal(&child, which);
        assert!(child.0.wait().unwrap().success());
        let mut rest = Vec::new();
        stderr.read_to_end(&mut rest).unwrap();
        let messages: Vec<_> =
            lines(&rest).iter().map(|line| line["msg"].as_str().unwrap().to_owned()).collect();
        assert_eq!(messages, [name, "Exiting"]);
        let length = notify.recv(&mut text).unwrap();
        assert_eq!(std::str::from_utf8(&text[..length]).unwrap().trim_end(), "STOPPING=1");
    }
}

#[test]
fn two_daemons_on_one_root_name_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let (child, _, _) = start(dir.path(), "");
    let root = dir.path().join("state");
    let config = dir.path().join("config.toml");
    let output = run(&[
        "--root",
        root.to_str().unwrap(),
        "--config",
        config.to_str().unwrap(),
        "--address",
        "/tmp/unused-soci.sock",
    ]);
    assert_eq!(output.status.code(), Some(1));
    let last = lines(&output.stderr).pop().unwrap();
    let message = last["msg"].as_str().unwrap();
    assert!(message.contains(&format!("process {}", child.0.id())), "{message}");
}
