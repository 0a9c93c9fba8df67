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

/// What is read of the environment beside what stands for flags, and why.
const READ: &[(&str, &str)] = &[
    ("`DOCKER_CONFIG`", "Directory of Docker's `config.json`, instead of `.docker` in `HOME`"),
    (
        "`DOCKER_AUTH_CONFIG`",
        "Logins as the JSON of such a file; an exact entry for a registry is used before the file's",
    ),
    ("`HOME`", "Where the Docker config and `.kube/config` are; that of the user, where it is not set"),
    ("`PATH`", "Where credential helpers and exec plugins of a kubeconfig are"),
    (
        "`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`",
        "Proxies, but for this machine and link-local addresses; for the API server as kubectl has it: `proxy-url` of its \
         cluster comes first, and `ALL_PROXY` is not looked at",
    ),
    ("`SSL_CERT_FILE`, `SSL_CERT_DIR`", "Certificate authorities that are trusted, instead of the system's"),
    ("`KUBECONFIG`", "Kubeconfig files, separated by `:`, unless `kubeconfig_path` names one"),
    ("`KUBERNETES_SERVICE_HOST`", "Whether it runs in a cluster, so that a service account will do"),
    (
        "`NOTIFY_SOCKET`, `LISTEN_FDS`, `WATCHDOG_USEC`",
        "systemd's: when it is ready, its socket, its watchdog",
    ),
    ("`OTEL_*`", "Traces, where it is built with them: [metrics.md](metrics.md#traces)"),
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
