//! `soci-snapshotter-grpc doctor`: what on this node keeps images from being lazy, each finding with the line to change.
//!
//! It reads what the daemon and containerd read, in the daemon's [`environment`], and asks what they would ask; it changes
//! nothing and needs no running daemon.
//! Whatever it cannot look at is a finding, never a failure of the doctor.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::args::Args;

mod containerd;
mod containerd_config;
mod environment;
mod image;
mod machine;
mod own;

/// What to look at.
#[derive(Debug, Clone, clap::Args)]
pub struct DoctorArgs {
    /// An image to look at as well: hosts, logins, index, and each layer.
    #[arg(value_name = "REFERENCE")]
    pub image: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// containerd's configuration file.
    #[arg(long, value_name = "PATH", default_value = "/etc/containerd/config.toml")]
    pub containerd_config: PathBuf,
}

/// How bad a finding is. The worst one is the exit status: 0 for `ok` and `note`, 1 for `warning`, 2 for `error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Some images are not lazy, or will not be.
    Warning,
    /// No image is lazy.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in one word; names stay from version to version.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// Where: a file, with the line where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// What to write there, or to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
}

impl Finding {
    fn new(check: &'static str, level: Level, what: impl Into<String>) -> Self {
        Self { check, level, what: what.into(), place: None, change: None }
    }

    fn at(mut self, place: impl Into<String>) -> Self {
        self.place = Some(place.into());
        self
    }

    fn change(mut self, change: impl Into<String>) -> Self {
        self.change = Some(change.into());
        self
    }
}

/// All findings, in the order in which they were made.
#[derive(Debug, Default, Serialize)]
struct Report {
    worst: Option<Level>,
    findings: Vec<Finding>,
}

/// Looks at everything and prints what was found.
///
/// # Errors
/// When it cannot be printed.
pub fn run(args: &Args, wanted: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let environment = environment::enter(&args.root);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start threads")?;
    let mut findings = vec![environment];
    findings.extend(runtime.block_on(look(args, wanted)));
    // Secrets may be synced, and helpers may run; nobody waits for them.
    runtime.shutdown_background();
    let worst = findings.iter().map(|finding| finding.level).max();
    let report = Report { worst, findings };
    let text = match wanted.json {
        true => serde_json::to_string_pretty(&report).context("write JSON")? + "\n",
        false => text(&report),
    };
    std::io::stdout().lock().write_all(text.as_bytes()).context("print the report")?;
    Ok(match worst {
        None | Some(Level::Ok | Level::Note) => ExitCode::SUCCESS,
        Some(Level::Warning) => ExitCode::from(1),
        Some(Level::Error) => ExitCode::from(2),
    })
}

async fn look(args: &Args, wanted: &DoctorArgs) -> Vec<Finding> {
    let mut findings = machine::look(&args.root);
    let config = own::look(args, &mut findings).await;
    let socket = own::socket(args);
    // Without a configuration of ours there is nothing to compare containerd's with but the defaults.
    let fallback = crate::Config::check(&crate::config::Raw::default());
    if let Some(config) = config.as_ref().or(fallback.as_ref().ok()) {
        findings.extend(containerd::look(&wanted.containerd_config, &socket, config));
        if let Some(reference) = &wanted.image {
            findings.extend(image::look(reference, config).await);
        }
    }
    findings
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for Finding { check, level, what, place, change } in &report.findings {
        let mark = match level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "WARNING",
            Level::Error => "ERROR",
        };
        let indent = " ".repeat(10);
        text.push_str(&format!("{mark:<9} {check}: {what}\n"));
        if let Some(place) = place {
            text.push_str(&format!("{indent}in {place}\n"));
        }
        if let Some(change) = change {
            let lines: Vec<&str> = change.lines().collect();
            match lines.as_slice() {
                [line] => text.push_str(&format!("{indent}change: {line}\n")),
                lines => {
                    text.push_str(&format!("{indent}change:\n"));
                    lines.iter().for_each(|line| text.push_str(&format!("{indent}  {line}\n")));
                }
            }
        }
    }
    let count = |level| report.findings.iter().filter(|finding| finding.level == level).count();
    text.push_str(&format!("\n{} errors, {} warnings\n", count(Level::Error), count(Level::Warning)));
    text
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_what_where_and_what_to_write() {
        let findings = vec![
            Finding::new("kernel", Level::Ok, "Linux 6.1"),
            Finding::new("containerd", Level::Error, "no labels").at("/etc/c.toml:3").change("a = 1\nb = 2"),
        ];
        let text = text(&Report { worst: Some(Level::Error), findings });
        assert_eq!(
            text,
            "ok        kernel: Linux 6.1\nERROR     containerd: no labels\n          in /etc/c.toml:3\n          \
             change:\n            a = 1\n            b = 2\n\n1 errors, 0 warnings\n"
        );
    }
}
