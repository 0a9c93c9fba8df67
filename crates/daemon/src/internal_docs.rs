//! What the program writes about itself, for `cargo xtask docs` and `cargo xtask package`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{CommandFactory, Subcommand};

use crate::args::Args;
use crate::{config, metrics};

/// A document.
#[derive(Debug, Clone, Subcommand)]
pub enum Document {
    /// The configuration file, as Markdown.
    Config,
    /// The metrics, as Markdown.
    Metrics,
    /// The command line, as Markdown.
    Cli,
    /// Manual pages, into a directory.
    Man {
        /// The directory.
        directory: PathBuf,
    },
    /// Completions, on standard output.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
}

/// Writes a document.
///
/// # Errors
/// When it cannot be written.
pub fn write(document: &Document) -> anyhow::Result<()> {
    let mut command = Args::command();
    let text = match document {
        Document::Config => config::document::document().into_bytes(),
        Document::Metrics => metrics::document::document().into_bytes(),
        Document::Cli => {
            let options = clap_markdown::MarkdownOptions::new()
                .title("soci-snapshotter-grpc".to_owned())
                .show_footer(false);
            let text = clap_markdown::help_markdown_command_custom(&command, &options);
            (text + &environment(&command)).into_bytes()
        }
        Document::Man { directory } => {
            let command = command.version(env!("CARGO_PKG_VERSION"));
            return clap_mangen::generate_to(command, directory).context("write manual pages");
        }
        Document::Completions { shell } => {
            let mut text = Vec::new();
            let name = command.get_name().to_owned();
            clap_complete::generate(*shell, &mut command, name, &mut text);
            text
        }
    };
    std::io::stdout().lock().write_all(&text).context("print the document")
}

/// Returns a table of the variables that stand for flags.
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
    text
}
