//! Measures ranged reads of a 300 MB blob over loopback, with registry and client in one process.
//!
//! `cargo run --release -p soci-registry --example transfer`: rows are scheme, size of a range and ranges in flight; the
//! figure is the best of three, since both sides share the machine's cores.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for people who measure")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use soci_auth::{AuthBoard, Authenticator, KeychainChain};
use soci_oci::{BlobSource, FetchClass, FetchContext};
use soci_registry::settings::Proxies;
use soci_registry::{NoMeters, Registry, Settings};
use soci_testkit::{Options, TestRegistry};

const SIZE: u64 = 300 << 20;

#[tokio::main]
async fn main() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    let pattern: Vec<u8> = (0..SIZE).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[2]).collect();
    std::fs::write(&path, pattern).unwrap();
    for tls in [false, true] {
        let server = TestRegistry::start(Options { tls, ..Options::default() }).await.unwrap();
        let (digest, size) = server.put_blob_file("team/app", &path).unwrap();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, server.ca_pem()).unwrap();
        let mut settings =
            Settings { hosts_dirs: Vec::new(), proxies: Proxies::Never, ..Settings::default() };
        settings.tls.ca.push(ca);
        let board = Arc::new(AuthBoard::new());
        let auth = Authenticator::new(KeychainChain::new(Vec::new()), board, soci_auth::Settings::default());
        let client = Registry::new(settings, auth, Arc::new(NoMeters)).unwrap();
        let blob = client
            .repository(&server.image("team/app").parse().unwrap())
            .blob(&digest.parse().unwrap(), size);
        for (range, flights) in [(1 << 20, 1), (4 << 20, 2), (16 << 20, 1), (16 << 20, 2), (16 << 20, 4)] {
            let mut best = Duration::MAX;
            for _ in 0..3 {
                let started = Instant::now();
                read(&blob, size, range, flights).await;
                best = best.min(started.elapsed());
            }
            let rate = size as f64 / best.as_secs_f64() / 1e6;
            let scheme = if tls { "https" } else { "http" };
            println!("{scheme:5} {:2} MiB x {flights}: {rate:6.0} MB/s", range >> 20);
        }
        server.shutdown().await;
    }
}

async fn read(blob: &Arc<dyn BlobSource>, size: u64, range: u64, flights: usize) {
    let starts = (0..size).step_by(usize::try_from(range).unwrap());
    let total: u64 = futures::stream::iter(starts)
        .map(|start| {
            let blob = Arc::clone(blob);
            tokio::spawn(async move {
                let context =
                    FetchContext::new(Instant::now() + Duration::from_secs(60), FetchClass::OnDemand);
                let mut stream = blob.open(start..size.min(start + range), &context).await.unwrap();
                let mut len = 0;
                while let Some(chunk) = stream.next().await {
                    len += chunk.unwrap().len() as u64;
                }
                len
            })
        })
        .buffered(flights)
        .map(Result::unwrap)
        .fold(0, |sum, len| async move { sum + len })
        .await;
    assert_eq!(total, size);
}
