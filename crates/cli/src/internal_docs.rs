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
