//! Secrets in the order in which the contract's tie-break takes them, each payload once.
//!
//! One payload is usually copied into every namespace. A lookup that met each copy would cost as much as there are
//! namespaces, so the copies are kept apart: only the first of each payload is met.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::secret::{Payload, SecretType};
use crate::store::SecretId;

/// Where a secret stands: newer creation first, then namespace and name by byte order.
pub(crate) type Rank = (Reverse<i64>, SecretId);

/// Secrets by rank.
#[derive(Debug, Default)]
pub(crate) struct Ranked {
    /// Of the secrets with one payload the first.
    firsts: BTreeMap<Rank, Arc<Payload>>,
    /// Every secret, after the digest of its payload.
    all: BTreeSet<([u8; 32], Rank)>,
}

impl Ranked {
    /// Adds a secret that is not among them.
    pub(crate) fn insert(&mut self, rank: Rank, payload: &Arc<Payload>) {
        let first = self.first_with(&payload.digest).cloned();
        self.all.insert((payload.digest, rank.clone()));
        if first.as_ref().is_some_and(|first| *first < rank) {
            return;
        }
        if let Some(first) = first {
            self.firsts.remove(&first);
        }
        self.firsts.insert(rank, Arc::clone(payload));
    }

    /// Removes the secret at `rank`, whose payload has `digest`.
    pub(crate) fn remove(&mut self, rank: &Rank, digest: &[u8; 32]) {
        self.all.remove(&(*digest, rank.clone()));
        if let Some(payload) = self.firsts.remove(rank)
            && let Some(next) = self.first_with(digest)
        {
            self.firsts.insert(next.clone(), payload);
        }
    }

    /// Returns how many there are, copies counted each.
    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether one of them has the payload with `digest`.
    pub(crate) fn has(&self, digest: &[u8; 32]) -> bool {
        self.first_with(digest).is_some()
    }

    /// Returns the first secret of each payload.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Rank, &Arc<Payload>)> {
        self.firsts.iter()
    }

    fn first_with(&self, digest: &[u8; 32]) -> Option<&Rank> {
        let kind = SecretType::DockerConfigJson;
        let nobody = SecretId { namespace: Arc::default(), name: Arc::default(), kind };
        let least = (*digest, (Reverse(i64::MAX), nobody));
        self.all.range(least..).next().filter(|(found, _)| found == digest).map(|(_, rank)| rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{id, secret};

    /// Compares with what is plainly so: all secrets sorted, of equal payloads the first.
    fn check(ranked: &Ranked, model: &BTreeMap<Rank, Arc<Payload>>) {
        let mut seen = BTreeSet::new();
        let expected: Vec<_> = model.iter().filter(|(_, payload)| seen.insert(payload.digest)).collect();
        let found: Vec<_> = ranked.iter().collect();
        let ids = |list: &[(&Rank, &Arc<Payload>)]| -> Vec<(Rank, [u8; 32])> {
            list.iter().map(|(rank, payload)| ((*rank).clone(), payload.digest)).collect()
        };
        assert_eq!(ids(&found), ids(&expected));
        assert_eq!((ranked.len(), ranked.is_empty()), (model.len(), model.is_empty()));
        assert!(expected.iter().all(|(_, payload)| ranked.has(&payload.digest)));
    }

    proptest::proptest! {
        #[test]
        fn in_any_order_of_arrival_and_departure_the_first_of_each_payload_is_met(
            steps in proptest::collection::vec((0..3_u8, 0..6_i64, 0..4_u8), 1..60)
        ) {
            let payloads: Vec<_> = ["a", "b", "c", "d"]
                .map(|user| Arc::new(secret("n", "s", 0, &[("reg.example", user)]).payload))
                .into();
            let (mut ranked, mut model) = (Ranked::default(), BTreeMap::<Rank, Arc<Payload>>::new());
            for (name, created, payload) in steps {
                let rank = (Reverse(created), id("n", &name.to_string()));
                match model.remove(&rank) {
                    Some(present) => ranked.remove(&rank, &present.digest),
                    None => {
                        let payload = &payloads[usize::from(payload)];
                        ranked.insert(rank.clone(), payload);
                        model.insert(rank, Arc::clone(payload));
                    }
                }
                check(&ranked, &model);
            }
        }
    }
}
