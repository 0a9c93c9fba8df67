//! Tokens by what they are for and whose they are.
//!
//! The key holds the fingerprint of the credential: a token is shared by all images that use the same one and by nobody
//! else. One request per key is under way at a time, in a task of its own; those who want the token share its result or
//! its error. A failure is never kept.
//!
//! A token has two ends. After the *soft* one it is still used while a new one is fetched behind it; after the *hard* one
//! it is not used. A token without a stated lifetime has a soft end only: it serves until it is refused. Times are
//! tokio's monotonic clock, which tests pause.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

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
pub(crate) struct TokenCache {
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
        let cached = self.tokens.lock().live(key, now);
        if let Some((token, renew)) = cached {
            if renew {
                drop(self.start(key, fetch));
            }
            return Ok((token, Served::Cached));
        }
        let realm = fetch.request.shown();
        match self.start(key, fetch).wait().await {
            Ok(result) => result.map(|token| (token, Served::Fetched)),
            Err(_abandoned) => Err(Arc::new(ExchangeError::Abandoned { realm })),
        }
    }

    /// Drops the token of `key` if it is still the one that was refused.
    pub(crate) fn invalidate(&self, key: &TokenKey, serial: u64) {
        let mut tokens = self.tokens.lock();
        if tokens.by_key.get(key).is_some_and(|entry| entry.token.serial == serial) {
            tokens.by_key.remove(key);
        }
    }

    fn start(&self, key: &TokenKey, fetch: Fetch) -> crate::flight::Flight<Fetched> {
        let (tokens, for_key) = (Arc::clone(&self.tokens), key.clone());
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
            let result = result.and_then(|grant| {
                let kept = tokens.lock().keep(for_key, &grant, Instant::now());
                kept.ok_or_else(|| ExchangeError::Unsendable { realm: fetch.request.shown() })
            });
            fetch.meters.token_fetched(result.is_ok());
            result.map_err(Arc::new)
        })
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

    fn keep(&mut self, key: TokenKey, grant: &Grant, now: Instant) -> Option<Token> {
        self.last_serial += 1;
        let token = Token { header: bearer_header(&grant.token)?, serial: self.last_serial };
        let (soft, hard) = ends(grant.life);
        if self.by_key.len() >= MAX_TOKENS && !self.by_key.contains_key(&key) {
            self.make_room(now);
        }
        let entry =
            Entry { token: token.clone(), soft: now + soft, hard: hard.map(|hard| now + hard), used: now };
        self.by_key.insert(key, entry);
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
