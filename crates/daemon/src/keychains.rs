//! The options by which registry logins are found, in the order of the contract.
//!
//! This list is the only place that knows the order: Docker config, then what the kubelet's pulls carry, then Kubernetes
//! secrets. The first that has a candidate is used, and the next is not tried because a registry refused it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use soci_auth::keychain::docker_config::{DockerConfigKeychain, Environment, Settings};
use soci_auth::{AuthBoard, Keychain, KeychainChain, Secret};

use crate::Config;
use crate::metrics::Metrics;

/// Returns the chain that `config` asks for. Reads the environment `variable` returns.
pub fn chain(
    config: &Config,
    board: &Arc<AuthBoard>,
    metrics: &Metrics,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> KeychainChain {
    let environment = Environment {
        home: variable("HOME").map(Into::into),
        docker_config: variable("DOCKER_CONFIG").map(Into::into),
        path: variable("PATH"),
        docker_auth_config: variable("DOCKER_AUTH_CONFIG").map(|text| Secret::new(text.into_vec())),
    };
    let docker = DockerConfigKeychain::new(
        environment,
        Arc::clone(board),
        Settings { meters: Arc::new(metrics.clone()), ..Settings::default() },
    );
    let options: Vec<Arc<dyn Keychain>> = vec![Arc::new(docker)];
    for (asked, table) in
        [(config.cri.is_some(), "cri_keychain"), (config.kubernetes.is_some(), "kubeconfig_keychain")]
    {
        if asked {
            tracing::warn!(
                key = table,
                "[{table}] is enabled, but this build has no such option; it is skipped"
            );
        }
    }
    KeychainChain::new(options)
}
