//! Which hosts were unreachable a moment ago, and which scheme a host speaks.
//!
//! A mirror that is down, or that refuses our credentials, would cost every read the time to find that out. After such a
//! failure a host goes to the end of the list for a while that doubles from one second to thirty; the first answer of any kind ends that.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use soci_auth::{Origin, Scheme};

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// Origins remembered at most.
const MAX: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct Health {
    down: Mutex<HashMap<Origin, Down>>,
    /// By `host:port` as https names it: the scheme that answered last.
    spoken: Mutex<HashMap<Origin, Scheme>>,
}

#[derive(Debug, Clone, Copy)]
struct Down {
    until: Instant,
    wait: Duration,
}

impl Health {
    /// Whether `origin` shall be asked after the others.
    pub(crate) fn is_down(&self, origin: &Origin) -> bool {
        self.down.lock().get(origin).is_some_and(|down| Instant::now() < down.until)
    }

    pub(crate) fn failed(&self, origin: &Origin) {
        let mut down = self.down.lock();
        if down.len() >= MAX {
            down.clear();
        }
        let wait = down.get(origin).map_or(FIRST, |known| (known.wait * 2).min(LONGEST));
        down.insert(origin.clone(), Down { until: Instant::now() + wait, wait });
    }

    pub(crate) fn answered(&self, origin: &Origin) {
        self.down.lock().remove(origin);
    }

    /// Returns `origins` with the one first that answered last.
    pub(crate) fn order<'a>(&self, origins: &'a [Origin]) -> Vec<&'a Origin> {
        let mut order: Vec<&Origin> = origins.iter().collect();
        if let [first, _, ..] = origins
            && let Some(scheme) = self.spoken.lock().get(first).copied()
        {
            order.sort_by_key(|origin| origin.scheme() != scheme);
        }
        order
    }

    /// Forgets which scheme a host spoke, after a failure there.
    pub(crate) fn doubt(&self, origin: &Origin) {
        let https = Origin::new(Scheme::Https, origin.host(), Some(origin.port()));
        self.spoken.lock().remove(&https);
    }

    /// Remembers which of a host's origins answered.
    pub(crate) fn spoke(&self, origins: &[Origin], answered: &Origin) {
        if let [first, _, ..] = origins {
            let mut spoken = self.spoken.lock();
            if spoken.len() >= MAX {
                spoken.clear();
            }
            spoken.insert(first.clone(), answered.scheme());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_rests_until_it_answers() {
        let health = Health::default();
        let origin = Origin::of_url(&"https://m.example".parse().unwrap()).unwrap();
        assert!(!health.is_down(&origin));
        health.failed(&origin);
        assert!(health.is_down(&origin));
        health.answered(&origin);
        assert!(!health.is_down(&origin));
    }

    #[test]
    fn the_scheme_that_answered_is_tried_first() {
        let health = Health::default();
        let origins: Vec<Origin> = ["https://localhost:5000", "http://localhost:5000"]
            .iter()
            .map(|url| Origin::of_url(&url.parse().unwrap()).unwrap())
            .collect();
        assert_eq!(health.order(&origins), [&origins[0], &origins[1]]);
        health.spoke(&origins, &origins[1]);
        assert_eq!(health.order(&origins), [&origins[1], &origins[0]]);
    }
}
