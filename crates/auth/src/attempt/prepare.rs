//! Finding what the request carries next: a candidate, and the form that the host wants it in.

use std::sync::Arc;

use tokio::time::timeout_at;

use super::{AuthAttempt, Carried};
use crate::board::Admission;
use crate::challenge::{BearerDemand, Demand};
use crate::credential::{basic_header, bearer_header};
use crate::exchange::{ExchangeError, TokenRequest};
use crate::token_cache::{Fetch, Served, TokenKey};
use crate::{
    AuthError, Candidate, Credential, Denied, Fingerprint, Origin, Reason, Scheme, TokenHttp, policy, scopes,
};

/// What became of one candidate.
enum Presented {
    As(Carried),
    /// It cannot be presented or its token was refused: another one is to be found.
    Unusable,
}

impl AuthAttempt {
    /// Returns a registry token for the first request, where one is at hand without waiting; else nothing is carried.
    pub(super) async fn registry_token(&mut self) -> Carried {
        let Some((option, candidate)) = self.auth.chain.registry_token(&self.scope).await else {
            return Carried::Nothing;
        };
        let Credential::RegistryToken(token) = &candidate.credential else { return Carried::Nothing };
        let header = bearer_header(token);
        match (header, self.admit(&candidate)) {
            (Some(header), Admission::Go) => {
                self.option = Some(option);
                self.use_candidate(candidate);
                self.mind_clear_text();
                Carried::Credential { header, basic: false }
            }
            _ => Carried::Nothing,
        }
    }

    /// Returns what to carry next.
    pub(super) async fn prepare(&mut self, http: &Arc<dyn TokenHttp>) -> Result<Carried, AuthError> {
        self.may_heal = false;
        loop {
            if self.candidate.is_none() && !self.find().await? {
                let answer = self.anonymous(http).await;
                let denied = matches!(answer, Err(AuthError::Denied(_)));
                self.may_heal = denied && self.may_get_a_credential();
                return answer;
            }
            let Some(candidate) = self.candidate.clone() else { continue };
            match self.present(&candidate, http).await? {
                Presented::As(carried) => {
                    self.mind_clear_text();
                    return Ok(carried);
                }
                Presented::Unusable => {}
            }
        }
    }

    /// Finds the next candidate and makes it the present one; `false` when no option has anything.
    async fn find(&mut self) -> Result<bool, AuthError> {
        let generation = self.auth.board.generation(&self.registry);
        if generation != self.generation {
            self.generation = generation;
            self.hear_news();
        }
        // What the host has just taken from another request is no guess, so it does not count as one.
        if let Some((option, candidate)) = self.auth.hosts.trusted(&self.scope, &self.access, generation)
            && self.option.is_none_or(|held| held == option)
            && !self.rejected.contains(&candidate.id)
            && self.admit(&candidate) == Admission::Go
        {
            self.option = Some(option);
            self.use_candidate(candidate);
            return Ok(true);
        }
        let auth = Arc::clone(&self.auth);
        let held = self.option.map(|option| option.name);
        let resolution =
            auth.chain.resolve(&self.scope, &self.rejected, held, &auth.board, &*auth.settings.meters);
        let found = timeout_at(self.deadline, resolution).await.map_err(|_| self.late())?;
        self.option_errors = found.errors;
        self.findings = found.findings;
        if found.option != self.option {
            (self.tried, self.entry) = (0, None);
        }
        self.option = found.option;
        let Some(option) = found.option else { return Ok(false) };
        let mut candidates = found.candidates;
        candidates.sort_by_cached_key(|candidate| self.was_refused(candidate.id.fingerprint));
        if self.entry.is_none() {
            self.entry = candidates.first().map(|candidate| candidate.id.entry.clone());
        }
        if self.tried < option.max_candidates
            && let Some(candidate) =
                candidates.into_iter().find(|candidate| self.admit(candidate) == Admission::Go)
        {
            self.use_candidate(candidate);
            return Ok(true);
        }
        if let (Some(flaw), false) = (self.flaw, self.any_refused) {
            return Err(self.denied(Reason::Incomplete(flaw)).into());
        }
        self.may_heal = true;
        let reason = if self.any_refused { Reason::Refused } else { Reason::Resting };
        Err(self.denied(reason).into())
    }

    /// Since there are news of the registry, more candidates may be presented, also such as were refused but not since.
    fn hear_news(&mut self) {
        self.tried = 0;
        let mut rejected = std::mem::take(&mut self.rejected);
        rejected.retain(|fingerprint| self.was_refused(fingerprint));
        self.rejected = rejected;
    }

    /// Whether a request that was refused for want of a credential waits for one: that of a mounted image does, since the
    /// next pull or a changed secret may bring it. A pull that has none is told at once.
    fn may_get_a_credential(&self) -> bool {
        self.last_status.is_some() && self.auth.board.is_pinned(&self.scope.image.key())
    }

