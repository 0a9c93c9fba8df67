//! One logical request to one host: which credential it carries, and what a refusal leads to.
//!
//! A refusal is answered by the first of these that is left to do (the *steps*):
//!
//! 1. the request was bare: answer the challenge;
//! 2. its token came from the cache: a newer one if there is, else one new token with the same credential;
//! 3. reject the candidate and ask all options anew from the first one; a changed or further candidate of the *same*
//!    option is tried (R6: another option only if this one has nothing at all any more);
//! 4. [`Denied`].
//!
//! The attempt itself never waits for better credentials, since another host may serve the request. It says whether that is
//! worth while ([`AuthAttempt::may_heal`]); who asks the hosts then waits ([`Authenticator::wait_for_news`]) and asks again,
//! through the same attempt.
//!
//! A 403 skips step 2: it is about the credential's rights or, with ECR, about its age. A refusal by the *token endpoint*
//! enters at step 3. Trouble that is no refusal (5xx, 429, no answer) rejects nobody. A refused credential rests (see
//! [`AuthBoard`](crate::AuthBoard)), so that thousands of requests do not lock an account.
//!
//! A request that has used up the candidates it may present waits like any other; news give it as many again, and the next
//! request begins with those that were not refused lately.
//!
//! Bounds: `MAX_REFUSALS` refusals per candidate, the option's own bound on candidates, the deadline on every wait.

mod authenticator;
mod prepare;

use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::Instant;

use crate::board::Answer;
use crate::chain::ChosenOption;
use crate::challenge::{self, Demand};
use crate::quirks::{self, Meaning};
use crate::token_cache::TokenKey;
use crate::{AuthError, Candidate, CredentialScope, Denied, Outcome, Reason, Rejected, TokenHttp};
pub use authenticator::{Authenticator, Settings};

/// How often one candidate is refused before it counts as rejected, whatever may still be tried with it.
const MAX_REFUSALS: usize = 4;
/// How often a request is refused in all. Reached only if a host keeps changing its challenge, or if news that do not help
/// come faster than the patience ends.
const MAX_REFUSALS_IN_ALL: usize = 24;

/// What a request wants to do in the repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read.
    Pull,
    /// Read and write.
    Push,
    /// Write, and read another repository of the same registry, so that a blob can be mounted from it.
    PushMount {
        /// The other repository.
        from: String,
    },
}

/// The state of one logical request to one host: what was presented, what was refused.
pub struct AuthAttempt {
    auth: Arc<Authenticator>,
    scope: CredentialScope,
    access: Access,
    deadline: Instant,
    /// By what the board and the options know the registry.
    registry: String,
    /// What the host wants, once known.
    demand: Option<Demand>,
    /// What the request carries; `None` before it was decided.
    carried: Option<Carried>,
    /// The option that the request stays with, and the candidate in use.
    option: Option<ChosenOption>,
    candidate: Option<Candidate>,
    /// How many candidates of the option were tried since the last news.
    tried: usize,
    /// The registry's generation when they were.
    generation: u64,
    /// Refusals of the present candidate, and of all.
    refusals: usize,
    refusals_in_all: usize,
    /// Whether the present candidate (or nobody, for an anonymous request) got a new token already.
    renewed: bool,
    rejected: Rejected,
    /// Whether the registry or its token endpoint refused a candidate of this request.
    any_refused: bool,
    /// Whether the host refused a new anonymous token.
    anonymous_refused: bool,
    /// The entry of the candidate that was refused last, or could not be presented.
    entry: Option<String>,
    /// The token server, where that was the last to refuse.
    token_server: Option<String>,
    /// Why a candidate could not be presented.
    flaw: Option<&'static str>,
    /// Whether what was denied last may be granted to a credential that is yet to come.
    may_heal: bool,
    /// Such a denial, to be told when the attempt ends without being served.
    untold: Option<AuthError>,
    last_status: Option<u16>,
    /// From the last resolution.
    option_errors: Vec<(&'static str, String)>,
    findings: Vec<String>,
}

/// What a request carries.
#[derive(Clone)]
enum Carried {
    /// No header.
    Nothing,
    /// The candidate itself.
    Credential { header: HeaderValue, basic: bool },
    /// A token, of the candidate or anonymous.
    Token { header: HeaderValue, key: TokenKey, serial: u64, from_cache: bool },
}

/// An answer that refuses a request: 401, 403, or a 400 that may be about an expired credential.
#[derive(Debug, Clone, Copy)]
pub struct Refusal<'a> {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The start of the body, at most 64 KiB of it.
    pub body: &'a [u8],
}

/// What to do about a refusal.
#[derive(Debug)]
pub enum Next {
    /// Ask for the header again and send the request once more.
    Retry,
    /// It is final.
    Final(Box<Denied>),
}

