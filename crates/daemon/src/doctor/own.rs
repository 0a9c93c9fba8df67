//! Our own configuration, and whether the daemon answers.

use std::path::PathBuf;
use std::time::Duration;

use soci_oci::with_causes;

use super::{Finding, Level, shown};
use crate::Config;
use crate::args::Args;
use crate::config;
use crate::probe::probe;
use crate::serve::{Address, DEFAULT_ADDRESS};

/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where a kubelet of usual installations is configured.
const KUBELET: &str = "/var/lib/kubelet/config.yaml";

/// Returns the socket that containerd should be told of.
pub(super) fn socket(args: &Args) -> PathBuf {
    match args.address.parse() {
        Ok(Address::Path(path)) => path,
        Ok(Address::Inherited) | Err(_) => PathBuf::from(DEFAULT_ADDRESS),
    }
}

/// Looks at our configuration, which is returned where it loads, and at the daemon.
pub(super) async fn look(args: &Args, findings: &mut Vec<Finding>) -> Option<Config> {
    let file = shown(&args.config);
    let loaded = match config::load(&args.config) {
        Ok(config::Loaded { config, findings: warnings, .. }) => {
            let present = if args.config.exists() { "loads" } else { "is absent: the defaults hold" };
            findings.push(Finding::new("config", Level::Ok, format!("{file} {present}")));
            for config::Finding { line, key, what } in warnings {
                let finding = Finding::new("config", Level::Warning, format!("{key} {what}"));
                findings.push(finding.at(format!("{file}:{line}")).change(format!("remove {key}")));
            }
            modes(&config, &file, findings);
            Some(config)
        }
        Err(error) => {
            let finding = Finding::new("config", Level::Error, with_causes(&error)).at(file);
            findings.push(finding.change(
                "correct the key that is named; `soci-snapshotter-grpc config default` shows all of them",
            ));
            None
        }
    };
    let socket = socket(args);
    findings.push(match probe(&socket, PATIENCE).await {
        Ok(()) => Finding::new("daemon", Level::Ok, format!("it answers on {}", shown(&socket))),
        Err(error) => Finding::new("daemon", Level::Error, with_causes(&error)).change(
            "systemctl start soci-snapshotter-grpc; journalctl -u soci-snapshotter-grpc says why it ended",
        ),
    });
    loaded
}

fn modes(config: &Config, file: &str, findings: &mut Vec<Finding>) {
    let found = &config.discovery;
    findings.push(match (found.v1, found.v2) {
        (false, false) => Finding::new("modes", Level::Error, "no way of finding an index is on")
            .at(file)
            .change("[pull_modes.soci_v2]\nenable = true"),
        (false, true) => Finding::new("modes", Level::Note, "indexes v2 are used; looking for v1 is off")
            .at(file)
            .change("[pull_modes.soci_v1]\nenable = true"),
        (true, _) => Finding::new("modes", Level::Ok, "indexes v1 are looked for"),
    });
    let kubelet = std::fs::read_to_string(KUBELET).ok();
    if config.cri.is_some()
        && let Some(text) = kubelet
        && !text.lines().any(|line| line.trim_start().starts_with("imageServiceEndpoint:"))
    {
        let what = "[cri_keychain] is on, and the kubelet is not told to pull through this daemon";
        let change = format!("imageServiceEndpoint: unix://{DEFAULT_ADDRESS}");
        findings.push(Finding::new("kubelet", Level::Warning, what).at(KUBELET).change(change));
    }
}
