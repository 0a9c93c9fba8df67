//! Tokens by what they are for and whose they are.
//!
//! The key holds the fingerprint of the credential: a token is shared by all images that use the same one and by nobody
//! else. One request per key is under way at a time, in a task of its own; those who want the token share its result or
//! its error. A failure is never kept.
//!
//! A token has two ends. At the *soft* one a new one is fetched ahead of need, as long as the token was in use lately, so
//! that a reader does not wait for a token in the ordinary case; meanwhile the old one still serves. After the *hard* end
//! it is not used. A token without a stated lifetime has a soft end only, noticed when it is used next: it serves until it
//! is refused. Times are tokio's monotonic clock, which tests pause.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::credential::bearer_header;
use crate::exchange::{ExchangeError, Grant, TokenRequest, exchange};
use crate::flight::Flights;
use crate::{Fingerprint, Meters, Origin, TokenHttp};

const MAX_TOKENS: usize = 4096;
/// A token that nobody asked for this long is dropped when room is made.
const IDLE: Duration = Duration::from_secs(60 * 60);
/// When a token without stated lifetime is renewed behind its users.
const UNSTATED_SOFT: Duration = Duration::from_secs(60);
/// How far before its end a token is renewed at the latest, where its life allows that.
const MARGIN: Duration = Duration::from_secs(10);
/// How long after a renewal was started behind the users the next one may be.
const RENEWAL_PAUSE: Duration = Duration::from_secs(5);
/// A token that was not used for this long, or for half its life if that is longer, is not renewed ahead of need.
const WARM: Duration = Duration::from_secs(10 * 60);

/// What a token is for and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    pub(crate) origin: Origin,
    pub(crate) realm: String,
    pub(crate) service: Option<String>,
    /// Sorted.
    pub(crate) scopes: Vec<String>,
    /// `None` is anonymous.
    pub(crate) who: Option<Fingerprint>,
}

/// A token, ready to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) header: HeaderValue,
    /// Tells tokens of one key apart.
    pub(crate) serial: u64,
}

/// Where a token came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// It was there.
    Cached,
    /// It was fetched while the caller waited.
    Fetched,
}

type Fetched = Result<Token, Arc<ExchangeError>>;

/// The tokens of a process.
#[derive(Debug, Default)]
pub(crate) struct TokenCache(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    tokens: Arc<Mutex<Tokens>>,
    flights: Flights<TokenKey, Fetched>,
}

/// How a token is to be fetched.
#[derive(Clone)]
pub(crate) struct Fetch {
    pub(crate) request: TokenRequest,
    pub(crate) http: Arc<dyn TokenHttp>,
    pub(crate) limit: Duration,
    pub(crate) meters: Arc<dyn Meters>,
}

#[derive(Debug, Default)]
struct Tokens {
    last_serial: u64,
    by_key: HashMap<TokenKey, Entry>,
}

#[derive(Debug)]
struct Entry {
    token: Token,
    soft: Instant,
    hard: Option<Instant>,
    used: Instant,
    /// Renews it at its soft end; goes with the entry.
    ahead: Option<Ahead>,
}

/// A task that ends with its owner.
#[derive(Debug)]
struct Ahead(AbortHandle);

impl Drop for Ahead {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl TokenCache {
    /// Returns the token of `key`, fetching it as `fetch` says unless a live one is there.
    ///
    /// The caller may give up at any time; a fetch that was started goes on for those who come later.
    pub(crate) async fn get(
        &self,
        key: &TokenKey,
        fetch: Fetch,
    ) -> Result<(Token, Served), Arc<ExchangeError>> {
        let now = Instant::now();
        let cached = self.0.tokens.lock().live(key, now);
        if let Some((token, renew)) = cached {
            if renew {
                drop(self.0.start(key, fetch));
            }
            return Ok((token, Served::Cached));
        }
        let realm = fetch.request.shown();
        match self.0.start(key, fetch).wait().await {
            Ok(result) => result.map(|token| (token, Served::Fetched)),
            Err(_abandoned) => Err(Arc::new(ExchangeError::Abandoned { realm })),
        }
    }

