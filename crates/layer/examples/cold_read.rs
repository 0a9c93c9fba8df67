//! Measures reading a layer from the first byte to the last with nothing cached, from a source that costs nothing (the
//! blob in memory) and from a file; then again from the cache; then 4 KiB reads, one per span; then completion in the
//! background; then unpacking 10,000 small files.
//!
//! ```text
//! cargo run --release -p soci-layer --example cold_read -- [MB of tar, 512] [directory for cache and files]
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a measurement"
)]

use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use soci_layer::unpack::{ApplyOptions, LayerBytes, NothingBelow, apply};
use soci_layer::{CacheSettings, LayerPool, LayerReader, LayerSpec, Meters, RangeRead, Settings, SpanCache};
use soci_oci::{BlobSource, BlobStream, Digest, FetchContext, FetchError, FetchErrorKind};
use soci_ztoc::{BuildOptions, Compression, DecodeLimits, SpanTable, UncompressedOffset, Ztoc, ZtocBuilder};

const READ: usize = 128 << 10;
const CHUNK: usize = 64 << 10;

#[derive(Debug)]
struct Memory(Bytes);

#[async_trait]
impl BlobSource for Memory {
    async fn open(&self, range: Range<u64>, _: &FetchContext) -> Result<BlobStream, FetchError> {
        let all = self.0.slice(range.start as usize..range.end as usize);
        let starts = (0..all.len()).step_by(CHUNK);
        let pieces: Vec<_> = starts.map(|at| Ok(all.slice(at..(at + CHUNK).min(all.len())))).collect();
        Ok(futures::stream::iter(pieces).boxed())
    }
}

#[derive(Debug)]
struct OnDisk(Arc<std::fs::File>);

#[async_trait]
impl BlobSource for OnDisk {
    async fn open(&self, range: Range<u64>, _: &FetchContext) -> Result<BlobStream, FetchError> {
        let file = Arc::clone(&self.0);
        Ok(futures::stream::unfold(range.start, move |at| {
            let file = Arc::clone(&file);
            async move {
                let len = (range.end - at).min(CHUNK as u64) as usize;
                if len == 0 {
                    return None;
                }
                let mut piece = vec![0; len];
                let read = file.read_exact_at(&mut piece, at);
                let failed = |error| FetchError::because(FetchErrorKind::Local, "reading the blob", error);
                Some((read.map(|()| Bytes::from(piece)).map_err(failed), at + len as u64))
            }
        })
        .boxed())
    }
}

struct Layer {
    blob: Bytes,
    ztoc: PathBuf,
    digest: Digest,
    spans: Arc<SpanTable>,
}

/// Text-like bytes that compress to about a third, at several hundred MB/s.
fn prose(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut words = Vec::new();
    for _ in 0..20_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        words.push(format!("{:x} ", (state >> 33) % (1 << (4 * (1 + state % 7)))));
    }
    let mut out = Vec::with_capacity(len + 32);
    while out.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        out.extend_from_slice(words[(state >> 40) as usize % words.len()].as_bytes());
    }
    out.truncate(len);
    out
}

fn layer(dir: &Path, tar: &[u8]) -> Layer {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(tar).unwrap();
    let blob = encoder.finish().unwrap();
    let options = BuildOptions { span_size: 4 << 20, build_tool: "bench".into() };
    let mut builder = ZtocBuilder::new(Compression::Gzip, options).unwrap();
    let start = Instant::now();
    builder.push(&blob).unwrap();
    let built = builder.finish().unwrap();
    println!("index build            {:8.0} MB/s of tar", rate(tar.len(), start.elapsed()));
    let ztoc = dir.join("layer.ztoc");
    std::fs::write(&ztoc, &built.bytes).unwrap();
    let spans = Arc::clone(Ztoc::decode(built.bytes.into(), &DecodeLimits::default()).unwrap().spans());
    Layer { blob: blob.into(), ztoc, digest: built.digest, spans }
}

fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

fn rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1000
}

