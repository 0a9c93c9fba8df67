//! What the machine can do, measured in the same run, to print beside the results.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use flate2::Compression;
use soci_e2e::stage::StageDir;
use soci_testkit::layer_gen::{Numbers, digest, gzip};

use crate::node::pause;

/// One limit: what, and how much.
pub(crate) type Limit = (&'static str, String);

/// Size of the file and of the buffers that are measured with.
const SIZE: usize = 512 << 20;

/// Measures the machine's limits.
pub(crate) fn measure() -> Result<Vec<Limit>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or_default().to_owned();
    let directory = StageDir::new()?;
    let path = directory.path().join("disk");
    let block = Numbers::new(3).bytes(4 << 20);
    let mut file = File::create(&path)?;
    for _ in 0..SIZE / block.len() {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    drop(file);
    drop_caches()?;
    let read = |path: &std::path::Path| -> Result<f64> {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        let start = Instant::now();
        while file.read(&mut buffer)? > 0 {}
        Ok(rate(SIZE, start))
    };
    let disk = read(&path)?;
    let cached = read(&path)?;
    let start = Instant::now();
    for _ in 0..64 {
        let _ = digest(&block);
    }
    let sha = rate(64 * block.len(), start);
    let text = Numbers::new(4).prose(64 << 20);
    let packed = gzip(&text, Compression::default()).blob;
    let mut decoder = flate2::read::GzDecoder::new(packed.as_ref());
    let mut buffer = vec![0; 1 << 20];
    let start = Instant::now();
    while decoder.read(&mut buffer)? > 0 {}
    let inflate = rate(text.len(), start);
    let [median, worst] = round_trip()?;
    let megabytes = |value: f64| format!("{value:.0} MB/s");
    Ok(vec![
        ("cores", format!("{cores}, load {load} before the run")),
        ("disk, sequential read, page cache dropped", megabytes(disk)),
        ("page cache, sequential read", megabytes(cached)),
        ("SHA-256, one core", megabytes(sha)),
        ("inflate by miniz_oxide, one core, streaming", megabytes(inflate)),
        ("a byte to a thread that sleeps, and back; p50, p99", format!("{median:.0} µs, {worst:.0} µs")),
    ])
}

/// What two wake-ups take, the least that anything between a caller and its server adds: a byte over a Unix socket to
/// a thread that sleeps, and back. Returns the 50th and the 99th percentile in microseconds.
fn round_trip() -> Result<[f64; 2]> {
    let (mut near, mut far) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || -> std::io::Result<()> {
        let mut byte = [0];
        while far.read(&mut byte)? > 0 {
            far.write_all(&byte)?;
        }
        Ok(())
    });
    let mut times = Vec::new();
    let mut byte = [0];
    for _ in 0..1000 {
        // Long enough for both to fall asleep.
        pause(Duration::from_millis(2));
        let start = Instant::now();
        near.write_all(&byte)?;
        near.read_exact(&mut byte)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    drop(near);
    echo.join().map_err(|_| anyhow::anyhow!("the other thread panicked"))??;
    times.sort_unstable_by(f64::total_cmp);
    Ok([times[times.len() / 2], times[times.len() * 99 / 100]])
}

#[expect(clippy::cast_precision_loss, reason = "sizes here are far below 2^52")]
fn rate(bytes: usize, start: Instant) -> f64 {
    bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
}

/// Empties the page cache and the caches of names.
pub(crate) fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache")
}
