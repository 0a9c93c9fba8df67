//! The soci command line.
//!
//! Flags, words, columns and exit codes are those of the Go tool, so that scripts and nerdctl go on working. There is no
//! database: what a listing says is read from the content store at that moment. Only this file and `output` print.

mod app;
mod args;
mod cli;
mod commands;
mod control;
mod credentials;
mod duration;
mod internal_docs;
mod listing;
mod output;
mod signals;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};

use crate::app::App;
use crate::cli::{Cli, Command};
use crate::output::Output;
use crate::signals::Signals;

/// The exit status for a command that there is not; each other failure has 1.
const NO_SUCH_COMMAND: u8 = 3;

fn main() -> ExitCode {
    let output = Arc::new(Output::new());
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(args::Stop::Text(text)) => {
            output.text(&text);
            return ExitCode::SUCCESS;
        }
        Err(args::Stop::Error(message)) => return output.fail(&message),
        Err(args::Stop::NoSuchCommand(message)) => {
            output.fail(&message);
            return ExitCode::from(NO_SUCH_COMMAND);
        }
    };
    output::log(cli.global.debug || matches!(&cli.command, Some(Command::Push(push)) if push.dumps()));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output.fail(&format!("starting: {error}")),
    };
    match runtime.block_on(run(cli, Arc::clone(&output))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output.fail(&format!("{error:#}")),
    }
}

/// Runs the command until it is done, interrupted, or out of time; gives back the lease in each case.
async fn run(cli: Cli, output: Arc<Output>) -> anyhow::Result<()> {
    let Cli { global, command, .. } = cli;
    let timeout = global.timeout;
    // Before anything begins, which might change the terminal.
    let mut signals = Signals::catch().context("waiting for signals")?;
    let app = App::new(global, output);
    let limit = async {
        match timeout.filter(|timeout| !timeout.is_zero()) {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let result = tokio::select! {
        result = dispatch(&app, command) => result,
        () = limit => Err(anyhow::anyhow!("not done within the limit of {:?} (--timeout)", timeout.unwrap_or_default())),
        what = signals.ended() => Err(anyhow::anyhow!(what)),
    };
    app.end().await;
    result
}

async fn dispatch(app: &App, command: Option<Command>) -> anyhow::Result<()> {
    match command {
        Some(Command::Create(args)) => commands::create::run(app, args).await,
        Some(Command::Convert(args)) => commands::convert::run(app, args).await,
        Some(Command::Push(args)) => commands::push::run(app, args).await,
        Some(Command::RebuildDb) => commands::rebuild_db::run(app).await,
        Some(Command::Index(command)) => commands::index::run(app, command).await,
        Some(Command::Auth(command)) => commands::auth::run(app, command).await,
        Some(Command::Ztoc(command)) => commands::ztoc::run(app, command).await,
        Some(Command::Prefetch(command)) => commands::prefetch::run(app, command).await,
        Some(Command::Version) => {
            app.output.text(&format!("soci {}\n", cli::version()));
            Ok(())
        }
        Some(Command::InternalDocs(document)) => internal_docs::write(&app.output, &document),
        None => bail!("no command; see soci --help"),
    }
}
