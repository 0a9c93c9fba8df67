//! Documents that the binaries write about themselves, so that they cannot disagree with the code.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, heading, root};

/// A document, and what prints its parts. A binary prints its own by a hidden subcommand.
struct Generated {
    file: &'static str,
    parts: &'static [(&'static str, &'static str)],
}

const GENERATED: &[Generated] = &[
    Generated { file: "docs/cli.md", parts: &[("soci", "cli"), ("soci-snapshotter-grpc", "cli")] },
    Generated { file: "docs/config.md", parts: &[("soci-snapshotter-grpc", "config")] },
    Generated { file: "docs/metrics.md", parts: &[("soci-snapshotter-grpc", "metrics")] },
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

/// Compares the documents with what the binaries print.
///
/// # Errors
/// Names those that are stale or missing.
pub(crate) fn compare() -> Result<()> {
    let mut stale = Vec::new();
    for document in GENERATED {
        let text = std::fs::read_to_string(document.path()).unwrap_or_default();
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
        let mut text = String::from("<!-- Written by `cargo xtask docs`. -->\n");
        for (package, document) in self.parts {
            let mut command =
                cargo(&["run", "--quiet", "--package", package, "--", "internal-docs", document]);
            let output = command.stderr(Stdio::inherit()).output()?;
            if !output.status.success() {
                bail!("{package} internal-docs {document}: {}", output.status);
            }
            let part = String::from_utf8(output.stdout).context("the document is not UTF-8")?;
            text.push('\n');
            text.push_str(part.trim_end());
            text.push('\n');
        }
        Ok(text)
    }
}