fn open(layer: &Layer, cache: &Path, source: Arc<dyn BlobSource>) -> (Arc<LayerPool>, Arc<LayerReader>) {
    let cache = SpanCache::open(cache, CacheSettings::default()).unwrap();
    let pool = LayerPool::new(cache, Settings::default(), Meters::default());
    let ztoc_file = Arc::new(layer.ztoc.clone());
    let spec = LayerSpec { ztoc: layer.digest, ztoc_file, spans: Arc::clone(&layer.spans) };
    let reader = pool.open(spec, source);
    (pool, reader)
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

async fn read_all(reader: &LayerReader, size: usize) {
    let mut at = 0;
    while at < size {
        let from = UncompressedOffset(at as u64);
        let chunks = match reader.try_read(from, READ) {
            Some(chunks) => chunks,
            None => reader.read_at(from, READ, deadline()).await.unwrap(),
        };
        at += chunks.len();
    }
}

async fn sequential(name: &str, layer: &Layer, cache: &Path, source: Arc<dyn BlobSource>) {
    let size = layer.spans.uncompressed_size() as usize;
    for road in ["cold", "cached"] {
        let (pool, reader) = open(layer, cache, Arc::clone(&source));
        let (start, before) = (Instant::now(), cpu());
        read_all(&reader, size).await;
        let (time, used) = (start.elapsed(), cpu() - before);
        println!(
            "{name:<8} {road:<13} {:8.0} MB/s, {:.2} CPU-s, RSS {} MB",
            rate(size, time),
            used.as_secs_f64(),
            rss_mb()
        );
        while pool.gauges().spans > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn random(layer: &Layer, cache: &Path) {
    let (_pool, reader) = open(layer, cache, Arc::new(Memory(layer.blob.clone())));
    let mut times = Vec::new();
    let count = layer.spans.len();
    for number in 0..count {
        // A large prime as the step visits each once, in no order a reader would be taken for sequential.
        let span = soci_ztoc::SpanId(u32::try_from(u64::from(number) * 7919 % u64::from(count)).unwrap());
        let range = layer.spans.uncompressed(span);
        let at = range.start.0 + (range.end.0 - range.start.0) / 2;
        let start = Instant::now();
        reader.read_at(UncompressedOffset(at), 4096, deadline()).await.unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    println!("4 KiB in mid-span      p50 {:.2} ms, p99 {:.2} ms", at(0.5), at(0.99));
}

async fn background(layer: &Layer, cache: &Path) {
    let (_pool, reader) = open(layer, cache, Arc::new(Memory(layer.blob.clone())));
    let (start, before) = (Instant::now(), cpu());
    reader.complete();
    while !reader.is_complete() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let size = layer.spans.uncompressed_size() as usize;
    let (time, used) = (start.elapsed(), cpu() - before);
    println!("background completion  {:8.0} MB/s of tar, {:.2} CPU-s", rate(size, time), used.as_secs_f64());
}

async fn unpack(dir: &Path) {
    let mut builder = tar::Builder::new(Vec::new());
    for number in 0..10_000 {
        let mut header = tar::Header::new_ustar();
        header.set_size(600);
        header.set_mode(0o644);
        header.set_cksum();
        let path = format!("d{}/file{number}", number / 100);
        builder.append_data(&mut header, path, &[b'x'; 600][..]).unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let diff_id = Some(Digest::of(&tar));
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&tar).unwrap();
    let blob = Bytes::from(encoder.finish().unwrap());
    let target = dir.join("unpacked");
    std::fs::create_dir(&target).unwrap();
    let start = Instant::now();
    let stream = futures::stream::iter([Ok(blob)]).boxed();
    let tar = LayerBytes::Whole { stream, codec: None, digest: None }.tar();
    let options = ApplyOptions { diff_id, ..ApplyOptions::default() };
    let usage = apply(tar, &target, Arc::new(NothingBelow), options).await.unwrap();
    println!("unpack 10,000 files    {:.2} s, {usage:?}", start.elapsed().as_secs_f64());
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let size = arguments.next().map_or(512, |text| text.parse::<usize>().unwrap()) * 1_000_000;
    let base = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(base).unwrap();
    let layer = {
        let mut header = tar::Header::new_ustar();
        header.set_size(size as u64);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header, "big", &prose(size)[..]).unwrap();
        layer(dir.path(), &builder.into_inner().unwrap())
    };
    let ratio = size as f64 / layer.blob.len() as f64;
    println!("{} spans, ratio {ratio:.2}, RSS {} MB with the blob in memory", layer.spans.len(), rss_mb());
    let file = dir.path().join("layer.gz");
    std::fs::write(&file, &layer.blob).unwrap();
    let file = Arc::new(std::fs::File::open(&file).unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let cache = |name: &str| dir.path().join(name);
        sequential("memory", &layer, &cache("a"), Arc::new(Memory(layer.blob.clone()))).await;
        sequential("file", &layer, &cache("b"), Arc::new(OnDisk(file))).await;
        random(&layer, &cache("c")).await;
        background(&layer, &cache("d")).await;
        unpack(dir.path()).await;
    });
}
