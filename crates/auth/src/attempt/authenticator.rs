//! What all requests share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::time::timeout_at;

use super::{Access, AuthAttempt};
use crate::known_hosts::KnownHosts;
use crate::token_cache::TokenCache;
use crate::{AuthBoard, CredentialScope, KeychainChain, Meters, NoMeters, Rejected};

/// How often what was refused is asked again while waiting for news: not every change bumps the board by itself (a file is
/// looked at when it is asked for).
const POLL: Duration = Duration::from_secs(1);
/// What is left of the deadline for the request itself after waiting for news.
const RESERVE: Duration = Duration::from_millis(250);

/// What the authenticator may take its time for.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long after its beginning a request that was refused still waits for news; zero for a command, which says so at
    /// once.
    pub patience: Duration,
    /// How long one token request may take.
    pub token_timeout: Duration,
    /// The client's name in OAuth2 requests.
    pub client_id: String,
    /// What counts.
    pub meters: Arc<dyn Meters>,
}

/// Everything that requests share: options, board, tokens, and what each host asked for last.
#[derive(Debug)]
pub struct Authenticator {
    pub(super) chain: KeychainChain,
    pub(super) board: Arc<AuthBoard>,
    pub(super) settings: Settings,
    pub(super) tokens: TokenCache,
    pub(super) hosts: KnownHosts,
    /// Hosts that were warned about for sending a credential in clear.
    pub(super) warned: Mutex<Vec<String>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // A refused read is over within five seconds, with what is asked before and after the wait.
            patience: Duration::from_millis(4500),
            token_timeout: Duration::from_secs(30),
            client_id: "soci".to_owned(),
            meters: Arc::new(NoMeters),
        }
    }
}

impl Authenticator {
    /// Returns an authenticator over the options of `chain`. `board` is the one that the options bump.
    pub fn new(chain: KeychainChain, board: Arc<AuthBoard>, settings: Settings) -> Arc<Self> {
        let (tokens, hosts, warned) = (TokenCache::default(), KnownHosts::default(), Mutex::default());
        Arc::new(Self { chain, board, settings, tokens, hosts, warned })
    }

    /// Returns the board that keychains and requests share.
    pub fn board(&self) -> &Arc<AuthBoard> {
        &self.board
    }

    /// Returns the options.
    pub fn chain(&self) -> &KeychainChain {
        &self.chain
    }

    /// Starts one logical request. Nothing is looked up yet; every wait of the attempt ends by `deadline`.
    ///
    /// Retries of the request, to this host, go through the same attempt: it knows what was refused.
    pub fn attempt(
        self: &Arc<Self>,
        mut scope: CredentialScope,
        access: Access,
        deadline: Instant,
    ) -> AuthAttempt {
        self.hosts.sweep();
        scope.namespace = scope.namespace.or_else(|| self.board.pull_namespace(&scope.image.key()));
        let registry = scope.identity();
        AuthAttempt {
            auth: Arc::clone(self),
            generation: self.board.generation(&registry),
            registry,
            scope,
            access,
            deadline: deadline.into(),
            demand: None,
            carried: None,
            option: None,
            candidate: None,
            tried: 0,
            refusals: 0,
            refusals_in_all: 0,
            renewed: false,
            rejected: Rejected::default(),
            any_refused: false,
            anonymous_refused: false,
            entry: None,
            token_server: None,
            flaw: None,
            may_heal: false,
            untold: None,
            last_status: None,
            option_errors: Vec::new(),
            findings: Vec::new(),
        }
    }

    /// Waits until it is worth while to ask again for what was refused: until there are news since `since`, a number of
    /// [`AuthBoard::latest`], or for a second, because not every change makes news. Returns `false` when the patience of a
    /// request that began at `patient_since` is over, or its deadline.
    pub async fn wait_for_news(&self, since: u64, patient_since: Option<Instant>, deadline: Instant) -> bool {
        let Some(begun) = patient_since else { return false };
        let now = tokio::time::Instant::now();
        let patience = begun.checked_add(self.settings.patience).unwrap_or(deadline);
        let ends = patience.min(deadline.checked_sub(RESERVE).unwrap_or(begun)).into();
        if now >= ends {
            return false;
        }
        let _news = timeout_at(ends.min(now + POLL), self.board.changed(since)).await;
        true
    }

    /// Warns once per host that a credential goes over the network in clear.
    pub(super) fn warn_of_clear_text(&self, host: &str) {
        const MAX_WARNED: usize = 256;
        let mut warned = self.warned.lock();
        if warned.len() < MAX_WARNED && !warned.iter().any(|known| known == host) {
            warned.push(host.to_owned());
            drop(warned);
            tracing::warn!(host, "a credential is sent over plain http; anyone on the way can read it");
        }
    }
}