    /// Drops the token of `key` if it is still the one that was refused.
    pub(crate) fn invalidate(&self, key: &TokenKey, serial: u64) {
        let mut tokens = self.0.tokens.lock();
        if tokens.by_key.get(key).is_some_and(|entry| entry.token.serial == serial) {
            tokens.by_key.remove(key);
        }
    }
}

impl Inner {
    fn start(self: &Arc<Self>, key: &TokenKey, fetch: Fetch) -> crate::flight::Flight<Fetched> {
        // The task holds the tokens but not their cache, which owns the task.
        let (tokens, cache, for_key) = (Arc::clone(&self.tokens), Arc::downgrade(self), key.clone());
        self.flights.join(key.clone(), || async move {
            // The one before may have ended between the caller's look and this start.
            if let Some(token) = tokens.lock().fresh(&for_key, Instant::now()) {
                return Ok(token);
            }
            let seconds = fetch.limit.as_secs();
            let result = match timeout(fetch.limit, exchange(&*fetch.http, &fetch.request)).await {
                Ok(result) => result,
                Err(_elapsed) => Err(ExchangeError::TimedOut { realm: fetch.request.shown(), seconds }),
            };
            let now = Instant::now();
            let result = result.and_then(|grant| {
                let kept = tokens.lock().keep(for_key.clone(), &grant, now);
                let token = kept.ok_or_else(|| ExchangeError::Unsendable { realm: fetch.request.shown() });
                token.map(|token| (token, grant.life))
            });
            fetch.meters.token_fetched(result.is_ok());
            if let Ok((token, Some(life))) = &result
                && let Some(http) = Arc::clone(&fetch.http).detached()
            {
                let lease = Lease { key: for_key, serial: token.serial, life: *life, received: now };
                let (key, serial) = (lease.key.clone(), lease.serial);
                let task = tokio::spawn(renew_ahead(cache, lease, Fetch { http, ..fetch }));
                tokens.lock().attach(&key, serial, Ahead(task.abort_handle()));
            }
            result.map(|(token, _)| token).map_err(Arc::new)
        })
    }
}

/// A token whose life is known.
struct Lease {
    key: TokenKey,
    serial: u64,
    life: Duration,
    received: Instant,
}

/// Waits for the soft end of a token and fetches the next one if this one is in use; trouble that may pass is tried again
/// until the token ends. A refusal is left to the next request, which asks all options anew.
async fn renew_ahead(cache: Weak<Inner>, lease: Lease, fetch: Fetch) {
    let mut at = lease.received + ends(Some(lease.life)).0;
    loop {
        sleep_until(at).await;
        let Some(inner) = cache.upgrade() else { return };
        if !inner.tokens.lock().is_warm(&lease, Instant::now()) {
            return;
        }
        let flight = inner.start(&lease.key, fetch.clone());
        drop(inner);
        match flight.wait().await {
            Ok(Err(error)) if !matches!(*error, ExchangeError::Refused { .. }) => {
                at = Instant::now() + RENEWAL_PAUSE;
            }
            _ => return,
        }
    }
}

impl Tokens {
    /// Returns a token before its hard end, and whether to renew it behind the caller.
    fn live(&mut self, key: &TokenKey, now: Instant) -> Option<(Token, bool)> {
        let entry = self.by_key.get_mut(key)?;
        if entry.hard.is_some_and(|hard| now >= hard) {
            self.by_key.remove(key);
            return None;
        }
        entry.used = now;
        let renew = now >= entry.soft;
        if renew {
            entry.soft = now + RENEWAL_PAUSE;
        }
        Some((entry.token.clone(), renew))
    }

    /// Returns a token that need not be renewed.
    fn fresh(&self, key: &TokenKey, now: Instant) -> Option<Token> {
        let entry = self.by_key.get(key)?;
        // A renewal that was just started has moved the soft end by its pause.
        (now + RENEWAL_PAUSE < entry.soft && entry.hard.is_none_or(|hard| now < hard))
            .then(|| entry.token.clone())
    }

    /// Whether the token is still the one of its key, can be used, and was used lately.
    fn is_warm(&self, lease: &Lease, now: Instant) -> bool {
        self.by_key.get(&lease.key).is_some_and(|entry| {
            entry.token.serial == lease.serial
                && entry.hard.is_none_or(|hard| now < hard)
                && now < entry.used + WARM.max(lease.life / 2)
        })
    }

    /// Lets a renewal end with its token.
    fn attach(&mut self, key: &TokenKey, serial: u64, ahead: Ahead) {
        if let Some(entry) = self.by_key.get_mut(key).filter(|entry| entry.token.serial == serial) {
            entry.ahead = Some(ahead);
        }
    }

    fn keep(&mut self, key: TokenKey, grant: &Grant, now: Instant) -> Option<Token> {
        self.last_serial += 1;
        let token = Token { header: bearer_header(&grant.token)?, serial: self.last_serial };
        let (soft, hard) = ends(grant.life);
        if self.by_key.len() >= MAX_TOKENS && !self.by_key.contains_key(&key) {
            self.make_room(now);
        }
        // Renewing is no use.
        let used = self.by_key.get(&key).map_or(now, |old| old.used);
        let (soft, hard) = (now + soft, hard.map(|hard| now + hard));
        self.by_key.insert(key, Entry { token: token.clone(), soft, hard, used, ahead: None });
        Some(token)
    }

