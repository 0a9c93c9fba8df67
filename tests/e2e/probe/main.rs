//! What runs inside test containers: prints words, reads files, waits.

use std::io::{Read as _, Write as _};
use std::time::Duration;

fn main() -> std::io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut out = std::io::stdout().lock();
    match words.split_first() {
        Some((verb, rest)) if verb == "echo" => writeln!(out, "{}", rest.join(" ")),
        Some((verb, paths)) if verb == "sum" => {
            for path in paths {
                let mut content = Vec::new();
                std::fs::File::open(path)?.read_to_end(&mut content)?;
                let sum = content.iter().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
                writeln!(out, "{path} {} {sum:016x}", content.len())?;
            }
            Ok(())
        }
        Some((verb, _)) if verb == "wait" => {
            writeln!(out, "waiting")?;
            out.flush()?;
            loop {
                std::thread::park_timeout(Duration::from_secs(3600));
            }
        }
        _ => Err(std::io::Error::other("usage: probe echo WORD... | sum PATH... | wait")),
    }
}
