//! Gives memory that was freed back to the system.
//!
//! glibc keeps what is freed for later. A daemon that had hundreds of layers mounted, and has none now, would stay as
//! large as it was; so a while after layers came or went the rest is handed back. This is one of the two modules with
//! `unsafe`: the call takes no pointer and has no precondition.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// After what times without a change memory is given back: once per pull or removal, not once per layer, and again when
/// what is kept for the next work is kept no more. Idle connections have buffers, too.
const QUIET: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(60)];

/// Gives freed memory back after each series of `changes`, at the times of [`QUIET`], until `stop`.
pub(crate) async fn give_back(changes: Arc<Notify>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = changes.notified() => {}
            () = stop.cancelled() => return,
        }
        let mut waits = QUIET.iter();
        while let Some(wait) = waits.next() {
            tokio::select! {
                () = changes.notified() => waits = QUIET.iter(),
                () = tokio::time::sleep(*wait) => {
                    // It locks the allocator's arenas one after another: not on a thread that serves.
                    let _ = tokio::task::spawn_blocking(trim).await;
                }
                () = stop.cancelled() => return,
            }
        }
    }
}

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "glibc offers this by a C function alone")]
fn trim() {
    // SAFETY: malloc_trim may be called at any time by any thread; it touches free memory only.
    let released = unsafe { libc::malloc_trim(0) };
    tracing::debug!(released = released == 1, "freed memory given back");
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_series_of_changes_is_one_and_a_stop_ends_it() {
        let (changes, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let task = tokio::spawn(give_back(Arc::clone(&changes), stop.clone()));
        for _ in 0..5 {
            changes.notify_one();
            tokio::time::sleep(QUIET[0] / 2).await;
        }
        assert!(!task.is_finished());
        stop.cancel();
        task.await.unwrap();
    }

    #[cfg(target_env = "gnu")]
    #[test]
    fn freed_memory_goes_back() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
        };
        // Small pieces with one that stays at the end, so that nothing goes back by itself.
        let pieces: Vec<Vec<u8>> = (0..20_000).map(|_| vec![1; 4000]).collect();
        let last = vec![1_u8; 4000];
        let full = resident();
        drop(pieces);
        trim();
        assert!(resident() + 10_000 < full, "{} of {full} pages", resident());
        drop(last);
    }
}
