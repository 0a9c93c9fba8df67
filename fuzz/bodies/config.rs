//! What the fuzz target of the daemon's configuration does with its input, so that an ordinary test replays its corpus.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test")]

use soci_snapshotter_grpc::config::{Config, dump, read};

/// Reads `data` as a configuration file and checks its values. What is found is on a line of the file; what loads is the
/// same after it was dumped.
pub fn daemon_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let lines = text.bytes().filter(|byte| *byte == b'\n').count() + 1;
    match read::parse(text) {
        Ok(read::Parsed { raw, findings, places }) => {
            assert!(findings.iter().all(|finding| (1..=lines).contains(&finding.line)));
            if let Err(error) = Config::check(&raw) {
                assert!((1..=lines).contains(&places.locate(error).line));
            }
            let dumped = dump::dump(&raw).unwrap();
            assert_eq!(read::parse(&dumped).unwrap().raw, raw);
        }
        Err(error) => assert!((1..=lines).contains(&error.line)),
    }
}
