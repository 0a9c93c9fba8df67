//! For which registries a change of secrets is news.
//!
//! News lets logins be tried again that were refused a moment ago, so there is none without a login that was not there
//! before, or is not there any more: a secret that changed in another login, or one more copy of one, has nothing to try.

use std::collections::BTreeSet;
use std::sync::Arc;

use soci_auth::AuthBoard;

use crate::secret::{Entry, Payload};

/// A change of more registries than this wakes the readers of all.
const MAX_TOUCHED: usize = 64;

/// What became of one secret.
///
/// It holds payloads, by which the store counts whether they are in use: it must be gone before the next change.
#[derive(Debug, Default)]
pub(crate) struct Change {
    /// What no secret has any more.
    pub gone: Option<Arc<Payload>>,
    /// What no secret had before.
    pub new: Option<Arc<Payload>>,
}

impl Change {
    /// Returns the entries that are only on one side.
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        let (gone, new) = (self.gone.as_deref(), self.new.as_deref());
        without(gone, new).chain(without(new, gone))
    }
}

fn without<'a>(payload: Option<&'a Payload>, other: Option<&'a Payload>) -> impl Iterator<Item = &'a Entry> {
    let entries = payload.map(|payload| payload.entries.as_slice()).unwrap_or_default();
    entries.iter().filter(move |entry| {
        let same = other.map(|other| other.entries_for(&entry.key)).unwrap_or_default();
        same.iter().all(|same| same.fingerprint != entry.fingerprint)
    })
}

/// The registries that changes are for.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    hosts: BTreeSet<String>,
    /// Whether they may be for any.
    any: bool,
}

impl Touched {
    pub(crate) fn add(&mut self, change: &Change) {
        for Entry { key, .. } in change.entries() {
            if self.any {
                return;
            }
            self.hosts.insert(key.host.clone());
            self.any = key.is_glob() || self.hosts.len() > MAX_TOUCHED;
        }
    }

    /// Says so on the board.
    pub(crate) fn tell(&self, board: &AuthBoard) {
        match self.any {
            false => self.hosts.iter().for_each(|host| board.bump(host)),
            true => board.bump_all(),
        }
    }
}
