//! The credentials of pulls by reference, by registry and by image id: one picture from three sides, kept in step and in
//! bounds. A credential stands pending until its pull ends, then confirmed or demoted; the best is offered first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};

use soci_oci::ImageRef;
use tokio::time::Instant;

use crate::keychain::{Candidate, CandidateId};
use crate::{AuthBoard, Credential, CredentialScope, Fingerprint};

/// The most credentials kept for one reference, beside those of pulls under way.
pub(super) const PER_REFERENCE: usize = 3;
/// The most references kept, beside those that are mounted or being pulled.
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

/// What a pull brings, and by what its entry is found again: the same credential for another host is another entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) fingerprint: Fingerprint,
    /// The registry named by `server_address`.
    pub(super) server: Option<String>,
}

/// One credential of a reference.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) credential: Credential,
    pub(super) login: Login,
    pub(super) sequence: u64,
    /// How many pulls that brought it are under way.
    pub(super) pulls: usize,
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

    /// Takes what a pull brings. The pull is under way until [`confirm`](Self::confirm) or [`demote`](Self::demote).
    pub(super) fn insert(&mut self, image: &ImageRef, credential: Credential, login: Login) {
        let sequence = self.next();
        let reference = self.references.entry(image.key()).or_insert_with(|| Reference {
            registry: image.registry().identity().to_owned(),
            image_id: None,
            used: 0,
            entries: Vec::new(),
        });
        reference.used = sequence;
        if let Some(entry) = reference.entries.iter_mut().find(|entry| entry.login == login) {
            entry.pulls += 1;
            entry.arrived = Instant::now();
            if entry.standing == Standing::Demoted {
                entry.standing = Standing::Pending;
                entry.sequence = sequence;
            }
            return;
        }
        let (standing, arrived) = (Standing::Pending, Instant::now());
        let entry = Entry { credential, login, sequence, pulls: 1, standing, arrived };
        reference.entries.insert(0, entry);
        self.bound_entries(&image.key());
    }

    /// A pull went well with what it brought. Returns whether that is still here.
    pub(super) fn confirm(&mut self, key: &str, login: &Login) -> bool {
        let sequence = self.next();
        let Some(reference) = self.references.get_mut(key) else { return false };
        let Some(entry) = reference.entries.iter_mut().find(|entry| entry.login == *login) else {
            return false;
        };
        entry.pulls = entry.pulls.saturating_sub(1);
        remove_confirmed(&mut self.registries, &reference.registry, entry.sequence);
        entry.standing = Standing::Confirmed;
        entry.sequence = sequence;
        let confirmed = self.registries.entry(reference.registry.clone()).or_default();
        confirmed.insert(Reverse(sequence), key.to_owned());
        self.bound_entries(key);
        true
    }

    /// A pull failed with what it brought.
    pub(super) fn demote(&mut self, key: &str, login: &Login) {
        if let Some(reference) = self.references.get_mut(key)
            && let Some(entry) = reference.entries.iter_mut().find(|entry| entry.login == *login)
        {
            entry.pulls = entry.pulls.saturating_sub(1);
            if entry.standing == Standing::Pending && entry.pulls == 0 {
                entry.standing = Standing::Demoted;
            }
        }
        self.bound_entries(key);
    }

    pub(super) fn name_image(&mut self, key: &str, id: String) {
        let Some(reference) = self.references.get_mut(key) else { return };
        if let Some(old) = reference.image_id.replace(id.clone()).filter(|old| *old != id) {
            self.unname(key, &old);
        }
        self.images.entry(id).or_default().insert(key.to_owned());
    }

    /// Forgets a reference whose image is gone, but not what a pull under way has brought for it: the kubelet removes an
    /// old image while its reference is pulled again.
    pub(super) fn removed(&mut self, key: &str) {
        let Some(reference) = self.references.get_mut(key) else { return };
        let entries = std::mem::take(&mut reference.entries);
        let (kept, gone): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| entry.pulls > 0);
        for entry in kept.iter().chain(&gone) {
            remove_confirmed(&mut self.registries, &reference.registry, entry.sequence);
        }
        let pending = |entry| Entry { standing: Standing::Pending, ..entry };
        reference.entries = kept.into_iter().map(pending).collect();
        let id = reference.image_id.take();
        if reference.entries.is_empty() {
            self.references.remove(key);
        }
        if let Some(id) = id {
            self.unname(key, &id);
        }
    }

    /// Forgets that a reference is the image of this id.
    fn unname(&mut self, key: &str, id: &str) {
        if let Some(keys) = self.images.get_mut(id) {
            keys.remove(key);
            if keys.is_empty() {
                self.images.remove(id);
            }
        }
    }

    fn forget(&mut self, key: &str) {
        let Some(reference) = self.references.remove(key) else { return };
        for entry in &reference.entries {
            remove_confirmed(&mut self.registries, &reference.registry, entry.sequence);
        }
        if let Some(id) = reference.image_id {
            self.unname(key, &id);
        }
    }

    /// Forgets the worst of a reference that has too many: demoted before pending before confirmed, older before newer;
    /// never what a pull under way has brought. Those are more than [`PER_REFERENCE`] until they end.
    fn bound_entries(&mut self, key: &str) {
        let Some(reference) = self.references.get_mut(key) else { return };
        while reference.entries.len() > PER_REFERENCE {
            let worst = reference.entries.iter().enumerate().filter(|(_, entry)| entry.pulls == 0);
            let worst = worst.max_by_key(|(_, entry)| (entry.standing, Reverse(entry.sequence)));
            let Some(at) = worst.map(|(at, _)| at) else { return };
            let entry = reference.entries.remove(at);
            remove_confirmed(&mut self.registries, &reference.registry, entry.sequence);
        }
    }

    /// Forgets the reference that was used longest ago, but none that a mounted layer needs, or that is being pulled.
    pub(super) fn bound(&mut self, board: &AuthBoard) {
        while self.references.len() > MAX_REFERENCES {
            let pulled = |reference: &Reference| reference.entries.iter().any(|entry| entry.pulls > 0);
            let oldest = self.references.iter();
            let oldest = oldest.filter(|(key, reference)| !pulled(reference) && !board.is_pinned(key));
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
    /// Whether this credential may be shown to the host that asks. It is the registry's, unless the caller named another
    /// host; a mirror gets it only when it is the one that was named, or when the operator says that it gets the registry's.
    pub(super) fn is_for(&self, scope: &CredentialScope) -> bool {
        match (&self.login.server, scope.mirror) {
            (None, false) => true,
            (None, true) => scope.forward,
            (Some(server), false) => scope.is_at(server),
            (Some(server), true) => {
                scope.is_at(server) || (scope.forward && server == scope.image.registry().identity())
            }
        }
    }

    pub(super) fn candidate(&self, key: &str) -> Candidate {
        let id = CandidateId { entry: format!("pull of {key}"), fingerprint: self.login.fingerprint };
        let age = Some(self.arrived.elapsed());
        Candidate { id, credential: self.credential.clone(), age }
    }
}
