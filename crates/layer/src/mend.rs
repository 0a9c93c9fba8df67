//! A stored zTOC that turns out lost or damaged while its layer is open.
//!
//! Decoder windows are read from it, so without it no further span can be inflated. It is fetched again by whoever knows
//! where from: once for all spans that miss it, and with pauses that grow where that does not help, so that a disk that
//! spoils what it is given does not become a stream of requests. Nothing of a span is held meanwhile: its bytes are in the
//! cache, or are fetched once more.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use soci_oci::{FetchContext, FetchError, FetchErrorKind, with_causes};

use crate::core::LayerCore;
use crate::meters::Event;
use crate::slot::FetchPermit;
use crate::{ReadError, fetch};

/// The pause after a first attempt; it doubles with each further one.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause. A file that was whole for twice as long counts as one that was never damaged.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The stored zTOC of an open layer.
#[async_trait]
pub trait ZtocFile: std::fmt::Debug + Send + Sync {
    /// Returns where it is.
    fn path(&self) -> &Path;

    /// Fetches it again and replaces the file, unless that is whole.
    ///
    /// # Errors
    /// Why it cannot be had, or stored.
    async fn fetch_again(&self, context: &FetchContext) -> Result<(), FetchError>;
}

/// A file of which nobody knows where it comes from.
#[async_trait]
impl ZtocFile for PathBuf {
    fn path(&self) -> &Path {
        self
    }

    async fn fetch_again(&self, _: &FetchContext) -> Result<(), FetchError> {
        let message = format!("it is not known where {} is to be had", self.display());
        Err(FetchError::new(FetchErrorKind::Integrity, message))
    }
}

/// The attempts to mend the zTOC of one layer. Who waits for the lock waits for the attempt that is under way.
#[derive(Debug, Default)]
pub(crate) struct Mending(tokio::sync::Mutex<Attempts>);

#[derive(Debug, Default)]
struct Attempts {
    /// How many there were in a row.
    count: u32,
    /// When the last one ended, and how.
    last: Option<(Instant, Result<(), FetchError>)>,
}

impl Mending {
    /// Has `file` fetched again, which was useless when somebody `looked`, unless that was done since or is not due yet.
    async fn attempt(
        &self,
        file: &dyn ZtocFile,
        looked: Instant,
        context: &FetchContext,
    ) -> Result<(), FetchError> {
        let mut attempts = self.0.lock().await;
        if let Some((ended, result)) = &attempts.last {
            if looked < *ended {
                return result.clone();
            }
            if ended.elapsed() < pause(attempts.count) {
                let again =
                    || FetchError::new(FetchErrorKind::Local, "it was replaced a moment ago: check the disk");
                return result.clone().and(Err(again()));
            }
            if ended.elapsed() > 2 * LONGEST_PAUSE {
                attempts.count = 0;
            }
        }
        let file_name = file.path().display();
        let result = file.fetch_again(context).await;
        let failed_before = attempts.last.as_ref().is_some_and(|(_, result)| result.is_err());
        match &result {
            Ok(()) => tracing::info!(file = %file_name, "a lost or damaged zTOC was fetched again"),
            Err(error) if failed_before => {
                tracing::debug!(file = %file_name, error = %with_causes(error), "a zTOC still cannot be fetched again");
            }
            Err(error) => {
                let error = with_causes(error);
                tracing::warn!(file = %file_name, error, "a lost or damaged zTOC cannot be fetched again at present");
            }
        }
        attempts.count = attempts.count.saturating_add(1);
        attempts.last = Some((Instant::now(), result.clone()));
        result
    }
}

fn pause(attempts: u32) -> Duration {
    PAUSE.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

/// Has the stored zTOC mended, of which span `permit` could not have its window because of `error` when it `looked`, and goes
/// on with the span then. Returns at once.
pub(crate) fn mend(core: &Arc<LayerCore>, permit: FetchPermit, looked: Instant, error: ReadError) {
    let core = Arc::clone(core);
    core.shared.handle.clone().spawn(async move {
        let class = permit.priority().class();
        let (context, file) = (core.context(class), core.file());
        let attempt = core.mending.attempt(&*file, looked, &context);
        let mended = tokio::select! {
            () = core.closed.cancelled() => return,
            mended = core.demanding(class, attempt) => mended,
        };
        match mended {
            Ok(()) => fetch::lead(&core, vec![permit]),
            Err(failed) => {
                core.meter.count(Event::SpansFailed(class), 1);
                let what = format!("{}; fetching that again", with_causes(&error));
                permit.fail(&ReadError::fetch(what, failed));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use soci_oci::FetchClass;

    use super::*;

    #[derive(Debug, Default)]
    struct Counted(AtomicUsize);

    #[async_trait]
    impl ZtocFile for Counted {
        fn path(&self) -> &Path {
            Path::new("ztoc")
        }

        async fn fetch_again(&self, _: &FetchContext) -> Result<(), FetchError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[tokio::test]
    async fn who_looked_before_it_was_mended_goes_on_and_who_finds_it_damaged_again_waits() {
        let (mending, file) = (Mending::default(), Counted::default());
        let context = FetchContext::new(Instant::now() + LONGEST_PAUSE, FetchClass::OnDemand);
        let looked = Instant::now();
        for _ in 0..3 {
            assert!(mending.attempt(&file, looked, &context).await.is_ok());
        }
        assert_eq!(file.0.load(Ordering::Relaxed), 1);
        let again = mending.attempt(&file, Instant::now(), &context).await.unwrap_err();
        assert_eq!(again.kind(), FetchErrorKind::Local, "{again}");
        assert_eq!(file.0.load(Ordering::Relaxed), 1);
    }
}
