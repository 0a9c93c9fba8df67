//! Everything that reads the source and runs none of it.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, heading, program, root, succeed};
use crate::{deps, docs};

/// Runs the verb.
pub(crate) fn check() -> Result<()> {
    components()?;
    heading("check: formatting");
    succeed(&mut cargo(&["fmt", "--all", "--check"]))?;
    heading("check: crate directions");
    deps::deps()?;
    heading("check: nothing left undone");
    undone(&root())?;
    heading("check: lints");
    succeed(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    heading("check: documentation");
    let mut rustdoc = cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
    succeed(rustdoc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"))?;
    heading("check: generated documents");
    docs::compare()
}

/// A toolchain installed with the minimal profile lacks these two.
fn components() -> Result<()> {
    let present = |name: &str| {
        program(name).is_some()
            && cargo(&[&name[6..], "--version"]).output().is_ok_and(|o| o.status.success())
    };
    if present("cargo-fmt") && present("cargo-clippy") {
        return Ok(());
    }
    let Some(rustup) = program("rustup") else {
        bail!("cargo fmt and cargo clippy are missing: install rustfmt and clippy for this toolchain");
    };
    succeed(std::process::Command::new(rustup).args(["component", "add", "rustfmt", "clippy"]))
}

/// Clippy denies these macros in code it compiles; this also sees code that a configuration switches off.
fn undone(root: &Path) -> Result<()> {
    let mut found = Vec::new();
    for directory in ["crates", "tests", "xtask", "fuzz"] {
        let directory = root.join(directory);
        if directory.is_dir() {
            scan(&directory, &mut found)?;
        }
    }
    if !found.is_empty() {
        bail!("left undone:\n  {}", found.join("\n  "));
    }
    Ok(())
}

fn scan(directory: &Path, found: &mut Vec<String>) -> Result<()> {
    let entries = directory.read_dir().with_context(|| format!("list {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                scan(&path, found)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let marks = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];
            for (number, line) in text.lines().enumerate() {
                if marks.iter().any(|mark| line.contains(mark)) {
                    found.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
                }
            }
        }
    }
    Ok(())
}
