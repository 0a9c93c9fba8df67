//! Which credential each host of an image would get, and what the registry says when it is asked: for `soci auth explain`.

use soci_auth::explain::{Check, HostReport, explain};
use soci_oci::{FetchContext, FetchError, FetchErrorKind};

use crate::repository::Repository;
use crate::stack::scope;
use crate::status::Operation;

impl Repository {
    /// Returns what the options have for each host that manifests are read from, in the order in which they are asked.
    ///
    /// May run credential helpers; sends no request.
    ///
    /// # Errors
    /// [`FetchErrorKind::Local`] when the files that list the hosts cannot be used.
    pub async fn explain(&self) -> Result<Vec<HostReport>, FetchError> {
        let inner = &self.session.inner;
        let list = inner.hosts.of(self.image().registry()).await;
        let list = list.map_err(|error| FetchError::new(FetchErrorKind::Local, error.to_string()))?;
        let mut reports = Vec::new();
        for host in list.iter().filter(|host| host.serves(Operation::Manifest)) {
            if let Some(origin) = inner.health.order(&host.origins).first() {
                reports.push(explain(&inner.auth, &scope(self.image(), host, origin)).await);
            }
        }
        Ok(reports)
    }

    /// Asks for the image's manifest as a pull would and returns what came of it.
    pub async fn probe(&self, ctx: &FetchContext) -> Check {
        match self.resolve(&self.image().object(), ctx).await {
            Ok(found) => Check { served: true, answer: format!("{} {}", found.media_type, found.digest) },
            Err(error) => Check { served: false, answer: error.to_string() },
        }
    }
}
