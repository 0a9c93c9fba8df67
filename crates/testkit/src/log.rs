//! What the code under test logs.

use std::io::{self, Write};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tracing::Dispatch;
use tracing::subscriber::DefaultGuard;

/// Collects what is logged on this thread, at every level, while the guard lives.
///
/// Other tests of the process do not hide lines from it. While a process has one collector, `tracing` asks the thread that
/// meets a statement first whether anyone wants it, and remembers a no for all threads; so there are two, from here on.
pub fn capture() -> (Log, DefaultGuard) {
    static SECOND: OnceLock<Dispatch> = OnceLock::new();
    SECOND.get_or_init(|| Dispatch::new(tracing_subscriber::registry()));
    let log = Log::default();
    let guard = tracing::subscriber::set_default(log.subscriber());
    (log, guard)
}

/// Collects what all threads of this process log from here on, at every level.
///
/// # Panics
/// The second time in a process.
pub fn capture_everywhere() -> Log {
    let log = Log::default();
    tracing::subscriber::set_global_default(log.subscriber()).expect("once in a process");
    log
}

/// What was logged so far.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn subscriber(&self) -> impl tracing::Subscriber + Send + Sync + 'static {
        let writer = self.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish()
    }

    /// Returns all of it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock()).into_owned()
    }

    /// Returns how many warnings hold `needle`.
    pub fn warnings(&self, needle: &str) -> usize {
        self.text().lines().filter(|line| line.contains("WARN") && line.contains(needle)).count()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_a_thread_without_a_log_met_first_is_seen() {
        let say = || tracing::warn!("said");
        let (log, _guard) = capture();
        std::thread::scope(|scope| scope.spawn(say).join()).unwrap();
        assert_eq!(log.warnings("said"), 0, "another thread's");
        say();
        assert_eq!(log.warnings("said"), 1);
    }
}
