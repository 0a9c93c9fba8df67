//! The program: arguments, log, configuration, signals.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use sd_notify::NotifyState;
use soci_auth::AuthBoard;
use soci_auth::keychain::cri::CriStore;
use soci_snapshotter::service::Unmount;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::args::{self, Args, Command, ConfigCommand};
use crate::config::checked::{Debug, Listen};
use crate::config::{self, Raw, dump};
use crate::control::Knowledge;
use crate::daemon::{Daemon, Options, Wiring};
use crate::debug;
use crate::keychains::{self, Keychains};
use crate::live::Live;
use crate::metrics::auth::Gauges;
use crate::metrics::text::Scrape;
use crate::metrics::{self, Metrics};
use crate::traces::Traces;
use crate::{control, doctor, dumps, internal_docs, logging, overlay, registries, watchdog};

/// How long leaving may take when mounts stay: calls under way get five seconds.
const LEAVE: std::time::Duration = std::time::Duration::from_secs(6);
/// How long threads that still work on the disk are waited for at the end.
const LAST_WORK: std::time::Duration = std::time::Duration::from_millis(200);

/// Runs the program to its end. A failure is a line of level `fatal` and exit status 1.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.command {
        Some(Command::Config(which)) => print_config(&args, *which),
        Some(Command::InternalDocs(document)) => internal_docs::write(document),
        Some(Command::Doctor(wanted)) => return end(doctor::run(&args, wanted)),
        None => serve(&args),
    };
    end(result.map(|()| ExitCode::SUCCESS))
}

