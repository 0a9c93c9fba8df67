//! Tells the service manager that the daemon lives, for as long as it answers.
//!
//! A timer alone would prove that a timer runs. So each sign of life is preceded by a [`probe`] through the daemon's own
//! socket; one that hangs or is refused is logged and gives no sign. The manager allows two to be missed before it ends the
//! process, so a machine that is busy for a moment costs nothing.
//!
//! Neither the threads that serve mounts nor those for blocking work are asked. Both may wait for a disk that stands still for
//! minutes, and go on when it does; ended meanwhile, the daemon would leave every running container with a dead mount.

use std::path::PathBuf;
use std::time::Duration;

use sd_notify::NotifyState;
use soci_oci::with_causes;
use tokio_util::task::AbortOnDropHandle;

use crate::probe::probe;

/// Signs of life per interval that the manager waits for.
const SIGNS: u32 = 3;

/// Starts to give signs of life where the service manager asks for them; stops when the handle is dropped. `socket` is where
/// this daemon listens.
pub fn start(socket: PathBuf) -> Option<AbortOnDropHandle<()>> {
    let interval = sd_notify::watchdog_enabled().filter(|interval| !interval.is_zero())?;
    let period = interval / SIGNS;
    tracing::debug!(interval_ms = interval.as_millis(), "the service manager watches this process");
    Some(AbortOnDropHandle::new(tokio::spawn(signs(socket, period))))
}

async fn signs(socket: PathBuf, period: Duration) {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match probe(&socket, period).await {
            Ok(()) => {
                if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                    tracing::warn!(%error, "cannot tell the service manager");
                }
            }
            Err(error) => {
                let error = with_causes(&error);
                tracing::error!(error, "this daemon does not answer itself; no sign of life is given");
            }
        }
    }
}
