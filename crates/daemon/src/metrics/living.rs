//! A list of what somebody else owns, to be looked at for as long as they do.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// Refers to each `T` that was [`added`](Self::add) and is still owned. A `T` calls [`Living::prune`] when it is dropped:
/// what a list refers to keeps its memory, and a piece of each of hundreds of layers keeps a page each.
#[derive(Debug)]
pub(super) struct Living<T> {
    list: Mutex<Vec<Weak<T>>>,
    /// Held while one is looked for, so that none is added twice. Not the lock of the list, which the last owner's `drop` takes.
    adding: Mutex<()>,
}

impl<T> Default for Living<T> {
    fn default() -> Self {
        Self { list: Mutex::default(), adding: Mutex::default() }
    }
}

impl<T> Living<T> {
    pub(super) fn add(&self, one: &Arc<T>) {
        self.list.lock().push(Arc::downgrade(one));
    }

    /// Returns the one that `is_it`, or adds the one that `make` returns.
    pub(super) fn find_or_add(&self, is_it: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> Arc<T> {
        let _adding = self.adding.lock();
        if let Some(found) = self.all().into_iter().find(|one| is_it(one)) {
            return found;
        }
        let one = Arc::new(make());
        self.add(&one);
        one
    }

    /// Returns all that are still owned.
    pub(super) fn all(&self) -> Vec<Arc<T>> {
        self.list.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Forgets what nobody owns any more, also what is being dropped.
    pub(super) fn prune(&self) {
        let mut list = self.list.lock();
        list.retain(|one| one.strong_count() > 0);
        if list.capacity() > list.len().saturating_mul(4) {
            list.shrink_to_fit();
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.list.lock().len()
    }
}