impl AuthAttempt {
    /// Returns the header to send with the request, marked sensitive.
    ///
    /// There is one when the host is known to want one, or when a registry token is at hand; else the request goes bare
    /// and the host's challenge decides. Called again without a refusal in between, it returns the same.
    ///
    /// # Errors
    /// [`AuthError`] when it is known already that no header would be accepted, or when it cannot be had: the request
    /// need not be sent.
    pub async fn authorization(
        &mut self,
        http: &Arc<dyn TokenHttp>,
    ) -> Result<Option<HeaderValue>, AuthError> {
        let header = self.header(http).await;
        header.inspect_err(|error| self.tell(error))
    }

    async fn header(&mut self, http: &Arc<dyn TokenHttp>) -> Result<Option<HeaderValue>, AuthError> {
        if self.carried.is_none() {
            self.may_heal = false;
            self.demand = self.auth.hosts.demand(&self.scope, &self.access);
            let first = match &self.demand {
                Some(_) => match self.prepare(http).await {
                    // The host has the last word on whether it still wants a credential that nobody has.
                    Err(AuthError::Denied(Denied { reason: Reason::NoCredential, .. }))
                        if self.refusals_in_all == 0 =>
                    {
                        Carried::Nothing
                    }
                    first => first?,
                },
                None => self.registry_token().await,
            };
            self.carried = Some(first);
        }
        Ok(match &self.carried {
            Some(Carried::Credential { header, .. } | Carried::Token { header, .. }) => Some(header.clone()),
            Some(Carried::Nothing) | None => None,
        })
    }

    /// Takes notice of a refusal and does what the [steps](self) say.
    ///
    /// # Errors
    /// [`AuthError`] when what to send next could not be had for a reason other than a refusal.
    pub async fn refused(
        &mut self,
        refusal: Refusal<'_>,
        http: &Arc<dyn TokenHttp>,
    ) -> Result<Next, AuthError> {
        let next = self.answer(refusal, http).await;
        match &next {
            Ok(Next::Final(denied)) => self.tell(&AuthError::Denied((**denied).clone())),
            Ok(Next::Retry) => {}
            Err(error) => self.tell(error),
        }
        next
    }

    async fn answer(&mut self, refusal: Refusal<'_>, http: &Arc<dyn TokenHttp>) -> Result<Next, AuthError> {
        let carried = self.carried.take().unwrap_or(Carried::Nothing);
        self.may_heal = false;
        (self.last_status, self.token_server) = (Some(refusal.status.as_u16()), None);
        let meaning = quirks::meaning(refusal.status, refusal.headers, refusal.body);
        if meaning == Meaning::Other {
            return Ok(self.finally(Reason::NotAuthentication));
        }
        self.refusals += 1;
        self.refusals_in_all += 1;
        if self.refusals_in_all > MAX_REFUSALS_IN_ALL {
            return Ok(self.finally(Reason::TooManyAttempts));
        }
        let switched = match self.hear(&refusal) {
            Ok(switched) => switched,
            Err(reason) if matches!(carried, Carried::Nothing) => {
                return Ok(self.finally(reason));
            }
            // A refusal without challenge (ECR, or a registry token that ran out) still is one.
            Err(_) => false,
        };
        self.judge(carried, meaning, switched);
        if meaning == Meaning::Forbidden && self.candidate.is_none() && !self.any_refused {
            // A host that never asked for a credential gets none, so to log in would not help.
            let reason = if self.demand.is_some() { Reason::NoCredential } else { Reason::NoChallenge };
            return Ok(self.finally(reason));
        }
        match self.prepare(http).await {
            Ok(carried) => {
                self.carried = Some(carried);
                Ok(Next::Retry)
            }
            Err(AuthError::Denied(denied)) => Ok(Next::Final(Box::new(denied))),
            Err(error) => Err(error),
        }
    }

    /// Takes notice that the request was served, with this status.
    pub fn accepted(&mut self, status: StatusCode) {
        self.untold = None;
        let (Some(option), Some(candidate)) = (self.option, &self.candidate) else { return };
        if matches!(self.carried, None | Some(Carried::Nothing)) {
            return;
        }
        let board = &self.auth.board;
        board.accept(&self.registry, self.scope.image.repository(), candidate.id.fingerprint);
        let answer = Answer::Judged(candidate.id.clone(), Outcome::Accepted, Some(status.as_u16()));
        board.note(&self.registry, self.scope.image.repository(), option.name, answer);
        let generation = board.generation(&self.registry);
        self.auth.hosts.accepted(&self.scope, &self.access, option, candidate, generation);
        self.auth.chain.verdict(option.name, &self.scope, &candidate.id, Outcome::Accepted);
        if self.auth.hosts.is_news(&self.scope.origin, option.name) {
            tracing::info!(
                host = self.scope.origin.authority(),
                keychain = option.name,
                "logged in to a registry"
            );
        }
    }

