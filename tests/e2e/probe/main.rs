//! What runs inside test containers: prints words, reads files, waits.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

fn main() -> std::io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut out = std::io::stdout().lock();
    match words.split_first() {
        Some((verb, rest)) if verb == "echo" => writeln!(out, "{}", rest.join(" ")),
        Some((verb, paths)) if verb == "sum" => {
            for path in paths {
                let mut content = Vec::new();
                File::open(path)?.read_to_end(&mut content)?;
                writeln!(out, "{path} {} {:016x}", content.len(), sum(&content))?;
            }
            Ok(())
        }
        Some((verb, [path, stride, count, pace])) if verb == "blocks" => {
            let number = |word: &str| word.parse().map_err(std::io::Error::other);
            blocks(
                &mut out,
                &File::open(path)?,
                number(stride)?,
                number(count)?,
                Duration::from_millis(number(pace)?),
            )
        }
        Some((verb, _)) if verb == "wait" => {
            writeln!(out, "waiting")?;
            out.flush()?;
            loop {
                std::thread::park_timeout(Duration::from_secs(3600));
            }
        }
        _ => Err(std::io::Error::other(
            "usage: probe echo WORD... | sum PATH... | blocks PATH STRIDE COUNT MILLISECONDS | wait",
        )),
    }
}

fn sum(content: &[u8]) -> u64 {
    content.iter().fold(0, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

/// Reads the start of each block of a file, the last block first and one after each `pace`; what cannot be read is tried
/// again. Prints number, milliseconds it took, and sum or error.
fn blocks(
    out: &mut impl std::io::Write,
    file: &File,
    stride: u64,
    count: u64,
    pace: Duration,
) -> std::io::Result<()> {
    let mut left = count;
    while left > 0 {
        let mut start = vec![0; 4096];
        let begun = Instant::now();
        let read = file.read_exact_at(&mut start, (left - 1) * stride);
        let took = begun.elapsed().as_millis();
        match read {
            Ok(()) => {
                left -= 1;
                writeln!(out, "{left} {took} {:016x}", sum(&start))?;
            }
            Err(error) => writeln!(out, "{} {took} error {}", left - 1, error.raw_os_error().unwrap_or(0))?,
        }
        out.flush()?;
        std::thread::sleep(pace);
    }
    Ok(())
}