    /// Puts a candidate into the form that the host wants.
    async fn present(
        &mut self,
        candidate: &Candidate,
        http: &Arc<dyn TokenHttp>,
    ) -> Result<Presented, AuthError> {
        let credential = &candidate.credential;
        if let Some(flaw) = credential.flaw() {
            return Ok(self.skip(flaw));
        }
        if let Credential::RegistryToken(token) = credential {
            return Ok(match bearer_header(token) {
                Some(header) => Presented::As(Carried::Credential { header, basic: false }),
                None => self.skip("the registry token holds bytes that no header can carry"),
            });
        }
        match (self.demand.clone(), credential) {
            (None, _) => Ok(Presented::As(Carried::Nothing)),
            (Some(Demand::Basic), Credential::Basic { username, password }) => {
                Ok(match basic_header(username, password) {
                    Some(header) => Presented::As(Carried::Credential { header, basic: true }),
                    None => self.skip("it cannot be put into a header"),
                })
            }
            (Some(Demand::Basic), _) => Ok(self.skip("an identity token cannot answer a Basic challenge")),
            (Some(Demand::Bearer(demand)), _) => {
                match self.token(&demand, Some(credential.clone()), http).await? {
                    Ok(carried) => Ok(Presented::As(carried)),
                    Err(status) => {
                        self.refused_by_token_server(&demand, status);
                        self.reject();
                        Ok(Presented::Unusable)
                    }
                }
            }
        }
    }

    fn refused_by_token_server(&mut self, demand: &BearerDemand, status: u16) {
        self.last_status = Some(status);
        self.token_server = Origin::of_url(&demand.realm).map(|server| server.to_string());
    }

    /// Leaves out a candidate that cannot be presented.
    fn skip(&mut self, flaw: &'static str) -> Presented {
        if let Some(candidate) = self.candidate.take() {
            self.rejected.add(candidate.id.fingerprint);
            self.entry = Some(candidate.id.entry);
        }
        self.flaw = Some(flaw);
        Presented::Unusable
    }

    /// Answers without a credential, since no option has one.
    async fn anonymous(&mut self, http: &Arc<dyn TokenHttp>) -> Result<Carried, AuthError> {
        match self.demand.clone() {
            None => Ok(Carried::Nothing),
            Some(Demand::Bearer(demand)) if !self.anonymous_refused => {
                match self.token(&demand, None, http).await? {
                    Ok(carried) => Ok(carried),
                    Err(status) => {
                        self.refused_by_token_server(&demand, status);
                        self.anonymous_refused = true;
                        Err(self.denied(Reason::NoCredential).into())
                    }
                }
            }
            Some(_) => Err(self.denied(Reason::NoCredential).into()),
        }
    }

    /// Gets a token; the inner error is the status with which the endpoint refused.
    async fn token(
        &mut self,
        demand: &BearerDemand,
        credential: Option<Credential>,
        http: &Arc<dyn TokenHttp>,
    ) -> Result<Result<Carried, u16>, AuthError> {
        policy::check_realm(&self.scope.origin, &demand.realm)?;
        let key = self.key_for(demand, credential.as_ref());
        let settings = &self.auth.settings;
        let fetch = Fetch {
            request: TokenRequest {
                realm: demand.realm.clone(),
                service: demand.service.clone(),
                scopes: scopes::wanted(&demand.scopes, self.scope.image.repository(), &self.access),
                credential,
                client_id: settings.client_id.clone(),
            },
            http: Arc::clone(http),
            limit: settings.token_timeout,
            meters: Arc::clone(&settings.meters),
        };
        let got =
            timeout_at(self.deadline, self.auth.tokens.get(&key, fetch)).await.map_err(|_| self.late())?;
        match got {
            Ok((token, served)) => Ok(Ok(Carried::Token {
                header: token.header,
                serial: token.serial,
                from_cache: served == Served::Cached,
                key,
            })),
            Err(error) => match *error {
                ExchangeError::Refused { status, .. } => Ok(Err(status)),
                _ => Err(AuthError::Token {
                    host: self.scope.origin.to_string(),
                    repository: self.scope.image.repository().to_owned(),
                    source: error,
                }),
            },
        }
    }

    /// Returns the key of the token that would be asked for at present.
    pub(super) fn token_key(&self) -> Option<TokenKey> {
        match &self.demand {
            Some(Demand::Bearer(demand)) => {
                Some(self.key_for(demand, self.candidate.as_ref().map(|candidate| &candidate.credential)))
            }
            _ => None,
        }
    }

    fn key_for(&self, demand: &BearerDemand, credential: Option<&Credential>) -> TokenKey {
        let mut scopes = scopes::wanted(&demand.scopes, self.scope.image.repository(), &self.access);
        scopes.sort_unstable();
        TokenKey {
            origin: self.scope.origin.clone(),
            realm: demand.realm.to_string(),
            service: demand.service.clone(),
            scopes,
            who: credential.map(Credential::fingerprint),
        }
    }

    fn admit(&self, candidate: &Candidate) -> Admission {
        self.auth.board.admit(&self.registry, self.scope.image.repository(), candidate.id.fingerprint)
    }

    /// Whether the credential was refused lately, by whichever request.
    fn was_refused(&self, credential: Fingerprint) -> bool {
        self.auth.board.was_refused(&self.registry, self.scope.image.repository(), credential)
    }

    fn use_candidate(&mut self, candidate: Candidate) {
        self.candidate = Some(candidate);
        self.tried += 1;
        self.refusals = 0;
        self.renewed = false;
    }

    fn mind_clear_text(&self) {
        let origin = &self.scope.origin;
        if self.candidate.is_some() && origin.scheme() == Scheme::Http && !origin.is_loopback() {
            self.auth.warn_of_clear_text(&origin.to_string());
        }
    }

    fn late(&self) -> AuthError {
        let (host, repository) = (self.scope.origin.to_string(), self.scope.image.repository().to_owned());
        AuthError::Deadline { host, repository }
    }
}

impl From<Denied> for AuthError {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}