fn end(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            logging::fatal(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn print_config(args: &Args, which: ConfigCommand) -> anyhow::Result<()> {
    let raw = match which {
        ConfigCommand::Default => Raw::default(),
        ConfigCommand::Dump => config::load(&args.config)?.raw,
    };
    let text = dump::dump(&raw)?;
    std::io::stdout().lock().write_all(text.as_bytes()).context("print the configuration")
}

fn serve(args: &Args) -> anyhow::Result<()> {
    let verbosity = args.log_level.parse().context("failed to prepare logger")?;
    let (traces, spans) = Traces::open(&|name| std::env::var(name).ok());
    logging::install(verbosity, spans);
    dumps::forbid();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        revision = args::revision(),
        "starting soci-snapshotter-grpc"
    );
    traces.announce();
    let address = args.address.parse()?;
    let config::Loaded { config, findings, places, .. } = config::load(&args.config)?;
    for finding in &findings {
        let config::Finding { line, key, what } = finding;
        tracing::warn!(file = %args.config.display(), line, key, "config key {key} {what}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("soci")
        .build()
        .context("start threads")?;
    let place = |key: &str| match places.line(&[key]) {
        Some(line) => format!("{}:{line}", args.config.display()),
        None => args.config.display().to_string(),
    };
    let endpoints = Endpoints { metrics: place("metrics_address"), debug: place("debug_address") };
    let options = Options { address, root: args.root.clone(), config, metrics: Metrics::default() };
    let result = runtime.block_on(until_signal(options, &endpoints));
    traces.flush();
    // Work on the disk that was cut is as after a crash: what is recorded is whole.
    runtime.shutdown_timeout(LAST_WORK);
    result
}

/// Where the configuration names the addresses of endpoints: file and line.
struct Endpoints {
    metrics: String,
    debug: String,
}

async fn until_signal(options: Options, endpoints: &Endpoints) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let (listen, metrics) = (options.config.metrics.clone(), options.metrics.clone());
    let inspected = options.config.debug.clone();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let start = async {
        let mut wired = None;
        let daemon = Daemon::start(options, |options| {
            let Wired { live, pulls, .. } = wired.insert(layers(options)?);
            Ok(Wiring { provider: Arc::clone(live) as _, pulls: pulls.clone() })
        })
        .await?;
        if let Some(Wired { live, knowledge, gauges, .. }) = wired {
            // The daemon serves without it; only questions about it stay unanswered.
            let control = control::beside(daemon.socket());
            if let Err(error) = control::serve(&control, knowledge, stop.clone()) {
                let error = soci_oci::with_causes(&error);
                tracing::warn!(error, "no control socket: soci auth explain --daemon will not work");
            }
            serve_state(inspected, &endpoints.debug, Arc::clone(&live), stop.clone()).await;
            serve_metrics(listen, &endpoints.metrics, metrics, live, gauges, stop).await;
        }
        anyhow::Ok(daemon)
    };
    let mut daemon = tokio::select! {
        started = start => started?,
        stopped = first(&mut interrupt, &mut terminate) => {
            tracing::info!("Got {}", stopped.name);
            return Ok(());
        }
    };
    notify(&[NotifyState::Ready]);
    let watchdog = watchdog::start(daemon.socket().to_owned());
    tracing::info!("soci-snapshotter-grpc successfully started");
    let stopped = tokio::select! {
        stopped = first(&mut interrupt, &mut terminate) => stopped,
        error = daemon.failed() => return Err(error),
    };
    // It does not answer itself from here on, and is not to be told so.
    drop(watchdog);
    notify(&[NotifyState::Stopping]);
    tracing::info!("Got {}", stopped.name);
    match stopped.unmount {
        Unmount::Yes => daemon.stop(Unmount::Yes).await,
        // Mounts stay, and what is on disk is whole at any moment: those who called are waited for, nothing else is.
        Unmount::No => {
            if tokio::time::timeout(LEAVE, daemon.stop(Unmount::No)).await.is_err() {
                tracing::debug!("work is under way still and is cut");
            }
        }
    }
    tracing::info!("Exiting");
    Ok(())
}

/// What a daemon is made of that others ask, too.
struct Wired {
    live: Arc<Live>,
    pulls: Option<Arc<CriStore>>,
    knowledge: Knowledge,
    gauges: Gauges,
}

/// Returns the layers that a daemon serves, and what pulls leave their credentials in.
fn layers(options: &Options) -> anyhow::Result<Wired> {
    let Options { config, metrics, .. } = options;
    let board = Arc::new(AuthBoard::new());
    let Keychains { chain, pulls, secrets, off } =
        keychains::open(config, &board, metrics, &|name| std::env::var_os(name));
    let registry = registries::client(config, chain, Arc::clone(&board), metrics)?;
    let userxattr = overlay::in_user_namespace();
    let knowledge = Knowledge { registry: registry.clone(), off };
    let live = Live::open(&options.root, config, userxattr, registry, board, metrics.clone())?;
    let gauges = Gauges { pulls: pulls.clone(), secrets };
    Ok(Wired { live, pulls, knowledge, gauges })
}

/// Serves metrics where the configuration says so.
async fn serve_metrics(
    listen: Option<Listen>,
    place: &str,
    metrics: Metrics,
    live: Arc<Live>,
    gauges: Gauges,
    stop: CancellationToken,
) {
    let Some(listen) = listen else { return };
    let render = move || {
        let mut scrape = Scrape::default();
        metrics.collect(&mut scrape);
        live.collect(&mut scrape);
        gauges.collect(&mut scrape);
        scrape.text()
    };
    let page =
        metrics::serve::Page { path: "/metrics", kind: metrics::serve::TEXT, render: Arc::new(render) };
    metrics::serve::serve(listen, page, place, stop).await;
}

/// Serves the daemon's state where the configuration says so.
async fn serve_state(listen: Debug, place: &str, live: Arc<Live>, stop: CancellationToken) {
    match listen {
        Debug::Off => {}
        Debug::Unix(path) => {
            metrics::serve::serve(Listen::Unix(path), debug::page(live), place, stop).await;
        }
        Debug::Refused(address) => {
            tracing::warn!(
                address,
                place,
                "debug_address is not a path: the state is for root alone and is not served there"
            );
        }
    }
}

struct Stopped {
    name: &'static str,
    unmount: Unmount,
}

async fn first(interrupt: &mut Signal, terminate: &mut Signal) -> Stopped {
    tokio::select! {
        _ = interrupt.recv() => Stopped { name: "interrupt", unmount: Unmount::Yes },
        _ = terminate.recv() => Stopped { name: "terminated", unmount: Unmount::No },
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}
