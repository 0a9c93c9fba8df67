//! What the file system and its FUSE layer cost by themselves: a layer whose bytes lie in memory, mounted and read.
//!
//! `cargo run --release -p soci-fs --example measure [MIB] [FILES]`, as root. Prints medians of five runs.

#![allow(clippy::print_stdout, reason = "a program for people")]

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use soci_fs::{
    FsOptions, FuseHub, HeaderCheck, LayerFs, LayerTree, MountOptions, OpaqueXattr, ServeOptions, Session,
    TreeOptions, Unmount,
};
use soci_layer::{RangeRead, ReadChunks, ReadError};
use soci_testkit::layer_gen::{Attr, LayerBuilder, Numbers};
use soci_ztoc::{BuildOptions, Compression, DecodeLimits, UncompressedOffset, Ztoc, ZtocBuilder};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const RUNS: usize = 5;

#[derive(Debug)]
struct Memory {
    tar: Bytes,
    /// Whether every read takes the way over a task.
    waits: bool,
}

impl Memory {
    fn slice(&self, at: UncompressedOffset, len: usize) -> ReadChunks {
        let start = usize::try_from(at.0).unwrap_or(usize::MAX).min(self.tar.len());
        self.tar.slice(start..start.saturating_add(len).min(self.tar.len())).into()
    }
}

#[async_trait::async_trait]
impl RangeRead for Memory {
    fn try_read(&self, at: UncompressedOffset, len: usize) -> Option<ReadChunks> {
        (!self.waits).then(|| self.slice(at, len))
    }

    async fn read_at(&self, at: UncompressedOffset, len: usize, _: Instant) -> Result<ReadChunks, ReadError> {
        Ok(self.slice(at, len))
    }
}

struct Mount {
    directory: tempfile::TempDir,
    session: Option<Session>,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = soci_fs::unmount(self.directory.path(), Unmount::Detach);
        self.session = None;
    }
}

fn ztoc(tar: &[u8]) -> Outcome<Ztoc> {
    let options = BuildOptions { span_size: 4 << 20, build_tool: "measure".into() };
    let mut builder = ZtocBuilder::new(Compression::Uncompressed, options)?;
    builder.push(tar)?;
    Ok(Ztoc::decode(builder.finish()?.bytes.into(), &DecodeLimits::default())?)
}

fn tree(ztoc: &Ztoc) -> Outcome<LayerTree> {
    let options = TreeOptions { xattrs: true, opaque: OpaqueXattr::Trusted, implied: &|_| None };
    Ok(LayerTree::build(ztoc, &options)?)
}

fn mount(
    hub: &FuseHub,
    tree: LayerTree,
    tar: &Bytes,
    waits: bool,
    read_ahead_kb: Option<u32>,
) -> Outcome<Mount> {
    let options = FsOptions {
        layer: "measure".into(),
        header_check: HeaderCheck::FirstRead,
        read_timeout: Duration::from_secs(60),
        state: None,
        statfs: "/tmp".into(),
        meter: None,
    };
    let fs = LayerFs::new(tree, Arc::new(Memory { tar: tar.clone(), waits }), options);
    let directory = tempfile::tempdir()?;
    let device = soci_fs::mount(directory.path(), &MountOptions::default())?;
    let serve = ServeOptions { read_ahead_kb, ..ServeOptions::default() };
    let session = Session::serve(device, None, fs, &serve, hub)?;
    Ok(Mount { directory, session: Some(session) })
}

fn median(mut runs: Vec<f64>) -> f64 {
    runs.sort_by(f64::total_cmp);
    runs.get(runs.len() / 2).copied().unwrap_or(f64::NAN)
}

