//! How many requests a host gets at a time, with a reserve for work that somebody waits for.
//!
//! Two semaphores per origin: one for everything, one that background work takes from first and that is smaller by the
//! reserve. Work that becomes urgent while it waits leaves the second queue.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use soci_auth::Origin;
use soci_oci::FetchClass;
use soci_oci::blob::Priority;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::settings::Concurrency;

/// Origins remembered at most: registries and the storage behind them.
const MAX_ORIGINS: usize = 1024;

/// The right to one request, body included; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    _all: OwnedSemaphorePermit,
    _unhurried: Option<OwnedSemaphorePermit>,
}

/// Hands out permits.
#[derive(Debug)]
pub(crate) struct Limiter {
    concurrency: Concurrency,
    origins: Mutex<HashMap<Origin, Arc<Gate>>>,
}

#[derive(Debug)]
struct Gate {
    all: Arc<Semaphore>,
    unhurried: Arc<Semaphore>,
}

impl Limiter {
    pub(crate) fn new(concurrency: Concurrency) -> Self {
        Self { concurrency, origins: Mutex::default() }
    }

    fn gate(&self, origin: &Origin) -> Arc<Gate> {
        let mut origins = self.origins.lock();
        if let Some(gate) = origins.get(origin) {
            return Arc::clone(gate);
        }
        if origins.len() >= MAX_ORIGINS {
            origins.retain(|_, gate| Arc::strong_count(gate) > 1);
        }
        let Concurrency { per_host, on_demand_reserve } = self.concurrency;
        let gate = Arc::new(Gate {
            all: Arc::new(Semaphore::new(per_host)),
            unhurried: Arc::new(Semaphore::new(per_host.saturating_sub(on_demand_reserve).max(1))),
        });
        origins.insert(origin.clone(), Arc::clone(&gate));
        gate
    }

    /// Waits for a permit; nothing when the deadline passes first.
    pub(crate) async fn acquire(
        &self,
        origin: &Origin,
        priority: &Priority,
        deadline: Instant,
    ) -> Option<Permit> {
        let gate = self.gate(origin);
        let wait = async {
            let unhurried = tokio::select! {
                biased;
                () = priority.reaches(FetchClass::OnDemand) => None,
                permit = Arc::clone(&gate.unhurried).acquire_owned() => permit.ok(),
            };
            let all = Arc::clone(&gate.all).acquire_owned().await.ok()?;
            Some(Permit { _all: all, _unhurried: unhurried })
        };
        tokio::time::timeout_at(deadline.into(), wait).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn origin() -> Origin {
        Origin::of_url(&"https://r.example".parse().unwrap()).unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(60)
    }

    #[tokio::test]
    async fn background_work_leaves_the_reserve_alone() {
        let limiter = Limiter::new(Concurrency { per_host: 3, on_demand_reserve: 1 });
        let background = Priority::new(FetchClass::Background);
        let urgent = Priority::new(FetchClass::OnDemand);
        let first = limiter.acquire(&origin(), &background, soon()).await.unwrap();
        let _second = limiter.acquire(&origin(), &background, soon()).await.unwrap();
        assert!(limiter.acquire(&origin(), &background, soon()).await.is_none());
        let _third = limiter.acquire(&origin(), &urgent, soon()).await.unwrap();
        assert!(limiter.acquire(&origin(), &urgent, soon()).await.is_none());
        drop(first);
        assert!(limiter.acquire(&origin(), &background, soon()).await.is_some());
    }

    #[tokio::test]
    async fn work_that_becomes_urgent_uses_the_reserve() {
        let limiter = Limiter::new(Concurrency { per_host: 2, on_demand_reserve: 1 });
        let background = Priority::new(FetchClass::Background);
        let _held = limiter.acquire(&origin(), &background, soon()).await.unwrap();
        let raised = Priority::new(FetchClass::Background);
        let deadline = Instant::now() + Duration::from_secs(20);
        let at = origin();
        let waiting = limiter.acquire(&at, &raised, deadline);
        let (permit, ()) = tokio::join!(waiting, async { raised.raise(FetchClass::OnDemand) });
        assert!(permit.is_some());
    }
}