    /// Whether it is worth while to wait for news after the request was denied, and to ask again through this attempt.
    pub fn may_heal(&self) -> bool {
        self.may_heal
    }

    /// Returns the option whose credential the request carries, for logs and reports.
    pub fn option(&self) -> Option<&'static str> {
        self.candidate.as_ref().and(self.option).map(|option| option.name)
    }

    fn tell(&mut self, error: &AuthError) {
        self.untold = match self.may_heal {
            true => Some(error.clone()),
            false => {
                self.auth.settings.meters.denied(&self.scope, self.option.map(|option| option.name), error);
                None
            }
        };
    }

    /// Learns what the host wants from a 401 and says whether it wants another scheme than before.
    fn hear(&mut self, refusal: &Refusal<'_>) -> Result<bool, Reason> {
        if refusal.status != StatusCode::UNAUTHORIZED {
            return Ok(false);
        }
        let demand =
            challenge::choose(&challenge::parse(refusal.headers)).map_err(|_| Reason::NoChallenge)?;
        let switched = self
            .demand
            .as_ref()
            .is_some_and(|old| matches!(old, Demand::Basic) != matches!(demand, Demand::Basic));
        if self.demand.as_ref() != Some(&demand) {
            self.auth.hosts.note(&self.scope, &self.access, &demand);
            self.demand = Some(demand);
        }
        Ok(switched)
    }

    /// Decides what the refusal says about what was carried.
    fn judge(&mut self, carried: Carried, meaning: Meaning, switched: bool) {
        match carried {
            Carried::Nothing => {}
            // Not the credential was refused, but the form in which it came.
            Carried::Credential { basic: true, .. } if switched && self.refusals < MAX_REFUSALS => {}
            Carried::Credential { .. } => self.reject(),
            Carried::Token { key, serial, from_cache, .. } => {
                self.auth.tokens.invalidate(&key, serial);
                let changed = self.token_key().is_some_and(|now| now != key);
                let renewable = (from_cache && !self.renewed) || changed;
                if meaning != Meaning::Forbidden && renewable && self.refusals < MAX_REFUSALS {
                    self.renewed = true;
                } else if self.candidate.is_some() {
                    self.reject();
                } else {
                    self.anonymous_refused = true;
                }
            }
        }
    }

    /// Rejects the present candidate: not again in this request, and not at once in others.
    fn reject(&mut self) {
        let (Some(candidate), Some(option)) = (self.candidate.take(), self.option) else { return };
        self.any_refused = true;
        self.entry = Some(candidate.id.entry.clone());
        self.rejected.add(candidate.id.fingerprint);
        let (board, repository) = (&self.auth.board, self.scope.image.repository());
        board.refuse(&self.registry, repository, candidate.id.fingerprint);
        board.note(
            &self.registry,
            repository,
            option.name,
            Answer::Judged(candidate.id.clone(), Outcome::Rejected, self.last_status),
        );
        self.auth.settings.meters.rejected(option.name);
        self.auth.chain.verdict(option.name, &self.scope, &candidate.id, Outcome::Rejected);
        tracing::debug!(host = %self.scope.origin, repository, option = option.name, entry = %candidate.id.entry,
            credential = %candidate.id.fingerprint, status = self.last_status, "credential refused");
    }

    fn finally(&self, reason: Reason) -> Next {
        Next::Final(Box::new(self.denied(reason)))
    }

    fn denied(&self, reason: Reason) -> Denied {
        Denied {
            host: self.scope.origin.to_string(),
            repository: self.scope.image.repository().to_owned(),
            option: self.option.map(|option| option.name),
            entry: self.option.and(self.entry.clone()),
            token_server: self.token_server.clone(),
            status: self.last_status,
            reason,
            option_errors: self
                .option_errors
                .iter()
                .map(|(option, error)| format!("{option}: {error}"))
                .collect(),
            findings: self.findings.clone(),
            remedy: self.auth.chain.remedy(),
        }
    }
}

impl Drop for AuthAttempt {
    fn drop(&mut self) {
        if let Some(error) = self.untold.take() {
            self.may_heal = false;
            self.tell(&error);
        }
    }
}

impl fmt::Debug for AuthAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthAttempt")
            .field("scope", &self.scope)
            .field("access", &self.access)
            .field("option", &self.option)
            .field("candidate", &self.candidate)
            .field("refusals", &self.refusals_in_all)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
