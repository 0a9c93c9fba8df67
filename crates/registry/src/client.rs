//! The registry client: everything that requests of all images share.

use std::fmt;
use std::sync::Arc;

use soci_auth::Authenticator;
use soci_oci::ImageRef;

use crate::hosts::Hosts;
use crate::meters::Meters;
use crate::repository::Repository;
use crate::settings::{Settings, SettingsError};
use crate::stack::Session;
use crate::stack::health::Health;
use crate::stack::limit::Limiter;
use crate::stack::retry::Pace;
use crate::transport::Transport;

/// A client of all registries. Cheap to clone; clones share connections, hosts, limits and tokens.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

/// What every request needs.
pub(crate) struct Inner {
    pub(crate) settings: Arc<Settings>,
    pub(crate) auth: Arc<Authenticator>,
    pub(crate) hosts: Hosts,
    pub(crate) transport: Transport,
    pub(crate) limiter: Limiter,
    pub(crate) health: Health,
    pub(crate) pace: Pace,
    pub(crate) meters: Arc<dyn Meters>,
    /// Held while the tag of a subject's referrers is read, changed and written back. The one lock that is held across
    /// requests: an asynchronous one, taken by pushes only.
    pub(crate) referrers_tag: tokio::sync::Mutex<()>,
}

impl Registry {
    /// Returns a client. Opens no connection and reads no file yet.
    ///
    /// # Errors
    /// [`SettingsError`] names the setting that makes no sense.
    pub fn new(
        settings: Settings,
        auth: Arc<Authenticator>,
        meters: Arc<dyn Meters>,
    ) -> Result<Self, SettingsError> {
        settings.check()?;
        let transport = Transport::new(settings.http.clone(), settings.proxies, &settings.user_agent)
            .map_err(|_| SettingsError::UserAgent(settings.user_agent.clone()))?;
        let settings = Arc::new(settings);
        Ok(Self(Arc::new(Inner {
            hosts: Hosts::new(Arc::clone(&settings)),
            transport,
            limiter: Limiter::new(settings.concurrency),
            health: Health::default(),
            pace: Pace::default(),
            meters,
            auth,
            settings,
            referrers_tag: tokio::sync::Mutex::default(),
        })))
    }

    /// Returns the repository of `image`; its tag and digest are not looked at.
    pub fn repository(&self, image: &ImageRef) -> Repository {
        Repository::new(Session { inner: Arc::clone(&self.0), image: image.clone() })
    }

    /// Returns the settings in force.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}
