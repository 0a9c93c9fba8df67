//! A list of what somebody else owns, to be looked at for as long as they do.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// Refers to each `T` that was [`added`](Self::add) and is still owned. A `T` calls [`Living::prune`] when it is dropped:
/// what a list refers to keeps its memory, and a piece of each of hundreds of layers keeps a page each.
#[derive(Debug)]
pub(super) struct Living<T>(Mutex<Vec<Weak<T>>>);

impl<T> Default for Living<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Living<T> {
    pub(super) fn add(&self, one: &Arc<T>) {
        self.0.lock().push(Arc::downgrade(one));
    }

    /// Returns all that are still owned.
    pub(super) fn all(&self) -> Vec<Arc<T>> {
        self.0.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Forgets what nobody owns any more, also what is being dropped.
    pub(super) fn prune(&self) {
        let mut list = self.0.lock();
        list.retain(|one| one.strong_count() > 0);
        if list.capacity() > list.len().saturating_mul(4) {
            list.shrink_to_fit();
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }
}
