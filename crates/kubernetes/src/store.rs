//! The synced secrets, indexed so that a lookup does not depend on how many there are.
//!
//! Equal payloads are stored once and counted as one candidate. Each (host, path) has its holders by [rank](crate::ranked).
//! A lookup asks for the image's path, its parents, and the whole registry, most specific first, literal hosts before
//! patterns; so it costs the depth of the repository, not the number of secrets.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};

use crate::change::Change;
use crate::matching::{SecretKey, host_matches, shape};
use crate::ranked::Ranked;
use crate::secret::{Entry, Payload, SecretType};

/// The most payload bytes that are kept; newer secrets are skipped beyond it.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 64 << 20;

/// Names one secret.
///
/// The type belongs to it: a secret is deleted and made anew with the other type under the same name, and of that two watches
/// tell in any order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SecretId {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its type.
    pub kind: SecretType,
}

/// One secret as the API server gave it, parsed.
#[derive(Debug, Clone)]
pub(crate) struct Secret {
    /// Which one.
    pub id: SecretId,
    /// When it was created, in seconds since 1970.
    pub created: i64,
    /// Its entries.
    pub payload: Payload,
}

/// An entry that matches an image, and whose it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Match<'a> {
    /// The secret that is named for it; of several with the same payload the first by rank.
    pub id: &'a SecretId,
    /// The entry, with the key that matched as normalised.
    pub entry: &'a Entry,
    /// When the secret was created, in seconds since 1970.
    pub created: i64,
}

/// What matches one image: the keys, most specific first, with who has them.
#[derive(Debug)]
pub(crate) struct Matching<'a>(Vec<(&'a SecretKey, &'a Holders)>);

/// What became of a secret that was put into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Applied {
    /// Lookups may answer otherwise.
    Changed,
    /// It is as it was.
    Same,
    /// It is left out, and what it had before is gone: there is no room.
    Full,
}

/// The secrets of one cluster.
#[derive(Debug, Default)]
pub(crate) struct SecretStore {
    secrets: HashMap<SecretId, Held>,
    payloads: HashMap<[u8; 32], Weak<Payload>>,
    literal: HashMap<SecretKey, Holders>,
    /// By path, number of labels and port, so that a lookup tries those only that may match.
    patterns: HashMap<(String, usize, String), BTreeMap<SecretKey, Holders>>,
    bytes: usize,
}

#[derive(Debug)]
struct Held {
    payload: Arc<Payload>,
    created: i64,
}

/// The secrets that have one key.
#[derive(Debug, Default)]
struct Holders {
    all: Ranked,
    by_namespace: HashMap<Arc<str>, Ranked>,
}

impl Holders {
    fn insert(&mut self, created: i64, id: &SecretId, payload: &Arc<Payload>) {
        let rank = (Reverse(created), id.clone());
        self.by_namespace.entry(id.namespace.clone()).or_default().insert(rank.clone(), payload);
        self.all.insert(rank, payload);
    }

    /// Returns whether none is left.
    fn remove(&mut self, created: i64, id: &SecretId, payload: &Payload) -> bool {
        let rank = (Reverse(created), id.clone());
        self.all.remove(&rank, &payload.digest);
        if let Some(own) = self.by_namespace.get_mut(&id.namespace) {
            own.remove(&rank, &payload.digest);
            if own.is_empty() {
                self.by_namespace.remove(&id.namespace);
            }
        }
        self.all.is_empty()
    }
}

impl SecretStore {
    /// Returns the number of secrets.
    pub(crate) fn len(&self) -> usize {
        self.secrets.len()
    }

