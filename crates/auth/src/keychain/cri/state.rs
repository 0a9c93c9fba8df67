//! The credentials of pulls by reference, by registry and by image id: one picture from three sides, kept in step and in
//! bounds. A credential stands pending until its pull ends, then confirmed or demoted; the best is offered first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};

use soci_oci::ImageRef;
use tokio::time::Instant;

use crate::keychain::{Candidate, CandidateId};
use crate::{AuthBoard, Credential, CredentialScope, Fingerprint};

/// The most credentials kept for one reference.
pub(super) const PER_REFERENCE: usize = 3;
/// The most references kept.
pub(super) const MAX_REFERENCES: usize = 4096;
/// What is kept, and by what it is found.
#[derive(Debug, Default)]
pub(super) struct State {
    /// By [`ImageRef::key`].
    pub(super) references: HashMap<String, Reference>,
    /// Confirmed entries by registry identity, newest first.
    pub(super) registries: HashMap<String, BTreeMap<Reverse<u64>, String>>,
    /// Image id to the references that were pulled as it.
    pub(super) images: HashMap<String, HashSet<String>>,
    /// Counts arrivals, confirmations and uses.
    pub(super) sequence: u64,
}

/// What pulls of one reference brought.
#[derive(Debug)]
pub(super) struct Reference {
    pub(super) registry: String,
    pub(super) image_id: Option<String>,
    pub(super) used: u64,
    /// Newest first.
    pub(super) entries: Vec<Entry>,
}

/// One credential of a reference.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) credential: Credential,
    pub(super) fingerprint: Fingerprint,
    /// The registry named by `server_address`.
    pub(super) server: Option<String>,
    pub(super) sequence: u64,
    pub(super) standing: Standing,
    /// When a pull brought it last.
    pub(super) arrived: Instant,
}

/// Ordered from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    Confirmed,
    Pending,
    Demoted,
}

impl State {
    pub(super) fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    pub(super) fn insert(
        &mut self,
        image: &ImageRef,
        credential: Credential,
        fingerprint: Fingerprint,
        server: Option<String>,
    ) {
        let sequence = self.next();
        let reference = self.references.entry(image.key()).or_insert_with(|| Reference {
            registry: image.registry().identity().to_owned(),
            image_id: None,
            used: 0,
            entries: Vec::new(),
        });
        reference.used = sequence;
        if let Some(entry) = reference.entries.iter_mut().find(|entry| entry.fingerprint == fingerprint) {
            entry.server = server;
            entry.arrived = Instant::now();
            if entry.standing == Standing::Demoted {
                entry.standing = Standing::Pending;
                entry.sequence = sequence;
            }
            return;
        }
        let (standing, arrived) = (Standing::Pending, Instant::now());
        let entry = Entry { credential, fingerprint, server, sequence, standing, arrived };
        reference.entries.insert(0, entry);
        if reference.entries.len() > PER_REFERENCE {
            // The worst goes: demoted before pending before confirmed, older before newer; never the one just put in.
            let worst = reference.entries.iter().enumerate().skip(1);
            let worst =
                worst.max_by_key(|(_, entry)| (entry.standing, Reverse(entry.sequence))).map(|(at, _)| at);
            if let Some(entry) = worst.map(|at| reference.entries.remove(at)) {
                remove_confirmed(&mut self.registries, &reference.registry, entry.sequence);
            }
        }
    }

    pub(super) fn confirm(&mut self, key: &str, fingerprint: Fingerprint) -> bool {
        let sequence = self.next();
        let Some(reference) = self.references.get_mut(key) else { return false };
        let Some(entry) = reference.entries.iter_mut().find(|entry| entry.fingerprint == fingerprint) else {
            return false;
        };
        remove_confirmed(&mut self.registries, &reference.registry, entry.sequence);
        entry.standing = Standing::Confirmed;
        entry.sequence = sequence;
        let confirmed = self.registries.entry(reference.registry.clone()).or_default();
        confirmed.insert(Reverse(sequence), key.to_owned());
        true
    }

    pub(super) fn demote(&mut self, key: &str, fingerprint: Fingerprint) {
        if let Some(reference) = self.references.get_mut(key)
            && let Some(entry) = reference.entries.iter_mut().find(|entry| entry.fingerprint == fingerprint)
            && entry.standing == Standing::Pending
        {
            entry.standing = Standing::Demoted;
        }
    }

    pub(super) fn name_image(&mut self, key: &str, id: String) {
        let Some(reference) = self.references.get_mut(key) else { return };
        if let Some(old) = reference.image_id.replace(id.clone())
            && old != id
            && let Some(keys) = self.images.get_mut(&old)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.images.remove(&old);
            }
        }
        self.images.entry(id).or_default().insert(key.to_owned());
    }

    pub(super) fn forget(&mut self, key: &str) {
        let Some(reference) = self.references.remove(key) else { return };
        for entry in &reference.entries {
            remove_confirmed(&mut self.registries, &reference.registry, entry.sequence);
        }
        if let Some(id) = reference.image_id
            && let Some(keys) = self.images.get_mut(&id)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.images.remove(&id);
            }
        }
    }

    /// Forgets the reference that was used longest ago, but none that a mounted layer needs.
    pub(super) fn bound(&mut self, board: &AuthBoard) {
        while self.references.len() > MAX_REFERENCES {
            let oldest = self.references.iter().filter(|(key, _)| !board.is_pinned(key));
            let oldest = oldest.min_by_key(|(_, reference)| reference.used).map(|(key, _)| key.clone());
            match oldest {
                Some(key) => self.forget(&key),
                None => return,
            }
        }
    }
}

fn remove_confirmed(
    registries: &mut HashMap<String, BTreeMap<Reverse<u64>, String>>,
    registry: &str,
    sequence: u64,
) {
    if let Some(confirmed) = registries.get_mut(registry) {
        confirmed.remove(&Reverse(sequence));
        if confirmed.is_empty() {
            registries.remove(registry);
        }
    }
}

impl Entry {
    /// Whether this credential may be shown to the host that asks. It is the registry's; a mirror gets it only when it
    /// is the one that the caller named, or the operator says so.
    pub(super) fn is_for(&self, scope: &CredentialScope) -> bool {
        match (&self.server, scope.mirror) {
            (Some(server), _) => *server == scope.identity() || (scope.mirror && scope.forward),
            (None, false) => true,
            (None, true) => scope.forward,
        }
    }

    pub(super) fn candidate(&self, key: &str) -> Candidate {
        let id = CandidateId { entry: format!("pull of {key}"), fingerprint: self.fingerprint };
        let age = Some(self.arrived.elapsed());
        Candidate { id, credential: self.credential.clone(), age }
    }
}
