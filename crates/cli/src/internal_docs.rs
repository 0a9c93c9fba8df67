//! What the program writes about itself, for `cargo xtask docs` and `cargo xtask package`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{CommandFactory as _, Subcommand};

use crate::cli::Cli;
use crate::output::Output;

/// A document.
#[derive(Subcommand)]
pub(crate) enum Document {
    /// The command line, as Markdown
    Cli,
    /// Manual pages, into a directory
    Man {
        /// The directory
        directory: PathBuf,
    },
    /// Completions, on standard output
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
}

/// Writes a document.
pub(crate) fn write(output: &Output, document: &Document) -> anyhow::Result<()> {
    let mut command = Cli::command();
    match document {
        Document::Cli => {
            let options = clap_markdown::MarkdownOptions::new().title("soci".to_owned()).show_footer(false);
            let text = clap_markdown::help_markdown_command_custom(&command, &options);
            output.text(&(text + &environment(&command)));
        }
        Document::Man { directory } => {
            let command = command.version(env!("CARGO_PKG_VERSION"));
            clap_mangen::generate_to(command, directory).context("write manual pages")?;
        }
        Document::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut command, "soci", &mut text);
            output.bytes(&text);
        }
    }
    Ok(())
}

/// What is read of the environment beside what stands for flags, and why.
const READ: &[(&str, &str)] = &[
    ("`DOCKER_CONFIG`", "Directory of Docker's `config.json`, instead of `.docker` in `HOME`"),
    (
        "`DOCKER_AUTH_CONFIG`",
        "Logins as the JSON of such a file; an exact entry for a registry is used before the file's",
    ),
    ("`HOME`", "Where the Docker config is; that of the user, where it is not set"),
    ("`PATH`", "Where credential helpers are"),
    (
        "`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`",
        "Proxies, but for this machine and link-local addresses",
    ),
    ("`SSL_CERT_FILE`, `SSL_CERT_DIR`", "Certificate authorities that are trusted, instead of the system's"),
    ("`TMPDIR`", "Where `convert --standalone` works on an archive; `/tmp`, where it is not set"),
];

/// Returns tables of the variables that stand for flags, and of the others.
fn environment(command: &clap::Command) -> String {
    let mut text = String::from("\n## Environment\n\n| variable | instead of |\n| --- | --- |\n");
    let mut pending = vec![command];
    while let Some(command) = pending.pop() {
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            if let (Some(name), Some(flag)) = (argument.get_env(), argument.get_long()) {
                text.push_str(&format!("| `{}` | `--{flag}` |\n", name.to_string_lossy()));
            }
        }
        pending.extend(command.get_subcommands());
    }
    text.push_str("\n| variable | for |\n| --- | --- |\n");
    for (names, effect) in READ {
        text.push_str(&format!("| {names} | {effect} |\n"));
    }
    text
}