    /// Adds or replaces a secret. Also returns what changed by that.
    pub(crate) fn apply(&mut self, secret: Secret) -> (Applied, Change) {
        if let Some(held) = self.secrets.get(&secret.id)
            && held.payload.digest == secret.payload.digest
            && held.created == secret.created
        {
            return (Applied::Same, Change::default());
        }
        let mut change = self.remove(&secret.id).unwrap_or_default();
        let known = self.payloads.get(&secret.payload.digest).and_then(Weak::upgrade);
        let payload = match known {
            Some(payload) => payload,
            None if self.bytes + secret.payload.size > MAX_PAYLOAD_BYTES => return (Applied::Full, change),
            None => {
                let payload = Arc::new(secret.payload);
                self.bytes += payload.size;
                self.payloads.insert(payload.digest, Arc::downgrade(&payload));
                change.new = Some(Arc::clone(&payload));
                payload
            }
        };
        for key in payload.keys() {
            let holders = match key.is_glob() {
                true => self.patterns.entry(place(key)).or_default().entry(key.clone()).or_default(),
                false => self.literal.entry(key.clone()).or_default(),
            };
            holders.insert(secret.created, &secret.id, &payload);
        }
        self.secrets.insert(secret.id, Held { payload, created: secret.created });
        (Applied::Changed, change)
    }

    /// Removes a secret. Returns what changed by that, where it was there.
    pub(crate) fn remove(&mut self, id: &SecretId) -> Option<Change> {
        let held = self.secrets.remove(id)?;
        for key in held.payload.keys() {
            if !key.is_glob() {
                if let Some(holders) = self.literal.get_mut(key)
                    && holders.remove(held.created, id, &held.payload)
                {
                    self.literal.remove(key);
                }
            } else if let Some(patterns) = self.patterns.get_mut(&place(key))
                && let Some(holders) = patterns.get_mut(key)
                && holders.remove(held.created, id, &held.payload)
            {
                patterns.remove(key);
                if patterns.is_empty() {
                    self.patterns.remove(&place(key));
                }
            }
        }
        if Arc::strong_count(&held.payload) > 1 {
            return Some(Change::default());
        }
        self.payloads.remove(&held.payload.digest);
        self.bytes = self.bytes.saturating_sub(held.payload.size);
        Some(Change { gone: Some(held.payload), new: None })
    }

    /// Returns the secrets of this type and `namespace` (all of them for `None`) that are not in `seen`: what was deleted
    /// while nobody watched.
    pub(crate) fn stale(
        &self,
        namespace: Option<&str>,
        kind: SecretType,
        seen: &HashSet<SecretId>,
    ) -> Vec<SecretId> {
        self.secrets
            .keys()
            .filter(|id| {
                id.kind == kind
                    && namespace.is_none_or(|namespace| &*id.namespace == namespace)
                    && !seen.contains(*id)
            })
            .cloned()
            .collect()
    }

    /// Returns what matches a repository at `host` (its identity): for the repository's path, its parents and the whole
    /// registry.
    pub(crate) fn matching<'a>(&'a self, host: &str, repository: &str) -> Matching<'a> {
        let (labels, port) = shape(host);
        let mut groups = Vec::new();
        let mut path = repository;
        loop {
            let key = SecretKey { host: host.to_owned(), path: path.to_owned() };
            groups.extend(self.literal.get_key_value(&key));
            let patterns = self.patterns.get(&(path.to_owned(), labels, port.to_owned()));
            groups.extend(
                patterns.into_iter().flatten().filter(|(pattern, _)| host_matches(&pattern.host, host)),
            );
            if path.is_empty() {
                return Matching(groups);
            }
            path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        }
    }
}

fn place(pattern: &SecretKey) -> (String, usize, String) {
    let (labels, port) = shape(&pattern.host);
    (pattern.path.clone(), labels, port.to_owned())
}

impl<'a> Matching<'a> {
    /// Returns how many keys of secrets match, copies of a payload counted each.
    pub(crate) fn count(&self) -> usize {
        self.0.iter().map(|(_, holders)| holders.all.len()).sum()
    }