fn sequential(path: &Path) -> Outcome<f64> {
    let file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let (begun, mut at) = (Instant::now(), 0_u64);
    loop {
        let read = file.read_at(&mut buffer, at)?;
        if read == 0 {
            break;
        }
        at += read as u64;
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    Ok(at as f64 / 1e6 / begun.elapsed().as_secs_f64())
}

fn random(path: &Path, size: u64, threads: u64) -> Outcome<f64> {
    const READS: u64 = 10_000;
    let begun = Instant::now();
    std::thread::scope(|scope| -> std::io::Result<()> {
        let workers: Vec<_> = (0..threads)
            .map(|seed| {
                scope.spawn(move || -> std::io::Result<()> {
                    let file = File::open(path)?;
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
                    let (mut numbers, mut page) = (Numbers::new(seed), [0; 4096]);
                    for _ in 0..READS / threads {
                        file.read_exact_at(&mut page, numbers.next_u64() % (size / 4096 - 1) * 4096)?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| std::io::Error::other("a reader panicked"))?)
    })?;
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    Ok(READS as f64 / begun.elapsed().as_secs_f64())
}

fn find(at: &Path) -> Outcome<f64> {
    let begun = Instant::now();
    let status = Command::new("find").arg(at).args(["-printf", "%s\\n"]).stdout(Stdio::null()).status()?;
    if !status.success() {
        return Err("find failed".into());
    }
    Ok(begun.elapsed().as_secs_f64())
}

fn drop_caches() -> Outcome<()> {
    Ok(OpenOptions::new().write(true).open("/proc/sys/vm/drop_caches")?.write_all(b"3")?)
}

/// Seconds of processor time that the program, readers included, has used.
fn processor() -> Outcome<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').ok_or("no fields")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

fn status(field: &str) -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    Ok(line.split_whitespace().nth(1).ok_or("no value")?.parse()?)
}

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().as_deref().unwrap_or("256").parse()?;
    let files: usize = arguments.next().as_deref().unwrap_or("100000").parse()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let hub = FuseHub::new(runtime.handle().clone(), FuseHub::suitable_threads())?;

    let small = Bytes::from(
        (0..20)
            .fold(LayerBuilder::new(), |layer, number| {
                layer.file(format!("f{number}"), &Attr::default(), b"x")
            })
            .tar(),
    );
    let few = ztoc(&small)?;
    let before = status("RssAnon")?;
    let mounts =
        (0..500).map(|_| mount(&hub, tree(&few)?, &small, false, None)).collect::<Outcome<Vec<_>>>()?;
    for mounted in &mounts {
        std::fs::read(mounted.directory.path().join("f7"))?;
    }
    let (after, threads) = (status("RssAnon")?, status("Threads")?);
    println!(
        "500 small layers: {} KiB of anonymous memory each, {threads} threads",
        after.saturating_sub(before) / 500
    );
    drop(mounts);
    println!("after unmounting: {} KiB of {before} KiB before", status("RssAnon")?);

    let tar = Bytes::from(
        LayerBuilder::new().file("big", &Attr::default(), &Numbers::new(1).bytes(mib << 20)).tar(),
    );
    let big = ztoc(&tar)?;
    for waits in [false, true] {
        let way = if waits { "through a task" } else { "answered in place" };
        for read_ahead in [None, Some(512), Some(1024), Some(2048), Some(4096)] {
            let (mut runs, used) = (Vec::new(), processor()?);
            for _ in 0..RUNS {
                let mounted = mount(&hub, tree(&big)?, &tar, waits, read_ahead)?;
                runs.push(sequential(&mounted.directory.path().join("big"))?);
            }
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let cost = (processor()? - used) / (RUNS * mib) as f64 * 1024.0;
            println!(
                "sequential, {way}, read-ahead {read_ahead:?} KiB: {:.0} MB/s, {cost:.2} CPU-s per GiB",
                median(runs)
            );
        }
        for threads in [1, 4] {
            let mut runs = Vec::new();
            for _ in 0..RUNS {
                let mounted = mount(&hub, tree(&big)?, &tar, waits, Some(1024))?;
                runs.push(random(&mounted.directory.path().join("big"), (mib as u64) << 20, threads)?);
            }
            println!("4 KiB random, {way}, {threads} threads: {:.0} reads/s", median(runs));
        }
    }

    let mut layer = LayerBuilder::new();
    for number in 0..files {
        layer = layer.file(format!("d{}/file-{number}", number / 1000), &Attr::default(), b"x");
    }
    let tar = Bytes::from(layer.tar());
    let many = ztoc(&tar)?;
    let begun = Instant::now();
    let built = tree(&many)?;
    println!("tree of {} nodes: {:?}, {} KiB", built.len(), begun.elapsed(), built.memory() >> 10);
    let (mut cold, mut warm, mut lookups) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let mounted = mount(&hub, tree(&many)?, &tar, false, None)?;
        drop_caches()?;
        cold.push(find(mounted.directory.path())?);
        warm.push(find(mounted.directory.path())?);
        let begun = Instant::now();
        for number in 0..files.min(10_000) {
            let path = mounted.directory.path().join(format!("d{}/file-{number}", number / 1000));
            std::io::Read::read_to_end(&mut File::open(path)?, &mut Vec::new())?;
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        lookups.push(files.min(10_000) as f64 / begun.elapsed().as_secs_f64());
    }
    println!("find -printf %s over {files} files: cold {:.3} s, warm {:.3} s", median(cold), median(warm));
    println!("open, read, close of small files after it: {:.0} files/s", median(lookups));

    Ok(())
}
