//! What the daemon tells this keychain.

use std::path::PathBuf;
use std::time::Duration;

use crate::proxy::Proxies;

/// Settings of the secrets keychain.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `kubeconfig_path`: when set, no other place is looked at, and a file that is not there yet is waited for.
    pub kubeconfig: Option<PathBuf>,
    /// `namespaces`: which ones to sync; empty for all.
    pub namespaces: Vec<String>,
    /// `legacy_dockercfg`: also sync secrets of the type `kubernetes.io/dockercfg`.
    pub legacy_dockercfg: bool,
    /// Where things are looked for; the daemon fills it from its environment.
    pub environment: Environment,
    /// How long to wait for what.
    pub timing: Timing,
}

/// The part of the process environment that matters here.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `$KUBECONFIG` split at colons, empty parts dropped.
    pub kubeconfig: Vec<PathBuf>,
    /// The home directory, already derived from the password database when `$HOME` is unset.
    pub home: PathBuf,
    /// Whether the process runs in a pod (`$KUBERNETES_SERVICE_HOST` is set).
    pub in_cluster: bool,
    /// The proxies it names.
    pub proxies: Proxies,
}

/// Waits and intervals; the defaults are for production.
#[derive(Debug, Clone)]
pub struct Timing {
    /// Between looks for a kubeconfig that is not there yet; jittered up to five times as long.
    pub appear: Duration,
    /// Between looks whether a file of the connection has changed.
    pub recheck: Duration,
    /// How long the API server may take to answer with a page of a list, or to open a watch.
    pub answer: Duration,
    /// The server is asked to end each watch after a time between these, in whole seconds.
    pub watch: (Duration, Duration),
    /// How much longer than that a watch may be silent before it is given up.
    pub silence: Duration,
    /// How long a watch may be silent on a server that has sent a bookmark. Servers send about one a minute, none promises it.
    pub quiet: Duration,
    /// How long after the last word of the server the secrets count as what it has.
    pub heard: Duration,
    /// First and longest wait after an error of the API server; doubles, with full jitter.
    pub back_off: (Duration, Duration),
    /// Longest wait while the server denies permission.
    pub denied: Duration,
    /// How long values are served after permission was revoked.
    pub revoked: Duration,
    /// How long an exec plugin may take.
    pub exec: Duration,
    /// The shortest time from one run of an exec plugin to the next because of the end that it names: where the clocks of
    /// the machine and of the API server differ, that end may seem to have passed already.
    pub renewal: Duration,
    /// How long a lookup waits for the first sync.
    pub first_sync: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            appear: Duration::from_secs(2),
            recheck: Duration::from_secs(30),
            answer: Duration::from_secs(60),
            watch: (Duration::from_secs(300), Duration::from_secs(600)),
            silence: Duration::from_secs(5),
            quiet: Duration::from_secs(150),
            heard: Duration::from_secs(90),
            back_off: (Duration::from_millis(800), Duration::from_secs(30)),
            denied: Duration::from_secs(300),
            revoked: Duration::from_secs(600),
            exec: Duration::from_secs(30),
            renewal: Duration::from_secs(60),
            first_sync: Duration::from_secs(10),
        }
    }
}

impl Settings {
    /// Returns settings that sync all namespaces with the kubeconfig found in `environment`.
    pub fn new(environment: Environment) -> Self {
        Self {
            kubeconfig: None,
            namespaces: Vec::new(),
            legacy_dockercfg: false,
            environment,
            timing: Timing::default(),
        }
    }
}
