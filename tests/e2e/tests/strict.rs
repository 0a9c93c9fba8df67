//! Under `strict` containerd's pull fails with the cause and what to do about it, each pull has one verdict, and the same pull
//! works when the cause is gone.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use soci_e2e::publish::Published;
use soci_e2e::scrape::scrape;
use soci_e2e::state::PATIENCE;
use soci_e2e::{Stage, StageOptions, images};
use soci_testkit::{Action, AuthMode, Fault, Matcher, wait};

/// A cause of a fallback: its code, what is said about it, and how it comes about.
struct Cause {
    reason: &'static str,
    says: &'static str,
    trouble: fn(&Stage, &Published) -> Result<()>,
}

/// Requests of the daemon, as against containerd's, to paths that contain `text`.
fn daemons(text: String) -> Matcher {
    Matcher::new(move |request| {
        let agent = request.headers.get("user-agent").and_then(|agent| agent.to_str().ok());
        agent.is_some_and(|agent| agent.starts_with("soci-snapshotter")) && request.path.contains(&text)
    })
}

/// Returns the digest of the SOCI index that stands beside the image.
fn index(stage: &Stage, published: &Published) -> Result<String> {
    let top = stage.registry.manifest(&published.repository, "1").context("the image has no manifest")?;
    let top: Value = serde_json::from_slice(&top)?;
    let entries = top["manifests"].as_array().context("the manifest is no index")?;
    let soci = entries.iter().find(|entry| entry["artifactType"].is_string());
    Ok(soci.and_then(|entry| entry["digest"].as_str()).context("it names no SOCI index")?.to_owned())
}

const CAUSES: [Cause; 4] = [
    Cause {
        reason: "index-missing",
        says: "push the index",
        trouble: |stage, published| {
            let matcher = daemons(format!("/manifests/{}", index(stage, published)?));
            stage.registry.fault(Fault::new(matcher, Action::status(404)));
            Ok(())
        },
    },
    Cause {
        reason: "index-denied",
        says: "soci auth explain --daemon",
        trouble: |stage, _| {
            stage.registry.fault(Fault::new(daemons("/v2/".to_owned()), Action::status(403)));
            Ok(())
        },
    },
    Cause {
        reason: "index-unavailable",
        says: "reaches the registry",
        trouble: |stage, _| {
            stage.registry.fault(Fault::new(daemons("/v2/".to_owned()), Action::Hangup));
            Ok(())
        },
    },
    Cause {
        reason: "mount-failed",
        says: "doctor IMAGE",
        trouble: |stage, _| {
            stage.registry.fault(Fault::new(daemons("/blobs/".to_owned()), Action::status(404)));
            Ok(())
        },
    },
];

fn stage() -> Result<Stage> {
    let mut options = StageOptions::new(AuthMode::Basic)?;
    options.config_head.push_str("metrics_network = \"unix\"\nmetrics_address = \"{stage}/m.sock\"\n");
    options.config.push_str("[pull_modes]\nstrict = true\n[blob]\nmax_retries = 1\n[http]\nMaxRetries = 1\n");
    Stage::start(options)
}

/// Returns what containerd says of a pull that fails.
fn refused(stage: &Stage, published: &Published) -> Result<String> {
    match stage.pull_as_kubelet(published) {
        Ok(()) => bail!("the pull is not refused\n{}", stage.log_tail()),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// Returns all verdicts that were counted.
fn verdicts(stage: &Stage) -> Result<Vec<String>> {
    let text = scrape(&stage.path().join("m.sock"))?;
    let lines = text.lines().filter(|line| line.starts_with("soci_pull_verdicts_total{"));
    let mut lines: Vec<String> = lines.map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

fn counted(verdict: &str, reason: &str, times: usize) -> String {
    format!("soci_pull_verdicts_total{{verdict=\"{verdict}\",reason=\"{reason}\"}} {times}")
}

#[test]
fn a_pull_that_would_fall_back_fails_with_the_cause_and_what_to_do() -> Result<()> {
    let stage = stage()?;
    let plain = stage.publish(&images::single(70), "strict/plain", "1");
    let said = refused(&stage, &plain)?;
    assert!(said.contains("(no-index)") && said.contains("soci convert"), "{said}");
    let mut expected = vec![counted("refused", "no-index", 1)];
    for ((seed, before), cause) in (71..).zip(0..).zip(&CAUSES) {
        let published = stage.publish_v2(&images::single(seed), &format!("strict/{}", cause.reason), "1")?;
        (cause.trouble)(&stage, &published)?;
        let said = refused(&stage, &published).context(cause.reason)?;
        assert!(said.contains(&format!("({})", cause.reason)) && said.contains(cause.says), "{said}");
        assert_eq!(stage.lazy_layers()?, before, "{}", cause.reason);
        stage.registry.clear_faults();
        // What was found out about an image is remembered for a moment, for the other layers of a pull.
        let mut refusals = 0;
        let pulled = wait::until(PATIENCE, || {
            refusals += 1;
            stage.pull_as_kubelet(&published).ok()
        });
        pulled.with_context(|| format!("{}: it cannot be pulled afterwards", cause.reason))?;
        expected.push(counted("refused", cause.reason, refusals));
        assert_eq!(stage.lazy_layers()?, before + 1, "{}", cause.reason);
    }
    expected.push(counted("lazy", "none", CAUSES.len()));
    expected.sort();
    assert_eq!(verdicts(&stage)?, expected, "each pull has one verdict");
    Ok(())
}
