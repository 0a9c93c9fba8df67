//! Measures building a zTOC and inflating its spans: `throughput LAYER [gzip|tar] [ROUNDS]`.
#![allow(clippy::print_stdout, reason = "an example that prints its figures")]

use std::error::Error;
use std::io::Read;
use std::time::Instant;

use soci_ztoc::{BuildOptions, BuiltZtoc, Compression, DecodeLimits, Ztoc, ZtocBuilder, inflate_span};

fn build(path: &str, compression: Compression) -> Result<BuiltZtoc, Box<dyn Error>> {
    let options = BuildOptions { span_size: 4 << 20, build_tool: "AWS SOCI CLI v0.2".into() };
    let mut builder = ZtocBuilder::new(compression, options)?;
    let mut file = std::fs::File::open(path)?;
    let mut chunk = vec![0; 256 << 10];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(builder.finish()?),
            len => builder.push(&chunk[..len])?,
        }
    }
}

/// Peak resident memory of this process so far.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM unknown").to_owned()
}

/// Processor time of all threads so far, in seconds (in steps of 10 ms).
fn processor_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15, counted after the program's name.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: throughput LAYER [gzip|tar] [ROUNDS]")?;
    let compression = match arguments.next().as_deref() {
        Some("tar") => Compression::Uncompressed,
        _ => Compression::Gzip,
    };
    let rounds: usize = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let mut last = None;
    for _ in 0..rounds {
        let (begin, busy) = (Instant::now(), processor_time());
        let built = build(&path, compression)?;
        let (took, busy) = (begin.elapsed().as_secs_f64(), processor_time() - busy);
        let peak = peak_memory();
        let ztoc = Ztoc::decode(built.bytes.into(), &DecodeLimits::default())?;
        let megabytes = ztoc.uncompressed_size() as f64 / 1e6;
        println!(
            "build: {megabytes:.0} MB in {took:.3} s, {:.0} MB/s; {busy:.2} s of processor; {}",
            megabytes / took,
            peak
        );
        last = Some(ztoc);
    }
    let ztoc = last.ok_or("no rounds")?;
    println!("{} entries, {} spans, {} bytes", ztoc.entries().len(), ztoc.spans().len(), ztoc.bytes().len());
    let begin = Instant::now();
    for _ in 0..rounds {
        Ztoc::decode(ztoc.bytes().clone(), &DecodeLimits::default())?;
    }
    println!("decode: {:.1} ms", begin.elapsed().as_secs_f64() * 1e3 / rounds as f64);

    let layer = std::fs::read(&path)?;
    let table = ztoc.spans();
    let mut out = Vec::new();
    for _ in 0..rounds {
        let mut total = 0;
        let (begin, busy) = (Instant::now(), processor_time());
        for id in table.ids() {
            let window = table.window(id);
            let range = usize::try_from(window.range.start)?..usize::try_from(window.range.end)?;
            let window = window.check(&ztoc.bytes()[range])?;
            let compressed = table.compressed(id);
            let compressed = &layer[usize::try_from(compressed.start.0)?..usize::try_from(compressed.end.0)?];
            let uncompressed = table.uncompressed(id);
            out.resize(usize::try_from(uncompressed.end.0 - uncompressed.start.0)?, 0);
            inflate_span(table, id, &window, compressed, &mut out)?;
            total += out.len();
        }
        let (took, busy) = (begin.elapsed().as_secs_f64(), processor_time() - busy);
        let megabytes = total as f64 / 1e6;
        println!(
            "spans: {megabytes:.0} MB in {took:.3} s, {:.0} MB/s; {busy:.2} s of processor",
            megabytes / took
        );
    }
    Ok(())
}