    /// Returns the matches, best first, each payload once for a key.
    ///
    /// The rank is: secrets of `namespace` where it is known; longest path; literal host before pattern; newer creation;
    /// namespace and name by byte order.
    pub(crate) fn ranked(&self, namespace: Option<&str>) -> impl Iterator<Item = Match<'a>> {
        let groups = self.0.iter().map(move |(key, holders)| {
            (*key, &holders.all, namespace.and_then(|namespace| holders.by_namespace.get(namespace)))
        });
        let own = groups.clone().filter_map(|(key, _, own)| Some((key, own?)));
        let own = own.flat_map(|(key, own)| own.iter().map(move |found| (key, found)));
        let others = groups.flat_map(|(key, all, own)| {
            let known = move |payload: &Payload| own.is_some_and(|own| own.has(&payload.digest));
            all.iter().filter(move |(_, payload)| !known(payload)).map(move |found| (key, found))
        });
        own.chain(others).flat_map(|(key, ((created, id), payload))| {
            let entries = payload.entries_for(key).iter();
            entries.map(move |entry| Match { id, entry, created: created.0 })
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use base64::Engine as _;
    use soci_auth::Credential;

    use super::*;

    pub(crate) fn id(namespace: &str, name: &str) -> SecretId {
        SecretId { namespace: namespace.into(), name: name.into(), kind: SecretType::DockerConfigJson }
    }

    pub(crate) fn secret(namespace: &str, name: &str, created: i64, auths: &[(&str, &str)]) -> Secret {
        // As text, since the order counts.
        let auths =
            auths.iter().map(|(key, user)| format!(r#""{key}":{{"username":"{user}","password":"p"}}"#));
        let json = format!(r#"{{"auths":{{{}}}}}"#, auths.collect::<Vec<_>>().join(","));
        let base64 = base64::engine::general_purpose::STANDARD.encode(json);
        let id = id(namespace, name);
        Secret { payload: Payload::parse(&base64, id.kind).unwrap(), id, created }
    }

    fn users(store: &SecretStore, repository: &str, namespace: Option<&str>) -> Vec<String> {
        let name = |found: Match| match &found.entry.credential {
            Credential::Basic { username, .. } => username.clone(),
            other => other.kind().to_owned(),
        };
        store.matching("reg.example", repository).ranked(namespace).map(name).collect()
    }

    #[test]
    fn t95_equal_ranks_are_chosen_by_age_then_name_whatever_the_order_of_arrival() {
        let secrets = [
            secret("b", "x", 10, &[("reg.example", "old-b")]),
            secret("a", "y", 10, &[("reg.example", "old-a-y")]),
            secret("a", "x", 10, &[("reg.example", "old-a-x")]),
            secret("z", "z", 20, &[("reg.example", "new")]),
        ];
        for rotation in 0..secrets.len() {
            let mut store = SecretStore::default();
            for at in 0..secrets.len() {
                store.apply(secrets[(at + rotation) % secrets.len()].clone());
            }
            assert_eq!(users(&store, "a", None), ["new", "old-a-x", "old-a-y", "old-b"]);
        }
    }

    #[test]
    fn t96_the_most_specific_path_comes_first_and_literals_before_patterns() {
        let mut store = SecretStore::default();
        store.apply(secret(
            "n",
            "a",
            1,
            &[("*.example", "glob"), ("reg.example", "host"), ("reg.example/team", "team")],
        ));
        store.apply(secret("n", "b", 9, &[("reg.*/team", "glob-team"), ("reg.example/team/app", "app")]));
        assert_eq!(users(&store, "team/app", None), ["app", "team", "glob-team", "host", "glob"]);
        assert_eq!(users(&store, "teamx/app", None), ["host", "glob"]);
    }

    #[test]
    fn a_lookup_tries_the_patterns_that_may_match_only() {
        let mut store = SecretStore::default();
        let keys: Vec<String> = (0..4000).map(|at| format!("r{at}-*.team.example/p{}", at % 7)).collect();
        let mut auths: Vec<(&str, &str)> = keys.iter().map(|key| (&**key, "other")).collect();
        auths.push(("reg.*:5000", "port"));
        auths.push(("reg.*", "mine"));
        store.apply(secret("n", "s", 1, &auths));
        assert_eq!(users(&store, "p1/a", None), ["mine"]);
        let tried = store.patterns.get(&(String::new(), 2, String::new())).unwrap();
        assert_eq!(tried.len(), 1, "of {} places", store.patterns.len());
        store.remove(&id("n", "s"));
        assert!(store.patterns.is_empty());
    }

    #[test]
    fn logins_for_one_key_that_is_spelled_in_several_ways_are_all_offered_in_their_order() {
        let mut store = SecretStore::default();
        store.apply(secret(
            "n",
            "s",
            1,
            &[
                ("https://reg.example/v1/", "stale"),
                ("reg.example", "good"),
                ("reg.example/team", "team"),
                ("http://reg.example", "stale"),
                ("reg.example:443", "third"),
            ],
        ));
        assert_eq!(users(&store, "team/a", None), ["team", "stale", "good", "third"]);
        store.apply(secret("n", "other", 9, &[("reg.example", "newer")]));
        assert_eq!(users(&store, "a", None), ["newer", "stale", "good", "third"]);
        store.remove(&id("n", "s"));
        assert_eq!(users(&store, "a", None), ["newer"]);
        store.remove(&id("n", "other"));
        assert!(store.literal.is_empty());
    }

    #[test]
    fn the_pods_namespace_comes_first() {
        let mut store = SecretStore::default();
        store.apply(secret("other", "s", 9, &[("reg.example/team", "theirs")]));
        store.apply(secret("mine", "s", 1, &[("reg.example", "mine")]));
        assert_eq!(users(&store, "team/a", Some("mine")), ["mine", "theirs"]);
        assert_eq!(users(&store, "team/a", None), ["theirs", "mine"]);
    }

    #[test]
    fn t90_updates_and_deletions_leave_nothing_behind() {
        let mut store = SecretStore::default();
        for (entries, expected) in [
            (&[("reg.example", "a"), ("*.io", "a")][..], Applied::Changed),
            (&[("reg.example", "a"), ("*.io", "a")], Applied::Same),
            (&[("reg.example", "b")], Applied::Changed),
        ] {
            assert_eq!(store.apply(secret("n", "s", 1, entries)).0, expected);
        }
        assert_eq!(users(&store, "x", None), ["b"]);
        assert!(store.remove(&id("n", "s")).is_some());
        assert!(users(&store, "x", None).is_empty());
        assert!(
            store.literal.is_empty()
                && store.patterns.is_empty()
                && store.payloads.is_empty()
                && store.bytes == 0
        );
    }

    #[test]
    fn copies_in_many_namespaces_are_one_payload_and_one_candidate() {
        let mut store = SecretStore::default();
        for at in 0..1000 {
            store.apply(secret(&format!("n{at:04}"), "pull", 1, &[("reg.example", "shared")]));
        }
        assert_eq!((store.len(), store.payloads.len()), (1000, 1));
        let matching = store.matching("reg.example", "x");
        let met: usize = matching.0.iter().map(|(_, holders)| holders.all.iter().count()).sum();
        assert_eq!((matching.count(), met), (1000, 1), "a lookup meets one, not each");
        assert_eq!(users(&store, "x", Some("n0500")), ["shared"]);
    }

    #[test]
    fn t98_what_is_not_listed_any_more_is_stale() {
        let mut store = SecretStore::default();
        for name in ["kept", "gone"] {
            store.apply(secret("n", name, 1, &[("reg.example", name)]));
        }
        let seen = HashSet::from([id("n", "kept")]);
        assert!(store.stale(Some("m"), SecretType::DockerConfigJson, &seen).is_empty());
        assert!(store.stale(None, SecretType::DockerCfg, &seen).is_empty());
        assert_eq!(store.stale(None, SecretType::DockerConfigJson, &seen), [id("n", "gone")]);
    }
}
