//! Which pod namespace pulled an image, and which images live mounts use.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

const MAX_PULLS: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Pulls(Arc<Mutex<Tables>>);

#[derive(Debug, Default)]
struct Tables {
    /// Number of the last note, to tell the oldest.
    last: u64,
    namespaces: HashMap<String, (u64, String)>,
    /// Bounded by the number of live mounts.
    pins: HashMap<String, usize>,
}

/// Keeps an image marked as in use until dropped.
#[derive(Debug)]
pub struct Pin {
    tables: Arc<Mutex<Tables>>,
    image: String,
}

impl Pulls {
    pub(super) fn note(&self, image: &str, namespace: &str) {
        let mut tables = self.0.lock();
        if tables.namespaces.len() >= MAX_PULLS && !tables.namespaces.contains_key(image) {
            let oldest = tables.namespaces.iter().min_by_key(|(_, (at, _))| *at).map(|(key, _)| key.clone());
            oldest.map(|key| tables.namespaces.remove(&key));
        }
        tables.last += 1;
        let at = tables.last;
        tables.namespaces.insert(image.to_owned(), (at, namespace.to_owned()));
    }

    pub(super) fn namespace(&self, image: &str) -> Option<String> {
        self.0.lock().namespaces.get(image).map(|(_, namespace)| namespace.clone())
    }

    pub(super) fn pin(&self, image: &str) -> Pin {
        *self.0.lock().pins.entry(image.to_owned()).or_default() += 1;
        Pin { tables: Arc::clone(&self.0), image: image.to_owned() }
    }

    pub(super) fn is_pinned(&self, image: &str) -> bool {
        self.0.lock().pins.contains_key(image)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut tables = self.tables.lock();
        if let Some(count) = tables.pins.get_mut(&self.image) {
            *count -= 1;
            if *count == 0 {
                tables.pins.remove(&self.image);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_pinned_until_the_last_pin_is_dropped() {
        let pulls = Pulls::default();
        let (first, second) = (pulls.pin("a"), pulls.pin("a"));
        drop(first);
        assert!(pulls.is_pinned("a") && !pulls.is_pinned("b"));
        drop(second);
        assert!(!pulls.is_pinned("a"));
    }

    #[test]
    fn the_oldest_namespace_makes_room() {
        let pulls = Pulls::default();
        (0..=MAX_PULLS).for_each(|n| pulls.note(&n.to_string(), "ns"));
        assert_eq!(pulls.namespace("0"), None);
        assert_eq!(pulls.namespace("1").as_deref(), Some("ns"));
    }
}
