//! Who needs which zTOC, so that what nobody needs goes at once and what somebody needs never does.
//!
//! A snapshot claims the zTOC that it is mounted with, from before the mount until it is released. An image that is being
//! pulled holds those of its index, from before the first is stored until its session ends. Whoever deletes looks and
//! deletes under the same lock under which claims are made, so that no zTOC is deleted between "it is stored already" and
//! the claim on it. The lock is a leaf, and is held for one unlink at most.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use soci_oci::Digest;
use tokio::sync::Notify;

/// The claims of one root.
#[derive(Debug, Default)]
pub struct Claims {
    state: Mutex<State>,
    /// Signalled when something may have lost its last claim.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    by_snapshot: BTreeMap<u64, Digest>,
    /// Which snapshots claim a zTOC. There is no empty set.
    claimed: BTreeMap<Digest, BTreeSet<u64>>,
    /// How many images being pulled hold it.
    held: BTreeMap<Digest, usize>,
    /// Those that lost their last hold since [`Claims::ended`].
    ended: Vec<Digest>,
}

/// Holds the zTOCs of one image until it is dropped.
#[derive(Debug)]
pub struct Hold {
    claims: Arc<Claims>,
    ztocs: Vec<Digest>,
}

impl Claims {
    /// Notes that `snapshot` is, or is about to be, mounted with `ztoc`.
    pub fn claim(&self, snapshot: u64, ztoc: Digest) {
        let mut state = self.state.lock();
        if let Some(before) = state.by_snapshot.insert(snapshot, ztoc) {
            take_back(&mut state.claimed, &before, snapshot);
        }
        state.claimed.entry(ztoc).or_default().insert(snapshot);
    }

    /// Takes the claim of `snapshot` back, and returns what it was on.
    pub fn unclaim(&self, snapshot: u64) -> Option<Digest> {
        let mut state = self.state.lock();
        let ztoc = state.by_snapshot.remove(&snapshot)?;
        take_back(&mut state.claimed, &ztoc, snapshot);
        Some(ztoc)
    }

    /// Returns the zTOC that `snapshot` claims, and whether it is the first of those that claim it.
    pub fn of(&self, snapshot: u64) -> Option<(Digest, bool)> {
        let state = self.state.lock();
        let ztoc = *state.by_snapshot.get(&snapshot)?;
        let first = state.claimed.get(&ztoc).and_then(BTreeSet::first) == Some(&snapshot);
        Some((ztoc, first))
    }

    /// Returns the snapshots that claim `ztoc`, in order.
    pub fn snapshots(&self, ztoc: &Digest) -> Vec<u64> {
        self.state.lock().claimed.get(ztoc).into_iter().flatten().copied().collect()
    }

    /// Whether a snapshot claims `ztoc`.
    pub fn is_claimed(&self, ztoc: &Digest) -> bool {
        self.state.lock().claimed.contains_key(ztoc)
    }

    /// Holds `ztocs`.
    pub fn hold(self: &Arc<Self>, ztocs: Vec<Digest>) -> Hold {
        let mut state = self.state.lock();
        for ztoc in &ztocs {
            *state.held.entry(*ztoc).or_default() += 1;
        }
        drop(state);
        Hold { claims: Arc::clone(self), ztocs }
    }

    /// Runs `delete` unless somebody needs `ztoc`; nobody can begin to meanwhile. Returns whether it ran.
    pub fn unless_needed(&self, ztoc: &Digest, delete: impl FnOnce()) -> bool {
        let state = self.state.lock();
        let free = !state.claimed.contains_key(ztoc) && !state.held.contains_key(ztoc);
        if free {
            delete();
        }
        free
    }

    /// Waits until zTOCs lost their last hold, and returns them. Cancel-safe.
    pub async fn ended(&self) -> Vec<Digest> {
        loop {
            let more = self.ended.notified();
            let ended = std::mem::take(&mut self.state.lock().ended);
            if !ended.is_empty() {
                return ended;
            }
            more.await;
        }
    }
}

impl Hold {
    /// Returns what is held.
    pub fn ztocs(&self) -> &[Digest] {
        &self.ztocs
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.claims.state.lock();
        for ztoc in &self.ztocs {
            lower(&mut state.held, ztoc);
            if !state.held.contains_key(ztoc) {
                state.ended.push(*ztoc);
            }
        }
        drop(state);
        self.claims.ended.notify_one();
    }
}

fn take_back(claimed: &mut BTreeMap<Digest, BTreeSet<u64>>, ztoc: &Digest, snapshot: u64) {
    if let Some(snapshots) = claimed.get_mut(ztoc) {
        snapshots.remove(&snapshot);
        if snapshots.is_empty() {
            claimed.remove(ztoc);
        }
    }
}

fn lower(counts: &mut BTreeMap<Digest, usize>, ztoc: &Digest) {
    if let Some(count) = counts.get_mut(ztoc) {
        *count -= 1;
        if *count == 0 {
            counts.remove(ztoc);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_ztoc_is_needed_while_a_snapshot_claims_it_or_a_pull_holds_it() {
        let claims = Arc::new(Claims::default());
        let ztoc = Digest::of(b"ztoc");
        let deleted = || claims.unless_needed(&ztoc, || {});
        let (one, two) = (claims.hold(vec![ztoc]), claims.hold(vec![ztoc]));
        assert!(!deleted());
        claims.claim(1, ztoc);
        claims.claim(1, ztoc);
        claims.claim(2, ztoc);
        drop((one, two));
        assert_eq!(claims.ended().await, [ztoc]);
        assert!(!deleted(), "two snapshots");
        assert_eq!((claims.of(1), claims.of(2)), (Some((ztoc, true)), Some((ztoc, false))));
        assert_eq!(claims.snapshots(&ztoc), [1, 2]);
        assert_eq!(claims.unclaim(1), Some(ztoc));
        assert_eq!(claims.unclaim(1), None);
        assert!(!deleted(), "one snapshot");
        assert_eq!((claims.of(1), claims.of(2)), (None, Some((ztoc, true))));
        assert!(claims.is_claimed(&ztoc));
        claims.claim(2, Digest::of(b"other"));
        assert!(deleted(), "it has another zTOC now");
    }
}
