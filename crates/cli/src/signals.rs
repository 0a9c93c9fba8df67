//! Signals that end a command. Caught, they let it give back what it holds: the terminal's echo, containerd's lease.

use std::io;
use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that end this command.
pub(crate) struct Signals(Vec<(Signal, &'static str)>);

impl Signals {
    /// Catches them from here on, but for those that who started the command wants to be ignored, as `nohup` does. Must be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// When the runtime cannot catch signals.
    pub(crate) fn catch() -> io::Result<Self> {
        let ignored = ignored();
        let ends = [
            (SignalKind::interrupt(), "interrupted"),
            (SignalKind::terminate(), "terminated"),
            (SignalKind::hangup(), "hung up"),
        ];
        let ends = ends.into_iter().filter(|(kind, _)| ignored >> (kind.as_raw_value() - 1) & 1 == 0);
        ends.map(|(kind, what)| Ok((signal(kind)?, what))).collect::<io::Result<_>>().map(Self)
    }

    /// Waits for one of them and returns what it did to the command.
    pub(crate) async fn ended(&mut self) -> &'static str {
        std::future::poll_fn(|context| {
            let come = |(signal, what): &mut (Signal, &'static str)| {
                signal.poll_recv(context).is_ready().then_some(*what)
            };
            self.0.iter_mut().find_map(come).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Returns the signals that this process ignores: bit 0 is signal 1.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}
