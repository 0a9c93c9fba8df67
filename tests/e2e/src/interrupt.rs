//! Ctrl-C and SIGTERM: noticed between two steps, so that everything a stage holds is taken down in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// Whether the user wants us to stop.
#[derive(Debug, Clone)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
    // The signals are listened to as long as this lives.
    _runtime: Arc<Runtime>,
}

impl Interrupt {
    /// Takes over SIGINT and SIGTERM from now on.
    ///
    /// # Errors
    /// Where the signals cannot be taken over.
    pub fn listen() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let asked = Arc::new(AtomicBool::new(false));
        let (mut interrupt, mut terminate) = {
            let _entered = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let flag = Arc::clone(&asked);
        runtime.spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                flag.store(true, Ordering::Relaxed);
            }
        });
        Ok(Self { asked, _runtime: Arc::new(runtime) })
    }

    /// Goes on, unless we were asked to stop.
    ///
    /// # Errors
    /// Where we were.
    pub fn check(&self) -> Result<()> {
        if self.asked.load(Ordering::Relaxed) {
            bail!("interrupted; what was started is taken down");
        }
        Ok(())
    }
}
