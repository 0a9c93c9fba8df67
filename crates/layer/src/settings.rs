//! What can be set about reading layers.

use std::time::Duration;

/// Limits and habits of a [`crate::LayerPool`].
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long one range of a source may take, whoever waits for it; readers have their own deadlines.
    pub fetch_timeout: Duration,
    /// How long a source may send nothing before its range is opened again.
    pub stall_timeout: Duration,
    /// Adjacent spans are joined into requests of at most this many compressed bytes (one span may be more).
    pub max_range: u64,
    /// Bytes of spans that may be in flight at once, compressed and inflated together, but for those of
    /// [`BackgroundSettings::in_flight`].
    pub in_flight: u64,
    /// The part of `in_flight` that only readers who wait may use.
    pub reserve: u64,
    /// Bytes of inflated spans that stay in memory for the next read.
    pub recent: u64,
    /// Bytes of buffers that are kept for the next span while there is work. With room for one of the usual size per
    /// worker and one that was just read, none is mapped anew for each span.
    pub keep: u64,
    /// Threads that hash, inflate and store.
    pub workers: usize,
    /// How far ahead of a sequential reader spans are fetched, at most. Zero turns it off.
    pub read_ahead: u32,
    /// How layers are completed in the background.
    pub background: BackgroundSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            fetch_timeout: Duration::from_secs(300),
            stall_timeout: Duration::from_secs(20),
            max_range: 12 << 20,
            in_flight: 24 << 20,
            reserve: 6 << 20,
            recent: 8 << 20,
            keep: 14 << 20,
            workers: std::thread::available_parallelism().map_or(2, usize::from),
            read_ahead: 8,
            background: BackgroundSettings::default(),
        }
    }
}

/// How layers are completed when nothing else is to do.
#[derive(Debug, Clone)]
pub struct BackgroundSettings {
    /// Compressed bytes per second, at most. `None` is as fast as it goes.
    pub bytes_per_second: Option<u64>,
    /// Compressed bytes of one request.
    pub max_range: u64,
    /// Bytes of spans that may be in flight for it at once. With room for two of the usual size that do not compress, one
    /// arrives while the other is stored.
    pub in_flight: u64,
    /// How long a layer rests after its first failed range; doubles with each that follows.
    pub backoff: Duration,
    /// The longest such rest.
    pub max_backoff: Duration,
}

impl Default for BackgroundSettings {
    fn default() -> Self {
        Self {
            bytes_per_second: None,
            max_range: 8 << 20,
            in_flight: 9 << 20,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(300),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;

    #[test]
    fn buffers_of_three_spans_of_the_usual_size_are_kept() {
        // 4 MiB and what is left of a deflate block.
        let span = (4 << 20) + (100 << 10);
        let keep = usize::try_from(Settings::default().keep).unwrap();
        let buffers = Buffers::new(keep);
        drop([buffers.take(span), buffers.take(span), buffers.take(span)]);
        assert!(buffers.free_bytes() >= 3 * span, "{} bytes are kept", buffers.free_bytes());
    }
}
