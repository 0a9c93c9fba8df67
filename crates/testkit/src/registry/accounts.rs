//! Users, their passwords and rights, and the tokens that were issued to them. All of it changes at run time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use base64::Engine;
use parking_lot::Mutex;

/// A right: what may be done to a repository.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Scope {
    pub(crate) repository: String,
    pub(crate) actions: BTreeSet<String>,
}

impl Scope {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("repository:")?;
        let (repository, actions) = rest.rsplit_once(':')?;
        let actions = actions.split(',').map(str::to_owned).collect();
        Some(Self { repository: repository.to_owned(), actions })
    }
}

/// What a password or token is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is this user's; nothing for an anonymous token.
    Valid(Option<String>),
    /// It was once.
    Expired(Option<String>),
    /// It never was, or not any more.
    Wrong(Option<String>),
    /// It is valid, but not for this.
    Insufficient(Option<String>),
}

impl Verdict {
    pub(crate) fn user(&self) -> Option<&str> {
        match self {
            Self::Valid(user) | Self::Expired(user) | Self::Wrong(user) | Self::Insufficient(user) => {
                user.as_deref()
            }
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Accounts(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    users: BTreeMap<String, User>,
    tokens: BTreeMap<String, Token>,
    identities: BTreeMap<String, String>,
    anonymous_pull: bool,
    issued: u64,
}

struct User {
    password: String,
    expired: bool,
    /// Repository to actions; absent = everything.
    rights: Option<BTreeMap<String, BTreeSet<String>>>,
}

struct Token {
    user: Option<String>,
    scopes: Vec<Scope>,
    expires: Instant,
}

impl Accounts {
    pub(crate) fn set_password(&self, user: &str, password: &str) {
        let mut inner = self.0.lock();
        let rights = inner.users.remove(user).and_then(|user| user.rights);
        inner.users.insert(user.to_owned(), User { password: password.to_owned(), expired: false, rights });
    }

    pub(crate) fn expire_password(&self, user: &str) {
        if let Some(user) = self.0.lock().users.get_mut(user) {
            user.expired = true;
        }
    }

    pub(crate) fn remove(&self, user: &str) {
        self.0.lock().users.remove(user);
    }

    pub(crate) fn restrict(&self, user: &str, repository: &str, actions: &[&str]) {
        if let Some(user) = self.0.lock().users.get_mut(user) {
            let actions = actions.iter().map(|&action| action.to_owned()).collect();
            user.rights.get_or_insert_default().insert(repository.to_owned(), actions);
        }
    }

    pub(crate) fn set_anonymous_pull(&self, allowed: bool) {
        self.0.lock().anonymous_pull = allowed;
    }

    pub(crate) fn set_identity_token(&self, token: &str, user: &str) {
        self.0.lock().identities.insert(token.to_owned(), user.to_owned());
    }

    pub(crate) fn revoke_tokens(&self) {
        let mut inner = self.0.lock();
        inner.tokens.clear();
    }

    pub(crate) fn revoke_identity_tokens(&self) {
        self.0.lock().identities.clear();
    }

    pub(crate) fn password(&self, user: &str, password: &str) -> Verdict {
        let name = Some(user.to_owned());
        match self.0.lock().users.get(user) {
            Some(found) if found.password == password && found.expired => Verdict::Expired(name),
            Some(found) if found.password == password => Verdict::Valid(name),
            _ => Verdict::Wrong(name),
        }
    }

    pub(crate) fn identity(&self, token: &str) -> Option<String> {
        self.0.lock().identities.get(token).cloned()
    }

    /// Whether `user` (nobody = anonymous) may do `action` in `repository`.
    pub(crate) fn may(&self, user: Option<&str>, repository: &str, action: &str) -> bool {
        may(&self.0.lock(), user, repository, action)
    }

    /// Issues a token for those of `scopes` that `user` has a right to.
    pub(crate) fn issue(&self, user: Option<&str>, scopes: &[Scope], ttl: Duration) -> String {
        let mut inner = self.0.lock();
        let granted = scopes
            .iter()
            .map(|scope| Scope {
                repository: scope.repository.clone(),
                actions: scope
                    .actions
                    .iter()
                    .filter(|action| may(&inner, user, &scope.repository, action))
                    .cloned()
                    .collect(),
            })
            .filter(|scope| !scope.actions.is_empty())
            .collect();
        inner.issued += 1;
        let token = format!("token-{}-{}", inner.issued, user.unwrap_or("anonymous"));
        let expires = Instant::now() + ttl;
        inner.tokens.insert(token.clone(), Token { user: user.map(str::to_owned), scopes: granted, expires });
        token
    }

    pub(crate) fn issue_identity(&self, user: &str) -> String {
        let mut inner = self.0.lock();
        inner.issued += 1;
        let token = format!("refresh-{}-{user}", inner.issued);
        inner.identities.insert(token.clone(), user.to_owned());
        token
    }

    pub(crate) fn token(&self, token: &str, repository: &str, action: &str) -> Verdict {
        let inner = self.0.lock();
        let Some(found) = inner.tokens.get(token) else {
            return Verdict::Wrong(None);
        };
        let user = found.user.clone();
        if Instant::now() >= found.expires {
            return Verdict::Expired(user);
        }
        let granted =
            found.scopes.iter().any(|scope| scope.repository == repository && scope.actions.contains(action));
        if granted { Verdict::Valid(user) } else { Verdict::Insufficient(user) }
    }
}

fn may(inner: &Inner, user: Option<&str>, repository: &str, action: &str) -> bool {
    match user.map(|user| inner.users.get(user)) {
        None => inner.anonymous_pull && action == "pull",
        Some(None) => false,
        Some(Some(user)) => user
            .rights
            .as_ref()
            .is_none_or(|rights| rights.get(repository).is_some_and(|actions| actions.contains(action))),
    }
}

/// Splits a `Basic` credential.
pub(crate) fn basic(value: &str) -> Option<(String, String)> {
    let (scheme, rest) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(rest.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// Takes the token of a `Bearer` credential.
pub(crate) fn bearer(value: &str) -> Option<&str> {
    let (scheme, rest) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| rest.trim())
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").field("users", &self.users.len()).finish_non_exhaustive()
    }
}
