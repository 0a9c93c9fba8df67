//! Documents that the binaries write about themselves, so that they cannot disagree with the code.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, heading, root};

/// A document, and what prints it. A binary prints its own by a hidden subcommand.
struct Generated {
    file: &'static str,
    package: &'static str,
    arguments: &'static [&'static str],
}

const GENERATED: &[Generated] = &[
    Generated { file: "docs/cli.md", package: "soci", arguments: &["internal-docs", "cli"] },
    Generated {
        file: "docs/config.md",
        package: "soci-snapshotter-grpc",
        arguments: &["internal-docs", "config"],
    },
    Generated {
        file: "docs/metrics.md",
        package: "soci-snapshotter-grpc",
        arguments: &["internal-docs", "metrics"],
    },
];

/// Runs the verb.
pub(crate) fn docs(arguments: &[String]) -> Result<()> {
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--check"] => compare(),
        [] => {
            for document in GENERATED {
                heading(document.file);
                let path = document.path();
                if let Some(directory) = path.parent() {
                    std::fs::create_dir_all(directory)?;
                }
                let text = document.print()?;
                std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            }
            Ok(())
        }
        _ => bail!("usage: cargo xtask docs [--check]"),
    }
}

/// Compares the documents that exist with what the binaries print.
///
/// # Errors
/// Names those that are stale.
pub(crate) fn compare() -> Result<()> {
    let mut stale = Vec::new();
    for document in GENERATED.iter().filter(|document| document.path().is_file()) {
        let path = document.path();
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        if text != document.print()? {
            stale.push(document.file);
        }
    }
    if !stale.is_empty() {
        bail!("stale: {}; run `cargo xtask docs` and commit what it writes", stale.join(", "));
    }
    Ok(())
}

impl Generated {
    fn path(&self) -> PathBuf {
        root().join(self.file)
    }

    fn print(&self) -> Result<String> {
        let mut command = cargo(&["run", "--quiet", "--package", self.package, "--"]);
        let output = command.args(self.arguments).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("{} {}: {}", self.package, self.arguments.join(" "), output.status);
        }
        String::from_utf8(output.stdout).context("the document is not UTF-8")
    }
}