    fn make_room(&mut self, now: Instant) {
        self.by_key.retain(|_, entry| now < entry.used + IDLE && entry.hard.is_none_or(|hard| now < hard));
        if self.by_key.len() >= MAX_TOKENS {
            let oldest = self.by_key.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone());
            oldest.map(|key| self.by_key.remove(&key));
        }
    }
}

/// Returns when to renew a token and when to stop using it, counted from its receipt.
fn ends(life: Option<Duration>) -> (Duration, Option<Duration>) {
    match life {
        None => (UNSTATED_SOFT, None),
        Some(life) if life > MARGIN => ((life * 4 / 5).min(life - MARGIN), Some(life)),
        Some(life) => (life * 4 / 5, Some(life)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Script, answer};
    use crate::{Credential, NoMeters, Scheme};

    fn key(who: Option<Fingerprint>) -> TokenKey {
        TokenKey {
            origin: Origin::new(Scheme::Https, "reg.example", None),
            realm: "https://auth.example/".into(),
            service: None,
            scopes: vec!["repository:a:pull".into()],
            who,
        }
    }

    fn fetch(http: &Arc<Script>) -> Fetch {
        Fetch {
            request: TokenRequest {
                realm: "https://auth.example/".parse().unwrap(),
                service: None,
                scopes: vec![],
                credential: None,
                client_id: "soci".into(),
            },
            http: Arc::clone(http) as Arc<dyn TokenHttp>,
            limit: Duration::from_secs(30),
            meters: Arc::new(NoMeters),
        }
    }

    /// A server that numbers its tokens.
    fn numbering(life: Option<u64>) -> Arc<Script> {
        let number = std::sync::atomic::AtomicU64::new(0);
        Script::by(move |_| {
            let number = number.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let life = life.map_or(String::new(), |life| format!(r#","expires_in":{life}"#));
            (200, format!(r#"{{"token":"T{number}"{life}}}"#))
        })
    }

    async fn text(cache: &TokenCache, http: &Arc<Script>) -> String {
        let (token, _) = cache.get(&key(None), fetch(http)).await.unwrap();
        token.header.to_str().unwrap().to_owned()
    }

    #[test]
    fn ends_keep_a_margin_where_the_life_allows_it() {
        let seconds = |life: u64| {
            let (soft, hard) = ends(Some(Duration::from_secs(life)));
            (soft.as_secs(), hard.unwrap().as_secs())
        };
        assert_eq!(
            [seconds(300), seconds(60), seconds(20), seconds(10), seconds(0)],
            [(240, 300), (48, 60), (10, 20), (8, 10), (0, 0)]
        );
        assert_eq!(ends(None), (Duration::from_secs(60), None));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn t107_many_callers_share_one_request() {
        let (cache, http) = (Arc::new(TokenCache::default()), numbering(Some(300)));
        let tasks: Vec<_> = (0..100)
            .map(|_| {
                let (cache, http) = (Arc::clone(&cache), Arc::clone(&http));
                tokio::spawn(async move { text(&cache, &http).await })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap(), "Bearer T0");
        }
        assert_eq!(http.sent().len(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn t107_many_refusals_of_one_token_fetch_one_new_token() {
        let (cache, http) = (Arc::new(TokenCache::default()), numbering(Some(300)));
        let (old, _) = cache.get(&key(None), fetch(&http)).await.unwrap();
        let tasks: Vec<_> = (0..100)
            .map(|_| {
                let (cache, http, serial) = (Arc::clone(&cache), Arc::clone(&http), old.serial);
                tokio::spawn(async move {
                    cache.invalidate(&key(None), serial);
                    text(&cache, &http).await
                })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap(), "Bearer T1");
        }
        assert_eq!(http.sent().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn after_its_soft_end_a_token_serves_while_one_renewal_runs() {
        let (cache, http) = (TokenCache::default(), numbering(Some(100)));
        assert_eq!(text(&cache, &http).await, "Bearer T0");
        tokio::time::advance(Duration::from_secs(80)).await;
        assert_eq!(text(&cache, &http).await, "Bearer T0");
        assert_eq!(text(&cache, &http).await, "Bearer T0");
        while http.sent().len() < 2 || text(&cache, &http).await == "Bearer T0" {
            tokio::task::yield_now().await;
        }
        assert_eq!((text(&cache, &http).await.as_str(), http.sent().len()), ("Bearer T1", 2));
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(text(&cache, &http).await, "Bearer T2", "after the hard end it is not used");
    }

    /// Lets the tasks that are due run, at a time that stands still.
    async fn settle() {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_in_use_is_renewed_before_it_ends_and_no_reader_waits() {
        let (cache, http) = (TokenCache::default(), numbering(Some(60)));
        let (_, served) = cache.get(&key(None), fetch(&http)).await.unwrap();
        assert_eq!(served, Served::Fetched);
        // A reader every 50 s: between two reads most of a token's life passes.
        for read in 1..20 {
            for _ in 0..5 {
                tokio::time::advance(Duration::from_secs(10)).await;
                settle().await;
            }
            let (_, served) = cache.get(&key(None), fetch(&http)).await.unwrap();
            assert_eq!(served, Served::Cached, "read {read} waited for a token");
        }
        let asked = http.sent().len();
        assert!((19..=22).contains(&asked), "{asked} requests in 950 s, one per 48 s are due");
        for _ in 0..200 {
            tokio::time::advance(Duration::from_secs(10)).await;
            settle().await;
        }
        let idle = http.sent().len() - asked;
        assert!(idle <= 14, "{idle} requests for a token that nobody uses, in 2000 s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_ahead_that_fails_is_tried_again_unless_it_is_refused() {
        for (failure, expected) in [(503, 3), (401, 2)] {
            let http = Arc::new(Script::new([
                answer(200, r#"{"token":"T0","expires_in":100}"#),
                answer(failure, ""),
                answer(200, r#"{"token":"T1","expires_in":100000}"#),
            ]));
            let cache = TokenCache::default();
            assert_eq!(text(&cache, &http).await, "Bearer T0");
            for _ in 0..19 {
                tokio::time::advance(Duration::from_secs(5)).await;
                settle().await;
            }
            assert_eq!(http.sent().len(), expected, "after {failure}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn renewals_end_with_the_cache_and_with_an_invalid_token() {
        let http = numbering(Some(60));
        let cache = TokenCache::default();
        let (token, _) = cache.get(&key(None), fetch(&http)).await.unwrap();
        cache.invalidate(&key(None), token.serial);
        tokio::time::advance(Duration::from_secs(100)).await;
        settle().await;
        assert_eq!(http.sent().len(), 1);
        text(&cache, &http).await;
        drop(cache);
        tokio::time::advance(Duration::from_secs(100)).await;
        settle().await;
        assert_eq!(http.sent().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn t106_a_token_without_lifetime_serves_until_refused() {
        let http = Arc::new(Script::new([answer(200, r#"{"token":"T0"}"#), answer(500, "")]));
        let cache = TokenCache::default();
        assert_eq!(text(&cache, &http).await, "Bearer T0");
        tokio::time::advance(Duration::from_secs(7 * 24 * 3600)).await;
        assert_eq!(text(&cache, &http).await, "Bearer T0");
    }

    #[tokio::test]
    async fn t117_a_failure_is_not_kept() {
        let http = Arc::new(Script::new([answer(500, ""), answer(200, r#"{"token":"T"}"#)]));
        let cache = TokenCache::default();
        let error = cache.get(&key(None), fetch(&http)).await.unwrap_err();
        assert!(matches!(*error, ExchangeError::Status { status: 500, .. }));
        assert_eq!(text(&cache, &http).await, "Bearer T");
    }

    #[tokio::test]
    async fn tokens_are_not_shared_between_credentials() {
        let (cache, http) = (TokenCache::default(), numbering(Some(300)));
        let who = |name: &str| key(Some(Credential::basic(name, "p").fingerprint()));
        let (first, _) = cache.get(&who("a"), fetch(&http)).await.unwrap();
        let (second, _) = cache.get(&who("b"), fetch(&http)).await.unwrap();
        assert_ne!(first.header, second.header);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_endpoint_times_out_for_all() {
        struct Silent;
        #[async_trait::async_trait]
        impl TokenHttp for Silent {
            async fn send(
                &self,
                _: http::Request<bytes::Bytes>,
            ) -> Result<http::Response<bytes::Bytes>, crate::TokenHttpError> {
                std::future::pending().await
            }
        }
        let cache = TokenCache::default();
        let fetch = Fetch { http: Arc::new(Silent), ..fetch(&numbering(None)) };
        let error = cache.get(&key(None), fetch).await.unwrap_err();
        assert_eq!(*error, ExchangeError::TimedOut { realm: "https://auth.example/".into(), seconds: 30 });
    }

    #[test]
    fn the_least_recently_used_token_makes_room() {
        let mut tokens = Tokens::default();
        let numbered = |n: usize| TokenKey { realm: n.to_string(), ..key(None) };
        let grant = Grant { token: crate::Secret::new("T"), life: None };
        let start = Instant::now();
        for n in 0..MAX_TOKENS {
            tokens.keep(numbered(n), &grant, start + Duration::from_millis(n as u64));
        }
        let now = start + Duration::from_secs(10);
        assert!(tokens.live(&numbered(0), now).is_some());
        tokens.keep(numbered(MAX_TOKENS), &grant, now);
        assert_eq!(tokens.by_key.len(), MAX_TOKENS);
        assert!(tokens.live(&numbered(0), now).is_some() && tokens.live(&numbered(1), now).is_none());
    }
}
