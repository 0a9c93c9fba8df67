//! Credentials: pull secrets of a large cluster, and what the relay adds to image calls.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use soci_testkit::cri::fake::FakeImageService;
use soci_testkit::cri::load::{self, Rate};
use soci_testkit::kube_api::KubeApi;
use soci_testkit::process::output;

use crate::pipe::Pipe;
use crate::samples::Samples;
use crate::sides::{Bench, Side};

/// Secrets of the cluster, and the namespaces they are spread over.
const SECRETS: usize = 10_000;
const NAMESPACES: usize = 1000;
/// The list of images whose way through the relay is measured, in bytes.
const LIST: usize = 15 << 20;
/// The kubelets of the measurement: more than a node ever has.
const STATUS: Rate = Rate { callers: 64, per_second: 500, calls: 80 };
/// Lists per measurement.
const LISTS: u32 = 20;
/// How long a sync may take before the run gives up.
const LONG: Duration = Duration::from_secs(60);

/// Measures both.
pub(crate) fn auth(bench: &Bench, side: &Side, samples: &mut Samples) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    relay(bench, side, samples, &runtime)?;
    // The other numbers come from our own log and our own library.
    if side.name == "ours" {
        secrets(bench, side, samples, &runtime)?;
        lookups(side, samples)?;
    }
    Ok(())
}

fn secrets(
    bench: &Bench,
    side: &Side,
    samples: &mut Samples,
    runtime: &tokio::runtime::Runtime,
) -> Result<()> {
    let api = runtime.block_on(KubeApi::start("t"))?;
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, api.kubeconfig(&json!({ "token": "t" })))?;
    let config = format!("[kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = {kubeconfig:?}\n");
    let synced = || -> Result<(u64, u64)> {
        let mut stage = bench.stage(side, &config)?;
        let line: Value = serde_json::from_str(&stage.wait_log("pull secrets are synced", LONG)?)?;
        let field = |name: &str| -> Result<u64> {
            let text = line[name].as_str().with_context(|| format!("no {name} in {line}"))?;
            Ok(text.parse()?)
        };
        if field("secrets")? != SECRETS as u64 && field("secrets")? != 0 {
            bail!("{} secrets are synced", field("secrets")?);
        }
        Ok((field("elapsed_ms")?, stage.snapshotter.daemon().memory("VmRSS")))
    };
    let (_, without) = synced()?;
    for at in 0..SECRETS {
        let user = format!("user-{at}");
        let auths = json!({ "auths": { "reg.example": { "username": user, "password": "p" } } }).to_string();
        let data = [(".dockerconfigjson", auths.as_str())];
        let (namespace, name) = (format!("ns{:04}", at % NAMESPACES), format!("pull{}", at / NAMESPACES));
        api.put(&namespace, &name, "kubernetes.io/dockerconfigjson", &data);
    }
    let (millis, with) = synced()?;
    samples.add("first sync of 10,000 secrets, ms", side.name, millis_of(millis));
    samples.add("memory they hold, MB", side.name, megabytes(with.saturating_sub(without)));
    Ok(())
}

/// The keychain by itself, by the example that `cargo xtask bench` builds beside the binaries.
fn lookups(side: &Side, samples: &mut Samples) -> Result<()> {
    let example = side.binaries.path("examples/lookup");
    let text = output(&mut Command::new(&example)).with_context(|| {
        format!(
            "run {}; cargo build --release -p soci-kubernetes --example lookup makes it",
            example.display()
        )
    })?;
    let result: Value = serde_json::from_str(text.trim())?;
    if result["wrong"] != 0 {
        bail!("{} lookups are wrong", result["wrong"]);
    }
    for (row, field) in [
        ("lookup among 10,000 secrets, p99, µs", "p99_us"),
        ("lookup among 10,000 copies of one secret, p99, µs", "copies_p99_us"),
    ] {
        samples.add(row, side.name, result[field].as_f64().with_context(|| format!("no {field}"))?);
    }
    Ok(())
}

fn relay(bench: &Bench, side: &Side, samples: &mut Samples, runtime: &tokio::runtime::Runtime) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let backend = directory.path().join("backend.sock");
    let fake = runtime.block_on(async { FakeImageService::start(&backend, LIST) })?;
    let stage = bench.stage(
        side,
        &format!("[cri_keychain]\nenable_keychain = true\nimage_service_path = {backend:?}\n"),
    )?;
    let through = stage.snapshotter.socket();
    let status = |socket: &Path| -> Result<[f64; 2]> {
        let mut times = runtime.block_on(load::image_status(socket, STATUS))?;
        times.sort_unstable();
        let at = |percent: usize| -> Result<f64> {
            let time = times.get(times.len() * percent / 100).context("no calls")?;
            Ok(time.as_secs_f64() * 1e6)
        };
        Ok([at(50)?, at(99)?])
    };
    let list = |socket: &Path| -> Result<f64> {
        let mut times = runtime.block_on(load::list_images(socket, LISTS))?;
        times.sort_unstable();
        Ok(times.get(times.len() / 2).context("no calls")?.as_secs_f64() * 1e3)
    };
    // Once unmeasured each, so that connections and caches are warm.
    for socket in [&backend, &through] {
        list(socket)?;
    }
    let direct = status(&backend)?;
    let mut add = |who, through: [f64; 2]| {
        let rows = ["relay: added to ImageStatus, p50, µs", "relay: added to ImageStatus, p99, µs"];
        for (row, (through, direct)) in rows.into_iter().zip(through.into_iter().zip(direct)) {
            samples.add(row, who, (through - direct).max(0.0));
        }
    };
    add(side.name, status(&through)?);
    if side.name == "ours" {
        let front = directory.path().join("pipe.sock");
        let _pipe = Pipe::start(&front, &backend)?;
        list(&front)?;
        add("pipe", status(&front)?);
    }
    let direct = list(&backend)?;
    samples.add("relay: added to 15 MiB ListImages, ms", side.name, (list(&through)? - direct).max(0.0));
    drop(fake);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "a time in milliseconds is far below 2^52")]
fn millis_of(millis: u64) -> f64 {
    millis as f64
}
