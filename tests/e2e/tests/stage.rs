//! The stage itself: what a user of the demo is left with when it does not come up.

use anyhow::{Context as _, Result};
use soci_e2e::{Stage, StageOptions};
use soci_testkit::AuthMode;

#[test]
fn a_stage_that_does_not_come_up_leaves_its_logs_where_they_are_said_to_be() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config = "[blob]\nmax_retries = \"many\"\n".to_owned();
    options.logs = Some(directory.path().join("logs"));
    let error = Stage::start(options).err().context("a daemon with that configuration started")?;
    let message = format!("{error:#}");
    assert!(message.contains("max_retries"), "the end of the log is in the message: {message}");
    let log = std::fs::read_to_string(directory.path().join("logs/snapshotter.log"))?;
    assert!(log.contains("max_retries"), "{log}");
    assert!(!message.contains("/snapshotter.log"), "no path that is gone: {message}");
    Ok(())
}
